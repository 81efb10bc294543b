//! Page tables with nothing clever about them, which say how each call must end.
//!
//! They keep one entry for every page and know the rules only in terms of pages, so that they can
//! be seen to be right.

use std::collections::{BTreeMap, BTreeSet};

use libc::{EEXIST, EINVAL, ENODEV, ENOENT, ENOMEM, EPERM};

use crate::cases::PAGE;

/// What is to be mapped: of which file, from which page on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Ram(u64),
    Bar(u64),
    NoMemory,
}

/// One mapped page.
#[derive(Debug, Clone, Copy)]
struct Page {
    /// Which mapping it is of.
    mapping: u64,
    /// Which call pinned it, and which page that was of what it pinned; nothing for a BAR's.
    pinned: Option<(u64, u64)>,
    /// Whether that call was for writing.
    writable: bool,
}

/// Several page tables, and what they must know of the host. Functions are attached to all.
#[derive(Debug)]
pub(crate) struct Model {
    tables: Vec<BTreeMap<u64, Page>>,
    calls: u64,
    /// How many pages the RAM and the BAR have.
    pub ram_pages: u64,
    pub bar_pages: u64,
    /// How many pages may be locked.
    pub locked_limit: usize,
    /// Which pages are reserved.
    pub reserved: std::ops::Range<u64>,
    /// Whether the BAR is decoded.
    pub decoding: bool,
}

impl Model {
    /// Nothing is mapped in any of `tables`.
    pub fn new(tables: usize, locked_limit: usize, reserved: std::ops::Range<u64>) -> Self {
        Self {
            tables: vec![BTreeMap::new(); tables],
            calls: 0,
            ram_pages: 0,
            bar_pages: 0,
            locked_limit,
            reserved,
            decoding: true,
        }
    }

    fn table(&self, which: usize) -> &BTreeMap<u64, Page> {
        self.tables.get(which).unwrap_or(const { &BTreeMap::new() })
    }

    /// How many different pages are locked.
    fn locked(&self) -> usize {
        let pages = self.tables.iter().flat_map(BTreeMap::values);
        let pinned: BTreeSet<_> = pages.filter_map(|page| page.pinned).collect();
        pinned.len()
    }

    fn check_place(&self, which: usize, start: u64, count: u64) -> Result<(), i32> {
        let mut wanted = start..start.saturating_add(count);
        if wanted.clone().any(|page| self.reserved.contains(&page)) {
            return Err(EINVAL);
        }
        if wanted.any(|page| self.table(which).contains_key(&page)) {
            return Err(EEXIST);
        }
        Ok(())
    }

    /// Enters pages, unless too many would be locked then.
    fn enter(&mut self, which: usize, pages: Vec<(u64, Page)>) -> Result<(), i32> {
        let before = self.tables.clone();
        if let Some(table) = self.tables.get_mut(which) {
            table.extend(pages);
        }
        if self.locked() > self.locked_limit {
            self.tables = before;
            return Err(ENOMEM);
        }
        Ok(())
    }

    /// A map of whole pages.
    pub fn map(
        &mut self,
        which: usize,
        (start, count): (u64, u64),
        source: Source,
        writable: bool,
    ) -> Result<(), i32> {
        if let Source::Bar(first) = source {
            if first.saturating_add(count) > self.bar_pages {
                return Err(EINVAL);
            }
            if !self.decoding {
                return Err(ENODEV);
            }
        }
        self.check_place(which, start, count)?;
        let inside = match source {
            Source::NoMemory => false,
            Source::Ram(first) => first.saturating_add(count) <= self.ram_pages,
            Source::Bar(_) => true,
        };
        if !inside {
            return Err(EINVAL);
        }
        self.calls = self.calls.saturating_add(1);
        let mapping = self.calls;
        let page = |nth| Page {
            mapping,
            pinned: matches!(source, Source::Ram(_)).then_some((mapping, nth)),
            writable,
        };
        let pages = (0..count).map(|nth| (start.saturating_add(nth), page(nth)));
        self.enter(which, pages.collect())
    }

    /// A copy of whole pages.
    pub fn copy(
        &mut self,
        which: usize,
        (start, count): (u64, u64),
        (from, first): (usize, u64),
        writable: bool,
    ) -> Result<(), i32> {
        let there = (0..count).map(|nth| self.table(from).get(&first.saturating_add(nth)).copied());
        let there: Vec<Page> = there.collect::<Option<_>>().ok_or(ENOENT)?;
        self.check_place(which, start, count)?;
        if writable && there.iter().any(|page| !page.writable) {
            return Err(EPERM);
        }
        self.calls = self.calls.saturating_add(1);
        // Each mapping it comes from makes one of its own.
        let call = self.calls;
        let sources: BTreeSet<u64> = there.iter().map(|page| page.mapping).collect();
        let of = |source| {
            let nth = sources.iter().position(|other| *other == source);
            u64::try_from(nth.unwrap_or(0)).unwrap_or(0)
        };
        let pages = there.into_iter().zip(start..).map(|(page, at)| {
            let mapping = call
                .saturating_mul(1 << 32)
                .saturating_add(of(page.mapping));
            (at, Page { mapping, ..page })
        });
        let pages = pages.collect();
        self.enter(which, pages)
    }

    /// An unmap of whole pages; tells the bytes. From the front on, whole mappings go until one
    /// is not whole.
    pub fn unmap(&mut self, which: usize, start: u64, count: u64) -> Result<u64, i32> {
        let wanted = start..start.saturating_add(count);
        let Some(table) = self.tables.get_mut(which) else {
            return Err(ENOENT);
        };
        let mut pages = 0;
        loop {
            let first = wanted.clone().find_map(|page| table.get(&page));
            let Some(mapping) = first.map(|page| page.mapping) else {
                break;
            };
            let whole = table
                .iter()
                .all(|(at, page)| page.mapping != mapping || wanted.contains(at));
            if !whole {
                return Err(ENOENT);
            }
            let before = table.len();
            table.retain(|_, page| page.mapping != mapping);
            pages += before.saturating_sub(table.len());
        }
        if pages == 0 {
            return Err(ENOENT);
        }
        Ok(bytes(pages))
    }

    /// An unmap of everything; tells the bytes.
    pub fn unmap_all(&mut self, which: usize) -> u64 {
        let table = self.tables.get_mut(which).map(std::mem::take);
        bytes(table.unwrap_or_default().len())
    }
}

fn bytes(pages: usize) -> u64 {
    u64::try_from(pages)
        .unwrap_or(u64::MAX)
        .saturating_mul(PAGE)
}
