//! What a map knows, and how those who change it keep out of each other's way.
//!
//! ```text
//!   turns    held by whoever changes the map, through a commit. A host's commit gives it up
//!     |      while a target makes a mapping, and takes its place in the queue again.
//!     v
//!   state    held for short steps: never while a target, a backing, a watcher, a subscriber or
//!     |      a cut-off handle is called, and never while something of theirs is dropped
//!     v
//!   target   held while the target is called
//! ```
//!
//! A mapping that is being made without a turn is *in flight*. Nobody plans for addresses in
//! which something is in flight, and nobody changes a region that belongs to an unfinished
//! host's commit (it is *busy*): they wait.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use smallvec::SmallVec;

use crate::addresses::KeptAddress;
use crate::layout::{IdMap, IdSet, Layout};
use crate::ledger::Ledger;
use crate::plan::whole_pages;
use crate::subscription::Subscribers;
use crate::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering};
use crate::translation::Viewer;
use crate::turn::Turns;
use crate::{
    BackingId, ConsumerKind, DmaTarget, HostAddress, Quarantine, Reason, RegionId, TargetId,
    TargetLimits, TargetName, TargetOptions,
};

/// As many as most machines have lie in place.
pub(crate) type TargetIds = SmallVec<[TargetId; 8]>;

/// A target as it is called: by one at a time, and not at all once it is quarantined.
pub(crate) struct Callee {
    target: Box<dyn DmaTarget>,
    stopped: bool,
}

/// What a panic carries.
pub(crate) type Payload = Box<dyn Any + Send>;

/// Why a call to a target came to nothing.
pub(crate) enum NoAnswer {
    /// It gets no more calls.
    Stopped,
    /// It has panicked in this one.
    Panicked(Payload),
}

/// How a target is called.
pub(crate) type Driver = Arc<Mutex<Callee>>;

impl Callee {
    pub(crate) fn driver(target: Box<dyn DmaTarget>) -> Driver {
        Arc::new(Mutex::new(Self {
            target,
            stopped: false,
        }))
    }

    /// Calls the target, unless it is to get no more calls. One that panics gets none either; whoever
    /// called lets the panic go on when the other targets have been told what they have to be.
    pub(crate) fn call<T>(
        &mut self,
        act: impl FnOnce(&mut dyn DmaTarget) -> T,
    ) -> Result<T, NoAnswer> {
        if self.stopped {
            return Err(NoAnswer::Stopped);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| act(&mut *self.target)));
        self.stopped = outcome.is_err();
        outcome.map_err(NoAnswer::Panicked)
    }

    /// The target, for those who ask it and for those who end it.
    pub(crate) fn even_if_stopped(&mut self) -> &mut dyn DmaTarget {
        &mut *self.target
    }

    /// No call follows the one that led to the quarantine, whoever waits to make one.
    pub(crate) const fn stop(&mut self) {
        self.stopped = true;
    }
}

/// A consumer and what is known of it.
pub(crate) struct Target {
    pub(crate) options: TargetOptions,
    pub(crate) limits: TargetLimits,
    pub(crate) kind: ConsumerKind,
    pub(crate) driver: Driver,
    pub(crate) ledger: Ledger,
    pub(crate) quarantined: Option<Quarantine>,
    /// Its registration has not succeeded yet.
    pub(crate) joining: bool,
    /// What is being mapped at this moment without a turn, inclusive; one for each host's commit
    /// that is at it.
    pub(crate) in_flight: SmallVec<[(u64, u64); 1]>,
}

impl Target {
    pub(crate) fn viewer(&self) -> Viewer<'_> {
        Viewer {
            limits: &self.limits,
            filter: &self.options.filter,
            sharing: self.kind == ConsumerKind::Sharing,
        }
    }
}

/// What the state's lock guards.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) layout: Layout,
    pub(crate) targets: BTreeMap<TargetId, Target>,
    /// Regions that unfinished host's commits touch.
    pub(crate) busy: IdSet<RegionId>,
    pub(crate) addresses: IdMap<BackingId, KeptAddress>,
    pub(crate) subscribers: Subscribers,
}

/// The map behind all its handles.
#[derive(Default)]
pub(crate) struct Inner {
    pub(crate) turns: Turns,
    pub(crate) state: Mutex<State>,
    /// Notified when something is no longer in flight or busy.
    pub(crate) settled: Condvar,
    /// Advances with every commit and with every mapping that is made without a turn, so that a
    /// commit that gave its turn up sees whether it was alone. Written by whoever has the turn.
    steps: AtomicU64,
    ids: AtomicU64,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("RegionManager")
            .field("regions", &state.layout.regions.len())
            .field("targets", &state.targets.len())
            .finish()
    }
}

impl State {
    /// Whether something is being mapped in the dirty ranges of some of these targets.
    fn is_in_flight(&self, targets: &[TargetId], dirty: &[(u64, u64)]) -> bool {
        let mut targets = targets.iter().filter_map(|id| self.targets.get(id));
        targets.any(|target| {
            target.in_flight.iter().any(|&(start, last)| {
                whole_pages(dirty, target.limits.page_size)
                    .iter()
                    .any(|range| range.0 <= last && start <= range.1)
            })
        })
    }

