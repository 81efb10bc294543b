//! The region manager: the one who owns the map.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::change::Operation;
use crate::commit::{Class, Commit, PendingCutOff, Watch};
use crate::layout::{Applied, Layout, Place, Region};
use crate::ledger::Ledger;
use crate::query;
use crate::sharing::Sharing;
use crate::translation::{Viewer, check_limits};
use crate::view::Seen;
use crate::{
    Backing, BackingId, Change, ChangeError, DisabledBecause, DmaTarget, Errno, Gpa, GpaRange,
    HostAddress, InvalidChange, Progress, Quarantine, Reach, ReachEntry, Reason, RegionId,
    RegionKind, RegionName, Report, SharingConsumer, TargetId, TargetLimits, TargetName,
    TargetOptions,
};

/// The whole address space.
const EVERYTHING: (u64, u64) = (0, u64::MAX);

/// The memory map of one virtual machine. Clones are handles on the same map; it ends with the
/// last of them and the last [`TargetHandle`].
///
/// Changes are made one at a time, in the order in which they take their turn; a commit returns
/// when every consumer has been told. Queries never wait for a consumer.
#[derive(Debug, Clone, Default)]
pub struct RegionManager {
    inner: Arc<Inner>,
}

/// A stretch of guest-physical addresses that shows one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewSegment {
    /// Where.
    pub range: GpaRange,
    /// Which region.
    pub region: RegionId,
    /// Its name.
    pub name: RegionName,
    /// RAM or device memory.
    pub kind: RegionKind,
    /// Where in the region the segment starts, in bytes.
    pub offset: u64,
}

/// A region as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// Which.
    pub id: RegionId,
    /// Its name.
    pub name: RegionName,
    /// RAM or device memory.
    pub kind: RegionKind,
    /// Size in bytes.
    pub size: u64,
    /// Where it lies, enabled or not; `None` where it would wrap past the end of the space.
    pub range: Option<GpaRange>,
    /// Why it is not enabled, if it is not.
    pub disabled: Option<DisabledBecause>,
}

/// A registered consumer. Dropping it unregisters the consumer and takes all its mappings down.
#[must_use = "dropping the handle unregisters the consumer"]
#[derive(Debug)]
pub struct TargetHandle {
    inner: Arc<Inner>,
    id: TargetId,
}

impl TargetHandle {
    /// Which registration this is.
    #[must_use]
    pub const fn id(&self) -> TargetId {
        self.id
    }

    /// Takes all mappings of the consumer down and forgets it, and tells what was done. What
    /// cannot be taken down is in [`Report::quarantined`]; its pages are kept for ever, because
    /// a device may still reach them.
    #[must_use = "the report tells whether everything could be taken down"]
    pub fn unregister(self) -> Report {
        self.inner.unregister(self.id)
    }
}

impl Drop for TargetHandle {
    fn drop(&mut self) {
        drop(self.inner.unregister(self.id));
    }
}

/// A consumer and what is known of it.
pub(crate) struct Target {
    pub(crate) options: TargetOptions,
    pub(crate) limits: TargetLimits,
    pub(crate) sharing: bool,
    pub(crate) driver: Driver,
    pub(crate) ledger: Ledger,
    pub(crate) quarantined: Option<Quarantine>,
}

pub(crate) type Driver = Arc<Mutex<Box<dyn DmaTarget>>>;

impl Target {
    pub(crate) fn viewer(&self) -> Viewer<'_> {
        Viewer {
            limits: &self.limits,
            filter: &self.options.filter,
            sharing: self.sharing,
        }
    }
}

/// A host address that is kept for the next mapping of its backing.
struct KeptAddress {
    backing: Backing,
    host: HostAddress,
}

/// What the state's lock guards. It is held for short steps only.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) layout: Layout,
    pub(crate) targets: BTreeMap<TargetId, Target>,
    /// For every backing that some region has and some target needed by address.
    host_addresses: HashMap<BackingId, KeptAddress>,
}

#[derive(Default)]
pub(crate) struct Inner {
    /// Held through a commit. Taken before `state`, never after.
    turn: Mutex<()>,
    pub(crate) state: Mutex<State>,
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

impl RegionManager {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins a change.
    pub fn change(&self) -> Change<'_> {
        Change {
            map: self,
            operations: Vec::new(),
        }
    }

    /// Registers an IOMMU: all that is active is replayed to it, and from then on it follows.
    /// A BAR that cannot be mapped is a reason in the reach.
    ///
    /// # Errors
    /// Where RAM cannot be mapped or the limits make no sense: everything that was mapped is
    /// unmapped again, and the target is dropped.
    pub fn register(
        &self,
        target: Box<dyn DmaTarget>,
        options: TargetOptions,
    ) -> Result<TargetHandle, ChangeError> {
        self.register_watched(target, options, &mut |_| ControlFlow::Continue(()))
    }

