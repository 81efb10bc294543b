//! Cutting functions off: what is done to the devices behind a target that had to be quarantined.
//! [`CutOffSwitch`] says what and why.
//!
//! # Locks
//! A cut-off comes in the middle of something: of a config write of the same function, whose lock
//! is then held by the very thread that cuts off, or of another one's. So it waits for no
//! function's lock. Its first step takes the guard's ([`guarded_host`](crate::guarded_host)), which
//! is held across single accesses to the command register. Its second step needs the function's;
//! where somebody has it, that step is theirs to do when they let go of it.

use std::fmt;
use std::sync::{Arc, Weak};

use memory_map::{CutOff, Errno, Quarantine, TargetName};

use crate::function::State;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering};
use crate::{AssignedFunction, Outcome};

/// What a cut-off has left to be done, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Aftermath {
    /// Set once: a removal holds bus mastering off as well, and leaves the reset to this.
    begun: AtomicBool,
    due: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
}

/// A function's lock. Whoever lets go of it does what a cut-off has left to be done.
pub(crate) struct Locked<'f> {
    // Dropped in this order.
    state: MutexGuard<'f, State>,
    _after: Finish<'f>,
}

struct Finish<'f>(&'f AssignedFunction);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.finish_cut_off();
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl AssignedFunction {
    pub(crate) fn lock(&self) -> Locked<'_> {
        Locked {
            state: self.state.lock(),
            _after: Finish(self),
        }
    }

    /// Turns bus mastering off and holds it off for good, and resets the function; see
    /// [`CutOffSwitch`] for the order and for how the guest sees it. Waits for no function's lock,
    /// so it may be called from a [`CutOff`]: where somebody is in the middle of an access to the
    /// function, the reset comes right after that. A second call makes sure once more that bus
    /// mastering is off.
    ///
    /// # Errors
    /// The host would not write the command register. It is tried again with every later write to
    /// config space; until then only closing the device stops it.
    pub fn cut_off(&self) -> Result<(), Errno> {
        let stopped = self.stop_for_good();
        self.finish_cut_off();
        stopped
    }

    /// Whether its bus mastering is held off: it has been cut off, or [removed](Self::remove).
    #[must_use]
    pub fn is_cut_off(&self) -> bool {
        self.guard.is_cut_off()
    }

    /// What came of the reset that follows a cut-off; none before it is over.
    #[must_use]
    pub fn cut_off_outcome(&self) -> Option<Outcome> {
        self.aftermath.outcome.lock().clone()
    }

    /// The first step of a cut-off.
    fn stop_for_good(&self) -> Result<(), Errno> {
        let stopped = self.guard.cut_off();
        if !self.aftermath.begun.swap(true, Ordering::SeqCst) {
            self.aftermath.due.store(true, Ordering::SeqCst);
        }
        stopped.map_err(Errno::from)
    }

    /// The second step, unless somebody has the lock, who then does it: they look after they have
    /// let go of it, and it was due before this looked whether they had.
    fn finish_cut_off(&self) {
        while self.aftermath.due.load(Ordering::SeqCst) {
            let Some(mut state) = self.state.try_lock() else {
                return;
            };
            if !self.aftermath.due.swap(false, Ordering::SeqCst) {
                continue;
            }
            let mut outcome = Outcome::default();
            if state.power.is_awake() {
                self.reset_by_host(&mut state, &mut outcome);
            } else {
                self.sync(&mut state, true, &mut outcome);
            }
            drop(state);
            *self.aftermath.outcome.lock() = Some(outcome);
        }
    }
}

