//! The difference between what a target holds and what it should, as calls to be made.

use smallvec::{SmallVec, smallvec};

use crate::layout::Layout;
use crate::ledger::{Entry, Ledger};
use crate::translation::{Piece, Unmappable, Viewer, Wanted};
use crate::{Access, Backing, RegionId, RegionKind};

/// A mapping to be made.
#[derive(Debug, Clone)]
pub(crate) struct NewMapping {
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) region: RegionId,
    pub(crate) kind: RegionKind,
    pub(crate) access: Access,
    pub(crate) backing: Backing,
    pub(crate) offset: u64,
}

impl NewMapping {
    pub(crate) const fn size(&self) -> u64 {
        self.last.wrapping_sub(self.start).wrapping_add(1)
    }

    fn of_piece(piece: &Piece<'_>, start: u64, last: u64) -> Self {
        Self {
            start,
            last,
            region: piece.region,
            kind: piece.kind,
            access: piece.access,
            backing: piece.backing.clone(),
            offset: piece.offset.wrapping_add(start.wrapping_sub(piece.start)),
        }
    }

    fn of_entry(entry_start: u64, entry: &Entry, start: u64, last: u64) -> Self {
        Self {
            start,
            last,
            region: entry.region,
            kind: entry.kind,
            access: entry.access,
            backing: entry.backing.clone(),
            offset: entry.offset.wrapping_add(start.wrapping_sub(entry_start)),
        }
    }

    /// Cuts it at multiples of `largest` if it is larger than that.
    pub(crate) fn cut_if_larger(self, largest: u64) -> impl Iterator<Item = Self> {
        // There is nothing to cut at multiples of nothing.
        let at = if self.size() > largest { largest } else { 0 };
        self.cut(at)
    }

    /// Cuts it at multiples of `largest`, a power of two.
    fn cut(self, largest: u64) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let mut piece = rest.take()?;
            let last = piece.start | largest.wrapping_sub(1);
            if last < piece.last {
                let start = last.wrapping_add(1);
                rest = Some(Self {
                    start,
                    offset: piece.offset.wrapping_add(start.wrapping_sub(piece.start)),
                    ..piece.clone()
                });
                piece.last = last;
            }
            Some(piece)
        })
    }

    /// Whether `next` goes on where this ends, in the address space and in the backing.
    fn goes_on_in(&self, next: &Self) -> bool {
        self.last.checked_add(1) == Some(next.start)
            && self.offset.wrapping_add(self.size()) == next.offset
            && self.access == next.access
            && self.backing == next.backing
    }
}

/// One unmap call.
#[derive(Debug)]
pub(crate) struct Unmap {
    pub(crate) start: u64,
    pub(crate) last: u64,
    /// The ledger entries it takes down, by their first address.
    pub(crate) entries: SmallVec<[u64; 2]>,
    /// What is to be mapped again at once, because only a part of the entry had to go or only
    /// its access has changed. Lies within the entry; the hole is open for two calls.
    pub(crate) again: Vec<NewMapping>,
}

impl Unmap {
    /// Whether only a part of a mapping had to go.
    pub(crate) fn bisects(&self) -> bool {
        match self.again.as_slice() {
            [] => false,
            [whole] => whole.start != self.start || whole.last != self.last,
            _ => true,
        }
    }
}

/// The calls that bring one target up to date.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) down: SmallVec<[Unmap; 1]>,
    pub(crate) up: SmallVec<[NewMapping; 1]>,
    /// What is visible and cannot be mapped by the target's own limits.
    pub(crate) unmappable: Vec<Unmappable>,
}

impl Plan {
    /// How many mappings will be taken down or made.
    pub(crate) fn steps(&self) -> usize {
        let down = self.down.iter();
        let down = down.map(|unmap| unmap.entries.len().saturating_add(unmap.again.len()));
        down.fold(self.up.len(), usize::saturating_add)
    }

