//! What an address space has to hold: all RAM that the guest sees, of the BARs that it sees those
//! pages that may be reached, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use super::PAGE;
use super::facts::Facts;
use super::told::{Segment, Told};

/// Where in memory each page should lead, by I/O virtual address.
pub type Pages = BTreeMap<u64, u64>;

/// What is told makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A region that is neither RAM, nor the platform's, nor a BAR of a known function.
    #[error("{0:?} is a BAR of no function that is known")]
    Unknown(String),
    /// More of RAM or of a BAR than there is.
    #[error("{region} ends before {offset:#x}, which is seen at {at:#x}")]
    Beyond {
        /// Whose.
        region: String,
        /// Where in it, in bytes.
        offset: u64,
        /// Where the guest sees it.
        at: u64,
    },
}

/// The pages of an address space in which the BARs of `reached` are.
///
/// # Errors
/// [`RuleError`].
pub fn pages(told: &Told, facts: &Facts, reached: &BTreeSet<String>) -> Result<Pages, RuleError> {
    let mut pages = Pages::new();
    let mut ram = RamFile::default();
    for segment in &told.view {
        if segment.ram {
            let start = ram.place(segment);
            enter(segment, &mut pages, |offset| {
                let page = usize::try_from(start.checked_add(offset)? / PAGE).ok()?;
                facts.ram.get(page).copied()
            })?;
            continue;
        }
        let Some((function, bar)) = bar(&segment.region) else {
            // The platform keeps it to itself.
            continue;
        };
        let unknown = || RuleError::Unknown(segment.region.clone());
        let of = facts.functions.get(function).ok_or_else(unknown)?;
        let range = of.bars.get(&bar).ok_or_else(unknown)?;
        let mut seen = Pages::new();
        enter(segment, &mut seen, |offset| {
            let at = range.start.checked_add(offset)?;
            (at < range.end).then_some(at)
        })?;
        let may_be = |(at, physical): &(u64, u64)| {
            reached.contains(function)
                && of.is_mappable(bar, physical.wrapping_sub(range.start))
                && facts.limits.allow(*at)
        };
        pages.extend(seen.into_iter().filter(may_be));
    }
    Ok(pages)
}

/// Where the regions of RAM are in its file: one behind the other.
#[derive(Debug, Default)]
struct RamFile<'t> {
    region: &'t str,
    start: u64,
    end: u64,
}

impl<'t> RamFile<'t> {
    /// Where the segment's region begins. Segments come by address.
    fn place(&mut self, segment: &'t Segment) -> u64 {
        if self.region != segment.region {
            self.region = &segment.region;
            self.start = self.end;
        }
        let size = (segment.last - segment.first).saturating_add(1);
        let into = segment.offset.saturating_add(size);
        self.end = self.start.saturating_add(into);
        self.start
    }
}

/// A BAR's function and number: `0000:00:06.0 BAR2`.
#[must_use]
pub fn bar(region: &str) -> Option<(&str, usize)> {
    let (function, number) = region.split_once(" BAR")?;
    Some((function, number.parse().ok()?))
}

