//! What may be mapped, and with which errno the rest is refused.

use libc::{EEXIST, EFAULT, EINVAL, EIO, EOVERFLOW};
use memory_map::{Access, HostVa, Iova, IovaRange};

use crate::cases::{AT, MSI, MSI_SIZE, NOWHERE, PAGE, map_ram, pages, ram_page, range, unmaps};
use crate::verdict::{granted, refused, refused_with_one_of, same};
use crate::{Bench, Complaint, Verdict};

/// Tries to map RAM there.
fn ram(bench: &dyn Bench, iova: IovaRange) -> std::io::Result<()> {
    bench.map(iova, bench.ram().address, Access::ReadWrite)
}

/// Nothing may be mapped in all of the container.
fn nothing_is_mapped(bench: &dyn Bench) -> Verdict {
    let all = IovaRange::from_inclusive(Iova::new(0), Iova::new(u64::MAX - PAGE));
    let all = all.map_err(|error| Complaint::Failed {
        expected: "a range".into(),
        got: error.to_string(),
    })?;
    unmaps(bench.container(), all, 0)
}

pub(crate) fn unaligned_iova_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(AT + 1, PAGE)?), EINVAL)?;
    refused(ram(bench, range(AT + PAGE / 2, PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn unaligned_address_is_einval(bench: &mut dyn Bench) -> Verdict {
    let inside = HostVa::new(bench.ram().address.raw() + 0x10);
    refused(bench.map(pages(0, 1)?, inside, Access::ReadWrite), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn unaligned_size_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(AT, 1)?), EINVAL)?;
    refused(ram(bench, range(AT, PAGE + 0x10)?), EINVAL)?;
    nothing_is_mapped(bench)
}

/// `EINVAL` up to Linux 6.17, `EOVERFLOW` from 6.18.
pub(crate) fn address_that_wraps_is_einval_or_eoverflow(bench: &mut dyn Bench) -> Verdict {
    let last_page = HostVa::new(u64::MAX - (PAGE - 1));
    let result = bench.map(pages(0, 2)?, last_page, Access::ReadWrite);
    refused_with_one_of(result, &[EINVAL, EOVERFLOW])?;
    nothing_is_mapped(bench)
}

pub(crate) fn same_range_again_is_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    refused(ram(bench, pages(4, 4)?), EEXIST)?;
    unmaps(bench.container(), pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn overlap_at_the_front_is_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    refused(ram(bench, pages(2, 3)?), EEXIST)?;
    unmaps(bench.container(), pages(0, 12)?, 4 * PAGE)
}

pub(crate) fn overlap_at_the_end_is_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    refused(ram(bench, pages(7, 3)?), EEXIST)?;
    unmaps(bench.container(), pages(0, 12)?, 4 * PAGE)
}

pub(crate) fn overlap_inside_is_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    refused(ram(bench, pages(5, 1)?), EEXIST)?;
    unmaps(bench.container(), pages(0, 12)?, 4 * PAGE)
}

pub(crate) fn overlap_around_is_eexist(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    refused(ram(bench, pages(3, 6)?), EEXIST)?;
    unmaps(bench.container(), pages(0, 12)?, 4 * PAGE)
}

pub(crate) fn neighbours_are_no_overlap(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    map_ram(bench, pages(2, 2)?, 4)?;
    map_ram(bench, pages(8, 2)?, 6)?;
    unmaps(bench.container(), pages(0, 12)?, 8 * PAGE)
}

pub(crate) fn same_memory_twice_is_allowed(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    map_ram(bench, pages(16, 4)?, 0)?;
    map_ram(bench, pages(32, 2)?, 1)?;
    unmaps(bench.container(), pages(0, 64)?, 10 * PAGE)
}

