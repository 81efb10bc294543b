//! Changes: what is asked of the map, and what came of it.

use std::ops::ControlFlow;

use crate::layout::{Region, region_from};
use crate::{
    Access, Backing, BackingId, DisabledBecause, Gpa, IovaRange, Quarantine, RangeError, Reason,
    RegionId, RegionManager, RegionName, RegionSpec, SubMapping, TargetId, TargetName,
};

/// One step of a change.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    /// The region is taken out when it is carried out.
    Add(RegionId, Option<Box<Region>>),
    Remove(RegionId),
    Enable(RegionId),
    Disable(RegionId, DisabledBecause),
    Move(RegionId, Gpa),
    SetAccess(RegionId, Access),
    SetSubMapping(RegionId, SubMapping),
    RemoveSubMapping(RegionId, u64, u64),
    Revoke(Backing),
}

/// Several operations that are carried out as one, in the order they were asked for. Nothing
/// happens before a commit; dropping a change forgets it.
#[must_use = "a change does nothing before it is committed"]
#[derive(Debug)]
pub struct Change<'m> {
    pub(crate) map: &'m RegionManager,
    pub(crate) operations: Vec<Operation>,
    /// The first region that makes no sense.
    pub(crate) invalid: Option<InvalidChange>,
}

impl Operation {
    /// The region that the operation is about, if it is about one.
    pub(crate) const fn region(&self) -> Option<RegionId> {
        match self {
            Self::Add(id, _)
            | Self::Remove(id)
            | Self::Enable(id)
            | Self::Disable(id, _)
            | Self::Move(id, _)
            | Self::SetAccess(id, _)
            | Self::SetSubMapping(id, _)
            | Self::RemoveSubMapping(id, ..) => Some(*id),
            Self::Revoke(_) => None,
        }
    }
}

impl Change<'_> {
    /// Adds a region, disabled, and tells the id that it will have.
    pub fn add(&mut self, spec: RegionSpec) -> RegionId {
        let id = self.map.next_region_id();
        match region_from(spec) {
            Ok(region) => self
                .operations
                .push(Operation::Add(id, Some(Box::new(region)))),
            Err(invalid) => {
                self.invalid.get_or_insert(invalid);
            }
        }
        id
    }

    /// Removes a region, enabled or not.
    pub fn remove(&mut self, region: RegionId) {
        self.operations.push(Operation::Remove(region));
    }

    /// Lets the guest see a region.
    pub fn enable(&mut self, region: RegionId) {
        self.operations.push(Operation::Enable(region));
    }

    /// Hides a region; `because` is what its reach will say.
    pub fn disable(&mut self, region: RegionId, because: DisabledBecause) {
        self.operations.push(Operation::Disable(region, because));
    }

    /// Moves a region, enabled or not, to start at `to`. A region that would wrap past the end
    /// of the address space there is taken down, and its reach says so.
    pub fn move_to(&mut self, region: RegionId, to: Gpa) {
        self.operations.push(Operation::Move(region, to));
    }

    /// Makes a region read-only or writable.
    pub fn set_access(&mut self, region: RegionId, access: Access) {
        self.operations.push(Operation::SetAccess(region, access));
    }

    /// Puts pages behind a part of a region, in place of what was there.
    pub fn set_sub_mapping(&mut self, region: RegionId, sub_mapping: SubMapping) {
        self.operations
            .push(Operation::SetSubMapping(region, sub_mapping));
    }

    /// Leaves `size` bytes at `offset` of a region without pages. Both are multiples of
    /// [`GRANULE`](crate::GRANULE).
    pub fn remove_sub_mapping(&mut self, region: RegionId, offset: u64, size: u64) {
        self.operations
            .push(Operation::RemoveSubMapping(region, offset, size));
    }

    /// Says that the kernel may have revoked what was mapped from `backing`: its epoch advances
    /// at the commit, every mapping made from it is taken down, and made again where the map
    /// still wants it.
    pub fn revoke(&mut self, backing: &Backing) {
        self.operations.push(Operation::Revoke(backing.clone()));
    }

    /// Commits a change of the host's, which may be refused: everything succeeds, or everything
    /// is undone, in all consumers. A BAR that cannot be mapped is no refusal but a reason in the
    /// reach; RAM that cannot is.
    ///
    /// When this returns, every target holds what the map says. While a mapping is being made,
    /// other changes may go ahead; those of the same regions wait.
    ///
    /// # Errors
    /// See [`ChangeError`]; the map is as it was.
    pub fn commit(self) -> Result<Report, ChangeError> {
        self.commit_watched(&mut |_| ControlFlow::Continue(()))
    }

    /// Like [`commit`](Self::commit), telling `watch` before every call to a target how far the
    /// work has come. `watch` may cancel the rest, which undoes what was done. It may read the
    /// map but must not change it.
    ///
    /// # Errors
    /// See [`ChangeError`]; the map is as it was.
    pub fn commit_watched(
        self,
        watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Report, ChangeError> {
        let map = self.map;
        map.commit_host(self.checked()?, watch)
    }

    /// Commits a change of the guest's, which cannot be refused: what is to go goes first, in
    /// all targets, or its target is quarantined; what is to come and cannot be mapped is at its
    /// place in the map all the same, unavailable with its reason.
    ///
    /// # Errors
    /// Only for a change that makes no sense ([`InvalidChange`]), before anything is done.
    pub fn commit_guest(self) -> Result<Report, InvalidChange> {
        let map = self.map;
        map.commit_guest(self.checked()?)
    }

    fn checked(self) -> Result<Vec<Operation>, InvalidChange> {
        match self.invalid {
            None => Ok(self.operations),
            Some(invalid) => Err(invalid),
        }
    }
}

