//! What the contract of iommufd is tried on.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use assigned_pci::HostFunction;
use dma_engine::DmaEngine;
use iommu::IoAddressSpace;
use memory_map::{Access, Backing, HostVa, IovaRange};

use crate::Window;

/// A host whose iommufd is to be held to the contract.
pub trait IommufdHost {
    /// A fresh iommufd with an address space in which nothing is mapped and to which both
    /// functions are attached, and what it takes to try it. At most one lives at a time.
    ///
    /// # Errors
    /// Where the host cannot give one.
    fn bench(&self) -> io::Result<Box<dyn Bench + '_>>;
}

/// One of the bench's functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    /// The one with a DMA engine.
    Engine,
    /// The one with a memory BAR.
    Memory,
}

/// An iommufd with two functions: one with a DMA engine, one with a memory BAR. Both decode
/// memory and master the bus.
pub trait Bench {
    /// The address space that both were attached to.
    fn ioas(&self) -> Arc<dyn IoAddressSpace>;

    /// Makes another one. The bench holds it until [`destroy`](Self::destroy).
    ///
    /// # Errors
    /// The kernel's errno.
    fn alloc(&self) -> io::Result<Arc<dyn IoAddressSpace>>;

    /// Lets go of one that [`alloc`](Self::alloc) made.
    fn destroy(&self, ioas: Arc<dyn IoAddressSpace>);

    /// Attaches a function, also one that is attached elsewhere.
    ///
    /// # Errors
    /// The kernel's errno; `EINVAL` where the other function would move along.
    fn attach(&self, function: Function, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<()>;

    /// The same along with all of its group that are attached.
    ///
    /// # Errors
    /// The kernel's errno.
    fn attach_group(&self, function: Function, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<()>;

    /// Detaches a function.
    ///
    /// # Errors
    /// The kernel's errno.
    fn detach(&self, function: Function) -> io::Result<()>;

    /// Whether both functions are in one IOMMU group.
    fn share_a_group(&self) -> bool;

    /// A memfd of RAM, of [`ram_size`](Self::ram_size) bytes.
    fn ram(&self) -> BorrowedFd<'_>;

    /// The same as a backing.
    fn ram_backing(&self) -> Backing;

    /// At least 32 pages.
    fn ram_size(&self) -> u64;

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

    /// A file that is no memory.
    fn no_memory(&self) -> BorrowedFd<'_>;

    /// Memory of at least 4 pages without a file.
    fn anonymous(&self) -> Window;

    /// Reads from that, by no IOMMU.
    ///
    /// # Errors
    /// Where the bytes do not lie within it.
    fn anonymous_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// [`IoAddressSpace::map`], safe because only addresses of [`anonymous`](Self::anonymous) and
    /// of the BAR, and such as have nothing behind them, are passed on.
    ///
    /// # Errors
    /// As `map`; an error without an errno for any other address.
    fn map_address(
        &self,
        ioas: &Arc<dyn IoAddressSpace>,
        iova: IovaRange,
        vaddr: HostVa,
        access: Access,
    ) -> io::Result<()>;

    /// The memory BAR's host address. It has at least 16 pages.
    fn bar(&self) -> Window;

    /// The memory BAR as a dma-buf of its size.
    fn dma_buf(&self) -> BorrowedFd<'_>;

    /// The same as a backing.
    fn bar_backing(&self) -> Backing;

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

    /// The function with the BAR. It can be reset, and put to sleep, if [`resetting_cases`] are tried.
    ///
    /// [`resetting_cases`]: super::resetting_cases
    fn memory(&self) -> Arc<dyn HostFunction>;

    /// Resets the bus of the function with the BAR, on which there must be nobody else's
    /// (`VFIO_DEVICE_PCI_HOT_RESET`).
    ///
    /// # Errors
    /// The kernel's errno.
    fn hot_reset(&self) -> io::Result<()>;

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

    /// The engine, whose DMA goes through what it is attached to.
    fn engine(&mut self) -> &mut dyn DmaEngine;

    /// Limits how much memory may be locked (`RLIMIT_MEMLOCK`, without `CAP_IPC_LOCK`) until what
    /// is returned is dropped. Nothing else of this user is locked.
    ///
    /// # Errors
    /// Where the host cannot do that.
    fn limit_locked_memory(&self, bytes: u64) -> io::Result<Box<dyn Any>>;
}
