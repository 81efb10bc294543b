//! Free places for BARs: in the windows of the function's bus, where nothing is.

use std::fs;
use std::ops::Range;

use anyhow::Context;

use crate::function::{Bar, Function};

/// A range of addresses with its depth in `/proc/iomem`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Resource {
    depth: usize,
    range: Range<u64>,
    name: String,
}

/// Where 32-bit BARs end; exclusive.
const FOUR_GIB: u64 = 1 << 32;

/// Free places for a BAR, aligned and as large, each in another part of a window: at most one near
/// the start and one near the end of each window of the function's bus, none that holds now what
/// anybody's registers point at, or what is `spoken_for`.
pub fn free_places(
    function: &Function,
    bar: Bar,
    everybody: &[impl AsRef<Function>],
    spoken_for: &[Range<u64>],
) -> anyhow::Result<Vec<u64>> {
    let iomem = fs::read_to_string("/proc/iomem").context("reading /proc/iomem")?;
    let mut taken = spoken_for.to_vec();
    for other in everybody.iter().map(AsRef::as_ref) {
        for bar in other.bars() {
            let start = other.address(*bar)?;
            taken.push(start..start.saturating_add(bar.size));
        }
    }
    Ok(places(&iomem, function.bus(), bar, &taken))
}

/// Where config space is by address.
pub fn ecam() -> anyhow::Result<Range<u64>> {
    let iomem = fs::read_to_string("/proc/iomem").context("reading /proc/iomem")?;
    let mut resources = iomem.lines().filter_map(read);
    let ecam = resources.find(|resource| resource.name.starts_with("PCI ECAM"));
    Ok(ecam.context("the kernel knows no ECAM")?.range)
}

/// Where RAM is.
pub fn ram() -> anyhow::Result<Vec<Range<u64>>> {
    let iomem = fs::read_to_string("/proc/iomem").context("reading /proc/iomem")?;
    let resources = iomem.lines().filter_map(read);
    let ram = resources.filter(|resource| resource.name == "System RAM");
    Ok(ram.map(|resource| resource.range).collect())
}

fn places(iomem: &str, bus: &str, bar: Bar, taken: &[Range<u64>]) -> Vec<u64> {
    let resources: Vec<Resource> = iomem.lines().filter_map(read).collect();
    let name = format!("PCI Bus {bus}");
    let mut found = Vec::new();
    for (at, window) in resources.iter().enumerate() {
        let fits = bar.wide || window.range.end <= FOUR_GIB;
        if window.name != name || !fits {
            continue;
        }
        let inside = resources.iter().skip(at + 1);
        let inside = inside.take_while(|resource| resource.depth > window.depth);
        let occupied: Vec<&Range<u64>> = inside
            .map(|resource| &resource.range)
            .chain(taken)
            .collect();
        let free = |start: &u64| {
            let end = start.saturating_add(bar.size);
            end <= window.range.end
                && !occupied
                    .iter()
                    .any(|range| range.start < end && *start < range.end)
        };
        // A window may have room for millions: a look at some from each end is enough.
        let first = window.range.start.next_multiple_of(bar.size);
        let last = (window.range.end / bar.size).saturating_sub(1);
        let last = last.saturating_mul(bar.size);
        let up = (0..LOOKS).map(|step| first.saturating_add(step * bar.size));
        let down = (0..LOOKS).map(|step| last.saturating_sub(step * bar.size));
        let low = up.clone().find(free);
        let high = down
            .take_while(|start| *start >= window.range.start)
            .find(free);
        found.extend(low);
        found.extend(high.filter(|high| low.is_none_or(|low| low != *high)));
    }
    found
}

/// How many places are looked at from each end of a window.
const LOOKS: u64 = 4096;

/// `  c0000000-dfffffff : PCI Bus 0000:00`, two spaces for each level.
fn read(line: &str) -> Option<Resource> {
    let text = line.trim_start();
    let depth = line.len().checked_sub(text.len())? / 2;
    let (range, name) = text.split_once(" : ")?;
    let (start, end) = range.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?.checked_add(1)?;
    Some(Resource {
        depth,
        range: start..end,
        name: name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use assigned_pci::BarIndex;

    use super::*;

    const IOMEM: &str = "\
00001000-0009fbff : System RAM
c0000000-dfffffff : PCI Bus 0000:00
  c0000000-c00fffff : PCI Bus 0000:01
    c0000000-c0003fff : 0000:01:00.0
  c0100000-c01fffff : 0000:00:05.0
fec00000-fec003ff : IOAPIC 0
100000000-11fffffff : System RAM
1000000000-10ffffffff : PCI Bus 0000:00
  1000000000-10003fffff : 0000:00:06.0
";

    fn bar(size: u64, wide: bool) -> Bar {
        let [index, ..] = BarIndex::ALL;
        Bar {
            index,
            size,
            wide,
            prefetchable: wide,
        }
    }

    #[test]
    fn places_are_in_windows_and_free() {
        let wide = places(IOMEM, "0000:00", bar(4 << 20, true), &[]);
        assert_eq!(
            wide,
            [0xc040_0000, 0xdfc0_0000, 0x10_0040_0000, 0x10_ffc0_0000]
        );
        let narrow = places(IOMEM, "0000:00", bar(1 << 20, false), &[]);
        assert_eq!(narrow, [0xc020_0000, 0xdff0_0000]);
        let behind = places(IOMEM, "0000:01", bar(0x4000, false), &[]);
        assert_eq!(behind, [0xc000_4000, 0xc00f_c000]);
        assert!(places(IOMEM, "0000:02", bar(0x4000, false), &[]).is_empty());
    }

    #[test]
    fn what_registers_point_at_is_not_free() {
        let taken = [0xc020_0000..0xc030_0000, 0xdff0_0000..0xdff0_1000];
        let places = places(IOMEM, "0000:00", bar(1 << 20, false), &taken);
        assert_eq!(places, [0xc030_0000, 0xdfe0_0000]);
    }

    #[test]
    fn a_full_window_has_no_place() {
        assert!(places(IOMEM, "0000:01", bar(1 << 20, false), &[]).is_empty());
    }
}
