//! One simulated I/O address space, with the rules of iommufd.
//!
//! An IOAS owns it. The order of the checks is that of the kernel's
//! `drivers/iommu/iommufd/io_pagetable.c`, because a caller sees which error comes first. As
//! there, an *area* is a range of addresses that shows a part of some *pages*, which areas of
//! several address spaces may share.

use std::collections::BTreeMap;
use std::sync::Arc;

use libc::{EADDRINUSE, EEXIST, EINVAL, ENOENT, EPERM};
use memory_map::{Access, Errno, Iova, IovaRange};

use crate::address_space::WindowId;
use crate::dma_buf::Import;
use crate::page::PAGE;
use crate::physical::PhysicalObject;

/// What pages were made from.
#[derive(Debug)]
pub(crate) enum Source {
    /// A host address, by that host mapping.
    Address(WindowId),
    /// A memfd.
    File,
    /// A dma-buf.
    DmaBuf(Import),
    /// Nothing that can be pinned; this is what comes of trying.
    Nothing(Errno),
}

/// Pages that are pinned once, however many areas show them.
#[derive(Debug)]
pub(crate) struct Pages {
    pub source: Source,
    /// None where there is nothing behind them.
    pub object: Option<Arc<PhysicalObject>>,
    /// Where in the object their first byte lies.
    pub offset: u64,
    pub writable: bool,
}

impl Pages {
    /// Whether pinning them counts as locked memory.
    pub fn counts(&self) -> bool {
        matches!(self.source, Source::Address(_) | Source::File)
    }

    /// What comes of filling an IOMMU's page table with them.
    pub fn fill(&self) -> Result<(), Errno> {
        match self.source {
            Source::Nothing(errno) => Err(errno),
            _ => Ok(()),
        }
    }
}

/// One mapping.
#[derive(Debug, Clone)]
pub(crate) struct Area {
    pub iova: IovaRange,
    pub access: Access,
    pub pages: Arc<Pages>,
    /// Where in the pages it starts, in bytes.
    pub start: u64,
}

/// What the attached devices leave to be mapped.
#[derive(Debug)]
pub(crate) struct Limits {
    /// What mappings must be multiples of.
    pub alignment: u64,
    pub allowed: Vec<IovaRange>,
}

/// The address space.
#[derive(Debug, Default)]
pub(crate) struct IoPageTable {
    areas: BTreeMap<u64, Area>,
    /// What devices that are attached from now on must leave.
    promised: Vec<IovaRange>,
    small_pages: bool,
}

const fn refused<T>(errno: i32) -> Result<T, Errno> {
    Err(Errno::new(errno))
}

/// Whether `number` is a multiple of `alignment`, a power of two.
const fn is_multiple(number: u64, alignment: u64) -> bool {
    number & alignment.wrapping_sub(1) == 0
}

impl IoPageTable {
    pub fn areas(&self) -> impl Iterator<Item = &Area> {
        self.areas.values()
    }

    /// The area that `iova` lies in.
    pub fn find(&self, iova: Iova) -> Option<&Area> {
        let (_, area) = self.areas.range(..=iova.raw()).next_back()?;
        area.iova.contains(iova).then_some(area)
    }

    fn overlaps(&self, range: IovaRange) -> bool {
        let below = self.areas.range(..=range.last().raw()).next_back();
        below.is_some_and(|(_, area)| area.iova.overlaps(&range))
    }

    /// What large pages are turned off for: alignment to the processor's pages.
    pub const fn alignment(&self) -> u64 {
        if self.small_pages { PAGE } else { 1 }
    }

    /// Whether large pages are used.
    pub const fn large_pages(&self) -> bool {
        !self.small_pages
    }

    pub fn set_large_pages(&mut self, on: bool, attached: bool) -> Result<(), Errno> {
        if !on && !self.small_pages {
            if attached && !self.areas.is_empty() {
                return refused(EINVAL);
            }
            self.check_alignment(PAGE)?;
        }
        self.small_pages = !on;
        Ok(())
    }

    /// Whether every area is made of such pages.
    fn check_alignment(&self, alignment: u64) -> Result<(), Errno> {
        let fits = |area: &Area| {
            [area.iova.start().raw(), area.iova.size(), area.start % PAGE]
                .iter()
                .all(|number| is_multiple(*number, alignment))
        };
        if self.areas().all(fits) {
            Ok(())
        } else {
            refused(EADDRINUSE)
        }
    }

