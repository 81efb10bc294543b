//! The tables that Intel's IOMMU walks for a function, as the kernel shows them in
//! `/sys/kernel/debug/iommu/intel/FUNCTION/domain_translation_struct`
//! (`CONFIG_INTEL_IOMMU_DEBUGFS`; a file for each function since Linux 6.7).

use std::collections::BTreeMap;

use super::PAGE;

/// Bits of an entry of a second-stage table (VT-d 4.1, 9.8): it may be read, it may be written, it
/// is a page and no table, the address.
const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The entries on the way to a page, from the level of 256 TiB to that of 4 KiB.
const LEVELS: usize = 5;

/// A page that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoPage {
    /// Where it is in memory.
    pub physical: u64,
    /// Whether devices may read it.
    pub read: bool,
    /// Whether they may write to it.
    pub write: bool,
}

/// What is mapped for a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoPageTable {
    /// The function.
    pub function: String,
    /// Where the topmost table is in memory. Functions with the same one are in one domain.
    pub root: u64,
    /// By I/O virtual address. Large pages are here as the small ones that they are made of.
    pub pages: BTreeMap<u64, IoPage>,
}

/// Why a text is not a function's table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IoPageTableError {
    /// It does not begin with the function and the topmost table's address.
    #[error("{0:?} is not `Device FUNCTION @ROOT`: there is no table, or one by PASID")]
    Header(String),
    /// A line that is no page's.
    #[error("{0:?} is no page's line")]
    Line(String),
}

/// The function and where its topmost table is, from the first line.
fn header(text: &str) -> Result<(&str, u64), IoPageTableError> {
    let line = text.lines().next().unwrap_or_default();
    let words = line
        .strip_prefix("Device ")
        .and_then(|rest| rest.split_once(" @"));
    words
        .and_then(|(function, root)| Some((function, number(root)?)))
        .filter(|(function, _)| !function.contains(' '))
        .ok_or_else(|| IoPageTableError::Header(line.to_owned()))
}

impl IoPageTable {
    /// Reads all of it.
    ///
    /// # Errors
    /// [`IoPageTableError`].
    pub fn read(text: &str) -> Result<Self, IoPageTableError> {
        let (function, root) = header(text)?;
        let mut pages = BTreeMap::new();
        let lines = text.lines().skip(1);
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with("IOVA_PFN")) {
            enter(line, &mut pages).ok_or_else(|| IoPageTableError::Line(line.to_owned()))?;
        }
        Ok(Self {
            function: function.to_owned(),
            root,
            pages,
        })
    }
}

/// `0x0000000101000 | PML5E PML4E PDPE PDE PTE`, less or zeroes at the end where the page is a
/// large one.
fn enter(line: &str, pages: &mut BTreeMap<u64, IoPage>) -> Option<()> {
    let (frame, entries) = line.split_once('|')?;
    let iova = number(frame.trim())?.checked_mul(PAGE)?;
    let entries: Vec<u64> = entries
        .split_whitespace()
        .map(number)
        .collect::<Option<_>>()?;
    let level = entries.iter().rposition(|entry| *entry != 0)?;
    let entry = *entries.get(level)?;
    // 4 KiB, and 512 times as much with each level that is left out.
    let above = LEVELS.checked_sub(1)?.checked_sub(level)?;
    let size = PAGE << (9 * above);
    let large = entry & LARGE != 0;
    let aligned = iova % size == 0 && (entry & ADDRESS).is_multiple_of(size);
    if above > 2 || large != (above > 0) || !aligned {
        return None;
    }
    for offset in (0..size).step_by(0x1000) {
        let page = IoPage {
            physical: (entry & ADDRESS) + offset,
            read: entry & READ != 0,
            write: entry & WRITE != 0,
        };
        if pages.insert(iova.checked_add(offset)?, page).is_some() {
            return None;
        }
    }
    Some(())
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Device 0000:00:05.0 @0x42bf000
IOVA_PFN         \tPML5E             \tPML4E             \tPDPE              \tPDE               \tPTE
0x0000000000000 |\t0x0000000000000000\t0x0000000004572403\t0x0000000004573403\t0x0000000004574403\t0x00000000042ad003
0x0000000000001 |\t0x0000000000000000\t0x0000000004572403\t0x0000000004573403\t0x0000000004574403\t0x000000000422e001
0x0000000101000 |\t0x0000000000000000\t0x0000000004572403\t0x00000000242fc403\t0x00000000fd000083
0x0000000101200 |\t0x0000000000000000\t0x0000000004572403\t0x00000000242fc403\t0x00000000fd200083\t0x0000000000000000

";

    #[test]
    fn pages_of_both_sizes_are_read() {
        let table = IoPageTable::read(TEXT).unwrap();
        assert_eq!(table.function, "0000:00:05.0");
        assert_eq!(table.root, 0x42b_f000);
        assert_eq!(table.pages.len(), 2 + 2 * 512);
        let page = |physical, write| IoPage {
            physical,
            read: true,
            write,
        };
        assert_eq!(table.pages[&0], page(0x42a_d000, true));
        assert_eq!(table.pages[&0x1000], page(0x422_e000, false));
        assert_eq!(table.pages[&0x1_0100_0000], page(0xfd00_0000, true));
        assert_eq!(table.pages[&0x1_013f_f000], page(0xfd3f_f000, true));
        assert!(!table.pages.contains_key(&0x1_0140_0000));
    }

    #[test]
    fn a_page_of_a_gibibyte_is_all_of_it() {
        let text = "Device 0000:00:05.0 @0x1000\n\
            0x0000000040000 |\t0x0\t0x0000000004572403\t0x0000000080000083\n";
        let table = IoPageTable::read(text).unwrap();
        assert_eq!(table.pages.len(), 1 << 18);
        assert_eq!(table.pages[&0x7fff_f000].physical, 0xbfff_f000);
    }

    #[test]
    fn what_is_no_table_of_this_kind_is_refused() {
        for text in [
            "",
            "Device 0000:00:05.0\n",
            "Device 0000:00:05.0 with pasid 1 @0x1000\n",
            // No entry at all, a table instead of a page, a small page that calls itself large,
            // one that is not aligned, too large a one, and one that is there twice.
            "Device a @0x1000\n0x0 |\t0x0\t0x0\t0x0\t0x0\t0x0\n",
            "Device a @0x1000\n0x0 |\t0x0\t0x1003\t0x2003\t0x200003\n",
            "Device a @0x1000\n0x0 |\t0x0\t0x1003\t0x2003\t0x3003\t0x4083\n",
            "Device a @0x1000\n0x1 |\t0x0\t0x1003\t0x2003\t0x200083\n",
            "Device a @0x1000\n0x0 |\t0x0\t0x83\n",
            "Device a @0x1000\n0x0 |\t0\n",
            "Device a @0x1000\n0x0 |\t0x0\t0x1\t0x1\t0x1\t0x3\n0x0 |\t0x0\t0x1\t0x1\t0x1\t0x3\n",
        ] {
            assert!(IoPageTable::read(text).is_err(), "{text}");
        }
    }
}
