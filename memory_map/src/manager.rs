//! The region manager: the one who owns the map.

use std::ops::ControlFlow;

use crate::change::Operation;
use crate::{
    Change, ChangeError, DmaTarget, Gpa, GpaRange, InvalidChange, Progress, Reach, ReachEntry,
    RegionId, RegionKind, RegionName, Report, SharingConsumer, TargetId, TargetOptions,
};

/// The memory map of one virtual machine. Clones are handles on the same map.
#[derive(Debug, Clone, Default)]
pub struct RegionManager {}

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

/// A registered consumer. Dropping it unregisters the consumer and takes all its mappings down.
#[derive(Debug)]
pub struct TargetHandle {}

impl TargetHandle {
    /// Which registration this is.
    #[must_use]
    pub fn id(&self) -> TargetId {
        todo!()
    }
    /// Takes all mappings of the consumer down and forgets it, and tells what was done. A
    /// mapping that cannot be taken down leaves the target quarantined, its backings alive.
    pub fn unregister(self) -> Report {
        todo!()
    }
}

impl RegionManager {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self {}
    }

    /// Begins a change.
    pub fn change(&self) -> Change<'_> {
        Change {
            map: self,
            operations: Vec::new(),
        }
    }

    /// Registers an IOMMU: all that is active is replayed to it, and from then on it follows.
    ///
    /// # Errors
    /// Where RAM cannot be mapped: everything that was mapped is unmapped again.
    pub fn register(
        &self,
        _target: Box<dyn DmaTarget>,
        _options: TargetOptions,
    ) -> Result<TargetHandle, ChangeError> {
        todo!()
    }

    /// Like [`register`](Self::register), with progress and a way to cancel.
    ///
    /// # Errors
    /// Where RAM cannot be mapped, or `watch` cancels: everything that was mapped is unmapped again.
    pub fn register_watched(
        &self,
        _target: Box<dyn DmaTarget>,
        _options: TargetOptions,
        _watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<TargetHandle, ChangeError> {
        todo!()
    }

    /// Registers a sharing consumer.
    ///
    /// # Errors
    /// Where a piece of RAM is refused: everything that was shown is taken back.
    pub fn register_sharing(
        &self,
        _consumer: Box<dyn SharingConsumer>,
        _options: TargetOptions,
    ) -> Result<TargetHandle, ChangeError> {
        todo!()
    }

    /// Looks again at a target's limits, which have changed.
    ///
    /// # Errors
    /// Where RAM no longer fits.
    pub fn limits_changed(&self, _target: TargetId) -> Result<Report, ChangeError> {
        todo!()
    }

    /// What the guest sees, by address.
    #[must_use]
    pub fn view(&self) -> Vec<ViewSegment> {
        todo!()
    }

    /// What the guest sees at one address.
    #[must_use]
    pub fn lookup(&self, _gpa: Gpa) -> Option<ViewSegment> {
        todo!()
    }

    /// The reach of every target into every region.
    #[must_use]
    pub fn reach(&self) -> Vec<ReachEntry> {
        todo!()
    }

    /// The reach of one target into one region.
    ///
    /// # Errors
    /// Where there is no such target or region.
    pub fn reach_of(&self, _target: TargetId, _region: RegionId) -> Result<Reach, InvalidChange> {
        todo!()
    }

    pub(crate) fn next_region_id(&self) -> RegionId {
        todo!()
    }

    pub(crate) fn commit_host(
        &self,
        _operations: Vec<Operation>,
        _watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Report, ChangeError> {
        todo!()
    }

    pub(crate) fn commit_guest(
        &self,
        _operations: Vec<Operation>,
    ) -> Result<Report, InvalidChange> {
        todo!()
    }
}