    /// IOMMUs first, then memory slots, then those that RAM is shared with; each by age.
    pub(crate) fn targets_in_order(&self) -> TargetIds {
        let kinds = [
            ConsumerKind::Iommu,
            ConsumerKind::MemorySlots,
            ConsumerKind::Sharing,
        ];
        let of_kind = |kind| {
            let its = self.targets.iter().filter(move |(_, t)| t.kind == kind);
            its.map(|(&id, _)| id)
        };
        kinds.into_iter().flat_map(of_kind).collect()
    }
}

impl Inner {
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Counts a step, and tells the count. The caller has the turn.
    pub(crate) fn step(&self) -> u64 {
        let steps = self.steps().wrapping_add(1);
        self.steps.store(steps, Ordering::Release);
        steps
    }

    /// The count of steps.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Acquire)
    }

    /// How to call a target.
    pub(crate) fn driver(&self, id: TargetId) -> Option<Driver> {
        self.with_target(id, |target| target.driver.clone())
    }

    /// What it takes to make a mapping of a backing in a target that has room for it. If
    /// `in_flight` is given, those addresses are in flight from now on.
    pub(crate) fn take_off(
        &self,
        id: TargetId,
        backing: BackingId,
        in_flight: Option<(u64, u64)>,
    ) -> Result<TakenOff<'_>, Reason> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let target = state.targets.get_mut(&id).ok_or(Reason::Quarantined)?;
        if target.quarantined.is_some() {
            return Err(Reason::Quarantined);
        }
        if let Some(limit) = target.limits.entry_limit {
            // What is in flight may land.
            let held = target.ledger.entries.len();
            let held = held.saturating_add(target.in_flight.len());
            if u64::try_from(held).unwrap_or(u64::MAX) >= limit {
                return Err(Reason::EntryLimit { limit });
            }
        }
        let in_flight = in_flight.map(|range| {
            target.in_flight.push(range);
            InFlight {
                inner: self,
                target: id,
                range,
                steps: self.step(),
                landed: false,
            }
        });
        Ok(TakenOff {
            kept: state.addresses.get(&backing).map(KeptAddress::host),
            in_flight,
        })
    }

    pub(crate) fn with_target<T>(
        &self,
        id: TargetId,
        act: impl FnOnce(&mut Target) -> T,
    ) -> Option<T> {
        self.state.lock().targets.get_mut(&id).map(act)
    }

    pub(crate) fn with_ledger<T>(
        &self,
        id: TargetId,
        act: impl FnOnce(&mut Ledger) -> T,
    ) -> Option<T> {
        self.with_target(id, |target| act(&mut target.ledger))
    }

    pub(crate) fn target_name(&self, id: TargetId) -> TargetName {
        self.with_target(id, |target| target.options.name.clone())
            .unwrap_or_else(|| "a target that left".into())
    }
}

impl Inner {
    /// Locks the state once nothing is in flight to these targets in the dirty ranges, so that
    /// their ledgers are exact there. What is in flight lands without a turn; nobody else takes off,
    /// for the caller has it.
    pub(crate) fn landed(
        &self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        while state.is_in_flight(targets, dirty) {
            self.settled.wait(&mut state);
        }
        state
    }

    /// Waits until nothing is in flight to a target.
    pub(crate) fn wait_until_landed(&self, state: &mut MutexGuard<'_, State>, id: TargetId) {
        while state
            .targets
            .get(&id)
            .is_some_and(|target| !target.in_flight.is_empty())
        {
            self.settled.wait(state);
        }
    }
}

/// Regions that belong to an unfinished host's commit, until this is dropped.
pub(crate) struct Busy<'a> {
    inner: &'a Inner,
    regions: &'a [RegionId],
}

impl<'a> Busy<'a> {
    /// The regions have been entered in [`State::busy`].
    pub(crate) fn new(inner: &'a Inner, regions: &'a [RegionId]) -> Self {
        Self { inner, regions }
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock();
        for region in self.regions {
            state.busy.remove(region);
        }
        drop(state);
        self.inner.settled.notify_all();
    }
}

/// What it takes to make one mapping.
pub(crate) struct TakenOff<'a> {
    /// The backing's host address, if it has one yet.
    pub(crate) kept: Option<HostAddress>,
    pub(crate) in_flight: Option<InFlight<'a>>,
}

/// A mapping is being made without a turn, until it has landed or this is dropped.
pub(crate) struct InFlight<'a> {
    inner: &'a Inner,
    target: TargetId,
    range: (u64, u64),
    /// The count of steps with this one.
    pub(crate) steps: u64,
    landed: bool,
}

impl InFlight<'_> {
    /// The ledger of `target`, to which this was in flight, is exact again.
    pub(crate) fn land(&mut self, target: &mut Target) {
        self.landed = true;
        target.in_flight.retain(|range| *range != self.range);
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if !self.landed {
            let inner = self.inner;
            inner.with_target(self.target, |target| self.land(target));
        }
        self.inner.settled.notify_all();
    }
}
