//! Regions: what is laid out in guest-physical address space.

use std::fmt;
use std::sync::Arc;

use crate::{Backing, Gpa, GpaRange, Label};

/// The granule of sub-mappings in bytes: the smallest page of any processor that is served.
pub const GRANULE: u64 = 0x1000;

/// A region's name for people, such as `ram` or `0000:00:06.0 BAR2`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionName(Arc<str>);

impl RegionName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: Into<Arc<str>>> From<T> for RegionName {
    fn from(name: T) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RegionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Names a region of one map. Never used again after the region is removed; a region with a
/// smaller id was added earlier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub(crate) u64);

impl fmt::Debug for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegionId({})", self.0)
    }
}

/// What a region holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RegionKind {
    /// The guest's memory. A mapping of it that fails is an error.
    Ram,
    /// A device's memory, such as a BAR. A mapping of it that fails is a reason in the reach.
    DeviceMemory,
}

/// What may be done through a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "read-only",
            Self::ReadWrite => "read-write",
        })
    }
}

/// Which of several regions at one address the guest sees: the highest. Of equals, the one that
/// was added first, whichever was enabled first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Priority(pub i32);

/// Part of a region that has pages behind it. What has none is trapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubMapping {
    /// Where it starts, in bytes from the region's start; a multiple of [`GRANULE`].
    pub offset: u64,
    /// Its size in bytes; a multiple of [`GRANULE`], not zero.
    pub size: u64,
    /// The pages' object.
    pub backing: Backing,
    /// Where in the object they start, in bytes; a multiple of [`GRANULE`].
    pub backing_offset: u64,
}

/// A region to be added. It begins disabled.
#[derive(Debug, Clone)]
pub struct RegionSpec {
    /// For people.
    pub name: RegionName,
    /// Where it lies. A region with sub-mappings that does not start on a multiple of
    /// [`GRANULE`] is visible, but no page of it can be mapped.
    pub range: GpaRange,
    /// Who wins where regions overlap.
    pub priority: Priority,
    /// RAM or device memory.
    pub kind: RegionKind,
    /// Whether it can be written.
    pub access: Access,
    /// Whether sharing consumers may see it. Counts for RAM only: they never see device memory.
    pub shareable: bool,
    /// What [filters](crate::Filter) know it by.
    pub label: Option<Label>,
    /// What backs it, in any order, without overlaps.
    pub sub_mappings: Vec<SubMapping>,
}

/// Why a region is not enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DisabledBecause {
    /// It was never enabled.
    New,
    /// Its owner took it down, without a more precise cause.
    Owner,
    /// The device does not decode memory.
    DecodingOff,
    /// One half of a 64-bit BAR has been written, the other not yet.
    HalfWritten,
    /// The BAR is being sized: one of its registers holds all ones.
    Sizing,
    /// The device sleeps (D1, D2 or D3hot).
    Sleeping,
    /// The device is being reset.
    Resetting,
    /// Where the guest put it, it would wrap past the end of the address space.
    Wraps(Gpa),
}

impl fmt::Display for DisabledBecause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::New => f.write_str("not enabled yet"),
            Self::Owner => f.write_str("disabled"),
            Self::DecodingOff => f.write_str("memory decoding is off"),
            Self::HalfWritten => f.write_str("half written: the other half of the BAR is due"),
            Self::Sizing => f.write_str("being sized: a register of the BAR holds all ones"),
            Self::Sleeping => f.write_str("the device sleeps (it is not in power state D0)"),
            Self::Resetting => f.write_str("the device is being reset"),
            Self::Wraps(gpa) => write!(f, "placed at {gpa}, where it wraps past the end"),
        }
    }
}
