//! The region manager: what the embedder holds.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::change::Operation;
use crate::commit::{Class, Watch};
use crate::layout::{Place, Region};
use crate::query;
use crate::sharing::Sharing;
use crate::state::Inner;
use crate::view::Seen;
use crate::{
    Change, ChangeError, ConsumerKind, DisabledBecause, DmaTarget, Gpa, GpaRange, InvalidChange,
    Progress, Quarantine, Reach, ReachEntry, ReachSubscription, RegionId, RegionKind, RegionName,
    Report, SharingConsumer, TargetHandle, TargetId, TargetOptions,
};

/// The whole address space.
const EVERYTHING: (u64, u64) = (0, u64::MAX);

/// The memory map of one virtual machine. Clones are handles on the same map; it ends with the
/// last of them and the last [`TargetHandle`].
///
/// Changes take turns; a commit returns when every consumer has been told. Queries never wait for
/// a consumer.
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

impl RegionManager {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether `other` is a handle on the same map, so that one change can hold regions of both.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Begins a change.
    pub fn change(&self) -> Change<'_> {
        Change {
            map: self,
            operations: Vec::new(),
            invalid: None,
        }
    }

    /// Registers an IOMMU or memory slots: all that is active is replayed to it, and from then on it follows.
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
        self.inner.register(target, options, watch)
    }

    /// Registers a sharing consumer: all shareable RAM is shown to it, and from then on it
    /// follows. It never sees a BAR.
    ///
    /// # Errors
    /// Where it refuses a piece: everything that was shown is taken back, and it is dropped.
    pub fn register_sharing(
        &self,
        consumer: Box<dyn SharingConsumer>,
        mut options: TargetOptions,
    ) -> Result<TargetHandle, ChangeError> {
        options.kind = ConsumerKind::Sharing;
        let target = Box::new(Sharing(consumer));
        let watch: &mut Watch<'_> = &mut |_| ControlFlow::Continue(());
        self.inner.register(target, options, watch)
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

    /// What the guest sees at one address. The same region may go on before and after the segment.
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

    /// Subscribes to changes of the reach. `wake` is called, without a lock, when there is
    /// something to [take](ReachSubscription::take) that was not there before; it must not change
    /// the map.
    #[must_use = "dropping the subscription ends it"]
    pub fn subscribe(&self, wake: impl Fn() + Send + Sync + 'static) -> ReachSubscription {
        ReachSubscription::new(self.inner.clone(), Arc::new(wake))
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