    /// Like [`register`](Self::register); `watch` is as for
    /// [`Change::commit_watched`](crate::Change::commit_watched).
    ///
    /// # Errors
    /// As for [`register`](Self::register), and where `watch` cancels.
    pub fn register_watched(
        &self,
        target: Box<dyn DmaTarget>,
        options: TargetOptions,
        watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<TargetHandle, ChangeError> {
        self.inner.clone().register(target, options, false, watch)
    }

    /// Registers a sharing consumer: all shareable RAM is shown to it, and from then on it
    /// follows. It never sees a BAR.
    ///
    /// # Errors
    /// Where it refuses a piece: everything that was shown is taken back, and it is dropped.
    pub fn register_sharing(
        &self,
        consumer: Box<dyn SharingConsumer>,
        options: TargetOptions,
    ) -> Result<TargetHandle, ChangeError> {
        let target = Box::new(Sharing(consumer));
        let watch: &mut Watch<'_> = &mut |_| ControlFlow::Continue(());
        self.inner.clone().register(target, options, true, watch)
    }

    /// Looks again at the limits of a target, which have changed: what they no longer allow is
    /// unmapped, what they now allow is mapped, and what was refused is tried again.
    ///
    /// # Errors
    /// Where RAM no longer fits: the mappings and the limits are as they were, and the embedder
    /// must undo what changed them.
    pub fn limits_changed(&self, target: TargetId) -> Result<Report, ChangeError> {
        self.inner.limits_changed(target)
    }

    /// What the guest sees, by address.
    #[must_use]
    pub fn view(&self) -> Vec<ViewSegment> {
        let state = self.inner.state.lock();
        let all = state.layout.seen(EVERYTHING.0, EVERYTHING.1);
        all.filter_map(|(seen, region)| segment(seen, region))
            .collect()
    }

    /// What the guest sees at one address. The segment is what surrounds the address there.
    #[must_use]
    pub fn lookup(&self, gpa: Gpa) -> Option<ViewSegment> {
        let state = self.inner.state.lock();
        let seen = state.layout.view.seen_at(gpa.raw())?;
        let region = state.layout.regions.get(&seen.region)?;
        segment(seen, region)
    }

    /// Every region, in the order they were added.
    #[must_use]
    pub fn regions(&self) -> Vec<RegionInfo> {
        let state = self.inner.state.lock();
        let all = state.layout.regions.iter();
        let mut regions: Vec<_> = all.map(|(&id, region)| info(id, region)).collect();
        regions.sort_unstable_by_key(|region| region.id);
        regions
    }

    /// One region.
    ///
    /// # Errors
    /// [`InvalidChange::UnknownRegion`].
    pub fn region(&self, id: RegionId) -> Result<RegionInfo, InvalidChange> {
        let state = self.inner.state.lock();
        state.layout.region(id).map(|region| info(id, region))
    }

    /// The reach of every target into every region, by target and region.
    #[must_use]
    pub fn reach(&self) -> Vec<ReachEntry> {
        query::all_reach(&self.inner.state.lock())
    }

    /// The reach of one target into one region.
    ///
    /// # Errors
    /// Where there is no such target or region.
    pub fn reach_of(&self, target: TargetId, region: RegionId) -> Result<Reach, InvalidChange> {
        let state = self.inner.state.lock();
        let target = state
            .targets
            .get(&target)
            .ok_or(InvalidChange::UnknownTarget(target))?;
        let found = state.layout.region(region)?;
        Ok(query::reach(&state.layout, target, region, found))
    }

    /// Why a target is quarantined, if it is.
    ///
    /// # Errors
    /// [`InvalidChange::UnknownTarget`].
    pub fn quarantine_of(&self, target: TargetId) -> Result<Option<Quarantine>, InvalidChange> {
        let state = self.inner.state.lock();
        let found = state.targets.get(&target);
        found
            .map(|target| target.quarantined.clone())
            .ok_or(InvalidChange::UnknownTarget(target))
    }

    /// How many mappings a target holds.
    ///
    /// # Errors
    /// [`InvalidChange::UnknownTarget`].
    pub fn mappings_of(&self, target: TargetId) -> Result<usize, InvalidChange> {
        let state = self.inner.state.lock();
        let found = state.targets.get(&target);
        found
            .map(|target| target.ledger.entries.len())
            .ok_or(InvalidChange::UnknownTarget(target))
    }

    pub(crate) fn next_region_id(&self) -> RegionId {
        RegionId(self.inner.next_id())
    }

    pub(crate) fn commit_host(
        &self,
        operations: Vec<Operation>,
        watch: &mut Watch<'_>,
    ) -> Result<Report, ChangeError> {
        self.inner.commit(operations, Class::Host, watch)
    }

    pub(crate) fn commit_guest(&self, operations: Vec<Operation>) -> Result<Report, InvalidChange> {
        let watch: &mut Watch<'_> = &mut |_| ControlFlow::Continue(());
        match self.inner.commit(operations, Class::Guest, watch) {
            Ok(report) => Ok(report),
            Err(ChangeError::Invalid(invalid)) => Err(invalid),
            // A guest's commit fails in no other way.
            Err(_) => Ok(Report::default()),
        }
    }
}

fn info(id: RegionId, region: &Region) -> RegionInfo {
    RegionInfo {
        id,
        name: region.name.clone(),
        kind: region.kind,
        size: region.size,
        range: match region.place {
            Place::At(range) => Some(range),
            Place::Wraps(_) => None,
        },
        disabled: region.inactive(),
    }
}

fn segment(seen: Seen, region: &Region) -> Option<ViewSegment> {
    let base = region.active()?.start().raw();
    Some(ViewSegment {
        range: GpaRange::of(seen.start, seen.last),
        region: seen.region,
        name: region.name.clone(),
        kind: region.kind,
        offset: seen.start.wrapping_sub(base),
    })
}

impl Inner {
    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn commit(
        &self,
        operations: Vec<Operation>,
        class: Class,
        watch: &mut Watch<'_>,
    ) -> Result<Report, ChangeError> {
        let turn = self.turn.lock();
        let (applied, targets) = {
            let mut state = self.state.lock();
            let applied = state.layout.apply(operations)?;
            (applied, state.targets_in_order())
        };
        let Applied {
            dirty,
            inverses,
            backings,
            revoked,
        } = applied;
        let mut commit = Commit::new(self, class, watch);
        let outcome = commit.run(&targets, &dirty).map_err(|cause| {
            self.state.lock().layout.revert(inverses);
            commit.undo(cause, &targets, &revoked)
        });
        let Commit {
            report, cut_offs, ..
        } = commit;
        self.release_addresses(&backings);
        drop(turn);
        cut_off(cut_offs);
        outcome.map(|()| report)
    }