    /// How many bytes will be mapped.
    pub(crate) fn bytes(&self) -> u64 {
        let again = self.down.iter().flat_map(|unmap| &unmap.again);
        again
            .chain(&self.up)
            .fold(0, |sum, new| sum.saturating_add(new.size()))
    }
}

/// Sorts dirty ranges, widens them to whole pages and joins those that touch.
pub(crate) fn whole_pages(dirty: &[(u64, u64)], page: u64) -> SmallVec<[(u64, u64); 4]> {
    let mask = page.wrapping_sub(1);
    let mut pages: SmallVec<[(u64, u64); 4]> = dirty
        .iter()
        .map(|&(start, last)| (start & !mask, last | mask))
        .collect();
    pages.sort_unstable();
    pages.dedup_by(|next, kept| {
        let touches = kept.1.checked_add(1).is_none_or(|end| next.0 <= end);
        if touches {
            kept.1 = kept.1.max(next.1);
        }
        touches
    });
    pages
}

/// Plans for the dirty ranges `dirty`, as [`whole_pages`] makes them.
pub(crate) fn plan(
    layout: &Layout,
    viewer: &Viewer<'_>,
    ledger: &Ledger,
    dirty: &[(u64, u64)],
) -> Plan {
    let mut unmappable = Vec::new();
    let mut wanted: SmallVec<[Piece<'_>; 2]> = SmallVec::new();
    for &(start, last) in dirty {
        viewer.wanted(layout, start, last, &mut |want| match want {
            Wanted::Piece(piece) => wanted.push(piece),
            Wanted::Unmappable(piece) => unmappable.push(piece),
        });
    }

    let mut down: SmallVec<[Unmap; 1]> = SmallVec::new();
    // Addresses that need no new mapping: kept entries, and what is mapped again at once.
    let mut settled: SmallVec<[(u64, u64); 4]> = SmallVec::new();
    let mut next_entry = Some(0);
    let mask = viewer.limits.page_size.wrapping_sub(1);
    for &(start, last) in dirty {
        for (at, entry) in ledger.entries_in(start, last) {
            // An entry that reaches over several dirty ranges is looked at once.
            if next_entry.is_none_or(|next| at < next) {
                continue;
            }
            next_entry = entry.last.checked_add(1);
            // Not so any more where the target's pages have grown: it is planned anew as a whole.
            let whole_pages = (at | entry.last.wrapping_add(1)) & mask == 0;
            if whole_pages && !entry.is_stale() && is_wanted_whole(at, entry, dirty, &wanted) {
                settled.push((at, entry.last));
                continue;
            }
            let again = if whole_pages {
                again(at, entry, dirty, &wanted, viewer.limits.largest_mapping)
            } else {
                Vec::new()
            };
            settled.extend(again.iter().map(|new| (new.start, new.last)));
            let joins = down.last().is_some_and(|previous| {
                viewer.limits.unmap_spans
                    && again.is_empty()
                    && previous.again.is_empty()
                    && previous.last.checked_add(1) == Some(at)
            });
            match down.last_mut() {
                Some(previous) if joins => {
                    previous.last = entry.last;
                    previous.entries.push(at);
                }
                _ => down.push(Unmap {
                    start: at,
                    last: entry.last,
                    entries: smallvec![at],
                    again,
                }),
            }
        }
    }

    let largest = viewer.limits.largest_mapping;
    let add = |up: &mut SmallVec<[NewMapping; 1]>, piece: &Piece<'_>, start: u64, last: u64| {
        let new = NewMapping::of_piece(piece, start, last);
        // Mostly it fits.
        if start | largest.wrapping_sub(1) >= last {
            up.push(new);
        } else {
            up.extend(new.cut(largest));
        }
    };
    let mut up: SmallVec<[NewMapping; 1]> = SmallVec::new();
    up.reserve(wanted.len());
    let mut settled = settled.into_iter().peekable();
    for piece in &wanted {
        let mut next = Some(piece.start);
        while let Some(start) = next.filter(|&start| start <= piece.last) {
            while settled.next_if(|settled| settled.1 < start).is_some() {}
            match settled.peek() {
                Some(&(from, to)) if from <= start => next = to.checked_add(1),
                Some(&(from, _)) if from <= piece.last => {
                    add(&mut up, piece, start, from.wrapping_sub(1));
                    next = Some(from);
                }
                _ => {
                    add(&mut up, piece, start, piece.last);
                    next = None;
                }
            }
        }
    }
    // Whole mappings go first, so that there is room for what remains of those that are cut; and
    // RAM comes first, so that no BAR takes the last entry from it.
    down.sort_by_key(|unmap| !unmap.again.is_empty());
    up.sort_by_key(|new| new.kind == RegionKind::DeviceMemory);
    Plan {
        down,
        up,
        unmappable,
    }
}

