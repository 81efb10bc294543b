//! The guest's memory map: regions, the flat view, and the consumers that follow it.

mod address;
mod backing;
mod change;
mod commit;
mod consumer;
mod errno;
mod layout;
mod ledger;
mod manager;
mod plan;
mod query;
mod reach;
mod region;
mod sharing;
mod translation;
mod view;

pub use address::{Address, AddressRange, Gpa, GpaRange, HostVa, Iova, IovaRange, RangeError};
pub use backing::{Backing, BackingId, BackingObject, Epoch, HostAddress, HostMapping};
pub use change::{Action, Change, ChangeError, InvalidChange, MappingChange, Progress, Report};
pub use consumer::{
    CutOff, DmaTarget, Filter, Label, MapRequest, Quarantine, SharingConsumer, TargetError,
    TargetId, TargetLimits, TargetName, TargetOptions,
};
pub use errno::Errno;
pub use manager::{RegionInfo, RegionManager, TargetHandle, ViewSegment};
pub use reach::{Missing, Reach, ReachEntry, Reason};
pub use region::{
    Access, DisabledBecause, GRANULE, Priority, RegionId, RegionKind, RegionName, RegionSpec,
    SubMapping,
};
