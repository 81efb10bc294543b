//! What went wrong on the simulated host, and what must never go wrong.

use std::fmt;
use std::sync::Arc;

use assigned_pci::BarIndex;
use memory_map::{Iova, IovaRange};

use crate::ContainerId;

/// A DMA access that the IOMMU refused. No data moved; a read got all ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The function that issued it.
    pub function: Arc<str>,
    /// The first byte that was refused.
    pub iova: Iova,
    /// Whether it was a write.
    pub write: bool,
    /// Why.
    pub cause: FaultCause,
}

/// Why the IOMMU refused an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultCause {
    /// Nothing is mapped there.
    NotMapped,
    /// What is mapped there is read-only.
    ReadOnly,
    /// The function's group is in no container, and attached to no address space of an iommufd.
    NoContainer,
    /// What is mapped there is a dma-buf's that was revoked: dead, until it is mapped anew.
    Revoked,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: DMA {} at {} faults: {}",
            self.function,
            direction(self.write),
            self.iova,
            match self.cause {
                FaultCause::NotMapped => "not mapped",
                FaultCause::ReadOnly => "mapped read-only",
                FaultCause::NoContainer => "its group is in no container",
                FaultCause::Revoked => "what is mapped was revoked",
            }
        )
    }
}

/// A DMA access that the IOMMU let through, or that never reached it, and that nobody answered.
/// No data moved; a read got all ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusError {
    /// The function that issued it.
    pub function: Arc<str>,
    /// The first byte that was not answered.
    pub iova: Iova,
    /// Whether it was a write.
    pub write: bool,
    /// Why.
    pub cause: BusErrorCause,
}

/// Why nobody answered an access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusErrorCause {
    /// The function may not issue DMA: its bus master enable is off.
    BusMasteringOff,
    /// The peer whose BAR is mapped there does not decode memory at the moment.
    PeerNotDecoding {
        /// The peer.
        peer: Arc<str>,
        /// Its BAR.
        bar: BarIndex,
    },
    /// The engine was given an address outside its own buffer.
    BufferOutOfRange {
        /// That address.
        buffer: u64,
        /// How many bytes were to be moved.
        count: u64,
    },
    /// Nothing lies at that address of the bus.
    Unclaimed,
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            function,
            iova,
            write,
            cause,
        } = self;
        write!(f, "{function}: DMA {} at {iova}: ", direction(*write))?;
        match cause {
            BusErrorCause::BusMasteringOff => f.write_str("its bus mastering is off"),
            BusErrorCause::PeerNotDecoding { peer, bar } => {
                write!(f, "{peer} does not decode {bar}")
            }
            BusErrorCause::BufferOutOfRange { buffer, count } => write!(
                f,
                "{count:#x} bytes at {buffer:#x} do not lie within the engine's buffer"
            ),
            BusErrorCause::Unclaimed => f.write_str("nothing is there"),
        }
    }
}

/// Something that must never happen, whatever a guest or a device does: the code under test has
/// left a device able to reach what is no longer its to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// A host address was taken away while an IOMMU mapping made from it was still there.
    FreedWhileMapped {
        /// Whose mapping.
        container: ContainerId,
        /// Where.
        iova: IovaRange,
        /// Of what.
        object: Arc<str>,
    },
    /// A function really used such a mapping.
    DmaToFreed {
        /// The function.
        function: Arc<str>,
        /// Where.
        iova: Iova,
        /// Whether it was a write.
        write: bool,
    },
    /// A function stopped decoding memory while its BAR was still mapped. Type1 does not revoke.
    DecodingOffWhileMapped {
        /// Whose mapping.
        container: ContainerId,
        /// Where.
        iova: IovaRange,
        /// Of what.
        object: Arc<str>,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FreedWhileMapped {
                container,
                iova,
                object,
            } => write!(
                f,
                "the host address of {object} was taken away while {container} had it at {iova}"
            ),
            Self::DmaToFreed {
                function,
                iova,
                write,
            } => write!(
                f,
                "{function}: DMA {} at {iova} through a mapping of freed memory",
                direction(*write)
            ),
            Self::DecodingOffWhileMapped {
                container,
                iova,
                object,
            } => write!(
                f,
                "{object} stopped being decoded while {container} had it at {iova}"
            ),
        }
    }
}

fn direction(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}

/// All that was recorded.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    pub faults: Vec<Fault>,
    pub bus_errors: Vec<BusError>,
    pub violations: Vec<Violation>,
}