/// Enters the pages that are seen whole, each where `place` says by its offset in the region.
fn enter(
    segment: &Segment,
    pages: &mut Pages,
    place: impl Fn(u64) -> Option<u64>,
) -> Result<(), RuleError> {
    let mut next = segment.first.checked_next_multiple_of(PAGE);
    while let Some(at) = next {
        let last = at.checked_add(PAGE - 1);
        if last.is_none_or(|last| last > segment.last) {
            break;
        }
        let offset = segment.offset.saturating_add(at - segment.first);
        let beyond = || RuleError::Beyond {
            region: segment.region.clone(),
            offset,
            at,
        };
        pages.insert(at, place(offset).ok_or_else(beyond)?);
        next = at.checked_add(PAGE);
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::witness::facts::{FunctionFacts, Limits};

    /// A segment of RAM or of a BAR.
    pub fn segment(first: u64, last: u64, region: &str, offset: u64) -> Segment {
        Segment {
            first,
            last,
            region: region.to_owned(),
            ram: region.starts_with("RAM"),
            offset,
        }
    }

    pub fn told(view: &[Segment]) -> Told {
        Told {
            view: view.to_vec(),
            pairs: vec![],
        }
    }

    /// Six pages of RAM; `a` with four pages in BAR2, of which MSI-X keeps the second, and `b` with
    /// 256 bytes in BAR0.
    pub fn facts() -> Facts {
        let a = FunctionFacts {
            bars: [(2, 0xfd00_0000..0xfd00_4000)].into(),
            msix: vec![(2, 0x1000..0x2000)],
        };
        let b = FunctionFacts {
            bars: [(0, 0xfe00_0000..0xfe00_0100)].into(),
            msix: vec![],
        };
        Facts {
            ram: vec![0x7000, 0x3000, 0x9000, 0x1000, 0xb000, 0xc000],
            functions: [("a".to_owned(), a), ("b".to_owned(), b)].into(),
            limits: Limits::new("0xfee00000 0xfeefffff msi", "d2008c222f0686").unwrap(),
        }
    }

    pub fn all() -> BTreeSet<String> {
        ["a", "b"].map(str::to_owned).into()
    }

    #[test]
    fn ram_is_in_its_file_one_region_behind_the_other() {
        let told = told(&[
            segment(0, 0x1fff, "RAM 0", 0),
            // What lies over the region's third page is not the guest's to see.
            segment(0x3000, 0x3fff, "RAM 0", 0x3000),
            segment(0x10_0000, 0x10_1fff, "RAM 1", 0),
        ]);
        let expected = [
            (0, 0x7000),
            (0x1000, 0x3000),
            (0x3000, 0x1000),
            (0x10_0000, 0xb000),
            (0x10_1000, 0xc000),
        ];
        assert_eq!(pages(&told, &facts(), &all()), Ok(expected.into()));
    }

    #[test]
    fn whole_pages_of_bars_are_there_where_they_may_be_reached() {
        let view = [
            // Half a page is none, MSI-X is kept, and so is what is smaller than a page.
            segment(0x8800, 0xbfff, "a BAR2", 0x800),
            segment(0xc000, 0xc0ff, "b BAR0", 0),
            segment(0xe000_0000, 0xefff_ffff, "ECAM", 0),
        ];
        let told = told(&view);
        let expected = [(0xa000, 0xfd00_2000), (0xb000, 0xfd00_3000)];
        assert_eq!(pages(&told, &facts(), &all()), Ok(expected.into()));
        let only_b = ["b".to_owned()].into();
        assert_eq!(pages(&told, &facts(), &only_b), Ok(Pages::new()));
    }

    #[test]
    fn where_the_iommu_does_not_lead_nothing_is() {
        for first in [0xfeef_e000, (1 << 48) - 0x2000, u64::MAX - 0x3fff] {
            let told = told(&[segment(first, first + 0x3fff, "a BAR2", 0)]);
            let found = pages(&told, &facts(), &all()).unwrap();
            let allowed = |at: &u64| facts().limits.allow(*at);
            assert!(found.keys().all(allowed), "{found:x?}");
            assert!(found.len() < 3, "{found:x?}");
        }
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        for region in ["c BAR0", "a BAR0"] {
            let told = told(&[segment(0, 0xfff, region, 0)]);
            let unknown = RuleError::Unknown(region.to_owned());
            assert_eq!(pages(&told, &facts(), &all()), Err(unknown));
        }
        for (region, size) in [("RAM 0", 0x7000), ("a BAR2", 0x5000)] {
            let told = told(&[segment(0, size - 1, region, 0)]);
            let beyond = pages(&told, &facts(), &all());
            assert!(
                matches!(beyond, Err(RuleError::Beyond { .. })),
                "{beyond:?}"
            );
        }
    }
}
