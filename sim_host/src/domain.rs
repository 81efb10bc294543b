//! One simulated IOMMU address space, with the rules of type1 v2.
//!
//! A container owns it. The order of the checks is that of the kernel's
//! `drivers/vfio/vfio_iommu_type1.c`, because a caller sees which error comes first.

use std::collections::BTreeMap;
use std::sync::Arc;

use libc::{EEXIST, EFAULT, EINVAL, ENOMEM, ENOSPC};
use memory_map::{Access, Errno, HostVa, Iova, IovaRange};

use crate::address_space::{AddressSpace, WindowId};
use crate::page::PAGE;
use crate::physical::PhysicalObject;

/// One mapping, as it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Mapping {
    pub iova: IovaRange,
    pub access: Access,
    /// The host mapping that it was made from.
    pub window: WindowId,
    pub object: Arc<PhysicalObject>,
    /// Where in the object it starts.
    pub offset: u64,
}

impl Mapping {
    /// How many pages of it count as locked memory: device memory does not.
    fn locked_pages(&self) -> u64 {
        if self.object.is_ram() {
            self.iova.size() / PAGE
        } else {
            0
        }
    }
}

/// What the process may still pin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Locked {
    /// How many pages are pinned, by all containers together.
    pub pages: u64,
    /// How many may be, if that is limited.
    pub limit: Option<u64>,
}

impl Locked {
    fn has_room_for(&self, more: u64) -> bool {
        self.limit.is_none_or(|limit| {
            self.pages
                .checked_add(more)
                .is_some_and(|pages| pages <= limit)
        })
    }
}

/// The address space and its limits.
#[derive(Debug)]
pub(crate) struct Domain {
    /// Smallest page in bytes.
    page: u64,
    allowed: Vec<IovaRange>,
    entry_limit: u32,
    mappings: BTreeMap<u64, Mapping>,
    /// How many pages of the mappings count as locked memory.
    locked: u64,
}

const fn refused<T>(errno: i32) -> Result<T, Errno> {
    Err(Errno::new(errno))
}

impl Domain {
    pub fn new(page: u64, allowed: Vec<IovaRange>, entry_limit: u32) -> Self {
        Self {
            page,
            allowed,
            entry_limit,
            mappings: BTreeMap::new(),
            locked: 0,
        }
    }

    pub fn allowed(&self) -> &[IovaRange] {
        &self.allowed
    }

    pub fn entries_left(&self) -> u32 {
        let used = u32::try_from(self.mappings.len()).unwrap_or(u32::MAX);
        self.entry_limit.saturating_sub(used)
    }

    pub fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }

    pub fn locked_pages(&self) -> u64 {
        self.locked
    }

    /// The mapping that `iova` lies in.
    pub fn find(&self, iova: Iova) -> Option<&Mapping> {
        let (_, mapping) = self.mappings.range(..=iova.raw()).next_back()?;
        mapping.iova.contains(iova).then_some(mapping)
    }

    /// Whether any mapping has a byte of `range`.
    pub fn overlaps(&self, range: IovaRange) -> bool {
        self.mappings
            .range(..=range.last().raw())
            .next_back()
            .is_some_and(|(_, mapping)| mapping.iova.overlaps(&range))
    }

    /// Takes `reserved` out of what may be mapped from now on (a group joins).
    ///
    /// Refused where something is mapped there, or where nothing would be left; nothing changes
    /// then.
    pub fn reserve(&mut self, reserved: &[IovaRange]) -> Result<(), Errno> {
        if reserved.iter().any(|range| self.overlaps(*range)) {
            return refused(EINVAL);
        }
        let allowed = exclude(&self.allowed, reserved);
        if allowed.is_empty() {
            return refused(EINVAL);
        }
        self.allowed = allowed;
        Ok(())
    }

    pub fn map(
        &mut self,
        space: &AddressSpace,
        locked: Locked,
        iova: IovaRange,
        vaddr: HostVa,
        access: Access,
    ) -> Result<(), Errno> {
        let size = iova.size();
        if !iova.start().is_aligned(self.page)
            || !vaddr.is_aligned(self.page)
            || !size.is_multiple_of(self.page)
        {
            return refused(EINVAL);
        }
        // Linux 6.12; newer kernels say EOVERFLOW.
        if vaddr.checked_add(iova.size().saturating_sub(1)).is_none() {
            return refused(EINVAL);
        }
        if self.overlaps(iova) {
            return refused(EEXIST);
        }
        if self.entries_left() == 0 {
            return refused(ENOSPC);
        }
        if !self.allowed.iter().any(|range| range.covers(&iova)) {
            return refused(EINVAL);
        }
        // From here on the kernel pins page by page. One host mapping is one object with a gap
        // after it, so that what is left over lies on nothing.
        let Some(shown) = space.find(vaddr) else {
            return refused(EFAULT);
        };
        if !shown.object.answers() {
            return refused(EFAULT);
        }
        let pinned = shown.left.min(size);
        if shown.object.is_ram() && !locked.has_room_for(pinned / PAGE) {
            return refused(ENOMEM);
        }
        if pinned < size {
            return refused(EFAULT);
        }
        let mapping = Mapping {
            iova,
            access,
            window: shown.window,
            object: shown.object,
            offset: shown.offset,
        };
        self.locked = self.locked.saturating_add(mapping.locked_pages());
        self.mappings.insert(iova.start().raw(), mapping);
        Ok(())
    }

    /// Takes down all mappings in `iova` and tells how many bytes they had.
    pub fn unmap(&mut self, iova: IovaRange) -> Result<u64, Errno> {
        if !iova.start().is_aligned(self.page) || !iova.size().is_multiple_of(self.page) {
            return refused(EINVAL);
        }
        let cut =
            |mapping: Option<&Mapping>| mapping.is_some_and(|mapping| !iova.covers(&mapping.iova));
        if cut(self.find(iova.start())) || cut(self.find(iova.last())) {
            return refused(EINVAL);
        }
        let inside: Vec<u64> = self
            .mappings
            .range(iova.start().raw()..=iova.last().raw())
            .map(|(start, _)| *start)
            .collect();
        let mut bytes = 0u64;
        for mapping in inside.iter().filter_map(|at| self.mappings.remove(at)) {
            self.locked = self.locked.saturating_sub(mapping.locked_pages());
            bytes = bytes.saturating_add(mapping.iova.size());
        }
        Ok(bytes)
    }

    pub fn unmap_all(&mut self) -> u64 {
        self.locked = 0;
        std::mem::take(&mut self.mappings)
            .values()
            .map(|mapping| mapping.iova.size())
            .fold(0, u64::saturating_add)
    }
}

/// What is left of `ranges` without `holes`.
pub(crate) fn exclude(ranges: &[IovaRange], holes: &[IovaRange]) -> Vec<IovaRange> {
    let mut left = ranges.to_vec();
    for hole in holes {
        left = left
            .into_iter()
            .flat_map(|range| {
                if !range.overlaps(hole) {
                    return [Some(range), None];
                }
                let before = hole.start().raw().checked_sub(1).and_then(|last| {
                    IovaRange::from_inclusive(range.start(), Iova::new(last)).ok()
                });
                let after = hole
                    .last()
                    .checked_add(1)
                    .and_then(|start| IovaRange::from_inclusive(start, range.last()).ok());
                [before, after]
            })
            .flatten()
            .collect();
    }
    left
}

#[cfg(test)]
#[path = "domain_tests.rs"]
mod tests;
