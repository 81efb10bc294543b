//! What kind of NVMe controller is to be plugged in, and its disk.

use std::sync::Arc;

use crate::OutOfBounds;
use crate::sparse::SparseMemory;

/// A disk in memory; clones are handles on the same one. It reads as zeroes until written.
#[derive(Debug, Clone)]
pub struct SimDisk {
    pub(crate) memory: Arc<SparseMemory>,
    /// The block size as a power of two.
    pub(crate) shift: u8,
    pub(crate) blocks: u64,
}

impl SimDisk {
    /// A disk of `blocks` blocks of 512 bytes.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self::with_block_shift(blocks, 9)
    }

    /// A disk of `blocks` blocks of 2^`shift` bytes; what does not fit 64 bits is left out.
    #[must_use]
    pub fn with_block_shift(blocks: u64, shift: u8) -> Self {
        let block = 1_u64.checked_shl(shift.into()).unwrap_or(0);
        Self {
            memory: Arc::new(SparseMemory::new(blocks.saturating_mul(block))),
            shift,
            blocks,
        }
    }

    /// Reads at an offset in bytes, as somebody who has the disk's file open.
    ///
    /// # Errors
    /// Where the bytes do not all lie on the disk.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        self.memory.read(offset, data)
    }

    /// Writes at an offset in bytes, likewise.
    ///
    /// # Errors
    /// Where the bytes do not all lie on the disk.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        self.memory.write(offset, data)
    }
}

/// What is wrong with a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NvmeFlaw {
    /// It never becomes ready when it is enabled.
    NeverReady,
    /// It fails when it is enabled (CSTS.CFS).
    FailsWhenEnabled,
    /// It never stops when it is disabled.
    NeverStops,
    /// It takes I/O commands and completes none.
    Silent,
    /// Its completions name another command than the one that was given.
    WrongIdentifier,
    /// It tells nonsense of itself: everything that Identify gives is all ones.
    NonsenseIdentity,
    /// Its memory buffer is said to be in a BAR that it does not have.
    NonsenseBuffer,
}

/// What kind of controller.
#[derive(Debug, Clone)]
pub(crate) struct NvmeSpec {
    pub disk: SimDisk,
    pub flaw: Option<NvmeFlaw>,
    /// In bytes; zero for none.
    pub buffer: u64,
}
