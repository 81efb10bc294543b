//! Why there is no layout, and what to do.

use std::fmt;

use memory_map::{Gpa, GpaRange, Iova};

use super::{Bytes, RAM_UNIT};
use crate::platform;

/// What ends the addresses that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The guest's processor.
    AddressBits {
        /// How many bits its physical addresses have.
        bits: u8,
    },
    /// The IOMMU that allows least.
    Iommu {
        /// The last address that all of them allow.
        last: Iova,
    },
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddressBits { bits } => {
                write!(
                    f,
                    "the processor, whose physical addresses have {bits} bits"
                )
            }
            Self::Iommu { last } => {
                write!(f, "the host's IOMMU, which allows no address above {last}")
            }
        }
    }
}

/// What limits the window below 4 GiB, where it is this.
fn low_limit(window: GpaRange) -> String {
    if window.size() == platform::LOW_WINDOW_SIZE {
        format!("the machine, which has {window} for them")
    } else {
        format!("the host's IOMMU, which leaves {window} of what the machine has for them")
    }
}

/// Why nothing can be laid out as wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM is not made of whole units.
    #[error(
        "{} of RAM cannot be had: ask for a multiple of {}, such as {}",
        Bytes(*ram), Bytes(RAM_UNIT), Bytes(ram.checked_next_multiple_of(RAM_UNIT).unwrap_or(0).max(RAM_UNIT))
    )]
    RamUnit {
        /// What was asked for, in bytes.
        ram: u64,
    },
    /// The guest's addresses are too short for a PC.
    #[error("a guest whose physical addresses have {bits} bits is no PC: give it at least 32")]
    AddressBits {
        /// How many there are.
        bits: u8,
    },
    /// The first RAM of a PC may not be there.
    #[error(
        "the host's IOMMU does not allow the first 2 MiB of addresses, where the guest's first \
         RAM must be: leave out the device for which it reserves them (see reserved_regions of \
         its group in /sys/kernel/iommu_groups)"
    )]
    NoFirstRam,
    /// RAM does not fit.
    #[error(
        "{} of RAM do not fit: the limit is {bound}; there is room for {}; ask for no more than \
         that, or leave out the devices behind that limit",
        Bytes(*wanted), Bytes(*fits)
    )]
    Ram {
        /// What was asked for, in bytes.
        wanted: u64,
        /// What there is room for, in bytes; not counting 64-bit BARs.
        fits: u64,
        /// What the limit is.
        bound: Bound,
    },
    /// Nothing is allowed where 32-bit BARs go.
    #[error(
        "the host's IOMMU allows no address from 0xc0000000 to 0xdfffffff, where 32-bit BARs go: \
         leave out the device for which it reserves them (see reserved_regions of its group in \
         /sys/kernel/iommu_groups)"
    )]
    NoLowWindow,
    /// The BARs that have to lie below 4 GiB do not fit.
    #[error(
        "the 32-bit BARs and, behind root ports, those that are not prefetchable need {} below \
         4 GiB, and there is room for {}: the limit is {}; assign fewer devices",
        Bytes(*needed), Bytes(*fits), low_limit(*window)
    )]
    LowWindow {
        /// What they need, in bytes, with the ports' windows around them.
        needed: u64,
        /// How much of the window suits them, in bytes.
        fits: u64,
        /// What there is.
        window: GpaRange,
    },
    /// The 64-bit BARs fit neither above RAM nor below 4 GiB.
    #[error(
        "the 64-bit BARs need {} above {start}, and {} are free there: the limit is {bound}; ask \
         for less RAM, or assign fewer devices",
        Bytes(*needed), Bytes(*free)
    )]
    HighWindow {
        /// What they need, in bytes.
        needed: u64,
        /// The largest run of addresses that suits them, in bytes.
        free: u64,
        /// Where RAM ends.
        start: Gpa,
        /// What the limit is.
        bound: Bound,
    },
}