    /// Whether a device may be attached that reserves these ranges and has pages of that size.
    pub fn check_device(&self, reserved: &[IovaRange], page: u64) -> Result<(), Errno> {
        let taken = |range: &IovaRange| {
            self.overlaps(*range)
                || self
                    .promised
                    .iter()
                    .any(|promised| promised.overlaps(range))
        };
        if reserved.iter().any(taken) {
            return refused(EADDRINUSE);
        }
        self.check_alignment(page)
    }

    /// Promises that these ranges stay free of what devices reserve.
    pub fn promise(&mut self, ranges: &[IovaRange], limits: &Limits) -> Result<(), Errno> {
        let mut promised: Vec<IovaRange> = Vec::new();
        for range in ranges {
            let overlap = promised.iter().any(|other| other.overlaps(range));
            if overlap || range.size() < 2 {
                return refused(EINVAL);
            }
            promised.push(*range);
        }
        let free = |range: &IovaRange| limits.allowed.iter().any(|allowed| allowed.covers(range));
        if !promised.iter().all(free) {
            return refused(EADDRINUSE);
        }
        self.promised = promised;
        Ok(())
    }

    /// Checks a mapping to be, up to the point where pages are pinned. `parts` lie side by side
    /// from `iova` on.
    pub fn check(
        &self,
        limits: &Limits,
        iova: IovaRange,
        access: Access,
        parts: &[(Arc<Pages>, u64)],
    ) -> Result<(), Errno> {
        let alignment = limits.alignment;
        if !is_multiple(iova.size(), alignment) || !is_multiple(iova.start().raw(), alignment) {
            return refused(EINVAL);
        }
        if !limits.allowed.iter().any(|range| range.covers(&iova)) {
            return refused(EINVAL);
        }
        if self.overlaps(iova) {
            return refused(EEXIST);
        }
        for (pages, start) in parts {
            if access == Access::ReadWrite && !pages.writable {
                return refused(EPERM);
            }
            if !is_multiple(start % PAGE, alignment) {
                return refused(EINVAL);
            }
        }
        Ok(())
    }

    /// Enters areas that have been checked.
    pub fn insert(&mut self, areas: Vec<Area>) {
        for area in areas {
            self.areas.insert(area.iova.start().raw(), area);
        }
    }

    /// The pages that are mapped in `range`, without a gap: those of each area with where in them
    /// it starts and how many bytes it has.
    pub fn pages(&self, range: IovaRange) -> Result<Vec<(Arc<Pages>, u64, u64)>, Errno> {
        let mut parts = Vec::new();
        let mut next = Some(range.start());
        while let Some(at) = next.filter(|at| *at <= range.last()) {
            let Some(area) = self.find(at) else {
                return refused(ENOENT);
            };
            let last = area.iova.last().min(range.last());
            let into = at.raw().wrapping_sub(area.iova.start().raw());
            let bytes = last.raw().wrapping_sub(at.raw()).saturating_add(1);
            let start = area.start.saturating_add(into);
            parts.push((Arc::clone(&area.pages), start, bytes));
            next = last.checked_add(1);
        }
        Ok(parts)
    }

    /// Takes down the areas in `range` one by one and tells how many bytes they had. One that is
    /// not wholly inside ends that, and those before it are gone.
    pub fn unmap(&mut self, range: IovaRange) -> Result<u64, Errno> {
        let mut bytes = 0u64;
        if self
            .find(range.start())
            .is_some_and(|area| !range.covers(&area.iova))
        {
            return refused(ENOENT);
        }
        while let Some((at, area)) = self
            .areas
            .range(range.start().raw()..=range.last().raw())
            .next()
        {
            if !range.covers(&area.iova) {
                return refused(ENOENT);
            }
            bytes = bytes.saturating_add(area.iova.size());
            let at = *at;
            self.areas.remove(&at);
        }
        Ok(bytes)
    }

    pub fn unmap_all(&mut self) -> u64 {
        std::mem::take(&mut self.areas)
            .values()
            .map(|area| area.iova.size())
            .fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
#[path = "io_page_table_tests.rs"]
mod tests;
