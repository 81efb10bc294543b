//! An assigned function's place in the machine: its config space for PCI, its BARs for the
//! processors, and who is told what went wrong.

use std::sync::Arc;

use assigned_pci::{AssignedFunction, BarIndex, Capability, CapabilityList, HostCall, Outcome};
use memory_map::{Errno, Gpa, RegionId};

use crate::notices::ErrorChain;
use crate::{Access, Notices, pci};

/// The command register, and its bit that says that memory is decoded (PCI Local Bus 3.0, 6.2.2).
const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;

/// An assigned function that the machine has.
#[derive(Debug, Clone)]
pub(crate) struct GuestFunction {
    function: Arc<AssignedFunction>,
    notices: Arc<Notices>,
}

impl GuestFunction {
    pub(crate) const fn new(function: Arc<AssignedFunction>, notices: Arc<Notices>) -> Self {
        Self { function, notices }
    }

    pub(crate) const fn function(&self) -> &Arc<AssignedFunction> {
        &self.function
    }

    /// The BARs that are regions of the map.
    pub(crate) fn regions(&self) -> Vec<(RegionId, BarIndex)> {
        let bars = self.function.bars().into_iter();
        bars.filter_map(|bar| Some((bar.region?, bar.index)))
            .collect()
    }

    /// A processor accesses a BAR.
    pub(crate) fn bar(&self, bar: BarIndex, offset: u64, access: Access<'_>) {
        let refused = match access {
            Access::Read(data) => self.function.bar_read(bar, offset, data),
            Access::Write(data) => self.function.bar_write(bar, offset, data),
        };
        if let Some(error) = refused {
            let what = "an access to a BAR is refused";
            self.notices
                .note(self.function.name(), what, &ErrorChain(&error));
        }
    }

    /// A processor accesses an address that nothing in the view answers for. Which BAR does, and
    /// where in it, if one does after all.
    pub(crate) fn settle(&self, gpa: Gpa) -> Option<(BarIndex, u64)> {
        let found = self.function.cpu_access(gpa)?;
        self.note(&found.outcome);
        Some((found.bar, found.offset))
    }

    /// Makes it quiet: no DMA, no interrupts.
    pub(crate) fn quiesce(&self) {
        self.note(&self.function.quiesce());
    }

    /// Makes it what it was at power-on, as far as it can be reset.
    pub(crate) fn reset(&self) {
        let mut outcome = self.function.reset();
        // Not every function has a reset, and there is nothing that anybody could do about it.
        let none = Errno::new(libc::ENOTTY);
        outcome
            .host_errors
            .retain(|error| !(error.call == HostCall::Reset && error.errno == none));
        self.note(&outcome);
    }

    /// Whether it shows BARs that the host's side does not decode, so that nobody can get at them.
    pub(crate) fn is_dead(&self) -> bool {
        let shows = self.function.bars().iter().any(|bar| bar.enabled);
        let host = self.function.host();
        // A virtual function decodes whatever its register says.
        if !shows || host.is_virtual() {
            return false;
        }
        let mut command = [0; 2];
        let gone = host.config_read(COMMAND, &mut command).is_err() || command == [0xff; 2];
        gone || command[0] & COMMAND_MEMORY == 0
    }

    /// Looks again what of it the host has taken away.
    pub(crate) fn look_again(&self) {
        self.note(&self.function.mappings_may_be_revoked());
    }

    fn note(&self, outcome: &Outcome) {
        self.notices.note_outcome(self.function.name(), outcome);
    }
}

impl pci::ConfigSpace for GuestFunction {
    fn read(&self, offset: u16, data: &mut [u8]) {
        if let Some(error) = self.function.config_read(offset, data) {
            let what = "a read of config space is refused";
            self.notices
                .note(self.function.name(), what, &ErrorChain(&error));
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        self.note(&self.function.config_write(offset, data));
    }

    fn bus_reset(&self) {
        self.reset();
    }

    fn is_express(&self) -> bool {
        is_express(&self.function)
    }
}

/// Whether a function is a PCI Express one, which belongs behind a root port.
pub(crate) fn is_express(function: &AssignedFunction) -> bool {
    let mut capabilities = function.capabilities().iter();
    capabilities
        .any(|found| found.list == CapabilityList::Standard && found.id == Capability::EXPRESS)
}
