//! What the container tells of its limits, and what happens at them.

use libc::{EEXIST, EFAULT, EINVAL, ENOMEM, ENOSPC};
use memory_map::Access;

use crate::cases::{MSI, MSI_SIZE, NOWHERE, PAGE, map_ram, pages, ram_page, range, unmaps};
use crate::verdict::{granted, refused, same};
use crate::{Bench, Complaint, Verdict};

/// How many more mappings the container takes.
fn entries_left(bench: &dyn Bench) -> Result<u32, Complaint> {
    granted(bench.container().info())?
        .entries_left
        .ok_or_else(|| Complaint::Failed {
            expected: "the number of entries left".into(),
            got: "nothing".into(),
        })
}

pub(crate) fn info_tells_pages_ranges_and_entries(bench: &mut dyn Bench) -> Verdict {
    let info = granted(bench.container().info())?;
    same("the smallest page", info.page_sizes.trailing_zeros(), 12)?;
    same("allowed ranges told", info.allowed.is_empty(), false)?;
    let sorted = info
        .allowed
        .iter()
        .zip(info.allowed.iter().skip(1))
        .all(|(one, next)| one.last() < next.start());
    same("ranges sorted and disjoint", sorted, true)?;
    let msi = range(MSI, MSI_SIZE)?;
    let reserved = !info.allowed.iter().any(|range| range.overlaps(&msi));
    same("the MSI window left out", reserved, true)?;
    let here = pages(0, 16)?;
    let usable = info.allowed.iter().any(|range| range.covers(&here));
    same("ordinary addresses allowed", usable, true)?;
    same("entries left", info.entries_left, Some(65_535))
}

pub(crate) fn entries_left_counts_down_and_up(bench: &mut dyn Bench) -> Verdict {
    let all = entries_left(bench)?;
    map_ram(bench, pages(0, 4)?, 0)?;
    same("entries left", entries_left(bench)?, all - 1)?;
    map_ram(bench, pages(4, 1)?, 4)?;
    map_ram(bench, pages(8, 1)?, 5)?;
    same("entries left", entries_left(bench)?, all - 3)?;
    unmaps(bench.container(), pages(0, 4)?, 4 * PAGE)?;
    same("entries left", entries_left(bench)?, all - 2)?;
    granted(bench.container().unmap_all())?;
    same("entries left", entries_left(bench)?, all)
}

pub(crate) fn refused_maps_take_no_entry(bench: &mut dyn Bench) -> Verdict {
    let all = entries_left(bench)?;
    let result = bench.map(pages(0, 1)?, NOWHERE, Access::ReadWrite);
    refused(result, EFAULT)?;
    let result = bench.map(range(MSI, PAGE)?, bench.ram().address, Access::ReadWrite);
    refused(result, EINVAL)?;
    same("entries left", entries_left(bench)?, all)
}

pub(crate) fn locked_memory_limit_is_enomem(bench: &mut dyn Bench) -> Verdict {
    let limit = bench.limit_locked_memory(4 * PAGE)?;
    let address = bench.ram().address;
    for access in [Access::ReadWrite, Access::ReadOnly] {
        refused(bench.map(pages(0, 5)?, address, access), ENOMEM)?;
        granted(bench.map(pages(0, 4)?, address, access))?;
        let fifth = bench.map(pages(8, 1)?, ram_page(bench, 4), access);
        refused(fifth, ENOMEM)?;
        unmaps(bench.container(), pages(0, 16)?, 4 * PAGE)?;
    }
    drop(limit);
    granted(bench.map(pages(0, 5)?, address, Access::ReadWrite))
}