/// The wanted pieces that overlap `start..=last`.
fn overlapping<'w, 'a>(wanted: &'w [Piece<'a>], start: u64, last: u64) -> &'w [Piece<'a>] {
    let from = wanted.partition_point(|piece| piece.last < start);
    let to = wanted.partition_point(|piece| piece.start <= last);
    wanted.get(from..to).unwrap_or_default()
}

/// The dirty ranges that overlap `start..=last`.
fn dirty_in(dirty: &[(u64, u64)], start: u64, last: u64) -> &[(u64, u64)] {
    let from = dirty.partition_point(|range| range.1 < start);
    let to = dirty.partition_point(|range| range.0 <= last);
    dirty.get(from..to).unwrap_or_default()
}

/// Whether a piece shows, at the addresses it shares with the entry, the same bytes.
fn same_bytes(at: u64, entry: &Entry, piece: &Piece<'_>) -> bool {
    *piece.backing == entry.backing
        && piece.start.wrapping_sub(piece.offset) == at.wrapping_sub(entry.offset)
}

/// Whether every dirty page of the entry is still wanted just as it is.
fn is_wanted_whole(at: u64, entry: &Entry, dirty: &[(u64, u64)], wanted: &[Piece<'_>]) -> bool {
    dirty_in(dirty, at, entry.last).iter().all(|range| {
        let (start, last) = (range.0.max(at), range.1.min(entry.last));
        let mut next = Some(start);
        for piece in overlapping(wanted, start, last) {
            let gap = next.is_none_or(|next| piece.start > next);
            if gap || !same_bytes(at, entry, piece) || piece.access != entry.access {
                return false;
            }
            next = piece.last.checked_add(1);
        }
        next.is_none_or(|next| next > last)
    })
}

/// What is to be mapped again of an entry that has to go: the parts that are not dirty, and the
/// dirty ones that show the same bytes.
fn again(
    at: u64,
    entry: &Entry,
    dirty: &[(u64, u64)],
    wanted: &[Piece<'_>],
    largest: u64,
) -> Vec<NewMapping> {
    let mut parts: Vec<NewMapping> = Vec::new();
    let mut add = |part: NewMapping| match parts.last_mut() {
        Some(previous) if previous.goes_on_in(&part) => previous.last = part.last,
        _ => parts.push(part),
    };
    let mut next = Some(at);
    for range in dirty_in(dirty, at, entry.last) {
        let (start, last) = (range.0.max(at), range.1.min(entry.last));
        if let Some(from) = next.filter(|&from| from < start) {
            add(NewMapping::of_entry(at, entry, from, start.wrapping_sub(1)));
        }
        for piece in overlapping(wanted, start, last) {
            if same_bytes(at, entry, piece) {
                let (from, to) = (piece.start.max(start), piece.last.min(last));
                add(NewMapping::of_piece(piece, from, to));
            }
        }
        next = last.checked_add(1);
    }
    if let Some(from) = next.filter(|&from| from <= entry.last) {
        add(NewMapping::of_entry(at, entry, from, entry.last));
    }
    // Already as small as it may be, unless the target's largest mapping has shrunk.
    if parts.iter().any(|part| part.size() > largest) {
        parts = parts
            .into_iter()
            .flat_map(|part| part.cut_if_larger(largest))
            .collect();
    }
    parts
}
