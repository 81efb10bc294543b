//! What a simulated function's power states and resets do, as vfio-pci has them: config space is
//! saved before a reset and restored after it, so that its user sees the command register as it
//! was; what is behind the BARs is reset.

use std::io;
use std::sync::Arc;

use libc::{EBUSY, ENOTTY};
use parking_lot::Mutex;

use crate::SimFunction;
use crate::call::Call;
use crate::config_space::ConfigSpace;
use crate::gate::AWAKE;
use crate::host::State;
use crate::log::Violation;
use crate::physical::Storage;
use crate::revocations::{Revocation, RevocationCause};

/// D3hot in PMCSR.
const ASLEEP: u8 = 3;

/// How resets of a function end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResetMethod {
    /// There is none.
    None,
    /// It works.
    Works,
    /// It fails with this errno, and has revoked.
    Fails(i32),
}

impl SimFunction {
    /// Has `listener` told of every revocation from now on. It is called with the host's state
    /// locked, so it must not call the host or any of its functions.
    pub fn on_revocation(&self, listener: impl Fn(Revocation) + Send + Sync + 'static) {
        self.revocations.add(listener);
    }

    pub(crate) fn revoke(&self, cause: RevocationCause) {
        self.host.0.dma_bufs.revoke(&self.name);
        self.revocations.tell(Revocation::Revoked(cause));
    }

    /// After an event: what was revoked can be mapped again if memory is enabled.
    pub(crate) fn restore(&self) {
        if self.gate.has_memory_enabled() {
            self.host.0.dma_bufs.restore(&self.name);
            self.revocations.tell(Revocation::Restored);
        }
    }

    /// Changes the power state as the kernel does on a write to PMCSR.
    pub(crate) fn set_power(&self, state: &State, config: &mut ConfigSpace, wanted: u8) {
        let now = self.gate.power();
        if wanted >= ASLEEP {
            self.revoke(RevocationCause::Sleep);
        }
        // Only D0 can be reached from every state; the others must be deeper than the one now.
        if wanted != now && (wanted == AWAKE || wanted > now) {
            if now == AWAKE {
                self.record_still_mapped(state);
            }
            if wanted == ASLEEP {
                config.save_command();
            }
            self.gate.set_power(wanted);
            config.set_power(wanted);
            if now == ASLEEP && !config.keeps_registers() {
                self.reset_registers();
                config.restore_command();
                self.gate.set_command(config.command());
            }
        }
        self.restore();
    }

    /// One reset, of whatever kind: the function is woken first.
    pub(crate) fn reset_function(
        &self,
        state: &State,
        config: &mut ConfigSpace,
        method: ResetMethod,
        cause: RevocationCause,
    ) -> io::Result<()> {
        self.revoke(cause);
        let done = match method {
            ResetMethod::None => Err(io::Error::from_raw_os_error(ENOTTY)),
            ResetMethod::Fails(errno) => Err(io::Error::from_raw_os_error(errno)),
            ResetMethod::Works => {
                if self.gate.power() != AWAKE {
                    self.set_power(state, config, AWAKE);
                }
                if self.gate.decodes_memory() {
                    self.record_still_mapped(state);
                }
                self.reset_registers();
                Ok(())
            }
        };
        self.restore();
        done
    }

    fn reset_registers(&self) {
        for behind in self.bars.iter().flatten() {
            if let Storage::Registers(registers) = &behind.object.storage {
                registers.reset();
            }
        }
    }

    /// Records what is still mapped of a function that stops answering.
    pub(crate) fn record_still_mapped(&self, state: &State) {
        let mut logs = self.host.0.logs.lock();
        for (container, mapping) in state.mappings() {
            let ours = mapping
                .object
                .owner
                .as_ref()
                .is_some_and(|owner| Arc::ptr_eq(&owner.gate, &self.gate));
            if ours {
                logs.violations.push(Violation::DecodingOffWhileMapped {
                    container,
                    iova: mapping.iova,
                    object: Arc::clone(&mapping.object.label),
                });
            }
        }
    }
}

/// The functions of one bus or slot, which a hot reset (`VFIO_DEVICE_PCI_HOT_RESET`) resets
/// together.
#[derive(Debug)]
pub struct SimBus {
    functions: Vec<Arc<SimFunction>>,
    busy: Mutex<u32>,
}

impl SimBus {
    /// A bus of these functions, of one host. Each of them can be reset through it, also those
    /// without a reset of their own.
    #[must_use]
    pub fn new(functions: impl IntoIterator<Item = Arc<SimFunction>>) -> Self {
        Self {
            functions: functions.into_iter().collect(),
            busy: Mutex::new(0),
        }
    }

    /// Has the next `times` hot resets end in `EBUSY`, after the first function has been revoked.
    pub fn be_busy(&self, times: u32) {
        *self.busy.lock() = times;
    }

    /// Resets all of them.
    ///
    /// # Errors
    /// `EBUSY` as often as [`be_busy`](Self::be_busy) said: what the first function had mapped is
    /// dead all the same. The errno of a function whose reset fails; the others have been reset.
    pub fn hot_reset(&self) -> io::Result<()> {
        let Some(first) = self.functions.first() else {
            return Ok(());
        };
        let cause = RevocationCause::HotReset;
        first.host.call(Call::Reset, &first.name, None, || {
            let state = first.host.0.state.write();
            let mut busy = self.busy.lock();
            if let Some(left) = busy.checked_sub(1) {
                *busy = left;
                first.revoke(cause);
                first.restore();
                return Err(io::Error::from_raw_os_error(EBUSY));
            }
            let mut done = Ok(());
            for function in &self.functions {
                let mut config = function.config.lock();
                let method = match function.reset_method {
                    ResetMethod::None => ResetMethod::Works,
                    method => method,
                };
                done = done.and(function.reset_function(&state, &mut config, method, cause));
            }
            done
        })
    }
}