/// Cuts a set of functions off: those behind one target, which the embedder registers with it.
///
/// A quarantined target may hold a mapping that the map no longer wants, and type1 cannot detach a
/// device, so the devices behind it must start no transaction any more.
///
/// ```
/// use std::sync::Arc;
/// use assigned_pci::{AssignedFunction, CutOffSwitch};
/// use memory_map::{ChangeError, DmaTarget, RegionManager, TargetHandle, TargetOptions};
///
/// fn register(
///     map: &RegionManager,
///     iommu: Box<dyn DmaTarget>,
///     behind: &[Arc<AssignedFunction>],
/// ) -> Result<TargetHandle, ChangeError> {
///     let mut options = TargetOptions::new("container 0");
///     options.cut_off = Some(Arc::new(CutOffSwitch::of(behind)));
///     map.register(iommu, options)
/// }
/// ```
///
/// # What a cut-off does
/// 1. At once, to all functions: bus mastering off in the physical command register. From then on
///    it is masked out of whatever is written there, by the guest or by anybody who goes through
///    [`AssignedFunction::host`], and no other write to config space reaches the host: it might
///    wake or reset the function and have the host restore the register from before.
/// 2. Then each function is reset, if it is awake, as by [`AssignedFunction::reset`]: its BARs leave
///    the map first, and what was mapped from them counts as revoked. One that sleeps stays asleep.
///    Where a function is in the middle of an access, its reset comes right after that.
///
/// When a cut-off returns, bus mastering is off, and no write that turns it on is under way. One
/// case depends on the host: a change of power state that is under way has the host restore the
/// command register when it ends. Linux lets the write that turns bus mastering off wait for that;
/// on a host that does not, the register is written once more right after.
///
/// The guest reads bus mastering as clear, whatever it writes: that is the truth, as of a function
/// that cannot master the bus, and a driver that checks is told. BARs, decoding and trapped accesses
/// work as before.
///
/// It holds no function alive. To end a device for good is its owner's: closing it is the one thing
/// that this does not do.
#[derive(Default)]
pub struct CutOffSwitch {
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    functions: Vec<Weak<AssignedFunction>>,
    state: Option<CutOffState>,
}

/// What a [`CutOffSwitch`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutOffState {
    /// The target that was quarantined.
    pub target: TargetName,
    /// Why.
    pub why: Quarantine,
    /// The functions whose bus mastering the host would not turn off, by name. They must be
    /// closed.
    pub failed: Vec<(String, Errno)>,
}

impl CutOffSwitch {
    /// A switch for no functions yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A switch for these functions.
    #[must_use]
    pub fn of<'f>(functions: impl IntoIterator<Item = &'f Arc<AssignedFunction>>) -> Self {
        let switch = Self::new();
        for function in functions {
            switch.add(function);
        }
        switch
    }

    /// Adds a function, before its guest can turn bus mastering on. If the functions have been cut
    /// off already, so is this one.
    pub fn add(&self, function: &Arc<AssignedFunction>) {
        let mut members = self.members.lock();
        members.functions.retain(|known| known.strong_count() > 0);
        members.functions.push(Arc::downgrade(function));
        let cut = members.state.is_some();
        drop(members);
        if cut {
            self.cut(std::slice::from_ref(function));
        }
    }

    /// What it did, if it had to.
    #[must_use]
    pub fn state(&self) -> Option<CutOffState> {
        self.members.lock().state.clone()
    }

    fn cut(&self, functions: &[Arc<AssignedFunction>]) {
        for function in functions {
            if let Err(errno) = function.stop_for_good() {
                let name = function.name();
                if let Some(state) = &mut self.members.lock().state
                    && state.failed.iter().all(|(known, _)| known != name)
                {
                    state.failed.push((name.to_owned(), errno));
                }
            }
        }
        for function in functions {
            function.finish_cut_off();
        }
    }
}

impl CutOff for CutOffSwitch {
    fn cut_off(&self, target: &TargetName, why: &Quarantine) {
        let mut members = self.members.lock();
        members.state.get_or_insert_with(|| CutOffState {
            target: target.clone(),
            why: why.clone(),
            failed: Vec::new(),
        });
        let functions: Vec<_> = members.functions.iter().filter_map(Weak::upgrade).collect();
        drop(members);
        self.cut(&functions);
    }
}

impl fmt::Debug for CutOffSwitch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.members.lock();
        f.debug_struct("CutOffSwitch")
            .field("functions", &members.functions.len())
            .field("state", &members.state)
            .finish()
    }
}