pub(crate) fn msi_window_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(MSI, PAGE)?), EINVAL)?;
    refused(ram(bench, range(MSI + MSI_SIZE - PAGE, PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn reaching_into_the_msi_window_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(MSI - PAGE, 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn reaching_out_of_the_msi_window_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(MSI + MSI_SIZE - PAGE, 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

/// Nothing so large has memory behind it, but the window is found first.
pub(crate) fn around_the_msi_window_is_einval(bench: &mut dyn Bench) -> Verdict {
    refused(ram(bench, range(MSI - PAGE, MSI_SIZE + 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn next_to_the_msi_window_is_allowed(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, range(MSI - PAGE, PAGE)?, 0)?;
    map_ram(bench, range(MSI + MSI_SIZE, PAGE)?, 1)?;
    unmaps(
        bench.container(),
        range(MSI - PAGE, MSI_SIZE + 2 * PAGE)?,
        2 * PAGE,
    )
}

pub(crate) fn first_and_last_page_of_every_allowed_range_map(bench: &mut dyn Bench) -> Verdict {
    let container = bench.container();
    for allowed in granted(container.info())?.allowed {
        let last = range(allowed.last().raw() & !(PAGE - 1), PAGE)?;
        let first = range(allowed.start().raw(), PAGE)?;
        if first == last {
            continue;
        }
        map_ram(bench, first, 0)?;
        map_ram(bench, last, 1)?;
        unmaps(container, allowed, 2 * PAGE)?;
    }
    Ok(())
}

/// The first address that the IOMMU does not translate.
pub(crate) fn past_aperture(bench: &dyn Bench) -> Result<Iova, Complaint> {
    granted(bench.container().info())?
        .allowed
        .last()
        .ok_or_else(|| Complaint::Skipped("the kernel does not tell the allowed ranges".into()))?
        .last()
        .checked_add(1)
        .filter(|after| after.raw() < u64::MAX - 16 * PAGE)
        .ok_or_else(|| Complaint::Skipped("the aperture is the whole address space".into()))
}

pub(crate) fn past_the_aperture_is_einval(bench: &mut dyn Bench) -> Verdict {
    let after = past_aperture(bench)?;
    refused(ram(bench, range(after.raw(), PAGE)?), EINVAL)?;
    refused(ram(bench, range(u64::MAX - (2 * PAGE - 1), PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn across_the_end_of_the_aperture_is_einval(bench: &mut dyn Bench) -> Verdict {
    let after = past_aperture(bench)?;
    refused(ram(bench, range(after.raw() - PAGE, 2 * PAGE)?), EINVAL)?;
    nothing_is_mapped(bench)
}

pub(crate) fn nothing_at_the_address_is_efault(bench: &mut dyn Bench) -> Verdict {
    refused(bench.map(pages(0, 1)?, NOWHERE, Access::ReadWrite), EFAULT)?;
    refused(bench.map(pages(0, 1)?, NOWHERE, Access::ReadOnly), EFAULT)?;
    nothing_is_mapped(bench)
}

pub(crate) fn running_past_the_memory_is_efault_and_maps_nothing(bench: &mut dyn Bench) -> Verdict {
    let all = bench.ram().size / PAGE;
    refused(ram(bench, pages(0, all + 1)?), EFAULT)?;
    let last = ram_page(bench, all - 1);
    refused(bench.map(pages(0, 2)?, last, Access::ReadWrite), EFAULT)?;
    nothing_is_mapped(bench)?;
    granted(ram(bench, pages(0, all)?))
}

pub(crate) fn bar_maps_like_memory(bench: &mut dyn Bench) -> Verdict {
    let bar = bench.bar();
    granted(bench.map(range(AT, bar.size)?, bar.address, Access::ReadWrite))?;
    unmaps(bench.container(), range(AT, bar.size)?, bar.size)?;
    let inside = HostVa::new(bar.address.raw() + 3 * PAGE);
    granted(bench.map(pages(0, 2)?, inside, Access::ReadOnly))?;
    unmaps(bench.container(), pages(0, 2)?, 2 * PAGE)
}

pub(crate) fn bar_that_is_not_decoded_is_efault(bench: &mut dyn Bench) -> Verdict {
    bench.set_decoding(false)?;
    let bar = bench.bar();
    let whole = bench.map(range(AT, bar.size)?, bar.address, Access::ReadWrite);
    refused(whole, EFAULT)?;
    let page = bench.map(pages(0, 1)?, bar.address, Access::ReadOnly);
    refused(page, EFAULT)?;
    nothing_is_mapped(bench)
}

pub(crate) fn bar_that_is_decoded_again_maps(bench: &mut dyn Bench) -> Verdict {
    let bar = bench.bar();
    let iova = range(AT, bar.size)?;
    granted(bench.map(iova, bar.address, Access::ReadWrite))?;
    unmaps(bench.container(), iova, bar.size)?;
    bench.set_decoding(false)?;
    refused(bench.map(iova, bar.address, Access::ReadWrite), EFAULT)?;
    bench.set_decoding(true)?;
    granted(bench.map(iova, bar.address, Access::ReadWrite))?;
    unmaps(bench.container(), iova, bar.size)
}

/// Not type1's doing but vfio-pci's, and what makes a driver of the function notice.
pub(crate) fn bar_access_without_decoding_is_eio(bench: &mut dyn Bench) -> Verdict {
    granted(bench.bar_write(0, *b"sentinel"))?;
    bench.set_decoding(false)?;
    refused(bench.bar_read(0), EIO)?;
    refused(bench.bar_write(0, [0; 8]), EIO)?;
    bench.set_decoding(true)?;
    same("in the BAR", granted(bench.bar_read(0))?, *b"sentinel")
}

pub(crate) fn without_an_iommu_everything_is_einval(bench: &mut dyn Bench) -> Verdict {
    let container = bench.without_iommu()?;
    refused(container.info(), EINVAL)?;
    refused(container.unmap_dma(pages(0, 1)?), EINVAL)?;
    refused(container.unmap_all(), EINVAL)
}

pub(crate) fn misalignment_is_found_before_overlap(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    refused(ram(bench, range(AT + 1, PAGE)?), EINVAL)
}

pub(crate) fn overlap_is_found_before_reserved_windows(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, range(MSI - PAGE, PAGE)?, 0)?;
    refused(ram(bench, range(MSI - PAGE, 2 * PAGE)?), EEXIST)?;
    let nowhere = bench.map(range(MSI - PAGE, PAGE)?, NOWHERE, Access::ReadWrite);
    refused(nowhere, EEXIST)
}

pub(crate) fn reserved_windows_are_found_before_missing_memory(bench: &mut dyn Bench) -> Verdict {
    let result = bench.map(range(MSI, PAGE)?, NOWHERE, Access::ReadWrite);
    refused(result, EINVAL)
}

pub(crate) fn read_only_memory_maps(bench: &mut dyn Bench) -> Verdict {
    let address = bench.ram().address;
    granted(bench.map(pages(0, 4)?, address, Access::ReadOnly))?;
    refused(bench.map(pages(0, 4)?, address, Access::ReadWrite), EEXIST)?;
    unmaps(bench.container(), pages(0, 4)?, 4 * PAGE)
}
