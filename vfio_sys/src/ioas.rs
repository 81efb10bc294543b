//! An IOAS: one I/O address space of an iommufd, which devices are attached to.
//!
//! ```text
//! Iommufd ◀──holds── Ioas ◀──holds── Device (attached)
//!                     ▲
//!                     └──holds── a DMA target that maps here
//! ```
//!
//! The embedder makes it and shares it: a DMA target maps through it while devices are attached
//! and detached. The kernel's object is destroyed, with all its mappings, when the last handle is
//! dropped. An attached device holds one and detaches before it lets go, so nothing is left in
//! the way of that.
#![expect(
    unsafe_code,
    reason = "mapping memory by address for DMA is unsafe by nature; see Ioas::map"
)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use iommufd_bindings::iommufd::{
    iommu_iova_range, iommufd_option_IOMMU_OPTION_HUGE_PAGES,
    iommufd_option_ops_IOMMU_OPTION_OP_SET,
};
use memory_map::{Access, HostVa, Iova, IovaRange};

use crate::iommufd::OP_GET;
use crate::{Iommufd, IommufdId, iommufd_ioctls};

const OP_SET: u16 = {
    assert!(iommufd_option_ops_IOMMU_OPTION_OP_SET == 0);
    0
};

/// Names an object of an iommufd; unique in it while the object lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoasId(u32);

impl IoasId {
    /// The id as the kernel has it.
    #[must_use]
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The same.
    #[must_use]
    pub const fn raw(self) -> u32 {
        self.0
    }
}

/// Where an IOAS takes mappings (`IOMMU_IOAS_IOVA_RANGES`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoasRanges {
    /// The ranges that may be mapped, sorted and disjoint. With no device attached that is
    /// everything; each device takes something away.
    pub allowed: Vec<IovaRange>,
    /// What addresses, lengths and offsets in files must be multiples of, in bytes: the finest
    /// page of the attached devices' IOMMUs, a power of two of no more than the processor's page;
    /// 1 with no device attached.
    pub alignment: u64,
}

/// How many ranges are asked for at first. More than two are rare.
const USUAL_RANGES: usize = 16;
/// How many ranges are believed.
const MOST_RANGES: usize = 1 << 16;
/// How often there may be more than were just told of, as there can be when a device is attached.
const ATTEMPTS: usize = 8;

/// An I/O address space (Linux 6.2, `linux/iommufd.h`).
#[derive(Debug)]
pub struct Ioas {
    iommufd: Arc<Iommufd>,
    id: IoasId,
}

impl Ioas {
    /// Makes an empty one (`IOMMU_IOAS_ALLOC`).
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn alloc(iommufd: Arc<Iommufd>) -> io::Result<Self> {
        let id = IoasId(iommufd_ioctls::ioas_alloc(iommufd.as_fd())?);
        Ok(Self { iommufd, id })
    }

    /// Its id in its iommufd.
    #[must_use]
    pub const fn id(&self) -> IoasId {
        self.id
    }

    /// The iommufd that it belongs to.
    #[must_use]
    pub const fn iommufd(&self) -> &Arc<Iommufd> {
        &self.iommufd
    }

    /// The name of that iommufd in this process.
    #[must_use]
    pub fn iommufd_id(&self) -> IommufdId {
        self.iommufd.id()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.iommufd.as_fd()
    }

    /// Where mappings may lie, and what they must be multiples of. Both change when a device is
    /// attached or detached.
    ///
    /// # Errors
    /// The kernel's errno; `EMSGSIZE` where there are more ranges each time, or too many to
    /// believe; `EIO` for ranges that cannot be.
    pub fn ranges(&self) -> io::Result<IoasRanges> {
        let mut room = USUAL_RANGES;
        for _ in 0..ATTEMPTS {
            let mut ranges = vec![iommu_iova_range::default(); room];
            let told = iommufd_ioctls::ioas_iova_ranges(self.fd(), self.id.raw(), &mut ranges)?;
            let total = usize::try_from(told.total).unwrap_or(usize::MAX);
            if total <= room {
                ranges.truncate(total);
                return ranges_of(&ranges, told.alignment);
            }
            if total > MOST_RANGES {
                break;
            }
            room = total;
        }
        Err(io::Error::from_raw_os_error(libc::EMSGSIZE))
    }

