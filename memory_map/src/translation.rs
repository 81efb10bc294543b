//! What a target should hold: the flat view, cut to what the target can map.

use crate::layout::{Layout, Region};
use crate::pages::Pages;
use crate::view::Seen;
use crate::{Access, Backing, Filter, Iova, IovaRange, Reason, RegionId, RegionKind, TargetLimits};

/// Whose view of the map is asked for.
#[derive(Debug)]
pub(crate) struct Viewer<'a> {
    pub(crate) limits: &'a TargetLimits,
    pub(crate) filter: &'a Filter,
    /// Sees shareable RAM only.
    pub(crate) sharing: bool,
}

/// A piece that the target should hold: addresses `start..=last`, whole pages of the target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'a> {
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) region: RegionId,
    pub(crate) kind: RegionKind,
    pub(crate) access: Access,
    pub(crate) backing: &'a Backing,
    pub(crate) offset: u64,
}

/// A piece that is visible and has pages, and that the target cannot map.
#[derive(Debug, Clone)]
pub(crate) struct Unmappable {
    pub(crate) start: u64,
    pub(crate) last: u64,
    pub(crate) region: RegionId,
    pub(crate) kind: RegionKind,
    pub(crate) reason: Reason,
}

#[derive(Debug)]
pub(crate) enum Wanted<'a> {
    Piece(Piece<'a>),
    Unmappable(Unmappable),
}

impl Viewer<'_> {
    /// Tells `each` what the target should hold of the addresses `start..=last`, by address.
    /// Both ends must lie on pages of the target, so that no page is judged by a part of it.
    pub(crate) fn wanted<'a>(
        &self,
        layout: &'a Layout,
        start: u64,
        last: u64,
        each: &mut dyn FnMut(Wanted<'a>),
    ) {
        for (seen, region) in layout.seen(start, last) {
            self.wanted_of(seen, region, each);
        }
    }

    /// The same for one stretch of one region.
    pub(crate) fn wanted_of<'a>(
        &self,
        seen: Seen,
        region: &'a Region,
        each: &mut dyn FnMut(Wanted<'a>),
    ) {
        let Some(range) = region.active() else { return };
        let base = range.start().raw();
        let (from, to) = (seen.start.wrapping_sub(base), seen.last.wrapping_sub(base));
        for (offset, pages) in region.pages_in(from, to) {
            // Within the stretch, so within the region: none of this wraps.
            let start = base.wrapping_add(offset).max(seen.start);
            let last = base.wrapping_add(pages.last).min(seen.last);
            let into = start.wrapping_sub(base.wrapping_add(offset));
            let backing_offset = pages.backing_offset.wrapping_add(into);
            self.cut(
                seen.region,
                region,
                pages,
                (start, last),
                backing_offset,
                each,
            );
        }
    }

    fn cut<'a>(
        &self,
        id: RegionId,
        region: &'a Region,
        pages: &'a Pages,
        (start, last): (u64, u64),
        backing_offset: u64,
        each: &mut dyn FnMut(Wanted<'a>),
    ) {
        let unmappable = |start, last, reason| {
            Wanted::Unmappable(Unmappable {
                start,
                last,
                region: id,
                kind: region.kind,
                reason,
            })
        };
        let piece = |from: u64, to| {
            Wanted::Piece(Piece {
                start: from,
                last: to,
                region: id,
                kind: region.kind,
                access: region.access,
                backing: &pages.backing,
                offset: backing_offset.wrapping_add(from.wrapping_sub(start)),
            })
        };
        if let Some(reason) = self.refusal(region) {
            return each(unmappable(start, last, reason));
        }
        let page = self.limits.page_size;
        let mask = page.wrapping_sub(1);
        let whole = IovaRange::of(start, last);
        // Nearly always it is whole pages, and allowed.
        if (start | last.wrapping_add(1) | backing_offset) & mask == 0
            && is_allowed(&self.limits.allowed, &whole)
        {
            return each(piece(start, last));
        }
        let misfit = || {
            if whole.size() < page {
                Reason::SmallerThanPage { page }
            } else {
                Reason::NotPageAligned { page }
            }
        };
        let aligned = whole.shrink_to(page);
        let aligned = aligned.filter(|_| start.wrapping_sub(backing_offset) & mask == 0);
        let Some(aligned) = aligned else {
            return each(unmappable(start, last, misfit()));
        };
        let (first, end) = (aligned.start().raw(), aligned.last().raw());
        if start < first {
            each(unmappable(start, first.wrapping_sub(1), misfit()));
        }
        for part in split_by_allowed(&self.limits.allowed, page, first, end) {
            each(match part.refusal {
                Some(reason) => unmappable(part.start, part.last, reason),
                None => piece(part.start, part.last),
            });
        }
        if end < last {
            each(unmappable(end.wrapping_add(1), last, misfit()));
        }
    }

    /// Why nothing of this region can be in the target, if so.
    pub(crate) fn refusal(&self, region: &Region) -> Option<Reason> {
        if self.sharing && !(region.kind == RegionKind::Ram && region.shareable) {
            return Some(Reason::Filtered);
        }
        if !self.filter.admits(region.kind, region.label.as_ref()) {
            return Some(Reason::Filtered);
        }
        if region.kind == RegionKind::DeviceMemory && !self.limits.device_memory {
            return Some(Reason::DeviceMemoryRefused);
        }
        if region.access == Access::ReadOnly && !self.limits.read_only {
            return Some(Reason::ReadOnlyUnsupported);
        }
        None
    }
}