    fn register(
        self: Arc<Self>,
        driver: Box<dyn DmaTarget>,
        options: TargetOptions,
        sharing: bool,
        watch: &mut Watch<'_>,
    ) -> Result<TargetHandle, ChangeError> {
        let limits = limits_of(&*driver, &options.name)?;
        let id = TargetId(self.next_id());
        let target = Target {
            options,
            limits,
            sharing,
            driver: Arc::new(Mutex::new(driver)),
            ledger: Ledger::default(),
            quarantined: None,
        };
        let turn = self.turn.lock();
        self.state.lock().targets.insert(id, target);
        let mut commit = Commit::new(&self, Class::Host, watch);
        let outcome = commit
            .run(&[id], &[EVERYTHING])
            .map_err(|cause| commit.undo(cause, &[], &[]));
        if outcome.is_err() {
            let target = self.state.lock().targets.remove(&id);
            if let Some(mut target) = target {
                commit.tear_down(id, &mut target);
            }
        }
        let Commit { cut_offs, .. } = commit;
        self.release_unneeded_addresses();
        drop(turn);
        cut_off(cut_offs);
        outcome?;
        Ok(TargetHandle { inner: self, id })
    }

    fn unregister(&self, id: TargetId) -> Report {
        let turn = self.turn.lock();
        let target = self.state.lock().targets.remove(&id);
        let Some(mut target) = target else {
            return Report::default();
        };
        let mut watch = |_| ControlFlow::Continue(());
        let mut commit = Commit::new(self, Class::Guest, &mut watch);
        commit.tear_down(id, &mut target);
        let Commit {
            report, cut_offs, ..
        } = commit;
        drop(target);
        self.release_unneeded_addresses();
        drop(turn);
        cut_off(cut_offs);
        report
    }

