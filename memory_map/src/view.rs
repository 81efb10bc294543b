//! The flat view: which region the guest sees at each address.
//!
//! The address space is cut into *cells*, each with the stack of enabled regions that cover it,
//! the one that is seen first. Two neighbours with the same stack are one cell, so the number of
//! cells depends on the regions that are enabled now and not on the history. Enabling or
//! disabling a region costs a search plus the cells it covers.

use std::cmp::Reverse;

use smallvec::SmallVec;

use crate::stretches::{Stretch, Stretches};
use crate::{Priority, RegionId};

/// A region's place in the order of those that cover an address: the smallest is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    priority: Reverse<Priority>,
    pub(crate) region: RegionId,
}

impl Rank {
    pub(crate) const fn new(priority: Priority, region: RegionId) -> Self {
        Self {
            priority: Reverse(priority),
            region,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Cell {
    last: u64,
    /// Sorted, never empty.
    stack: SmallVec<[Rank; 2]>,
}

/// A stretch of addresses in which one region is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) region: RegionId,
}

impl Stretch for Cell {
    fn last(&self) -> u64 {
        self.last
    }
}

/// The cells, by their first address.
#[derive(Debug, Default)]
pub(crate) struct FlatView {
    cells: Stretches<Cell>,
}

impl FlatView {
    /// Puts a region over `start..=last`.
    pub(crate) fn insert(&mut self, start: u64, last: u64, rank: Rank) {
        let below = self.cells.at_or_below(last);
        if below.is_none_or(|(_, cell)| cell.last < start) {
            return self.insert_alone(start, last, rank);
        }
        self.split_before(start);
        if let Some(end) = last.checked_add(1) {
            self.split_before(end);
        }
        let mut gaps: SmallVec<[(u64, u64); 4]> = SmallVec::new();
        // The first address that no cell has accounted for; none past the end of the space.
        let mut next = Some(start);
        for (cell_start, cell) in self.cells.starting_in_mut(start, last) {
            if let Some(next) = next.filter(|&next| next < cell_start) {
                gaps.push((next, cell_start.wrapping_sub(1)));
            }
            if let Err(place) = cell.stack.binary_search(&rank) {
                cell.stack.insert(place, rank);
            }
            next = cell.last.checked_add(1);
        }
        if let Some(next) = next.filter(|&next| next <= last) {
            gaps.push((next, last));
        }
        for (gap_start, gap_last) in gaps {
            self.insert_alone(gap_start, gap_last, rank);
        }
    }

    /// Puts a region where there is no cell.
    fn insert_alone(&mut self, start: u64, last: u64, rank: Rank) {
        let mut stack = SmallVec::new();
        stack.push(rank);
        self.cells.insert(start, Cell { last, stack });
    }

    /// Takes a region from `start..=last`, exactly where it was put.
    pub(crate) fn remove(&mut self, start: u64, last: u64, rank: Rank) {
        // Where it lies alone, no cell is left to be joined to another.
        let alone = |cell: &Cell| cell.last == last && *cell.stack == [rank];
        if self.cells.remove_if(start, alone).is_some() {
            return;
        }
        let mut emptied: SmallVec<[u64; 4]> = SmallVec::new();
        for (cell_start, cell) in self.cells.starting_in_mut(start, last) {
            if let Ok(place) = cell.stack.binary_search(&rank) {
                cell.stack.remove(place);
            }
            if cell.stack.is_empty() {
                emptied.push(cell_start);
            }
        }
        for cell_start in emptied {
            self.cells.remove(cell_start);
        }
        // Two neighbours inside the range differed before and still do; only its ends may now
        // be equal to what lies outside.
        self.join_before(start);
        if let Some(end) = last.checked_add(1) {
            self.join_before(end);
        }
    }

    /// Makes `address` the start of a cell, if it lies within one.
    fn split_before(&mut self, address: u64) {
        let Some((_, cell)) = self.cells.below_mut(address) else {
            return;
        };
        if cell.last < address {
            return;
        }
        let tail = cell.clone();
        cell.last = address.wrapping_sub(1);
        self.cells.insert(address, tail);
    }

    /// Joins the cell that starts at `address` to its neighbour below, if their stacks are equal.
    fn join_before(&mut self, address: u64) {
        let Some(cell) = self.cells.get(address) else {
            return;
        };
        let Some((_, below)) = self.cells.below(address) else {
            return;
        };
        if below.last.checked_add(1) != Some(address) || below.stack != cell.stack {
            return;
        }
        let last = cell.last;
        self.cells.remove(address);
        if let Some((_, below)) = self.cells.below_mut(address) {
            below.last = last;
        }
    }

    /// What is seen in `start..=last`, by address, clipped to it. Neighbouring cells that show
    /// the same region are one.
    pub(crate) fn seen(&self, start: u64, last: u64) -> impl Iterator<Item = Seen> + '_ {
        let mut cells = self
            .cells
            .overlapping(start, last)
            .filter_map(move |(cell_start, cell)| {
                Some(Seen {
                    start: cell_start.max(start),
                    last: cell.last.min(last),
                    region: cell.stack.first()?.region,
                })
            })
            .peekable();
        std::iter::from_fn(move || {
            let mut seen = cells.next()?;
            while let Some(next) = cells.next_if(|next| {
                next.region == seen.region && seen.last.checked_add(1) == Some(next.start)
            }) {
                seen.last = next.last;
            }
            Some(seen)
        })
    }
}

impl FlatView {
    /// Adds to `regions` all that lie in `start..=last`, seen or covered; some more than once.
    pub(crate) fn lying_in(&self, start: u64, last: u64, regions: &mut impl Extend<RegionId>) {
        for (_, cell) in self.cells.overlapping(start, last) {
            regions.extend(cell.stack.iter().map(|rank| rank.region));
        }
    }

