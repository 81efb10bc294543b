//! A page table with nothing clever about it, which says how each call must end.
//!
//! It keeps one entry for every page and knows the rules only in terms of pages, so that it can
//! be seen to be right.

use std::collections::{BTreeMap, BTreeSet};

use libc::{EEXIST, EFAULT, EINVAL, ENOMEM};

use crate::cases::PAGE;

/// What is to be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// RAM from this page on.
    Ram(u64),
    /// The BAR from this page on.
    Bar(u64),
    /// Nothing at all.
    Nowhere,
}

/// One mapped page.
#[derive(Debug, Clone, Copy)]
struct Page {
    /// Which map made it.
    map: u64,
    /// Whether it counts as locked memory.
    locked: bool,
}

/// The page table, and what it must know of the host.
#[derive(Debug)]
pub(crate) struct Model {
    pages: BTreeMap<u64, Page>,
    maps: u64,
    /// How many pages the RAM has, with nothing after them.
    pub ram_pages: u64,
    /// How many pages may be locked.
    pub locked_limit: usize,
    /// Which pages are reserved.
    pub reserved: std::ops::Range<u64>,
    /// Whether the BAR is decoded.
    pub decoding: bool,
}

impl Model {
    /// Nothing is mapped.
    pub fn new(ram_pages: u64, locked_limit: usize, reserved: std::ops::Range<u64>) -> Self {
        Self {
            pages: BTreeMap::new(),
            maps: 0,
            ram_pages,
            locked_limit,
            reserved,
            decoding: true,
        }
    }

    /// How many mappings there are.
    pub fn mappings(&self) -> usize {
        self.maps_in(|_| true).len()
    }

    fn maps_in(&self, inside: impl Fn(u64) -> bool) -> BTreeSet<u64> {
        let hit = self.pages.iter().filter(|(page, _)| inside(**page));
        hit.map(|(_, page)| page.map).collect()
    }

    /// A map of whole pages.
    pub fn map(&mut self, start: u64, count: u64, source: Source) -> Result<(), i32> {
        let wanted = start..start.saturating_add(count);
        if wanted.clone().any(|page| self.pages.contains_key(&page)) {
            return Err(EEXIST);
        }
        if wanted.clone().any(|page| self.reserved.contains(&page)) {
            return Err(EINVAL);
        }
        let before = self.pages.clone();
        self.maps = self.maps.saturating_add(1);
        for (nth, page) in (0..).zip(wanted) {
            let result = match source {
                Source::Nowhere => Err(EFAULT),
                Source::Bar(_) if !self.decoding => Err(EFAULT),
                Source::Bar(_) => Ok(false),
                Source::Ram(first) if first + nth >= self.ram_pages => Err(EFAULT),
                Source::Ram(_) if self.locked() >= self.locked_limit => Err(ENOMEM),
                Source::Ram(_) => Ok(true),
            };
            match result {
                Ok(locked) => {
                    let map = self.maps;
                    self.pages.insert(page, Page { map, locked });
                }
                Err(errno) => {
                    self.pages = before;
                    return Err(errno);
                }
            }
        }
        Ok(())
    }

    /// How many pages are locked.
    fn locked(&self) -> usize {
        self.pages.values().filter(|page| page.locked).count()
    }

    /// An unmap of whole pages; tells the bytes.
    pub fn unmap(&mut self, start: u64, count: u64) -> Result<u64, i32> {
        let wanted = start..start.saturating_add(count);
        let inside = self.maps_in(|page| wanted.contains(&page));
        let outside = self.maps_in(|page| !wanted.contains(&page));
        if !inside.is_disjoint(&outside) {
            return Err(EINVAL);
        }
        let before = self.pages.len();
        self.pages.retain(|page, _| !wanted.contains(page));
        Ok(bytes(before.saturating_sub(self.pages.len())))
    }

    /// An unmap of everything; tells the bytes.
    pub fn unmap_all(&mut self) -> u64 {
        bytes(std::mem::take(&mut self.pages).len())
    }
}

fn bytes(pages: usize) -> u64 {
    u64::try_from(pages)
        .unwrap_or(u64::MAX)
        .saturating_mul(PAGE)
}