    fn limits_changed(&self, id: TargetId) -> Result<Report, ChangeError> {
        let unknown = || ChangeError::Invalid(InvalidChange::UnknownTarget(id));
        let turn = self.turn.lock();
        let (driver, name) = {
            let state = self.state.lock();
            let target = state.targets.get(&id).ok_or_else(unknown)?;
            (target.driver.clone(), target.options.name.clone())
        };
        let limits = limits_of(&**driver.lock(), &name)?;
        let before = {
            let mut state = self.state.lock();
            let target = state.targets.get_mut(&id).ok_or_else(unknown)?;
            std::mem::replace(&mut target.limits, limits)
        };
        let mut watch = |_| ControlFlow::Continue(());
        let mut commit = Commit::new(self, Class::Host, &mut watch);
        let outcome = commit.run(&[id], &[EVERYTHING]).map_err(|cause| {
            if let Some(target) = self.state.lock().targets.get_mut(&id) {
                target.limits = before;
            }
            commit.undo(cause, &[], &[])
        });
        let Commit {
            report, cut_offs, ..
        } = commit;
        drop(turn);
        cut_off(cut_offs);
        outcome.map(|()| report)
    }

    /// How to call a target that may be called.
    pub(crate) fn driver(&self, id: TargetId) -> Option<Driver> {
        let state = self.state.lock();
        let target = state.targets.get(&id)?;
        target.quarantined.is_none().then(|| target.driver.clone())
    }

    pub(crate) fn with_ledger<T>(
        &self,
        id: TargetId,
        act: impl FnOnce(&mut Ledger) -> T,
    ) -> Option<T> {
        let mut state = self.state.lock();
        let target = state.targets.get_mut(&id)?;
        Some(act(&mut target.ledger))
    }

    pub(crate) fn target_name(&self, id: TargetId) -> TargetName {
        let state = self.state.lock();
        match state.targets.get(&id) {
            Some(target) => target.options.name.clone(),
            None => "a target that left".into(),
        }
    }

    /// Why a target has no room for another mapping, if so.
    pub(crate) fn full(&self, id: TargetId) -> Option<Reason> {
        let state = self.state.lock();
        let target = state.targets.get(&id)?;
        let limit = target.limits.entry_limit?;
        let held = u64::try_from(target.ledger.entries.len()).unwrap_or(u64::MAX);
        (held >= limit).then_some(Reason::EntryLimit { limit })
    }

    /// The host address of a backing, made now if there is none yet. Commits take turns, so no
    /// backing is mapped twice at a time.
    pub(crate) fn host_address(&self, backing: &Backing) -> Result<HostAddress, Errno> {
        if let Some(kept) = self.state.lock().host_addresses.get(&backing.id()) {
            return Ok(kept.host.clone());
        }
        let host = backing.map_host()?;
        let kept = KeptAddress {
            backing: backing.clone(),
            host: host.clone(),
        };
        self.state.lock().host_addresses.insert(backing.id(), kept);
        Ok(host)
    }

    /// Gives up the addresses of those backings that no region has any more.
    fn release_addresses(&self, backings: &[BackingId]) {
        let mut released = Vec::new();
        {
            let mut state = self.state.lock();
            for &backing in backings {
                if !state.layout.uses(backing) {
                    released.extend(state.host_addresses.remove(&backing));
                }
            }
        }
        // Unmapping calls the embedder and the kernel: not under the lock.
        drop(released);
    }

    /// Gives up the addresses that no registered target needs any more.
    fn release_unneeded_addresses(&self) {
        let (backings, drivers) = {
            let state = self.state.lock();
            let backings: Vec<Backing> = state
                .host_addresses
                .values()
                .map(|kept| kept.backing.clone())
                .collect();
            let drivers: Vec<Driver> = state.targets.values().map(|t| t.driver.clone()).collect();
            (backings, drivers)
        };
        let needed = |backing: &Backing| {
            drivers
                .iter()
                .any(|driver| driver.lock().needs_host_address(backing))
        };
        for backing in backings {
            if !needed(&backing) {
                let released = self.state.lock().host_addresses.remove(&backing.id());
                drop(released);
            }
        }
    }
}

impl State {
    /// IOMMUs first, then those that RAM is shared with; each by age.
    fn targets_in_order(&self) -> Vec<TargetId> {
        let mut targets: Vec<(bool, TargetId)> = self
            .targets
            .iter()
            .map(|(&id, target)| (target.sharing, id))
            .collect();
        targets.sort_unstable();
        targets.into_iter().map(|(_, id)| id).collect()
    }
}

fn limits_of(driver: &dyn DmaTarget, name: &TargetName) -> Result<TargetLimits, ChangeError> {
    let limits = driver.limits().map_err(|errno| ChangeError::Limits {
        target: name.clone(),
        errno,
    })?;
    check_limits(&limits).map_err(|what| ChangeError::ImpossibleLimits {
        target: name.clone(),
        what,
    })?;
    Ok(limits)
}

/// Tells the owners of quarantined targets. No lock is held here.
fn cut_off(pending: Vec<PendingCutOff>) {
    for PendingCutOff {
        cut_off,
        target,
        why,
    } in pending
    {
        cut_off.cut_off(&target, &why);
    }
}
