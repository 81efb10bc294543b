//! What a VFIO type1 (v2) container does, whoever plays it.
#![expect(
    unsafe_code,
    reason = "mapping memory for DMA is unsafe by nature; see map_dma"
)]

use std::io;

use memory_map::{Access, HostVa, IovaRange};
use vfio_sys::{Container, Type1Info};

/// What a type1 v2 container does, as the kernel's ABI has it (`linux/vfio.h`). The real
/// container and the simulated one both implement it, and the crate `contract` holds both to the
/// same behaviour, errno for errno.
pub trait Type1Container: Send + Sync {
    /// Page sizes, allowed ranges and entries left (`VFIO_IOMMU_GET_INFO`).
    ///
    /// # Errors
    /// The kernel's errno.
    fn info(&self) -> io::Result<Type1Info>;

    /// Maps the memory at `vaddr` for DMA at `iova` (`VFIO_IOMMU_MAP_DMA`).
    ///
    /// # Errors
    /// `EEXIST` where part of the range is mapped, `EINVAL` for a misaligned or reserved range,
    /// `ENOSPC` past the entry limit, `ENOMEM` past `RLIMIT_MEMLOCK`, `EFAULT` for an address
    /// with nothing behind it. Nothing is mapped then.
    ///
    /// # Safety
    /// The bytes from `vaddr` on, as many as `iova` has, must be a mapping of this process that
    /// stays in place until the IOMMU mapping is taken down, and whose contents may change (and
    /// for read-only access, be read) at any moment without breaking what the compiler assumes:
    /// never memory that Rust references point into.
    unsafe fn map_dma(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()>;

    /// Takes down all mappings in `iova` and tells how many bytes they had
    /// (`VFIO_IOMMU_UNMAP_DMA`).
    ///
    /// # Errors
    /// `EINVAL` where the range would bisect a mapping, or is misaligned. Nothing is unmapped
    /// then.
    fn unmap_dma(&self, iova: IovaRange) -> io::Result<u64>;

    /// Takes down all mappings there are (`VFIO_DMA_UNMAP_FLAG_ALL`, Linux 5.12).
    ///
    /// # Errors
    /// The kernel's errno.
    fn unmap_all(&self) -> io::Result<u64>;
}

impl Type1Container for Container {
    fn info(&self) -> io::Result<Type1Info> {
        Ok(Self::info(self)?)
    }

    unsafe fn map_dma(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        // SAFETY: the caller vouches for the memory, in the same words.
        unsafe { Self::map_dma(self, iova, vaddr, access) }
    }

    fn unmap_dma(&self, iova: IovaRange) -> io::Result<u64> {
        Self::unmap_dma(self, iova)
    }

    fn unmap_all(&self) -> io::Result<u64> {
        Self::unmap_all(self)
    }
}