    /// Says that these ranges will be mapped, so that no device is attached that cannot reach
    /// them all. The kernel then refuses such an attachment; it limits no mapping at an address
    /// of our choice. Replaces what was said before; nothing takes it all back
    /// (`IOMMU_IOAS_ALLOW_IOVAS`).
    ///
    /// # Errors
    /// `EADDRINUSE` where an attached device does not reach one of them; `EINVAL` for ranges that
    /// overlap, or one of a single byte.
    pub fn allow(&self, ranges: &[IovaRange]) -> io::Result<()> {
        let ranges: Vec<iommu_iova_range> = ranges
            .iter()
            .map(|range| iommu_iova_range {
                start: range.start().raw(),
                last: range.last().raw(),
            })
            .collect();
        iommufd_ioctls::ioas_allow_iovas(self.fd(), self.id.raw(), &ranges)
    }

    /// Maps a file from `offset` on for DMA at `iova`, as many bytes as `iova` has
    /// (`IOMMU_IOAS_MAP_FILE`, Linux 6.13): a memfd, a file on tmpfs or hugetlbfs, or, from Linux
    /// 6.19 on, a dma-buf of a VFIO device. Pages of a file are pinned once a device is attached,
    /// and count towards the user's `RLIMIT_MEMLOCK`; a dma-buf's do not.
    ///
    /// # Errors
    /// `EEXIST` where part of the range is mapped; `EINVAL` for a misaligned or reserved range,
    /// one that ends past the file, or a file of another kind; `ENOMEM` past `RLIMIT_MEMLOCK`;
    /// `ENODEV` for a dma-buf that is revoked; `ENOTTY` before Linux 6.13. Nothing is mapped
    /// then. **Success of a dma-buf says nothing if it was revoked meanwhile.**
    pub fn map_file(
        &self,
        iova: IovaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> io::Result<()> {
        iommufd_ioctls::ioas_map_file(self.fd(), self.id.raw(), iova, file, offset, access)
    }

    /// Maps the memory at `vaddr` for DMA at `iova`, as many bytes as `iova` has
    /// (`IOMMU_IOAS_MAP`). For memory that lies in no file; never for a device's, which has no
    /// pages that could be pinned.
    ///
    /// # Errors
    /// As for [`map_file`](Self::map_file); `EFAULT` for an address with nothing behind it, or
    /// device memory.
    ///
    /// # Safety
    /// Why this is unsafe: a device writes to the memory, at any moment, behind the compiler's
    /// back. The bytes from `vaddr` on must be a mapping of this process that stays in place
    /// until the IOMMU mapping is taken down, and whose contents may change (and for read-only
    /// access, be read) at any moment without breaking what the compiler assumes: never memory
    /// that Rust references point into.
    pub unsafe fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        // SAFETY: the caller vouches for the memory, in the same words.
        unsafe { iommufd_ioctls::ioas_map(self.fd(), self.id.raw(), iova, vaddr, access) }
    }

    /// Maps at `iova` what another IOAS of the same iommufd has mapped from `from` on, as many
    /// bytes as `iova` has (`IOMMU_IOAS_COPY`). Both share the pinned pages, which count once;
    /// each may be unmapped without the other.
    ///
    /// # Errors
    /// `ENOENT` for an IOAS that there is not, or where the source has a gap; `EPERM` for writing
    /// what was mapped read-only; else as for [`map_file`](Self::map_file). **Copying a dma-buf
    /// that was revoked succeeds and maps nothing.**
    pub fn copy(
        &self,
        iova: IovaRange,
        source: IoasId,
        from: Iova,
        access: Access,
    ) -> io::Result<()> {
        let source = source.raw();
        iommufd_ioctls::ioas_copy(self.fd(), self.id.raw(), iova, source, from, access)
    }

