//! The host's address spaces, and which functions are attached to which.

use std::collections::BTreeMap;
use std::sync::Arc;

use libc::{EBUSY, EINVAL, ENODEV, ENOENT, ENOMEM};
use memory_map::{Access, Errno, Iova, IovaRange};
use vfio_sys::{IoasId, IommufdId};

use crate::domain::exclude;
use crate::host::State;
use crate::io_page_table::{Area, IoPageTable, Limits, Pages, Source};
use crate::iommufd::SimIoasMapping;
use crate::page::PAGE;
use crate::{GroupId, HostSpec};

/// Names an address space of the host. Ids are of one iommufd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct IoasKey {
    pub iommufd: IommufdId,
    pub ioas: IoasId,
}

/// Pages side by side: where in them each part starts, and how many bytes it has.
pub(crate) type Parts = Vec<(Arc<Pages>, u64, u64)>;

/// All address spaces.
#[derive(Debug, Default)]
pub(crate) struct Ioases {
    tables: BTreeMap<IoasKey, IoPageTable>,
    next: u32,
}

const fn refused<T>(errno: i32) -> Result<T, Errno> {
    Err(Errno::new(errno))
}

/// All addresses, as far as a range can have them.
fn everything() -> Vec<IovaRange> {
    IovaRange::from_inclusive(Iova::new(0), Iova::new(u64::MAX - 1))
        .into_iter()
        .collect()
}

impl State {
    pub fn add_ioas(&mut self, iommufd: IommufdId) -> IoasKey {
        // No id is used twice, though the kernel would.
        self.ioases.next = self.ioases.next.wrapping_add(1);
        let ioas = IoasId::new(self.ioases.next);
        let key = IoasKey { iommufd, ioas };
        self.ioases.tables.insert(key, IoPageTable::default());
        key
    }

    pub fn remove_ioas(&mut self, key: IoasKey) {
        self.ioases.tables.remove(&key);
        for group in self.groups.values_mut() {
            if group.ioas == Some(key) {
                group.ioas = None;
                group.attached.clear();
            }
        }
    }

    pub fn ioas(&self, key: IoasKey) -> Result<&IoPageTable, Errno> {
        self.ioases.tables.get(&key).ok_or(Errno::new(ENOENT))
    }

    pub fn ioas_mut(&mut self, key: IoasKey) -> Result<&mut IoPageTable, Errno> {
        self.ioases.tables.get_mut(&key).ok_or(Errno::new(ENOENT))
    }

    /// Whether any function is attached to it.
    pub fn is_attached(&self, key: IoasKey) -> bool {
        self.groups.values().any(|group| group.ioas == Some(key))
    }

    /// What functions of `group` keep to themselves, with what the platform does and what the
    /// IOMMU does not reach.
    fn reserved(&self, spec: &HostSpec, group: GroupId) -> Vec<IovaRange> {
        let mut reserved = exclude(&everything(), &spec.allowed());
        if let Some(group) = self.groups.get(&group) {
            reserved.extend(&group.reserved);
        }
        reserved
    }

    /// What the functions that are attached leave.
    pub fn ioas_limits(&self, spec: &HostSpec, key: IoasKey) -> Result<Limits, Errno> {
        let mut limits = Limits {
            alignment: self.ioas(key)?.alignment(),
            allowed: everything(),
        };
        for (id, group) in &self.groups {
            if group.ioas == Some(key) {
                limits.alignment = limits.alignment.max(spec.page());
                limits.allowed = exclude(&limits.allowed, &self.reserved(spec, *id));
            }
        }
        Ok(limits)
    }

    /// Attaches a function. If it is attached to something else, that is replaced, for all of its
    /// group; `alone` refuses that where there are others.
    pub fn attach(
        &mut self,
        spec: &HostSpec,
        key: IoasKey,
        function: &Arc<str>,
        alone: bool,
    ) -> Result<(), Errno> {
        let id = *self.functions.get(function).ok_or(Errno::new(ENODEV))?;
        let reserved = self.reserved(spec, id);
        let group = self.groups.get(&id).ok_or(Errno::new(ENODEV))?;
        if group.container.is_some() {
            return refused(EBUSY);
        }
        let table = self.ioas(key)?;
        if group.ioas != Some(key) {
            // Who joins a group that is attached has to be where that is.
            let moves = group.attached.contains(function);
            let others = group.attached.len() > usize::from(moves);
            if group.ioas.is_some() && (!moves || (alone && others)) {
                return refused(EINVAL);
            }
            table.check_device(&reserved, spec.page())?;
            // What is there is pinned before what was is let go.
            if !self.is_attached(key) {
                for area in table.areas() {
                    area.pages.fill()?;
                }
                self.check_locked_with(Some(key), None)?;
            }
        }
        if let Some(group) = self.groups.get_mut(&id) {
            group.ioas = Some(key);
            group.attached.insert(Arc::clone(function));
        }
        Ok(())
    }

