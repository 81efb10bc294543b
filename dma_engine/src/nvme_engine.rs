//! An NVMe controller as a DMA engine, with blocks of its disk as the buffer.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::HostFunction;
use memory_map::Iova;

use crate::engine::copy_in_pieces;
use crate::{DmaEngine, EngineError, EngineMemory, Nvme, NvmeError};

/// Blocks of a disk that an engine may overwrite.
///
/// There is no default: whoever makes one says that these blocks of this disk may be lost. They
/// are saved before they are first overwritten and put back at the end, but not if the process is
/// killed in between, or the controller fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScratchBlocks {
    first: u64,
    end: u64,
}

/// Why a text names no scratch blocks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no blocks: wanted is FIRST..END, such as 2048..2056, where END is the first block \
     that is not meant"
)]
pub struct ScratchBlocksError(String);

impl ScratchBlocks {
    /// From the block `first` up to, and without, the block `end`; `None` if that is none.
    #[must_use]
    pub fn new(first: u64, end: u64) -> Option<Self> {
        (first < end).then_some(Self { first, end })
    }

    const fn count(self) -> u64 {
        self.end.saturating_sub(self.first)
    }
}

impl fmt::Display for ScratchBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.end)
    }
}

impl FromStr for ScratchBlocks {
    type Err = ScratchBlocksError;

    /// Reads `FIRST..END`, in decimal.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.parse().ok();
        text.split_once("..")
            .and_then(|(first, end)| Self::new(number(first)?, number(end)?))
            .ok_or_else(|| ScratchBlocksError(text.to_owned()))
    }
}

/// The most that is used of the scratch blocks, in bytes.
const MOST: u64 = 64 << 10;
const BOUNCE: u64 = 4096;

/// The engine: [`load`](DmaEngine::load) writes from the bus to the scratch blocks,
/// [`store`](DmaEngine::store) reads from there to the bus. Lengths are whole blocks, addresses
/// multiples of four.
///
/// Nothing is accessed before the first transfer. The scratch blocks are put back by
/// [`finish`](DmaEngine::finish), and when the engine is dropped, for which the lent memory must
/// still be mapped.
#[derive(Debug)]
pub struct NvmeEngine {
    nvme: Nvme,
    scratch: ScratchBlocks,
    /// What was in the scratch blocks, while it is not there.
    saved: Option<Vec<u8>>,
}

impl NvmeEngine {
    /// An engine of `function`, which must be an NVMe controller, with [`Nvme::MEMORY`] bytes lent
    /// to it, that may overwrite these blocks of its first namespace.
    #[must_use]
    pub fn new(
        function: Arc<dyn HostFunction>,
        memory: Box<dyn EngineMemory>,
        scratch: ScratchBlocks,
    ) -> Self {
        Self {
            nvme: Nvme::new(function, memory),
            scratch,
            saved: None,
        }
    }

    /// See [`Nvme::with_time_limit`].
    #[must_use]
    pub fn with_time_limit(mut self, limit: Duration) -> Self {
        self.nvme.set_time_limit(limit);
        self
    }

    /// The block size, and how many bytes the scratch blocks hold of which use is made.
    fn extent(&mut self) -> Result<(u64, u64), NvmeError> {
        let identity = self.nvme.enable()?;
        let (block, has) = (identity.block_size, identity.blocks);
        let most = MOST.min(identity.max_transfer);
        if self.scratch.end > has {
            return Err(NvmeError::Blocks {
                function: self.nvme.function().name(),
                first: self.scratch.first,
                count: self.scratch.count(),
                has,
            });
        }
        let size = self.scratch.count().saturating_mul(block).min(most);
        Ok((block, size / block * block))
    }

    fn check(&mut self, len: u64) -> Result<(), NvmeError> {
        let (block, most) = self.extent()?;
        if len == 0 || len > most || !len.is_multiple_of(block) {
            return Err(NvmeError::Length { len, block, most });
        }
        Ok(())
    }

    /// Reads the scratch blocks by way of the bounce page.
    fn save(&mut self) -> Result<(), NvmeError> {
        if self.saved.is_some() {
            return Ok(());
        }
        let (block, size) = self.extent()?;
        let mut saved = Vec::new();
        for (number, len) in bounces(self.scratch.first, size, block) {
            self.nvme.read(number, self.nvme.bounce(), len)?;
            let mut data = vec![0; usize::try_from(len).unwrap_or_default()];
            self.nvme.bounce_read(&mut data)?;
            saved.extend(data);
        }
        self.saved = Some(saved);
        Ok(())
    }

    /// Writes them back.
    fn put_back(&mut self) -> Result<(), NvmeError> {
        let Some(saved) = self.saved.take() else {
            return Ok(());
        };
        let done = self.write_all(&saved);
        if done.is_err() {
            // To be tried again.
            self.saved = Some(saved);
        }
        done
    }

    fn write_all(&mut self, saved: &[u8]) -> Result<(), NvmeError> {
        let (block, size) = self.extent()?;
        let pieces = bounces(self.scratch.first, size, block);
        let bounce = usize::try_from(BOUNCE).unwrap_or(usize::MAX);
        for ((number, len), data) in pieces.zip(saved.chunks(bounce)) {
            // Enabling the controller anew, if need be, clears the bounce page: so that comes
            // first.
            self.nvme.enable()?;
            self.nvme.bounce_write(data)?;
            self.nvme.write(number, self.nvme.bounce(), len)?;
        }
        Ok(())
    }
}

/// Cuts `size` bytes from block `first` on into pieces of a bounce page: the first block of each,
/// and its length in bytes.
fn bounces(first: u64, size: u64, block: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = BOUNCE / block;
    (0..size.div_ceil(BOUNCE)).map(move |piece| {
        let left = size.saturating_sub(piece.saturating_mul(BOUNCE));
        let number = first.saturating_add(piece.saturating_mul(step));
        (number, left.min(BOUNCE))
    })
}

impl DmaEngine for NvmeEngine {
    fn name(&self) -> String {
        format!("NVMe controller of {}", self.nvme.function().name())
    }

    /// Before the first transfer, what can be said for sure.
    fn max_transfer(&self) -> u64 {
        let least = self.scratch.count().saturating_mul(512).min(BOUNCE);
        let known = self.saved.as_ref().map(Vec::len);
        known
            .and_then(|len| u64::try_from(len).ok())
            .unwrap_or(least)
    }

    fn last_address(&self) -> Iova {
        Iova::new(u64::MAX)
    }

    fn load(&mut self, from: Iova, len: u64) -> Result<(), EngineError> {
        self.check(len)?;
        self.save()?;
        Ok(self.nvme.write(self.scratch.first, from, len)?)
    }

    fn store(&mut self, to: Iova, len: u64) -> Result<(), EngineError> {
        self.check(len)?;
        Ok(self.nvme.read(self.scratch.first, to, len)?)
    }

    fn copy(&mut self, from: Iova, to: Iova, len: u64) -> Result<(), EngineError> {
        // How much one transfer can move is known only now.
        self.save()?;
        copy_in_pieces(self, from, to, len)
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        self.put_back()?;
        Ok(self.nvme.rest()?)
    }
}

impl Drop for NvmeEngine {
    fn drop(&mut self) {
        // Who wants to know calls `finish`.
        let _ = self.put_back();
    }
}

#[cfg(test)]
#[path = "nvme_engine_tests.rs"]
mod tests;