/// How far a commit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes mapped so far, over all targets.
    pub done: u64,
    /// Bytes to be mapped in all.
    pub total: u64,
}

/// What a commit did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Every mapping made or taken down, in order, and every one that could not be made.
    pub mappings: Vec<MappingChange>,
    /// Mappings that were taken down only because a part of them had to change, and whose other
    /// parts were made again.
    pub bisected: u64,
    /// Targets that were quarantined.
    pub quarantined: Vec<(TargetId, Quarantine)>,
    /// Pieces of RAM that some target should hold and now does not. The virtual machine must be
    /// stopped: its devices no longer reach its memory.
    pub ram_missing: Vec<(TargetId, IovaRange, Reason)>,
}

impl Report {
    /// How many mappings were made.
    #[must_use]
    pub fn maps(&self) -> usize {
        self.count(|action| matches!(action, Action::Mapped))
    }

    /// How many mappings were taken down.
    #[must_use]
    pub fn unmaps(&self) -> usize {
        self.count(|action| matches!(action, Action::Unmapped))
    }

    fn count(&self, wanted: impl Fn(&Action) -> bool) -> usize {
        self.mappings.iter().filter(|m| wanted(&m.action)).count()
    }
}

/// One mapping that a commit made, took down, or could not make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappingChange {
    /// In which target.
    pub target: TargetId,
    /// Where.
    pub iova: IovaRange,
    /// Of which backing.
    pub backing: BackingId,
    /// What was done.
    pub action: Action,
}

/// What was done to a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// It was made.
    Mapped,
    /// It was taken down.
    Unmapped,
    /// It could not be made.
    Unavailable(Reason),
}

