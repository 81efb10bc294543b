//! Where things are in memory, and what must not be mapped, as the host's kernel and the functions
//! themselves tell it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::PAGE;

/// A flag in sysfs's `resource`: it is memory (`include/linux/ioport.h`).
const IORESOURCE_MEM: u64 = 0x200;
/// In config space: the pointer to the first capability, and MSI-X (PCI Local Bus 3.0, 6.8.2).
const CAPABILITIES: usize = 0x34;
const MSIX: u8 = 0x11;
const MSIX_CONTROL: usize = 2;
const MSIX_TABLE: usize = 4;
const MSIX_PENDING: usize = 8;

/// A function of the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FunctionFacts {
    /// Where each of its memory BARs is on the host's bus, by number.
    pub bars: BTreeMap<usize, Range<u64>>,
    /// Pages that hold something of MSI-X, by BAR, as offsets in it.
    pub msix: Vec<(usize, Range<u64>)>,
}

impl FunctionFacts {
    /// From sysfs's `resource` and the config space. A capability list that leads nowhere has no
    /// MSI-X.
    #[must_use]
    pub fn new(resource: &str, config: &[u8]) -> Self {
        Self {
            bars: bars(resource),
            msix: msix(config).unwrap_or_default(),
        }
    }

    /// Whether the page at an offset of a BAR, which lies in it, may be mapped.
    #[must_use]
    pub fn is_mappable(&self, bar: usize, offset: u64) -> bool {
        let kept = |(other, pages): &(usize, Range<u64>)| *other == bar && pages.contains(&offset);
        !self.msix.iter().any(kept)
    }

    /// How many pages of a BAR can be mapped.
    #[must_use]
    pub fn mappable_pages(&self, bar: usize) -> usize {
        let size = self
            .bars
            .get(&bar)
            .map_or(0, |range| range.end - range.start);
        let whole = (0..size / PAGE).map(|page| page * PAGE);
        whole.filter(|at| self.is_mappable(bar, *at)).count()
    }
}

/// The memory BARs in sysfs's `resource`: start, end (inclusive) and flags, a line for each.
fn bars(resource: &str) -> BTreeMap<usize, Range<u64>> {
    let mut bars = BTreeMap::new();
    for (number, line) in resource.lines().take(6).enumerate() {
        let mut fields = line.split_whitespace().map(hexadecimal);
        let mut next = || fields.next().flatten();
        if let (Some(start), Some(last), Some(flags)) = (next(), next(), next())
            && flags & IORESOURCE_MEM != 0
            && let Some(end) = last.checked_add(1)
        {
            bars.insert(number, start..end);
        }
    }
    bars
}

/// The pages of MSI-X's table and of its pending bits.
fn msix(config: &[u8]) -> Option<Vec<(usize, Range<u64>)>> {
    let word = |at: usize| {
        let bytes = config.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let mut at = usize::from(*config.get(CAPABILITIES)? & !3);
    // There is room for no more than 48.
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        if *config.get(at)? != MSIX {
            at = usize::from(*config.get(at + 1)? & !3);
            continue;
        }
        let vectors = u64::from((word(at + MSIX_CONTROL)? & 0x7ff) + 1);
        let pages = |register: u32, size: u64| {
            let (bar, offset) = (register & 7, u64::from(register & !7));
            let first = offset / PAGE * PAGE;
            (bar as usize, first..(offset + size).next_multiple_of(PAGE))
        };
        return Some(vec![
            pages(word(at + MSIX_TABLE)?, 16 * vectors),
            pages(word(at + MSIX_PENDING)?, 8 * vectors.div_ceil(64)),
        ]);
    }
    None
}

/// What a function's IOMMU cannot map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How many bits its addresses have.
    pub address_bits: u32,
    /// What is reserved in between; ends are exclusive.
    pub reserved: Vec<Range<u64>>,
}