    pub fn detach(&mut self, key: IoasKey, function: &Arc<str>) {
        let Some(id) = self.functions.get(function) else {
            return;
        };
        if let Some(group) = self.groups.get_mut(id).filter(|it| it.ioas == Some(key)) {
            group.attached.remove(function);
            if group.attached.is_empty() {
                group.ioas = None;
            }
        }
    }

    /// Maps `parts` at `iova`.
    pub fn enter(
        &mut self,
        spec: &HostSpec,
        key: IoasKey,
        iova: IovaRange,
        access: Access,
        parts: Parts,
    ) -> Result<(), Errno> {
        let limits = self.ioas_limits(spec, key)?;
        let starts: Vec<_> = parts
            .iter()
            .map(|(pages, start, _)| (Arc::clone(pages), *start))
            .collect();
        self.ioas(key)?.check(&limits, iova, access, &starts)?;
        let mut areas = Vec::new();
        let mut at = iova.start();
        for (pages, start, bytes) in parts {
            let Ok(range) = IovaRange::new(at, bytes) else {
                return refused(EINVAL);
            };
            at = range.last().checked_add(1).unwrap_or(at);
            areas.push(Area {
                iova: range,
                access,
                pages,
                start,
            });
        }
        if self.is_attached(key) {
            for area in &areas {
                area.pages.fill()?;
            }
            self.check_locked_with(None, Some(&areas))?;
        }
        self.ioas_mut(key)?.insert(areas);
        Ok(())
    }

    /// Whether there is room to pin what is mapped in the attached address spaces and, besides,
    /// in `attaching`, and `more`.
    fn check_locked_with(
        &self,
        attaching: Option<IoasKey>,
        more: Option<&[Area]>,
    ) -> Result<(), Errno> {
        let Some(limit) = self.locked_limit else {
            return Ok(());
        };
        let more = more.unwrap_or_default();
        let pages = self.pinned_pages(attaching, more);
        if pages.saturating_mul(PAGE) > limit {
            return refused(ENOMEM);
        }
        Ok(())
    }

    /// How many pages iommufd has pinned: each page of what several areas show once.
    pub fn pinned_pages(&self, attaching: Option<IoasKey>, more: &[Area]) -> u64 {
        let attached = self
            .ioases
            .tables
            .iter()
            .filter(|(key, _)| attaching == Some(**key) || self.is_attached(**key))
            .flat_map(|(_, table)| table.areas());
        let mut pinned: BTreeMap<*const Pages, Vec<(u64, u64)>> = BTreeMap::new();
        for area in attached.chain(more).filter(|area| area.pages.counts()) {
            let end = area.start.saturating_add(area.iova.size());
            let part = (area.start / PAGE, end.div_ceil(PAGE));
            pinned
                .entry(Arc::as_ptr(&area.pages))
                .or_default()
                .push(part);
        }
        pinned.into_values().map(covered).sum()
    }

    pub fn ioas_mappings(&self, key: IoasKey) -> Vec<SimIoasMapping> {
        let areas = self.ioases.tables.get(&key).into_iter();
        areas
            .flat_map(IoPageTable::areas)
            .map(|area| SimIoasMapping {
                ioas: key.ioas,
                iova: area.iova,
                access: area.access,
                object: match &area.pages.object {
                    Some(object) => Arc::clone(&object.label),
                    None => "nothing".into(),
                },
                offset: area.pages.offset.saturating_add(area.start),
                dead: self.is_dead(area),
            })
            .collect()
    }

    /// All of them.
    pub fn all_ioas_mappings(&self) -> Vec<SimIoasMapping> {
        let keys = self.ioases.tables.keys();
        keys.flat_map(|key| self.ioas_mappings(*key)).collect()
    }

    /// Whether what an area shows was revoked.
    pub fn is_dead(&self, area: &Area) -> bool {
        match &area.pages.source {
            Source::DmaBuf(import) => !self.dma_bufs.is_live(import),
            _ => false,
        }
    }
}

/// How many numbers lie in any of the half-open ranges.
fn covered(mut ranges: Vec<(u64, u64)>) -> u64 {
    ranges.sort_unstable();
    let mut end = 0u64;
    let mut total = 0u64;
    for (start, after) in ranges {
        let start = start.max(end);
        total = total.saturating_add(after.saturating_sub(start));
        end = end.max(after);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_pages_count_once() {
        assert_eq!(covered(vec![(0, 4), (2, 6), (8, 9), (8, 9)]), 7);
        assert_eq!(covered(vec![(2, 6), (0, 10), (3, 4)]), 10);
        assert_eq!(covered(vec![]), 0);
    }
}
