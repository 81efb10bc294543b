//! What an I/O address space (IOAS) of an iommufd does, whoever plays it.
#![expect(
    unsafe_code,
    reason = "mapping memory by address for DMA is unsafe by nature; see map"
)]

use std::io;
use std::os::fd::BorrowedFd;

use memory_map::{Access, HostVa, Iova, IovaRange};
use vfio_sys::{Ioas, IoasId, IoasRanges, IommufdId};

/// What an IOAS does, as the kernel's ABI has it (`linux/iommufd.h`). The real one and the
/// simulated one both implement it, and the crate `contract` holds both to the same behaviour,
/// errno for errno.
///
/// Files are real ones on both hosts: on the simulated one they only name what is mapped.
pub trait IoAddressSpace: Send + Sync {
    /// Its id in its iommufd.
    fn id(&self) -> IoasId;

    /// Its iommufd's name in this process.
    fn iommufd(&self) -> IommufdId;

    /// Where mappings may lie, and what they must be multiples of (`IOMMU_IOAS_IOVA_RANGES`).
    ///
    /// # Errors
    /// The kernel's errno.
    fn ranges(&self) -> io::Result<IoasRanges>;

    /// Says that these ranges will be mapped, so that no device is attached that does not reach
    /// them (`IOMMU_IOAS_ALLOW_IOVAS`).
    ///
    /// # Errors
    /// `EADDRINUSE` where an attached device does not reach one of them; `EINVAL` for ranges that
    /// overlap, or one of a single byte.
    fn allow(&self, ranges: &[IovaRange]) -> io::Result<()>;

    /// Maps a file, a memfd or a dma-buf, from `offset` on (`IOMMU_IOAS_MAP_FILE`, Linux 6.13;
    /// dma-bufs, 6.19).
    ///
    /// # Errors
    /// `EEXIST` where part of the range is mapped, `EINVAL` for a misaligned or reserved range or
    /// one past the end of the file, `ENOMEM` past `RLIMIT_MEMLOCK`, `ENODEV` for a revoked
    /// dma-buf. Nothing is mapped then. Success says nothing of a dma-buf that was revoked while
    /// it was mapped.
    fn map_file(
        &self,
        iova: IovaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> io::Result<()>;

    /// Maps the memory at `vaddr` (`IOMMU_IOAS_MAP`).
    ///
    /// # Errors
    /// As for [`map_file`](Self::map_file); `EFAULT` for an address with nothing behind it, or a
    /// device's memory.
    ///
    /// # Safety
    /// The bytes from `vaddr` on, as many as `iova` has, must be a mapping of this process that
    /// stays in place until the IOMMU mapping is taken down, and whose contents may change (and
    /// for read-only access, be read) at any moment without breaking what the compiler assumes:
    /// never memory that Rust references point into.
    unsafe fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()>;

    /// Maps what another IOAS of the same iommufd has mapped from `from` on (`IOMMU_IOAS_COPY`).
    /// The pages are pinned once.
    ///
    /// # Errors
    /// `ENOENT` for an IOAS that there is not, or where it has a gap; `EPERM` for writing what
    /// was mapped read-only; else as for [`map_file`](Self::map_file). Copying a revoked dma-buf
    /// succeeds and maps nothing.
    fn copy(&self, iova: IovaRange, source: IoasId, from: Iova, access: Access) -> io::Result<()>;

    /// Takes down all mappings in `iova` and tells how many bytes they had (`IOMMU_IOAS_UNMAP`).
    ///
    /// # Errors
    /// `ENOENT` where the range would bisect a mapping, or nothing is mapped in it; `EBUSY` where
    /// one is in use. Mappings before the one that was refused may be gone.
    fn unmap(&self, iova: IovaRange) -> io::Result<u64>;

    /// Takes down all mappings there are.
    ///
    /// # Errors
    /// The kernel's errno.
    fn unmap_all(&self) -> io::Result<u64>;

    /// Whether large IOMMU pages are used where they can be (`IOMMU_OPTION_HUGE_PAGES`).
    ///
    /// # Errors
    /// The kernel's errno.
    fn huge_pages(&self) -> io::Result<bool>;

    /// Turns the use of large IOMMU pages on or off.
    ///
    /// # Errors
    /// `EINVAL` for turning it off with a device attached and something mapped.
    fn set_huge_pages(&self, on: bool) -> io::Result<()>;
}

impl IoAddressSpace for Ioas {
    fn id(&self) -> IoasId {
        Self::id(self)
    }

    fn iommufd(&self) -> IommufdId {
        self.iommufd_id()
    }

    fn ranges(&self) -> io::Result<IoasRanges> {
        Self::ranges(self)
    }

    fn allow(&self, ranges: &[IovaRange]) -> io::Result<()> {
        Self::allow(self, ranges)
    }

    fn map_file(
        &self,
        iova: IovaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> io::Result<()> {
        Self::map_file(self, iova, file, offset, access)
    }

    unsafe fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        // SAFETY: the caller vouches for the memory, in the same words.
        unsafe { Self::map(self, iova, vaddr, access) }
    }

    fn copy(&self, iova: IovaRange, source: IoasId, from: Iova, access: Access) -> io::Result<()> {
        Self::copy(self, iova, source, from, access)
    }

    fn unmap(&self, iova: IovaRange) -> io::Result<u64> {
        Self::unmap(self, iova)
    }

    fn unmap_all(&self) -> io::Result<u64> {
        Self::unmap_all(self)
    }

    fn huge_pages(&self) -> io::Result<bool> {
        Self::huge_pages(self)
    }

    fn set_huge_pages(&self, on: bool) -> io::Result<()> {
        Self::set_huge_pages(self, on)
    }
}
