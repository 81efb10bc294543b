//! The RAM below 4 GiB, where all of a kernel has to be.

use memory_map::{Gpa, GpaRange};

use super::error::BootError;
use crate::layout::Layout;
use crate::platform;

/// Below this a PC keeps things.
const FIRST: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;

pub(super) struct Room {
    /// RAM from 1 MiB to the hole below 4 GiB, by address.
    stretches: Vec<GpaRange>,
}

impl Room {
    pub(super) fn of(layout: &Layout) -> Self {
        let last = Gpa::new(platform::LOW_HOLE.raw() - 1);
        let low = GpaRange::from_inclusive(Gpa::new(FIRST), last).ok();
        let pieces = layout.ram().iter();
        let stretches = pieces.filter_map(|piece| piece.range.intersection(&low?));
        Self {
            stretches: stretches.collect(),
        }
    }

    pub(super) fn last(&self) -> Gpa {
        let last = self.stretches.last();
        last.map_or(Gpa::new(FIRST - 1), GpaRange::last)
    }

    pub(super) fn covers(&self, range: GpaRange) -> bool {
        self.stretches.iter().any(|stretch| stretch.covers(&range))
    }

    /// `size` bytes at the lowest multiple of `alignment` (a power of two) from `address` on.
    pub(super) fn from(&self, address: u64, size: u64, alignment: u64) -> Option<GpaRange> {
        let mut fitting = self.stretches.iter().filter_map(|stretch| {
            let start = stretch.start().raw().max(address);
            let start = start.checked_next_multiple_of(alignment)?;
            let range = GpaRange::new(Gpa::new(start), size).ok()?;
            stretch.covers(&range).then_some(range)
        });
        fitting.next()
    }

    /// `size` bytes in whole pages from their start on, as high as may be: up to `last`, above the
    /// kernel where both lie in one stretch.
    pub(super) fn for_initrd(
        &self,
        size: u64,
        kernel: GpaRange,
        last: u64,
    ) -> Result<GpaRange, BootError> {
        let mut free = 0;
        for stretch in self.stretches.iter().rev() {
            let first = if stretch.overlaps(&kernel) {
                kernel.last().raw().saturating_add(1)
            } else {
                stretch.start().raw()
            };
            let end = stretch.last().raw().min(last).saturating_add(1);
            let Some(first) = first.checked_next_multiple_of(PAGE) else {
                continue;
            };
            free = free.max(end.saturating_sub(first));
            let start = end.checked_sub(size).map(|start| start & !(PAGE - 1));
            let Some(start) = start.filter(|start| *start >= first) else {
                continue;
            };
            if let Ok(range) = GpaRange::new(Gpa::new(start), size) {
                return Ok(range);
            }
        }
        Err(BootError::InitrdDoesNotFit {
            size,
            free,
            last: Gpa::new(last.min(platform::LOW_HOLE.raw() - 1)),
            ram_last: self.last(),
        })
    }
}
