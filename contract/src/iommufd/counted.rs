//! An address space whose calls are counted.
#![expect(
    unsafe_code,
    reason = "IoAddressSpace::map is unsafe for the sake of real memory; here it is passed on"
)]

use std::fmt;
use std::io;
use std::ops::Sub;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iommu::IoAddressSpace;
use memory_map::{Access, HostVa, Iova, IovaRange};
use serde::Serialize;
use vfio_sys::{IoasId, IoasRanges, IommufdId};

/// How often an address space was asked for what, whatever it answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// `IOMMU_IOAS_MAP_FILE` and `IOMMU_IOAS_MAP`.
    pub maps: u64,
    /// `IOMMU_IOAS_COPY`.
    pub copies: u64,
    /// `IOMMU_IOAS_UNMAP`.
    pub unmaps: u64,
    /// All others: ranges, promises, options.
    pub others: u64,
}

impl Calls {
    /// All of them.
    #[must_use]
    pub const fn total(&self) -> u64 {
        let Self {
            maps,
            copies,
            unmaps,
            others,
        } = *self;
        maps.saturating_add(copies)
            .saturating_add(unmaps)
            .saturating_add(others)
    }

    /// Of each, where there were so many.
    pub(crate) fn each(self, times: u64) -> Self {
        let each = |calls: u64| calls.checked_div(times).unwrap_or(0);
        Self {
            maps: each(self.maps),
            copies: each(self.copies),
            unmaps: each(self.unmaps),
            others: each(self.others),
        }
    }
}

impl Sub for Calls {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            maps: self.maps.saturating_sub(before.maps),
            copies: self.copies.saturating_sub(before.copies),
            unmaps: self.unmaps.saturating_sub(before.unmaps),
            others: self.others.saturating_sub(before.others),
        }
    }
}

/// An address space that passes on what it is asked for, and counts.
pub struct Counted {
    inner: Arc<dyn IoAddressSpace>,
    maps: AtomicU64,
    copies: AtomicU64,
    unmaps: AtomicU64,
    others: AtomicU64,
}

impl fmt::Debug for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.calls().fmt(f)
    }
}

impl Counted {
    /// Of another one.
    #[must_use]
    pub fn new(inner: Arc<dyn IoAddressSpace>) -> Self {
        Self {
            inner,
            maps: AtomicU64::new(0),
            copies: AtomicU64::new(0),
            unmaps: AtomicU64::new(0),
            others: AtomicU64::new(0),
        }
    }

    /// The calls so far.
    pub fn calls(&self) -> Calls {
        Calls {
            maps: self.maps.load(Ordering::Relaxed),
            copies: self.copies.load(Ordering::Relaxed),
            unmaps: self.unmaps.load(Ordering::Relaxed),
            others: self.others.load(Ordering::Relaxed),
        }
    }

    fn count<T>(&self, calls: &AtomicU64, call: impl FnOnce(&dyn IoAddressSpace) -> T) -> T {
        calls.fetch_add(1, Ordering::Relaxed);
        call(&*self.inner)
    }
}

impl IoAddressSpace for Counted {
    fn id(&self) -> IoasId {
        self.inner.id()
    }

    fn iommufd(&self) -> IommufdId {
        self.inner.iommufd()
    }

    fn ranges(&self) -> io::Result<IoasRanges> {
        self.count(&self.others, |ioas| ioas.ranges())
    }

    fn allow(&self, ranges: &[IovaRange]) -> io::Result<()> {
        self.count(&self.others, |ioas| ioas.allow(ranges))
    }

    fn map_file(
        &self,
        iova: IovaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> io::Result<()> {
        self.count(&self.maps, |ioas| ioas.map_file(iova, file, offset, access))
    }

    unsafe fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        // SAFETY: the caller vouches for the memory, in the same words.
        self.count(&self.maps, |ioas| unsafe { ioas.map(iova, vaddr, access) })
    }

    fn copy(&self, iova: IovaRange, source: IoasId, from: Iova, access: Access) -> io::Result<()> {
        self.count(&self.copies, |ioas| ioas.copy(iova, source, from, access))
    }

    fn unmap(&self, iova: IovaRange) -> io::Result<u64> {
        self.count(&self.unmaps, |ioas| ioas.unmap(iova))
    }

    fn unmap_all(&self) -> io::Result<u64> {
        self.count(&self.unmaps, |ioas| ioas.unmap_all())
    }

    fn huge_pages(&self) -> io::Result<bool> {
        self.count(&self.others, |ioas| ioas.huge_pages())
    }

    fn set_huge_pages(&self, on: bool) -> io::Result<()> {
        self.count(&self.others, |ioas| ioas.set_huge_pages(on))
    }
}
