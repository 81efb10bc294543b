//! What may be mapped of a file, and with which errno the rest is refused.

use libc::{EEXIST, EINVAL};
use memory_map::{Access, Iova, IovaRange};

use super::Bench;
use super::cases::{map_ram, nothing_is_mapped, unmaps};
use crate::cases::{AT, MSI, MSI_SIZE, PAGE, pages, range};
use crate::verdict::{granted, refused, same};
use crate::{Complaint, Verdict};

/// Tries to map RAM there.
fn ram(bench: &dyn Bench, iova: IovaRange) -> std::io::Result<()> {
    bench
        .ioas()
        .map_file(iova, bench.ram(), 0, Access::ReadWrite)
}

pub(crate) fn unaligned_iova_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(AT + 1, PAGE)?), EINVAL)?;
    refused(ram(bench, range(AT + PAGE / 2, PAGE)?), EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn unaligned_size_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(AT, 1)?), EINVAL)?;
    refused(ram(bench, range(AT, PAGE + 0x10)?), EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn unaligned_file_offset_is_einval(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    for offset in [1, 0x10, PAGE + 0x800] {
        let result = ioas.map_file(pages(0, 1)?, bench.ram(), offset, Access::ReadWrite);
        refused(result, EINVAL)?;
    }
    nothing_is_mapped(&ioas)
}

pub(crate) fn same_range_again_is_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    refused(ram(bench, pages(4, 4)?), EEXIST)?;
    unmaps(&bench.ioas(), pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn overlaps_are_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    // At the front, at the end, inside, around.
    for (page, count) in [(2, 3), (7, 3), (5, 1), (3, 6)] {
        refused(ram(bench, pages(page, count)?), EEXIST)?;
    }
    unmaps(&bench.ioas(), pages(0, 12)?, 4 * PAGE)
}

pub(crate) fn neighbours_are_no_overlap(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    map_ram(bench, pages(2, 2)?, 4)?;
    map_ram(bench, pages(8, 2)?, 6)?;
    unmaps(&bench.ioas(), pages(0, 12)?, 8 * PAGE)
}

pub(crate) fn same_file_twice_is_allowed(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    map_ram(bench, pages(16, 4)?, 0)?;
    map_ram(bench, pages(32, 2)?, 1)?;
    unmaps(&bench.ioas(), pages(0, 64)?, 10 * PAGE)
}

pub(crate) fn msi_window_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(MSI, PAGE)?), EINVAL)?;
    refused(ram(bench, range(MSI + MSI_SIZE - PAGE, PAGE)?), EINVAL)?;
    refused(ram(bench, range(MSI - PAGE, 2 * PAGE)?), EINVAL)?;
    refused(ram(bench, range(MSI + MSI_SIZE - PAGE, 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

/// Nothing so large has memory behind it, but the window is found first.
pub(crate) fn around_the_msi_window_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(MSI - PAGE, MSI_SIZE + 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn next_to_the_msi_window_is_allowed(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, range(MSI - PAGE, PAGE)?, 0)?;
    map_ram(bench, range(MSI + MSI_SIZE, PAGE)?, 1)?;
    let around = range(MSI - PAGE, MSI_SIZE + 2 * PAGE)?;
    unmaps(&bench.ioas(), around, 2 * PAGE)
}

pub(crate) fn first_and_last_page_of_every_allowed_range_map(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    for allowed in granted(ioas.ranges())?.allowed {
        // Of all 64 bits, the last page is not whole: its last byte is no address.
        let end = allowed.last().raw().saturating_add(1) & !(PAGE - 1);
        let last = range(end.saturating_sub(PAGE), PAGE)?;
        let first = range(allowed.start().raw(), PAGE)?;
        if first == last {
            continue;
        }
        map_ram(bench, first, 0)?;
        map_ram(bench, last, 1)?;
        unmaps(&ioas, allowed, 2 * PAGE)?;
    }
    Ok(())
}

/// The first address that the IOMMU does not translate.
fn past_aperture(bench: &dyn Bench) -> Result<Iova, Complaint> {
    let ranges = granted(bench.ioas().ranges())?;
    ranges
        .allowed
        .last()
        .and_then(|range| range.last().checked_add(1))
        .filter(|after| after.raw() < u64::MAX - 16 * PAGE)
        .ok_or_else(|| Complaint::Skipped("the aperture is the whole address space".into()))
}

pub(crate) fn past_the_aperture_is_einval(bench: &mut dyn Bench) -> Verdict {
    let after = past_aperture(bench)?;
    refused(ram(bench, range(after.raw(), PAGE)?), EINVAL)?;
    refused(ram(bench, range(u64::MAX - (2 * PAGE - 1), PAGE)?), EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn across_the_end_of_the_aperture_is_einval(bench: &mut dyn Bench) -> Verdict {
    let after = past_aperture(bench)?;
    refused(ram(bench, range(after.raw() - PAGE, 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn past_the_end_of_the_file_is_einval(bench: &mut dyn Bench) -> Verdict {
    let (ioas, size) = (bench.ioas(), bench.ram_size());
    let all = size / PAGE;
    for (offset, count) in [(0, all + 1), (size - PAGE, 2), (size, 1), (1 << 40, 1)] {
        let result = ioas.map_file(pages(0, count)?, bench.ram(), offset, Access::ReadWrite);
        refused(result, EINVAL)?;
    }
    nothing_is_mapped(&ioas)?;
    granted(ram(bench, pages(0, all)?))
}

pub(crate) fn a_file_that_is_no_memory_is_einval(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let result = ioas.map_file(pages(0, 1)?, bench.no_memory(), 0, Access::ReadWrite);
    refused(result, EINVAL)?;
    nothing_is_mapped(&ioas)
}

pub(crate) fn misalignment_is_found_before_overlap(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    refused(ram(bench, range(AT + 1, PAGE)?), EINVAL)
}

/// The other way about than type1 does it.
pub(crate) fn reserved_windows_are_found_before_overlap(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, range(MSI - PAGE, PAGE)?, 0)?;
    refused(ram(bench, range(MSI - PAGE, 2 * PAGE)?), EINVAL)
}

pub(crate) fn overlap_is_found_before_the_end_of_the_file(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 1)?, 0)?;
    let ioas = bench.ioas();
    let past = ioas.map_file(pages(0, 1)?, bench.ram(), 1 << 40, Access::ReadWrite);
    refused(past, EEXIST)?;
    let none = ioas.map_file(pages(0, 1)?, bench.no_memory(), 0, Access::ReadWrite);
    refused(none, EEXIST)
}

pub(crate) fn read_only_memory_maps(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let iova = pages(0, 4)?;
    granted(ioas.map_file(iova, bench.ram(), 0, Access::ReadOnly))?;
    refused(ram(bench, iova), EEXIST)?;
    unmaps(&ioas, iova, 4 * PAGE)
}

pub(crate) fn ranges_tell_what_may_be_mapped(bench: &mut dyn Bench) -> Verdict {
    let ranges = granted(bench.ioas().ranges())?;
    same("the alignment", ranges.alignment, PAGE)?;
    let sorted = ranges
        .allowed
        .iter()
        .zip(ranges.allowed.iter().skip(1))
        .all(|(one, next)| one.last() < next.start());
    same("ranges sorted and disjoint", sorted, true)?;
    let msi = range(MSI, MSI_SIZE)?;
    let reserved = !ranges.allowed.iter().any(|range| range.overlaps(&msi));
    same("the MSI window left out", reserved, true)?;
    let here = pages(0, 16)?;
    let usable = ranges.allowed.iter().any(|range| range.covers(&here));
    same("ordinary addresses allowed", usable, true)
}

pub(crate) fn huge_pages_are_on_and_can_be_turned_off_while_nothing_is_mapped(
    bench: &mut dyn Bench,
) -> Verdict {
    let ioas = bench.ioas();
    same("huge pages", granted(ioas.huge_pages())?, true)?;
    granted(ioas.set_huge_pages(false))?;
    same("huge pages", granted(ioas.huge_pages())?, false)?;
    map_ram(bench, pages(0, 4)?, 0)?;
    granted(ioas.set_huge_pages(false))?;
    granted(ioas.set_huge_pages(true))?;
    same("huge pages", granted(ioas.huge_pages())?, true)
}

pub(crate) fn huge_pages_cannot_be_turned_off_while_something_is_mapped(
    bench: &mut dyn Bench,
) -> Verdict {
    let ioas = bench.ioas();
    map_ram(bench, pages(0, 4)?, 0)?;
    refused(ioas.set_huge_pages(false), EINVAL)?;
    same("huge pages", granted(ioas.huge_pages())?, true)?;
    unmaps(&ioas, pages(0, 4)?, 4 * PAGE)?;
    granted(ioas.set_huge_pages(false))
}
