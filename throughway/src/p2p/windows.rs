//! Where the stand-in for a guest puts its BARs.

use anyhow::{Result, anyhow};
use assigned_pci::{BarInfo, Windows};
use memory_map::{Gpa, GpaRange, IovaRange};

const LAST_32: u64 = 0xffff_ffff;

/// Chooses windows above `ram_last` among the addresses that every IOMMU allows.
///
/// 64-bit BARs stay below 4 GiB where there is ample room, because some DMA engines have 32-bit
/// registers or are driven through them.
pub fn choose(allowed: &[IovaRange], ram_last: Gpa, bars: &[BarInfo]) -> Result<Windows> {
    let low = largest(allowed, ram_last.raw().saturating_add(1), LAST_32)
        .ok_or_else(|| anyhow!("the IOMMU allows no addresses between RAM and 4 GiB"))?;
    // Natural alignment can waste as much again as there is.
    let sizes = bars.iter().filter(|bar| bar.region.is_some());
    let need = sizes.fold(0_u64, |sum, bar| sum.saturating_add(bar.size));
    if need.saturating_mul(4) <= low.size() {
        let half = low.size() / 2;
        let middle = low.start().raw().saturating_add(half);
        return Ok(Windows {
            low: GpaRange::new(low.start(), half)?,
            high: GpaRange::from_inclusive(Gpa::new(middle), low.last())?,
        });
    }
    let high = largest(allowed, LAST_32 + 1, u64::MAX).unwrap_or(low);
    Ok(Windows { low, high })
}

/// The largest allowed stretch within `start..=last`.
fn largest(allowed: &[IovaRange], start: u64, last: u64) -> Option<GpaRange> {
    let within = GpaRange::from_inclusive(Gpa::new(start), Gpa::new(last)).ok()?;
    allowed
        .iter()
        .filter_map(|range| range.to_gpa().intersection(&within))
        .max_by_key(GpaRange::size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use assigned_pci::{BarIndex, BarKind};
    use memory_map::Iova;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap()
    }

    fn bar(size: u64) -> BarInfo {
        let map = memory_map::RegionManager::new();
        let host = sim_host::SimHost::default();
        let function = host
            .add_function(sim_host::FunctionSpec::shared_memory("x", size))
            .unwrap();
        let options = assigned_pci::FunctionOptions::default();
        let function = assigned_pci::AssignedFunction::new(function, map, &options).unwrap();
        let bars = function.bars();
        let bar = bars.iter().find(|bar| bar.index == BarIndex::ALL[2]);
        let bar = *bar.unwrap();
        assert!(matches!(
            bar.kind,
            BarKind::Memory {
                is_64_bit: true,
                ..
            }
        ));
        bar
    }

    #[test]
    fn small_bars_stay_below_4_gib_and_large_ones_go_above() {
        let allowed = [
            range(0, 0xfedf_ffff),
            range(0xfef0_0000, 0xfc_ffff_ffff),
            range(0x100_0000_0000, 0xffff_ffff_ffff),
        ];
        let ram_last = Gpa::new(0x3ff_ffff);
        let small = choose(&allowed, ram_last, &[bar(4 << 20)]).unwrap();
        assert!(small.low.start().raw() > ram_last.raw());
        assert!(small.high.last().raw() <= 0xfedf_ffff);
        assert!(!small.low.overlaps(&small.high));
        let large = choose(&allowed, ram_last, &[bar(16 << 30)]).unwrap();
        assert_eq!(large.high, allowed[2].to_gpa());
    }
}
