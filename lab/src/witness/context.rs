//! Which tables Intel's IOMMU walks for each function: the context entries, as the kernel shows them
//! in `/sys/kernel/debug/iommu/intel/dmar_translation_struct`.

use std::collections::BTreeMap;

/// Bits of the lower half of a context entry (VT-d 4.1, 9.3): it counts, and without translation
/// what is asked for passes as it is; the address.
const PRESENT: u64 = 1 << 0;
const PASS_THROUGH: u64 = 1 << 3;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where the topmost table of each function in domain 0 is in memory, by the function's name.
///
/// ```text
/// B.D.F    Root_entry        Context_entry     PASID ...
/// 00:05.0  0x..00:0x..931001 0x..0302:0x..43cc001 -1 ...
/// ```
///
/// What has no table is left out.
#[must_use]
pub fn roots(text: &str) -> BTreeMap<String, u64> {
    text.lines().filter_map(root).collect()
}

fn root(line: &str) -> Option<(String, u64)> {
    let mut words = line.split_whitespace();
    let function = words.next()?;
    let (_, lower) = words.nth(1)?.split_once(':')?;
    let lower = u64::from_str_radix(lower.strip_prefix("0x")?, 16).ok()?;
    let walked = lower & PRESENT != 0 && lower & PASS_THROUGH == 0;
    walked.then(|| (format!("0000:{function}"), lower & ADDRESS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_with_tables_are_told() {
        let text = "\
IOMMU dmar0: Root Table Address: 0x929000
B.D.F\tRoot_entry\t\t\t\tContext_entry\t\t\t\tPASID\tPASID_table_entry
00:05.0\t0x0000000000000000:0x0000000000931001\t0x0000000000000302:0x00000000043cc001\t-1    \t0x0000000000000000:0x0000000000000000:0x0000000000000000
00:06.0\t0x0000000000000000:0x0000000000931001\t0x0000000000000302:0x00000000043cc005\t-1    \t0x0000000000000000:0x0000000000000000:0x0000000000000000
00:07.0\t0x0000000000000000:0x0000000000931001\t0x0000000000000002:0x0000000000000009\t-1    \t0x0000000000000000:0x0000000000000000:0x0000000000000000
00:08.0\t0x0000000000000000:0x0000000000931001\t0x0000000000000000:0x0000000000000000\t-1    \t0x0000000000000000:0x0000000000000000:0x0000000000000000

";
        let expected = [("0000:00:05.0", 0x43c_c000), ("0000:00:06.0", 0x43c_c000)];
        let expected = expected.map(|(name, root)| (name.to_owned(), root));
        assert_eq!(roots(text), expected.into());
    }
}