    /// Takes down all mappings in `iova` and tells how many bytes they had (`IOMMU_IOAS_UNMAP`).
    ///
    /// # Errors
    /// `ENOENT` where the range would bisect a mapping, or nothing is mapped in it; `EBUSY` where
    /// one is being made or used.
    /// **Not atomic:** mappings before the one that was refused may be gone.
    pub fn unmap(&self, iova: IovaRange) -> io::Result<u64> {
        iommufd_ioctls::ioas_unmap(self.fd(), self.id.raw(), iova.start().raw(), iova.size())
    }

    /// Takes down all mappings there are and tells how many bytes they had.
    ///
    /// # Errors
    /// `EBUSY` as for [`unmap`](Self::unmap).
    pub fn unmap_all(&self) -> io::Result<u64> {
        iommufd_ioctls::ioas_unmap(self.fd(), self.id.raw(), 0, u64::MAX)
    }

    /// Whether IOMMU pages larger than the processor's are used where they can be
    /// (`IOMMU_OPTION_HUGE_PAGES`); they are, unless it was turned off.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn huge_pages(&self) -> io::Result<bool> {
        let option = iommufd_option_IOMMU_OPTION_HUGE_PAGES;
        let id = self.id.raw();
        Ok(iommufd_ioctls::option(self.fd(), option, OP_GET, id, 0)? != 0)
    }

    /// Turns the use of larger IOMMU pages on or off.
    ///
    /// # Errors
    /// `EINVAL` for turning it off with a device attached and something mapped.
    pub fn set_huge_pages(&self, on: bool) -> io::Result<()> {
        let option = iommufd_option_IOMMU_OPTION_HUGE_PAGES;
        let id = self.id.raw();
        iommufd_ioctls::option(self.fd(), option, OP_SET, id, on.into()).map(drop)
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        // Attached devices hold the IOAS, so nothing of ours is in the way; what somebody else
        // attached to it keeps it until the iommufd is closed.
        let _ = iommufd_ioctls::destroy(self.iommufd.as_fd(), self.id.raw());
    }
}

fn ranges_of(told: &[iommu_iova_range], alignment: u64) -> io::Result<IoasRanges> {
    let impossible = || io::Error::from_raw_os_error(libc::EIO);
    let mut allowed = Vec::with_capacity(told.len());
    for range in told {
        // The last byte of the address space is never mapped, and the whole of it is no range.
        let last = range.last.min(u64::MAX - 1);
        let range = IovaRange::from_inclusive(Iova::new(range.start), Iova::new(last))
            .map_err(|_| impossible())?;
        allowed.push(range);
    }
    allowed.sort_unstable();
    let overlap = allowed
        .array_windows()
        .any(|[lower, upper]: &[IovaRange; 2]| lower.overlaps(upper));
    if overlap || !alignment.is_power_of_two() {
        return Err(impossible());
    }
    Ok(IoasRanges { allowed, alignment })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(ranges: &[(u64, u64)]) -> Vec<iommu_iova_range> {
        ranges
            .iter()
            .map(|(start, last)| iommu_iova_range {
                start: *start,
                last: *last,
            })
            .collect()
    }

    #[test]
    fn ranges_as_the_kernel_tells_them() {
        let ranges = [(0xfef0_0000, 0xffff_ffff_ffff), (0, 0xfedf_ffff)];
        let ranges = ranges_of(&told(&ranges), 0x1000).unwrap();
        let texts: Vec<String> = ranges.allowed.iter().map(IovaRange::to_string).collect();
        assert_eq!(texts, ["0x0-0xfedfffff", "0xfef00000-0xffffffffffff"]);
        assert_eq!(ranges.alignment, 0x1000);
    }

    #[test]
    fn without_a_device_everything_is_allowed() {
        let ranges = ranges_of(&told(&[(0, u64::MAX)]), 1).unwrap();
        assert_eq!(ranges.allowed[0].last().raw(), u64::MAX - 1);
        assert_eq!(ranges.alignment, 1);
    }

    #[test]
    fn impossible_answers_are_refused() {
        assert!(ranges_of(&told(&[(2, 1)]), 1).is_err());
        assert!(ranges_of(&told(&[(0, 0xfff), (0xfff, 0x1fff)]), 1).is_err());
        assert!(ranges_of(&told(&[(0, 0xfff)]), 0).is_err());
        assert!(ranges_of(&told(&[(0, 0xfff)]), 3).is_err());
    }
}
