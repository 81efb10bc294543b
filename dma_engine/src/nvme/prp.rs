//! Where a command's data are: physical region pages (section 4.3).

use memory_map::IovaRange;

/// The page that all of it counts in; CC.MPS is zero.
pub(super) const PAGE: u64 = 0x1000;
/// How many entries a page of a list has.
const ENTRIES: u64 = PAGE / 8;
/// How many bytes the first page and one page of a list describe, however they start.
pub(super) const MOST: u64 = ENTRIES * PAGE;

/// The first address, and those of the pages that follow.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pages {
    pub first: u64,
    pub rest: Vec<u64>,
}

impl Pages {
    /// Those that `range` touches, at most [`MOST`] bytes.
    pub fn of(range: IovaRange) -> Self {
        let first = range.start().raw();
        let last_page = range.last().raw() & !(PAGE - 1);
        let mut rest = Vec::new();
        let mut page = first & !(PAGE - 1);
        while page < last_page {
            // It ends at the last page, so that it cannot wrap.
            page = page.saturating_add(PAGE);
            rest.push(page);
        }
        Self { first, rest }
    }

    /// The pages that follow, as a list in memory.
    pub fn list(&self) -> Vec<u8> {
        self.rest
            .iter()
            .flat_map(|page| page.to_le_bytes())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use memory_map::Iova;

    use super::*;

    fn pages(start: u64, len: u64) -> Pages {
        Pages::of(IovaRange::new(Iova::new(start), len).unwrap())
    }

    #[test]
    fn every_page_that_is_touched_is_named_once() {
        assert_eq!(pages(0x1000, 0x1000).rest, [0; 0]);
        assert_eq!(pages(0x1ffc, 4).rest, [0; 0]);
        assert_eq!(pages(0x1ffc, 8).rest, [0x2000]);
        assert_eq!(pages(0x1200, 0x2000).rest, [0x2000, 0x3000]);
        assert_eq!(pages(0x1200, 0x2000).first, 0x1200);
        assert_eq!(pages(u64::MAX - 0xfff, 0x1000).rest, [0; 0]);
        assert_eq!(pages(u64::MAX - 0x1fff, 0x2000).rest, [u64::MAX - 0xfff]);
    }

    #[test]
    fn the_longest_transfer_fits_a_page_of_a_list_however_it_starts() {
        for start in [0x1000, 0x1004, 0x1ffc] {
            assert!(pages(start, MOST).list().len() <= 0x1000, "{start:#x}");
        }
    }
}
