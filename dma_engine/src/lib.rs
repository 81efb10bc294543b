//! Drivers for DMA engines that prove by bytes who reaches whom.
//!
//! A [`DmaEngine`] copies from the bus into its own buffer and back: QEMU's edu ([`Edu`]), and NVMe
//! controllers ([`NvmeEngine`]), whose buffer is blocks of their disk that the caller gives up. The
//! caller owns the assigned function: it opens it, has it decode memory and master the bus, and
//! keeps it so while the engine is used. A driver does none of that: without memory decoding it
//! fails with `EIO`, and without bus mastering no byte moves.
//!
//! [`Nvme`] reads blocks of a disk to any bus address and writes them from there, and
//! [`ControllerMemoryBuffer`] makes an NVMe controller's own memory a peer for others.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use assigned_pci::HostFunction;
//! # use memory_map::Iova;
//! # fn example(function: &Arc<dyn HostFunction>) -> Result<(), dma_engine::EngineError> {
//! if let Some(mut engine) = dma_engine::find_engine(function) {
//!     engine.copy(Iova::new(0x10_0000), Iova::new(0xc000_0000), 4096)?;
//! }
//! # Ok(()) }
//! ```

mod edu;
mod engine;
mod engine_memory;
mod nvme;
mod nvme_engine;

pub use edu::Edu;
pub use engine::{DmaEngine, EngineError, find_engine};
pub use engine_memory::EngineMemory;
pub use nvme::{
    BufferProblem, ControllerMemoryBuffer, Nvme, NvmeCommand, NvmeError, NvmeIdentity, NvmeStatus,
};
pub use nvme_engine::{NvmeEngine, ScratchBlocks, ScratchBlocksError};
