//! Reach: which region each target can get at, and if not, why.

use std::fmt;
use std::sync::Arc;

use crate::{
    DisabledBecause, Errno, GpaRange, IovaRange, RegionId, RegionName, TargetId, TargetName,
};

/// Why a piece of the map is not in a target, in terms that a person can act on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The region is not enabled.
    Disabled(DisabledBecause),
    /// Another region of higher priority lies over it.
    Covered {
        /// The one that is seen instead.
        by: RegionName,
    },
    /// It has no pages behind it: accesses are trapped, by design.
    Trapped,
    /// It lies beyond what the IOMMU can address.
    OutsideAperture {
        /// The highest address that it can.
        last: u64,
    },
    /// It lies in a window that the platform reserves, such as the one for MSI.
    ReservedWindow {
        /// The window.
        window: IovaRange,
    },
    /// It is smaller than a page of the IOMMU.
    SmallerThanPage {
        /// The page in bytes.
        page: u64,
    },
    /// Its pages do not start on pages of the IOMMU, or end in the middle of one.
    NotPageAligned {
        /// The page in bytes.
        page: u64,
    },
    /// The pages have no host address, which this target needs.
    NoHostAddress(Errno),
    /// The device does not export this BAR as a dma-buf, which this target needs.
    NoDmaBufExport(Arc<str>),
    /// The target cannot hold read-only mappings.
    ReadOnlyUnsupported,
    /// The target takes no device memory.
    DeviceMemoryRefused,
    /// The target holds as many mappings as it can.
    EntryLimit {
        /// That many.
        limit: u64,
    },
    /// The kernel refused.
    Kernel {
        /// With this errno.
        errno: Errno,
        /// What to do about it, where that is known.
        hint: Option<Arc<str>>,
    },
    /// The kernel revoked it while it was being mapped, again and again.
    Revoked,
    /// The target's filter does not admit it.
    Filtered,
    /// The target is quarantined: it may hold mappings that the map no longer wants.
    Quarantined,
    /// A change that will map it is on its way.
    Pending,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disabled(why) => why.fmt(f),
            Self::Covered { by } => write!(f, "covered by {by}"),
            Self::Trapped => f.write_str("trapped by design: no pages behind it"),
            Self::OutsideAperture { last } => write!(
                f,
                "outside the aperture, which ends at {last:#x}: place it lower"
            ),
            Self::ReservedWindow { window } => {
                write!(f, "in the reserved window {window}: place it elsewhere")
            }
            Self::SmallerThanPage { page } => {
                write!(f, "smaller than a page of {page:#x} bytes")
            }
            Self::NotPageAligned { page } => {
                write!(f, "not aligned to a page of {page:#x} bytes")
            }
            Self::NoHostAddress(errno) => write!(f, "it has no host address: {errno}"),
            Self::NoDmaBufExport(why) => write!(f, "the device exports no dma-buf for it: {why}"),
            Self::ReadOnlyUnsupported => f.write_str("the target holds no read-only mappings"),
            Self::DeviceMemoryRefused => f.write_str("the target takes no device memory"),
            Self::EntryLimit { limit } => {
                write!(f, "the target holds its limit of {limit} mappings")
            }
            Self::Kernel { errno, hint } => {
                write!(f, "the kernel refused: {errno}")?;
                match hint {
                    Some(hint) => write!(f, "; {hint}"),
                    None => Ok(()),
                }
            }
            Self::Revoked => f.write_str("revoked by the kernel while it was being mapped"),
            Self::Filtered => f.write_str("kept out by policy"),
            Self::Quarantined => f.write_str("the target is quarantined"),
            Self::Pending => f.write_str("not mapped yet"),
        }
    }
}

/// A part of a region that a target cannot get at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Which part, where the region lies now.
    pub range: GpaRange,
    /// Why.
    pub reason: Reason,
}

/// Whether a target can get at a region. What is trapped by design, such as an MSI-X table in
/// the middle of a BAR, does not count against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// All of it.
    Mapped,
    /// Some of it.
    Partly {
        /// How many bytes are mapped.
        mapped: u64,
        /// What is not, by address.
        missing: Vec<Missing>,
    },
    /// None of it.
    Unavailable(Reason),
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped => f.write_str("mapped"),
            Self::Partly { mapped, missing } => {
                write!(f, "partly ({mapped:#x} bytes")?;
                for Missing { range, reason } in missing {
                    write!(f, "; not {range}: {reason}")?;
                }
                f.write_str(")")
            }
            Self::Unavailable(reason) => write!(f, "unavailable: {reason}"),
        }
    }
}

/// The reach of one target into one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReachEntry {
    /// Which target.
    pub target: TargetId,
    /// Its name.
    pub target_name: TargetName,
    /// Which region.
    pub region: RegionId,
    /// Its name.
    pub region_name: RegionName,
    /// The reach.
    pub reach: Reach,
}
