//! Why a function cannot be assigned.

use std::fmt;

use memory_map::{ChangeError, Errno};

use crate::{BarIndex, MsiKind};

/// Why an [`AssignedFunction`](crate::AssignedFunction) was not made. The map is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FunctionError {
    /// The host would not read config space.
    #[error("{function}: reading config space at {offset:#x} failed")]
    ConfigRead {
        /// Which function.
        function: String,
        /// Where, in bytes.
        offset: u16,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
    /// The host would not turn decoding and bus mastering off, to begin with.
    #[error("{function}: writing the command register failed")]
    CommandWrite {
        /// Which function.
        function: String,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
    /// Config space has a size that no PCI function has.
    #[error("{function}: config space has {size} bytes; a PCI function has 256 or 4096")]
    ConfigSize {
        /// Which function.
        function: String,
        /// That many bytes.
        size: u16,
    },
    /// The device does not answer.
    #[error(
        "{function}: config space reads all ones, so the device does not answer: it is gone, \
         without power (D3cold) or its link is down. Look at it with `lspci -vv`; remove and \
         rescan it, or cycle its power"
    )]
    ReadsAllOnes {
        /// Which function.
        function: String,
    },
    /// A bridge, or something that is not known.
    #[error(
        "{function}: header type {header_type:#x} is not an endpoint's; bridges cannot be \
         assigned, assign the functions behind it"
    )]
    NotAnEndpoint {
        /// Which function.
        function: String,
        /// Its header type, without the multi-function bit.
        header_type: u8,
    },
    /// The host would not tell what is behind a BAR.
    #[error("{function}: the host does not tell what is behind {bar}")]
    BarQuery {
        /// Which function.
        function: String,
        /// Which BAR.
        bar: BarIndex,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
    /// A BAR that no PCI function can have.
    #[error("{function} {bar}: {problem}; the device is broken and cannot be assigned")]
    Bar {
        /// Which function.
        function: String,
        /// Which BAR.
        bar: BarIndex,
        /// What is wrong with it.
        problem: BarProblem,
    },
    /// A capability list that cannot be followed to its end.
    #[error(
        "{function}: the {list} capability list is broken at {offset:#x}: {problem}; the device \
         cannot be assigned"
    )]
    Capability {
        /// Which function.
        function: String,
        /// Which list.
        list: CapabilityList,
        /// Where in config space the capability, or the pointer to it, lies, in bytes.
        offset: u16,
        /// What is wrong there.
        problem: CapabilityProblem,
    },
    /// An MSI-X capability that points nowhere.
    #[error(
        "{function}: the {structure} of its MSI-X capability {problem}; the device cannot be \
         assigned"
    )]
    Msix {
        /// Which function.
        function: String,
        /// Which of the two structures.
        structure: MsixStructure,
        /// What is wrong with it.
        problem: MsixProblem,
    },
    /// The host would not tell what interrupt vectors there are.
    #[error("{function}: the host does not tell what {kind} vectors there are")]
    Vectors {
        /// Which function.
        function: String,
        /// Of which kind.
        kind: MsiKind,
        /// What the kernel said.
        #[source]
        errno: Errno,
    },
    /// The map did not take the BARs' regions.
    #[error("{function}: its BARs were not added to the memory map")]
    Map {
        /// Which function.
        function: String,
        /// Why.
        #[source]
        error: ChangeError,
    },
}

/// What is wrong with a BAR (PCI Local Bus 3.0, 6.2.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BarProblem {
    /// Its size is not a power of two.
    NotPowerOfTwo {
        /// Its size in bytes.
        size: u64,
    },
    /// It is smaller than its register can say.
    TooSmall {
        /// Its size in bytes.
        size: u64,
        /// The least, in bytes.
        least: u64,
    },
    /// It is larger than its register can say.
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// The most, in bytes.
        most: u64,
    },
    /// Its type bits (2:1) are reserved ones.
    ReservedType {
        /// The register's low four bits.
        bits: u8,
    },
    /// A 64-bit BAR in the last register, which leaves none for its upper half.
    NoUpperHalf,
    /// A mappable area that reaches past the BAR's end.
    AreaPastEnd {
        /// Where the area starts in the BAR, in bytes.
        offset: u64,
        /// The area's size in bytes.
        size: u64,
        /// The BAR's size in bytes.
        bar_size: u64,
    },
}

