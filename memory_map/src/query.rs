//! Queries of the reach: derived from the view and the ledgers, so it cannot drift from them.

use crate::layout::{Layout, Region, bounds};
use crate::ledger::Ledger;
use crate::state::{State, Target};
use crate::translation::{Piece, Wanted};
use crate::{GpaRange, Missing, Reach, ReachEntry, Reason, RegionId};

/// The reach of every target into every region, by target and region.
pub(crate) fn all_reach(state: &State) -> Vec<ReachEntry> {
    let regions = state.layout.regions.iter();
    let mut entries: Vec<ReachEntry> = regions
        .flat_map(|(&id, region)| reach_into(state, id, region))
        .collect();
    entries.sort_unstable_by_key(|entry| (entry.target, entry.region));
    entries
}

/// The reach of every target into one region.
pub(crate) fn reach_into<'s>(
    state: &'s State,
    id: RegionId,
    region: &'s Region,
) -> impl Iterator<Item = ReachEntry> + 's {
    state
        .targets
        .iter()
        .map(move |(&target, found)| ReachEntry {
            target,
            target_name: found.options.name.clone(),
            region: id,
            region_name: region.name.clone(),
            reach: reach(&state.layout, found, id, region),
        })
}

/// What has been found of a region in a target.
#[derive(Default)]
struct Found {
    mapped: u64,
    missing: Vec<Missing>,
}

impl Found {
    fn miss(&mut self, start: u64, last: u64, reason: Reason) {
        match self.missing.last_mut() {
            Some(missing)
                if missing.reason == reason
                    && missing.range.last().raw().checked_add(1) == Some(start) =>
            {
                missing.range = GpaRange::of(missing.range.start().raw(), last);
            }
            _ => self.missing.push(Missing {
                range: GpaRange::of(start, last),
                reason,
            }),
        }
    }
}

/// The reach of one target into one region.
pub(crate) fn reach(layout: &Layout, target: &Target, id: RegionId, region: &Region) -> Reach {
    if target.quarantined.is_some() {
        return Reach::Unavailable(Reason::Quarantined);
    }
    if let Some(reason) = target.viewer().refusal(region) {
        return Reach::Unavailable(reason);
    }
    let page = target.limits.page_size;
    if region.pages.is_empty() {
        return Reach::Unavailable(if region.size < page {
            Reason::SmallerThanPage { page }
        } else {
            Reason::Trapped
        });
    }
    if let Some(why) = region.inactive() {
        return Reach::Unavailable(Reason::Disabled(why));
    }
    let Some(range) = region.active() else {
        return Reach::Unavailable(Reason::Trapped);
    };
    let found = look(layout, target, id, region, range);
    match (found.mapped, found.missing.first()) {
        (_, None) => Reach::Mapped,
        (0, Some(first)) => Reach::Unavailable(first.reason.clone()),
        (mapped, Some(_)) => Reach::Partly {
            mapped,
            missing: found.missing,
        },
    }
}

fn look(layout: &Layout, target: &Target, id: RegionId, region: &Region, range: GpaRange) -> Found {
    let mut found = Found::default();
    let (start, last) = bounds(range);
    // A page is judged whole: at the region's ends it may hold more than the region.
    let mask = target.limits.page_size.wrapping_sub(1);
    let viewer = target.viewer();
    for (seen, other) in layout.seen(start & !mask, last | mask) {
        if seen.region != id {
            let (from, to) = (seen.start.max(start), seen.last.min(last));
            if from > to {
                continue;
            }
            // What is hidden counts only where there would be pages.
            for (offset, pages) in region.pages_in(from.wrapping_sub(start), to.wrapping_sub(start))
            {
                let by = other.name.clone();
                found.miss(
                    start.wrapping_add(offset).max(from),
                    start.wrapping_add(pages.last).min(to),
                    Reason::Covered { by },
                );
            }
            continue;
        }
        viewer.wanted_of(seen, region, &mut |want| match want {
            Wanted::Unmappable(piece) => found.miss(piece.start, piece.last, piece.reason),
            Wanted::Piece(piece) => count(&target.ledger, &piece, &mut found),
        });
    }
    found
}

/// Counts how much of a wanted piece is really there.
fn count(ledger: &Ledger, piece: &Piece<'_>, found: &mut Found) {
    let mut next = Some(piece.start);
    let mut entries = ledger
        .entries_in(piece.start, piece.last)
        .filter(|(at, entry)| {
            entry.backing == *piece.backing
                && entry.access == piece.access
                && at.wrapping_sub(entry.offset) == piece.start.wrapping_sub(piece.offset)
                && !entry.is_stale()
        })
        .peekable();
    while let Some(start) = next.filter(|&start| start <= piece.last) {
        while entries.next_if(|(_, entry)| entry.last < start).is_some() {}
        let last = match entries.peek() {
            Some((at, entry)) if *at <= start => {
                let last = entry.last.min(piece.last);
                let size = last.wrapping_sub(start).wrapping_add(1);
                found.mapped = found.mapped.saturating_add(size);
                last
            }
            Some((at, _)) => miss_until(ledger, start, at.wrapping_sub(1), found),
            None => miss_until(ledger, start, piece.last, found),
        };
        next = last.checked_add(1);
    }
}

/// Notes as missing what starts at `start` and has one reason, at most to `last`.
fn miss_until(ledger: &Ledger, start: u64, last: u64, found: &mut Found) -> u64 {
    match ledger.failure_at(start) {
        Some((failure_last, reason)) => {
            let last = failure_last.min(last);
            found.miss(start, last, reason.clone());
            last
        }
        None => {
            // Wanted, not refused and not there: a commit is on its way, or a revocation has
            // not been followed up.
            let last = ledger
                .failure_after(start)
                .map_or(last, |at| last.min(at.wrapping_sub(1)));
            found.miss(start, last, Reason::Pending);
            last
        }
    }
}
