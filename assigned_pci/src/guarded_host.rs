//! The host's side of a function behind a guard that can hold its bus mastering off for good: when
//! it is cut off, and when it leaves the guest.
//!
//! Every [`AssignedFunction`](crate::AssignedFunction) has one around the [`HostFunction`] it was
//! made from, and whoever reaches the host through it
//! ([`AssignedFunction::host`](crate::AssignedFunction::host)) passes the guard.
//!
//! Its lock is held across accesses to the command register and nothing else, so that a write
//! which began before the cut-off has ended when that returns. It is never held across a reset, a
//! change of power state or a commit, and nothing is locked under it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::command::Command;
use crate::config_space::COMMAND;
use crate::sync::Mutex;
use crate::{BarIndex, HostBar, HostFunction, HostVectors, MsiKind};

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct GuardedHost {
    host: Arc<dyn HostFunction>,
    cut: Mutex<bool>,
}

impl GuardedHost {
    pub(crate) fn new(host: Arc<dyn HostFunction>) -> Self {
        Self {
            host,
            cut: Mutex::new(false),
        }
    }

    /// Turns bus mastering off, for good. A second call makes sure once more.
    pub(crate) fn cut_off(&self) -> io::Result<()> {
        let mut cut = self.cut.lock();
        *cut = true;
        self.stop()
    }

    pub(crate) fn is_cut_off(&self) -> bool {
        *self.cut.lock()
    }

    /// After a call that may have had the host restore the command register as it was before the
    /// cut-off. Linux waits with a write to that register until a reset or a change of power state
    /// is over, so there the cut-off itself comes after it.
    fn hold(&self) -> io::Result<()> {
        let cut = self.cut.lock();
        if *cut { self.stop() } else { Ok(()) }
    }

    /// Turns bus mastering off and leaves the rest of the command register. The lock is held.
    fn stop(&self) -> io::Result<()> {
        let mut bytes = [0; 2];
        let off = match self.host.config_read(COMMAND, &mut bytes) {
            // It does not say what it is, so all of it goes.
            Err(_) => Command::OFF,
            Ok(()) if bytes == [0xff; 2] => Command::OFF,
            Ok(()) => {
                let command = Command::new(u16::from_le_bytes(bytes));
                if !command.masters_bus() {
                    return Ok(());
                }
                command.without_bus_master()
            }
        };
        self.host.config_write(COMMAND, &off.to_bytes())
    }
}

impl HostFunction for GuardedHost {
    fn name(&self) -> String {
        self.host.name()
    }

    fn config_size(&self) -> u16 {
        self.host.config_size()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.host.config_read(offset, data)
    }

    /// After a cut-off the command register is written without bus mastering, and nothing else of
    /// config space is: a write elsewhere might wake the function or reset it, and have the host
    /// restore the command register from before.
    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        let low = COMMAND
            .checked_sub(offset)
            .map(usize::from)
            .filter(|low| *low < data.len());
        if let Some(low) = low {
            let cut = self.cut.lock();
            if !*cut {
                return self.host.config_write(offset, data);
            }
            let mut data = data.to_vec();
            if let Some(byte) = data.get_mut(low) {
                let [masked, _] = Command::new((*byte).into()).without_bus_master().to_bytes();
                *byte = masked;
            }
            return self.host.config_write(offset, &data);
        }
        if self.is_cut_off() {
            return self.hold();
        }
        let written = self.host.config_write(offset, data);
        self.hold().and(written)
    }

    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>> {
        self.host.bar(bar)
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.host.bar_read(bar, offset, data)
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        self.host.bar_write(bar, offset, data)
    }

    fn reset(&self) -> io::Result<()> {
        let reset = self.host.reset();
        self.hold().and(reset)
    }

    fn vectors(&self, kind: MsiKind) -> io::Result<HostVectors> {
        self.host.vectors(kind)
    }

    /// Without bus mastering none is raised, so a cut-off has nothing to hold here.
    fn connect_vectors(
        &self,
        kind: MsiKind,
        first: u16,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        self.host.connect_vectors(kind, first, eventfds)
    }

    fn disconnect_vectors(&self, kind: MsiKind) -> io::Result<()> {
        self.host.disconnect_vectors(kind)
    }

    fn is_virtual(&self) -> bool {
        self.host.is_virtual()
    }
}