impl fmt::Display for BarProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPowerOfTwo { size } => {
                write!(f, "its size of {size:#x} bytes is not a power of two")
            }
            Self::TooSmall { size, least } => write!(
                f,
                "its size of {size:#x} bytes is less than the least there is, {least:#x}"
            ),
            Self::TooLarge { size, most } => write!(
                f,
                "its size of {size:#x} bytes is more than its register can say, {most:#x}"
            ),
            Self::ReservedType { bits } => {
                write!(f, "its type bits {bits:#06b} are reserved")
            }
            Self::NoUpperHalf => f.write_str("a 64-bit BAR in the last register has no upper half"),
            Self::AreaPastEnd {
                offset,
                size,
                bar_size,
            } => write!(
                f,
                "its mappable area of {size:#x} bytes at {offset:#x} reaches past its end at \
                 {bar_size:#x}"
            ),
        }
    }
}

/// One of a function's two capability lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CapabilityList {
    /// In the first 256 bytes, from the pointer at 0x34 (PCI Local Bus 3.0, 6.7).
    Standard,
    /// From 0x100 on (PCI Express Base 6.0, 7.6).
    Extended,
}

impl fmt::Display for CapabilityList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Standard => "standard",
            Self::Extended => "extended",
        })
    }
}

/// What is wrong with a capability list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CapabilityProblem {
    /// A pointer that is not a multiple of four.
    Misaligned,
    /// A pointer to before where capabilities can lie.
    TooLow {
        /// The first offset that they can have, in bytes.
        first: u16,
    },
    /// A pointer back to a capability that came before.
    Cyclic,
    /// A capability that reaches past the end of its space.
    Truncated {
        /// Its length in bytes.
        length: u16,
        /// Where the space ends, in bytes.
        end: u16,
    },
}

impl fmt::Display for CapabilityProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned => f.write_str("that is not a multiple of four"),
            Self::TooLow { first } => write!(f, "no capability can lie below {first:#x}"),
            Self::Cyclic => f.write_str("the list comes back here, it would never end"),
            Self::Truncated { length, end } => write!(
                f,
                "the capability has {length:#x} bytes and reaches past {end:#x}"
            ),
        }
    }
}

/// What an MSI-X capability points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MsixStructure {
    /// The table of vectors.
    Table,
    /// The pending-bit array.
    PendingBits,
}

impl fmt::Display for MsixStructure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Table => "table",
            Self::PendingBits => "pending-bit array",
        })
    }
}

/// What is wrong with where an MSI-X structure lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MsixProblem {
    /// The BAR indicator is 6 or 7.
    ReservedIndicator {
        /// The indicator.
        indicator: u8,
    },
    /// The BAR does not exist, or is no memory BAR.
    NoSuchBar {
        /// Which.
        bar: BarIndex,
    },
    /// It reaches past its BAR's end.
    PastEnd {
        /// Which BAR.
        bar: BarIndex,
        /// Where the structure starts, in bytes.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The BAR's size in bytes.
        bar_size: u64,
    },
}

impl fmt::Display for MsixProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservedIndicator { indicator } => {
                write!(f, "names BAR {indicator}, which no function has")
            }
            Self::NoSuchBar { bar } => {
                write!(f, "is said to be in {bar}, which is no memory BAR")
            }
            Self::PastEnd {
                bar,
                offset,
                size,
                bar_size,
            } => write!(
                f,
                "has {size:#x} bytes at {offset:#x} of {bar}, which ends at {bar_size:#x}"
            ),
        }
    }
}