impl Limits {
    /// From the IOMMU group's `reserved_regions` and the IOMMU's capability register (VT-d 4.1,
    /// 11.4.2: bits 21:16 are the address width less one).
    #[must_use]
    pub fn new(reserved_regions: &str, capability: &str) -> Option<Self> {
        let capability = u64::from_str_radix(capability.trim(), 16).ok()?;
        // `direct` regions are mapped where they are, and no less kept from others.
        let region = |line: &str| {
            let mut words = line.split_whitespace().map(hexadecimal);
            let (first, last) = (words.next()??, words.next()??);
            Some(first..last.checked_add(1)?)
        };
        Some(Self {
            address_bits: u32::try_from(capability >> 16 & 0x3f).ok()? + 1,
            reserved: reserved_regions
                .lines()
                .map(region)
                .collect::<Option<_>>()?,
        })
    }

    /// Whether a page can be mapped there.
    #[must_use]
    pub fn allow(&self, page: u64) -> bool {
        let below = page.checked_shr(self.address_bits).unwrap_or(0) == 0;
        below && !self.reserved.iter().any(|range| range.contains(&page))
    }
}

/// All that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Where each page of the RAM's file is in memory, in the order of the file.
    pub ram: Vec<u64>,
    /// By name.
    pub functions: BTreeMap<String, FunctionFacts>,
    /// What the IOMMU cannot map.
    pub limits: Limits,
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU's igb: two memory BARs, one of ports, and one with MSI-X in it.
    const RESOURCE: &str = "\
0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200
0x00000000fe820000 0x00000000fe83ffff 0x0000000000040200
0x0000000000009000 0x000000000000901f 0x0000000000040101
0x00000000fe840000 0x00000000fe843fff 0x0000000000040200
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x00000000fe8c0000 0x00000000fe8fffff 0x0000000000046200
";

    fn config() -> Vec<u8> {
        let mut config = vec![0; 256];
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, 0x70]);
        config[0x70..0x74].copy_from_slice(&[MSIX, 0, 9, 0x80]);
        config[0x74..0x78].copy_from_slice(&3_u32.to_le_bytes());
        config[0x78..0x7c].copy_from_slice(&0x2003_u32.to_le_bytes());
        config
    }

    #[test]
    fn memory_bars_and_what_msix_keeps_of_them() {
        let facts = FunctionFacts::new(RESOURCE, &config());
        let bars: Vec<_> = facts.bars.keys().copied().collect();
        assert_eq!(bars, [0, 1, 3]);
        assert_eq!(facts.bars[&3], 0xfe84_0000..0xfe84_4000);
        assert_eq!(facts.msix, [(3, 0..0x1000), (3, 0x2000..0x3000)]);
        assert_eq!(facts.mappable_pages(3), 2);
        assert_eq!(facts.mappable_pages(0), 32);
        assert_eq!(facts.mappable_pages(5), 0);
    }

    #[test]
    fn a_config_space_without_msix_or_with_a_loop_keeps_nothing() {
        assert_eq!(FunctionFacts::new(RESOURCE, &[0; 64]).msix, []);
        assert_eq!(FunctionFacts::new(RESOURCE, &[]).msix, []);
        let mut looped = config();
        looped[0x41] = 0x40;
        assert_eq!(FunctionFacts::new(RESOURCE, &looped).msix, []);
    }

    #[test]
    fn the_window_for_messages_and_what_is_past_the_width_is_not_allowed() {
        let regions = "0x00000000fee00000 0x00000000feefffff msi\n";
        let limits = Limits::new(regions, "d2008c222f0686\n").unwrap();
        assert_eq!(limits.address_bits, 48);
        for (page, allowed) in [
            (0, true),
            (0xfedf_f000, true),
            (0xfee0_0000, false),
            (0xfeef_f000, false),
            (0xfef0_0000, true),
            (0xffff_ffff_f000, true),
            (1 << 48, false),
        ] {
            assert_eq!(limits.allow(page), allowed, "{page:#x}");
        }
        assert_eq!(Limits::new(regions, "none"), None);
        assert_eq!(Limits::new("0x0 msi", "0"), None);
    }
}