    /// What is seen at `address`. The same region may be seen on either side, too.
    pub(crate) fn seen_at(&self, address: u64) -> Option<Seen> {
        let (start, cell) = self.cells.at_or_below(address)?;
        let region = cell.stack.first()?.region;
        (cell.last >= address).then_some(Seen {
            start,
            last: cell.last,
            region,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// For each of 32 addresses, all regions that cover it.
    type Naive = Vec<std::collections::BTreeSet<Rank>>;

    fn seen_naively(naive: &Naive) -> Vec<Seen> {
        let mut all: Vec<Seen> = Vec::new();
        for (address, stack) in naive.iter().enumerate() {
            let Some(top) = stack.first() else { continue };
            let address = address as u64;
            match all.last_mut() {
                Some(seen) if seen.region == top.region && seen.last + 1 == address => {
                    seen.last = address;
                }
                _ => all.push(Seen {
                    start: address,
                    last: address,
                    region: top.region,
                }),
            }
        }
        all
    }

    proptest! {
        #[test]
        fn cells_show_what_a_table_of_addresses_shows(
            regions in prop::collection::vec((0_i32..3, 0_usize..24, 1_usize..9), 1..8),
            toggles in prop::collection::vec(0_usize..8, 1..40),
            window in (0_u64..32, 0_u64..32),
        ) {
            let mut view = FlatView::default();
            let mut naive: Naive = vec![Default::default(); 32];
            let mut enabled = vec![false; regions.len()];
            for toggle in toggles {
                let index = toggle % regions.len();
                let (priority, start, size): (i32, usize, usize) = regions[index];
                let rank = Rank::new(Priority(priority), RegionId(index as u64));
                let (first, last) = (start as u64, (start + size - 1) as u64);
                enabled[index] = !enabled[index];
                if enabled[index] {
                    view.insert(first, last, rank);
                } else {
                    view.remove(first, last, rank);
                }
                for stack in naive.iter_mut().skip(start).take(size) {
                    if enabled[index] { stack.insert(rank); } else { stack.remove(&rank); }
                }
                prop_assert_eq!(
                    view.seen(0, u64::MAX).collect::<Vec<_>>(),
                    seen_naively(&naive)
                );
                // As many cells as there are stretches with equal stacks: nothing is left over.
                let mut cells = 0;
                for address in 0..32 {
                    if !naive[address].is_empty()
                        && (address == 0 || naive[address - 1] != naive[address])
                    {
                        cells += 1;
                    }
                }
                prop_assert_eq!(view.cells.len(), cells);
            }
            for address in 0..34 {
                let all = seen_naively(&naive);
                let around = all.iter().find(|seen| (seen.start..=seen.last).contains(&address));
                let seen = view.seen_at(address);
                prop_assert_eq!(seen.map(|s| s.region), around.map(|s| s.region));
                let lies_within = seen.is_none_or(|s| around.is_some_and(|around| {
                    (s.start..=s.last).contains(&address)
                        && around.start <= s.start
                        && s.last <= around.last
                }));
                prop_assert!(lies_within);
            }
            let (start, last) = (window.0.min(window.1), window.0.max(window.1));
            let clipped: Vec<Seen> = seen_naively(&naive)
                .into_iter()
                .filter(|seen| seen.start <= last && start <= seen.last)
                .map(|seen| Seen { start: seen.start.max(start), last: seen.last.min(last), ..seen })
                .collect();
            prop_assert_eq!(view.seen(start, last).collect::<Vec<_>>(), clipped);
        }
    }

    #[test]
    fn the_top_of_the_address_space_is_an_address_like_any_other() {
        let mut view = FlatView::default();
        let low = Rank::new(Priority(0), RegionId(1));
        let high = Rank::new(Priority(1), RegionId(2));
        view.insert(u64::MAX - 15, u64::MAX, low);
        view.insert(u64::MAX, u64::MAX, high);
        let seen: Vec<_> = view.seen(0, u64::MAX).collect();
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[1].start, u64::MAX);
        view.remove(u64::MAX, u64::MAX, high);
        assert_eq!(view.cells.len(), 1);
    }
}