/// A change that makes no sense, whoever asks for it. Nothing has been done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidChange {
    /// There is no such region, or no longer.
    #[error("there is no {0:?} in this map")]
    UnknownRegion(RegionId),
    /// There is no such target, or no longer.
    #[error("there is no {0:?} in this map")]
    UnknownTarget(TargetId),
    /// A sub-mapping's offset, size or backing offset is not a multiple of the granule.
    #[error(
        "a sub-mapping of {region} must start and end on multiples of {granule:#x}, also in its \
         backing: offset {offset:#x}, size {size:#x}, backing offset {backing_offset:#x}",
        granule = crate::GRANULE
    )]
    Misaligned {
        /// Of which region.
        region: RegionName,
        /// Offset in the region.
        offset: u64,
        /// Size in bytes.
        size: u64,
        /// Offset in the backing.
        backing_offset: u64,
    },
    /// RAM must start on a page, or none of it could be mapped.
    #[error("{region} cannot lie at {at}: RAM starts on multiples of {granule:#x}", granule = crate::GRANULE)]
    MisalignedRam {
        /// Which region.
        region: RegionName,
        /// Where it was to start.
        at: Gpa,
    },
    /// A sub-mapping reaches past its region's end.
    #[error(
        "a sub-mapping of {size:#x} bytes at {offset:#x} reaches past the end of {region}, which \
         has {region_size:#x}"
    )]
    PastRegion {
        /// Of which region.
        region: RegionName,
        /// Offset in the region.
        offset: u64,
        /// Size in bytes.
        size: u64,
        /// The region's size in bytes.
        region_size: u64,
    },
    /// A sub-mapping reaches past its backing's end.
    #[error(
        "a sub-mapping of {region} wants {size:#x} bytes at {backing_offset:#x} of a backing that \
         has {backing_size:#x}"
    )]
    PastBacking {
        /// Of which region.
        region: RegionName,
        /// Offset in the backing.
        backing_offset: u64,
        /// Size in bytes.
        size: u64,
        /// The backing's size in bytes.
        backing_size: u64,
    },
    /// Two sub-mappings of a region that is added overlap.
    #[error("two sub-mappings of {region} overlap at {offset:#x}")]
    SubMappingsOverlap {
        /// Of which region.
        region: RegionName,
        /// Where, in bytes from the region's start.
        offset: u64,
    },
    /// An empty range, or one that wraps.
    #[error(transparent)]
    Range(#[from] RangeError),
}

/// Why a change of the host's was refused. The map is as it was before; so are the targets, unless
/// it is [`UndoIncomplete`](Self::UndoIncomplete).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The change makes no sense.
    #[error(transparent)]
    Invalid(#[from] InvalidChange),
    /// A target did not take a piece of RAM, or of a region that may not be missing.
    #[error("{region} at {range} cannot be mapped into {target}: {reason}")]
    Refused {
        /// Which target.
        target: TargetName,
        /// Which part.
        range: IovaRange,
        /// Of which region.
        region: RegionName,
        /// Why.
        reason: Reason,
    },
    /// A target would not tell its limits.
    #[error("{target} does not tell its limits")]
    Limits {
        /// Which target.
        target: TargetName,
        /// What the kernel said.
        #[source]
        errno: crate::Errno,
    },
    /// A target told limits that cannot be true.
    #[error("{target} tells impossible limits: {what}")]
    ImpossibleLimits {
        /// Which target.
        target: TargetName,
        /// What is wrong with them.
        what: &'static str,
    },
    /// A target was quarantined while the change was made.
    #[error("{target} had to be quarantined")]
    Quarantined {
        /// Which target.
        target: TargetName,
        /// Why.
        #[source]
        why: Quarantine,
    },
    /// The one who watched cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// The change was refused, and undoing it did not succeed whole either: a mapping that was
    /// there could not be made again, or a target had to be quarantined on the way.
    #[error(
        "{cause}; and undoing that left {range} missing in {target}: {reason}{}",
        if report.ram_missing.is_empty() {
            ""
        } else {
            "; that is RAM, so the virtual machine must be stopped"
        }
    )]
    UndoIncomplete {
        /// Why it was to be undone.
        #[source]
        cause: Box<Self>,
        /// In which target something is missing.
        target: TargetName,
        /// The first piece; RAM, if any of it is missing.
        range: IovaRange,
        /// Why it could not be mapped again.
        reason: Reason,
        /// All that the undo did.
        report: Box<Report>,
    },
}
