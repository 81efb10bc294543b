//! The pages behind a region: disjoint stretches of offsets, each of one backing.
//!
//! Nearly every region has pages in one stretch: a BAR, a piece of RAM. That one lies in the region
//! itself, so that a walk over many regions does not go to the heap for each.

use smallvec::SmallVec;

use crate::stretches::{Stretch, Stretches};
use crate::{Backing, BackingId};

/// Pages behind a part of a region; its first offset is its key.
#[derive(Debug, Clone)]
pub(crate) struct Pages {
    /// Last offset in the region.
    pub(crate) last: u64,
    pub(crate) backing: Backing,
    pub(crate) backing_offset: u64,
}

impl Stretch for Pages {
    fn last(&self) -> u64 {
        self.last
    }
}

/// All pages of one region, by offset. Stretches that go on in one another are one after
/// [`join_before`](Self::join_before).
#[derive(Debug, Clone)]
pub(crate) enum RegionPages {
    One(u64, Pages),
    /// None, or several.
    Many(Stretches<Pages>),
}

impl Default for RegionPages {
    fn default() -> Self {
        Self::Many(Stretches::default())
    }
}

impl RegionPages {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Many(many) if many.is_empty())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Pages)> {
        let (one, many) = match self {
            Self::One(offset, pages) => (Some((*offset, pages)), None),
            Self::Many(many) => (None, Some(many.iter())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// Those that overlap the offsets `start..=last`.
    pub(crate) fn overlapping(&self, start: u64, last: u64) -> impl Iterator<Item = (u64, &Pages)> {
        let (one, many) = match self {
            Self::One(offset, pages) => {
                let hit = *offset <= last && start <= pages.last;
                (hit.then_some((*offset, pages)), None)
            }
            Self::Many(many) => (None, Some(many.overlapping(start, last))),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// The first offsets of those that start in `start..=last`.
    pub(crate) fn starts(&self, start: u64, last: u64) -> SmallVec<[u64; 4]> {
        let (one, many) = match self {
            Self::One(offset, _) => (Some(*offset), None),
            Self::Many(many) => (None, Some(many.starting_from(start).map(|(at, _)| at))),
        };
        one.into_iter()
            .filter(|at| start <= *at)
            .chain(many.into_iter().flatten())
            .take_while(|at| *at <= last)
            .collect()
    }

    /// Puts pages at `offset`, where none are.
    pub(crate) fn insert(&mut self, offset: u64, pages: Pages) {
        *self = match std::mem::take(self) {
            Self::Many(many) if many.is_empty() => Self::One(offset, pages),
            Self::Many(mut many) => {
                many.insert(offset, pages);
                Self::Many(many)
            }
            Self::One(at, one) => {
                let mut many = Stretches::default();
                many.insert(at, one);
                many.insert(offset, pages);
                Self::Many(many)
            }
        };
    }

    /// Takes out those that start at `offset`.
    pub(crate) fn remove(&mut self, offset: u64) -> Option<Pages> {
        match std::mem::take(self) {
            Self::One(at, pages) if at == offset => Some(pages),
            one @ Self::One(..) => {
                *self = one;
                None
            }
            Self::Many(mut many) => {
                let removed = many.remove(offset);
                let last = many.iter().next().map(|(at, _)| at);
                let single = last.filter(|_| many.len() == 1);
                let single = single.and_then(|at| Some((at, many.remove(at)?)));
                *self = single.map_or(Self::Many(many), |(at, pages)| Self::One(at, pages));
                removed
            }
        }
    }

    /// Joins the pages that start at `seam` to those before, if they go on in the same pages.
    /// Returns their backing if so.
    pub(crate) fn join_before(&mut self, seam: u64) -> Option<BackingId> {
        let Self::Many(many) = self else { return None };
        let after = many.get(seam)?;
        let (offset, before) = many.below(seam)?;
        let size = seam.wrapping_sub(offset);
        let goes_on = before.last.checked_add(1) == Some(seam)
            && before.backing == after.backing
            && before.backing_offset.wrapping_add(size) == after.backing_offset;
        if !goes_on {
            return None;
        }
        let last = after.last;
        if let Some((_, before)) = many.below_mut(seam) {
            before.last = last;
        }
        self.remove(seam).map(|pages| pages.backing.id())
    }
}
