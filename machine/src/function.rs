//! An assigned function's place in the machine: its config space for PCI, its BARs for the
//! processors, and who is told what went wrong.
//!
//! # A function that is pulled out
//! The hardware makes a [`GuestFunction`] for each function, once, and shares it with the root
//! complex for as long as the machine lives. The function in it can leave for good
//! ([`GuestFunction::pull_out`]), while processors run. What always holds:
//!
//! 1. From then on nobody is there: config space reads all ones, writes do nothing, no BAR answers,
//!    no reset brings it back.
//! 2. An access has a handle of its own on the function until it is over. One that began before goes
//!    on, against a device that is still open; one that comes to the function's lock after that finds
//!    it [removed](AssignedFunction::remove). So nothing is closed under an access, and the last one
//!    to end closes it.
//! 3. No lock of the place's is held while the function is called.

use std::sync::{Arc, PoisonError, RwLock};

use assigned_pci::{AssignedFunction, BarIndex, Capability, CapabilityList, HostCall, Outcome};
use memory_map::{Errno, Gpa, RegionId};

use crate::notices::ErrorChain;
use crate::{Access, Notices, pci};

/// An assigned function that the machine has, or had. See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct GuestFunction {
    name: String,
    is_express: bool,
    /// None once it was pulled out.
    function: RwLock<Option<Arc<AssignedFunction>>>,
    notices: Arc<Notices>,
}

impl GuestFunction {
    pub(crate) fn new(function: Arc<AssignedFunction>, notices: Arc<Notices>) -> Self {
        Self {
            name: function.name().to_owned(),
            is_express: is_express(&function),
            function: RwLock::new(Some(function)),
            notices,
        }
    }

    /// A handle on it, if it is still there.
    fn function(&self) -> Option<Arc<AssignedFunction>> {
        // A handle, which is replaced at once.
        let function = self.function.read();
        function.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes it out of the machine, and out of the map; none if it was before.
    pub(crate) fn pull_out(&self) -> Option<PulledOut> {
        let function = {
            let mut place = self
                .function
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            place.take()?
        };
        let outcome = function.remove();
        self.note(&outcome);
        Some(PulledOut { function, outcome })
    }

    /// The BARs that are regions of the map.
    pub(crate) fn regions(&self) -> Vec<(RegionId, BarIndex)> {
        let bars = self.function().map(|function| function.bars());
        let bars = bars.unwrap_or_default().into_iter();
        bars.filter_map(|bar| Some((bar.region?, bar.index)))
            .collect()
    }

    /// A processor accesses a BAR. What is read is all ones already.
    pub(crate) fn bar(&self, bar: BarIndex, offset: u64, access: Access<'_>) {
        let Some(function) = self.function() else {
            return;
        };
        let refused = match access {
            Access::Read(data) => function.bar_read(bar, offset, data),
            Access::Write(data) => function.bar_write(bar, offset, data),
        };
        if let Some(error) = refused {
            let what = "an access to a BAR is refused";
            self.notices.note(&self.name, what, &ErrorChain(&error));
        }
    }

    /// A processor accesses an address that nothing in the view answers for. Which BAR does, and
    /// where in it, if one does after all.
    pub(crate) fn settle(&self, gpa: Gpa) -> Option<(BarIndex, u64)> {
        let found = self.function()?.cpu_access(gpa)?;
        self.note(&found.outcome);
        Some((found.bar, found.offset))
    }

    /// Has it start no DMA any more, and leaves its BARs where they are.
    pub(crate) fn stop_mastering(&self) {
        if let Some(function) = self.function() {
            self.note(&function.stop_mastering());
        }
    }

    /// Makes it quiet: no DMA, no interrupts, no BARs.
    pub(crate) fn quiesce(&self) {
        if let Some(function) = self.function() {
            self.note(&function.quiesce());
        }
    }

    /// Makes it what it was at power-on, as far as it can be reset.
    pub(crate) fn reset(&self) {
        let Some(function) = self.function() else {
            return;
        };
        let mut outcome = function.reset();
        // Not every function has a reset, and there is nothing that anybody could do about it.
        let none = Errno::new(libc::ENOTTY);
        outcome
            .host_errors
            .retain(|error| !(error.call == HostCall::Reset && error.errno == none));
        self.note(&outcome);
    }

    /// Takes its BARs out of the map if nobody answers at them, so that nobody can get at them.
    /// Whether it had to.
    pub(crate) fn hide_if_dead(&self) -> bool {
        let hidden = self.function().and_then(|it| it.hide_if_dead());
        let Some(outcome) = hidden else {
            return false;
        };
        let what = "it does not answer, and is taken out of the map";
        let told = &"reset it from the guest";
        self.notices.note(&self.name, what, told);
        self.note(&outcome);
        true
    }

    /// Looks again what of it the host has taken away.
    pub(crate) fn look_again(&self) {
        if let Some(function) = self.function() {
            self.note(&function.mappings_may_be_revoked());
        }
    }

    fn note(&self, outcome: &Outcome) {
        self.notices.note_outcome(&self.name, outcome);
    }
}

/// A function that has left the machine. The host has it back when this is dropped, along with every
/// other handle on it; an access that was under way has one until it is over.
#[derive(Debug)]
pub struct PulledOut {
    /// The function, [removed](AssignedFunction::remove).
    pub function: Arc<AssignedFunction>,
    /// What came of that. It has been noted.
    pub outcome: Outcome,
}

impl pci::ConfigSpace for GuestFunction {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let Some(function) = self.function() else {
            data.fill(0xff);
            return;
        };
        if let Some(error) = function.config_read(offset, data) {
            let what = "a read of config space is refused";
            self.notices.note(&self.name, what, &ErrorChain(&error));
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let Some(function) = self.function() {
            self.note(&function.config_write(offset, data));
        }
    }

    fn bus_reset(&self) {
        self.reset();
    }

    fn is_express(&self) -> bool {
        self.is_express
    }
}

/// Whether a function is a PCI Express one, which belongs behind a root port.
pub(crate) fn is_express(function: &AssignedFunction) -> bool {
    let mut capabilities = function.capabilities().iter();
    capabilities
        .any(|found| found.list == CapabilityList::Standard && found.id == Capability::EXPRESS)
}