struct Part {
    start: u64,
    last: u64,
    refusal: Option<Reason>,
}

/// Whether whole pages may be mapped just so.
fn is_allowed(allowed: &[IovaRange], pages: &IovaRange) -> bool {
    let from = allowed.partition_point(|range| range.last() < pages.start());
    allowed.get(from).is_some_and(|range| range.covers(pages))
}

/// Cuts `start..=last` (whole pages) into what may be mapped and what may not. A page that a
/// window reserves in part may not.
fn split_by_allowed(
    allowed: &[IovaRange],
    page: u64,
    start: u64,
    last: u64,
) -> impl Iterator<Item = Part> + '_ {
    let mut next = Some(start);
    let from = allowed.partition_point(|range| range.last().raw() < start);
    let mut ranges = allowed
        .get(from..)
        .unwrap_or_default()
        .iter()
        .filter_map(move |range| range.shrink_to(page))
        .map(|range| (range.start().raw(), range.last().raw()))
        .filter(move |range| range.1 >= start)
        .peekable();
    std::iter::from_fn(move || {
        let start = next.filter(|&next| next <= last)?;
        let part = match ranges.peek() {
            Some(&(allowed_start, allowed_last)) if allowed_start <= start => {
                ranges.next();
                Part {
                    start,
                    last: allowed_last.min(last),
                    refusal: None,
                }
            }
            Some(&(allowed_start, _)) => Part {
                start,
                last: allowed_start.wrapping_sub(1).min(last),
                refusal: Some(refused_at(allowed, start)),
            },
            None => Part {
                start,
                last,
                refusal: Some(refused_at(allowed, start)),
            },
        };
        next = part.last.checked_add(1);
        Some(part)
    })
}

/// Why `address`, which lies in no allowed range, cannot be mapped.
fn refused_at(allowed: &[IovaRange], address: u64) -> Reason {
    let above = allowed.partition_point(|range| range.last().raw() < address);
    let below_last = above
        .checked_sub(1)
        .and_then(|below| allowed.get(below))
        .map(|range| range.last().raw());
    match allowed.get(above) {
        None => Reason::OutsideAperture {
            last: below_last.unwrap_or(0),
        },
        Some(range) => {
            let start = below_last.map_or(0, |last| last.saturating_add(1));
            // `address` itself may lie in the range where only a part of its page is allowed.
            let last = range.start().raw().saturating_sub(1).max(start);
            Reason::ReservedWindow {
                window: IovaRange::of(start, last),
            }
        }
    }
}

/// Whether limits can be true, or what is wrong with them.
pub(crate) fn check_limits(limits: &TargetLimits) -> Result<(), &'static str> {
    if !limits.page_size.is_power_of_two() || limits.page_size < crate::GRANULE {
        return Err("the page size is not a power of two of at least 0x1000");
    }
    if !limits.largest_mapping.is_power_of_two() || limits.largest_mapping < limits.page_size {
        return Err("the largest mapping is not a power of two of at least a page");
    }
    let sorted = limits
        .allowed
        .windows(2)
        .all(|pair| matches!(pair, [a, b] if a.last() < b.start()));
    if !sorted {
        return Err("the allowed ranges are not sorted and disjoint");
    }
    Ok(())
}

/// An inclusive range of addresses as I/O virtual ones.
pub(crate) fn iova(start: u64, last: u64) -> IovaRange {
    debug_assert!(start <= last && Iova::new(start) <= Iova::new(last));
    IovaRange::of(start, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::of(start, last)
    }

    fn split(allowed: &[IovaRange], start: u64, last: u64) -> Vec<(u64, u64, Option<Reason>)> {
        split_by_allowed(allowed, 0x1000, start, last)
            .map(|part| (part.start, part.last, part.refusal))
            .collect()
    }

    #[test]
    fn a_piece_over_a_reserved_window_and_past_the_aperture_falls_into_parts() {
        let allowed = [range(0, 0x3fff), range(0x6000, 0x9fff)];
        let window = Some(Reason::ReservedWindow {
            window: range(0x4000, 0x5fff),
        });
        assert_eq!(
            split(&allowed, 0x3000, 0xbfff),
            [
                (0x3000, 0x3fff, None),
                (0x4000, 0x5fff, window.clone()),
                (0x6000, 0x9fff, None),
                (
                    0xa000,
                    0xbfff,
                    Some(Reason::OutsideAperture { last: 0x9fff })
                ),
            ]
        );
        assert_eq!(split(&allowed, 0x4000, 0x4fff), [(0x4000, 0x4fff, window)]);
        assert_eq!(split(&allowed, 0x1000, 0x1fff), [(0x1000, 0x1fff, None)]);
    }

    #[test]
    fn a_page_that_is_reserved_in_part_is_reserved() {
        let allowed = [range(0, 0x27ff), range(0x2900, 0xffff)];
        let parts = split(&allowed, 0x1000, 0x3fff);
        assert_eq!(parts[0], (0x1000, 0x1fff, None));
        assert_eq!((parts[1].0, parts[1].1), (0x2000, 0x2fff));
        assert!(matches!(parts[1].2, Some(Reason::ReservedWindow { .. })));
        assert_eq!(parts[2], (0x3000, 0x3fff, None));
    }

    #[test]
    fn the_last_page_of_the_address_space_can_be_allowed() {
        let allowed = [range(0x1000, u64::MAX)];
        assert_eq!(
            split(&allowed, u64::MAX - 0xfff, u64::MAX),
            [(u64::MAX - 0xfff, u64::MAX, None)]
        );
    }
}