pub(crate) fn locked_memory_is_given_back(bench: &mut dyn Bench) -> Verdict {
    let _limit = bench.limit_locked_memory(4 * PAGE)?;
    map_ram(bench, pages(0, 3)?, 0)?;
    let address = ram_page(bench, 3);
    refused(bench.map(pages(8, 2)?, address, Access::ReadWrite), ENOMEM)?;
    unmaps(bench.container(), pages(0, 3)?, 3 * PAGE)?;
    map_ram(bench, pages(8, 2)?, 3)?;
    map_ram(bench, pages(0, 2)?, 0)?;
    granted(bench.container().unmap_all())?;
    map_ram(bench, pages(0, 4)?, 0)
}

pub(crate) fn same_memory_twice_is_locked_twice(bench: &mut dyn Bench) -> Verdict {
    let _limit = bench.limit_locked_memory(4 * PAGE)?;
    map_ram(bench, pages(0, 3)?, 0)?;
    let address = bench.ram().address;
    refused(bench.map(pages(8, 2)?, address, Access::ReadWrite), ENOMEM)?;
    map_ram(bench, pages(8, 1)?, 0)
}

pub(crate) fn bar_is_no_locked_memory(bench: &mut dyn Bench) -> Verdict {
    let _limit = bench.limit_locked_memory(PAGE)?;
    let bar = bench.bar();
    let iova = pages(64, bar.size / PAGE)?;
    granted(bench.map(iova, bar.address, Access::ReadWrite))?;
    map_ram(bench, pages(0, 1)?, 0)?;
    let result = bench.map(pages(8, 1)?, ram_page(bench, 1), Access::ReadWrite);
    refused(result, ENOMEM)
}

pub(crate) fn missing_memory_is_found_before_the_locked_memory_limit(
    bench: &mut dyn Bench,
) -> Verdict {
    let _limit = bench.limit_locked_memory(0)?;
    let result = bench.map(pages(0, 8)?, NOWHERE, Access::ReadWrite);
    refused(result, EFAULT)?;
    let result = bench.map(pages(0, 1)?, bench.ram().address, Access::ReadWrite);
    refused(result, ENOMEM)
}

/// Pages are pinned one after the other: whichever is hit first counts.
pub(crate) fn locked_memory_limit_is_found_before_missing_memory_further_on(
    bench: &mut dyn Bench,
) -> Verdict {
    let all = bench.ram().size / PAGE;
    let _limit = bench.limit_locked_memory(2 * PAGE)?;
    let result = bench.map(pages(0, 4)?, ram_page(bench, all - 3), Access::ReadWrite);
    refused(result, ENOMEM)?;
    let result = bench.map(pages(0, 4)?, ram_page(bench, all - 2), Access::ReadWrite);
    refused(result, EFAULT)
}

/// Fills the container with single pages, all of the same memory.
pub(crate) fn entry_limit_is_enospc(bench: &mut dyn Bench) -> Verdict {
    let all = entries_left(bench)?;
    for entry in 0..u64::from(all) {
        map_ram(bench, pages(entry, 1)?, 0)?;
    }
    same("entries left", entries_left(bench)?, 0)?;
    let address = bench.ram().address;
    let after = pages(u64::from(all), 1)?;
    refused(bench.map(after, address, Access::ReadWrite), ENOSPC)?;
    // The limit is found after an overlap, and before a reserved window or missing memory.
    refused(bench.map(pages(0, 1)?, address, Access::ReadWrite), EEXIST)?;
    let reserved = range(MSI, PAGE)?;
    refused(bench.map(reserved, address, Access::ReadWrite), ENOSPC)?;
    refused(bench.map(after, NOWHERE, Access::ReadWrite), ENOSPC)?;
    unmaps(bench.container(), pages(7, 1)?, PAGE)?;
    granted(bench.map(after, address, Access::ReadWrite))?;
    refused(bench.map(pages(7, 1)?, address, Access::ReadWrite), ENOSPC)?;
    let bytes = granted(bench.container().unmap_all())?;
    same("bytes unmapped", bytes, u64::from(all) * PAGE)?;
    same("entries left", entries_left(bench)?, all)
}
