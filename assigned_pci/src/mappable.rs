//! Which pages of a BAR can be mapped: whole granules of its mappable areas, less those that stay
//! trapped.

use std::ops::Range;

use memory_map::{GRANULE, SubMapping};

use crate::{BarProblem, HostBar, HostBarArea};

/// The sub-mappings of a BAR's region, without the granules in `trapped`.
pub(crate) fn sub_mappings(
    bar: &HostBar,
    trapped: &[Range<u64>],
) -> Result<Vec<SubMapping>, BarProblem> {
    let mut found = Vec::new();
    for area in &bar.areas {
        let end = area
            .offset
            .checked_add(area.size)
            .filter(|end| *end <= bar.size)
            .ok_or(BarProblem::AreaPastEnd {
                offset: area.offset,
                size: area.size,
                bar_size: bar.size,
            })?;
        // An area that does not start on a granule has none of its pages where the BAR's are.
        if area.offset.is_multiple_of(GRANULE) {
            let whole = area.offset..end & !(GRANULE - 1);
            found.extend(
                without(whole, trapped)
                    .into_iter()
                    .filter_map(|piece| sub_mapping(area, &piece)),
            );
        }
    }
    Ok(found)
}

fn sub_mapping(area: &HostBarArea, piece: &Range<u64>) -> Option<SubMapping> {
    Some(SubMapping {
        offset: piece.start,
        size: piece
            .end
            .checked_sub(piece.start)
            .filter(|size| *size > 0)?,
        backing: area.backing.clone(),
        backing_offset: piece.start.checked_sub(area.offset)?,
    })
}

/// What is left of `whole` without `holes`, which may overlap and come in any order.
fn without(whole: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    holes.iter().fold(vec![whole], |pieces, hole| {
        pieces
            .into_iter()
            .flat_map(|piece| {
                [
                    piece.start..piece.end.min(hole.start),
                    piece.start.max(hole.end)..piece.end,
                ]
            })
            .filter(|piece| !piece.is_empty())
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_may_overlap_and_touch_the_ends() {
        let left = |holes: &[(u64, u64)]| -> Vec<(u64, u64)> {
            let holes: Vec<_> = holes.iter().map(|(start, end)| *start..*end).collect();
            let pieces = without(0..10, &holes);
            pieces.into_iter().map(|p| (p.start, p.end)).collect()
        };
        assert_eq!(left(&[]), [(0, 10)]);
        assert_eq!(left(&[(2, 4), (3, 6)]), [(0, 2), (6, 10)]);
        assert_eq!(left(&[(3, 6), (2, 4)]), [(0, 2), (6, 10)]);
        assert_eq!(left(&[(0, 1), (9, 12)]), [(1, 9)]);
        assert_eq!(left(&[(0, 20)]), []);
        assert_eq!(left(&[(12, 14)]), [(0, 10)]);
    }
}
