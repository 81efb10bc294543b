//! What the contract is tried on.

use std::any::Any;
use std::io;

use dma_engine::DmaEngine;
use iommu::Type1Container;
use memory_map::{Access, HostVa, IovaRange};

/// Bytes at host addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Where they start; a multiple of 4 KiB.
    pub address: HostVa,
    /// How many there are; a multiple of 4 KiB.
    pub size: u64,
}

/// A host whose type1 is to be held to the contract.
pub trait Type1Host {
    /// A fresh container with its IOMMU set and nothing mapped, and what it takes to try it. At
    /// most one lives at a time.
    ///
    /// # Errors
    /// Where the host cannot give one.
    fn bench(&self) -> io::Result<Box<dyn Bench + '_>>;
}

/// A container with two functions: one with a DMA engine, one with a memory BAR. Both decode
/// memory and master the bus.
pub trait Bench {
    /// The container.
    fn container(&self) -> &dyn Type1Container;

    /// [`Type1Container::map_dma`], safe because only addresses of [`ram`](Self::ram) and of
    /// [`bar`](Self::bar), and such as have nothing behind them, are passed on.
    ///
    /// # Errors
    /// As `map_dma`; an error without an errno for any other address.
    fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()>;

    /// RAM of at least 16 pages, with nothing behind the page that follows it.
    fn ram(&self) -> Window;

    /// Reads from the RAM, by no IOMMU.
    ///
    /// # Errors
    /// Where the bytes do not lie within it.
    fn ram_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes to the RAM, by no IOMMU.
    ///
    /// # Errors
    /// Where the bytes do not lie within it.
    fn ram_write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// The memory BAR, of at least 16 pages.
    fn bar(&self) -> Window;

    /// Reads 8 bytes from the BAR, by no IOMMU.
    ///
    /// # Errors
    /// As [`HostFunction::bar_read`](assigned_pci::HostFunction::bar_read).
    fn bar_read(&self, offset: u64) -> io::Result<[u8; 8]>;

    /// Writes 8 bytes to the BAR, by no IOMMU.
    ///
    /// # Errors
    /// As [`HostFunction::bar_write`](assigned_pci::HostFunction::bar_write).
    fn bar_write(&self, offset: u64, data: [u8; 8]) -> io::Result<()>;

    /// Has the function with the BAR decode memory, or not.
    ///
    /// # Errors
    /// As [`HostFunction::config_write`](assigned_pci::HostFunction::config_write).
    fn set_decoding(&self, on: bool) -> io::Result<()>;

    /// Has the function with the engine master the bus, or not.
    ///
    /// # Errors
    /// As [`HostFunction::config_write`](assigned_pci::HostFunction::config_write).
    fn set_mastering(&self, on: bool) -> io::Result<()>;

    /// A second container, which no group has joined: it has no IOMMU.
    ///
    /// # Errors
    /// Where the host cannot open one.
    fn without_iommu(&self) -> io::Result<Box<dyn Type1Container>>;

    /// The engine, whose DMA goes through the container.
    fn engine(&mut self) -> &mut dyn DmaEngine;

    /// Limits how much memory may be locked (`RLIMIT_MEMLOCK`, without `CAP_IPC_LOCK`) until what
    /// is returned is dropped.
    ///
    /// # Errors
    /// Where the host cannot do that.
    fn limit_locked_memory(&self, bytes: u64) -> io::Result<Box<dyn Any>>;
}
