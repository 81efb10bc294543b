//! Memory that is mapped by its address, for want of a file.

use libc::{EEXIST, EFAULT, EINVAL, EOVERFLOW};
use memory_map::{Access, HostVa};

use super::Bench;
use super::cases::{nothing_is_mapped, unmaps};
use crate::Verdict;
use crate::cases::{NOWHERE, PAGE, pages};
use crate::verdict::{granted, refused};

fn map(bench: &dyn Bench, count: u64, at: HostVa) -> Result<std::io::Result<()>, crate::Complaint> {
    Ok(bench.map_address(&bench.ioas(), pages(0, count)?, at, Access::ReadWrite))
}

pub(crate) fn memory_without_a_file_maps_by_its_address(bench: &mut dyn Bench) -> Verdict {
    granted(map(bench, 4, bench.anonymous().address)?)?;
    unmaps(&bench.ioas(), pages(0, 4)?, 4 * PAGE)
}

pub(crate) fn nothing_at_the_address_is_efault(bench: &mut dyn Bench) -> Verdict {
    refused(map(bench, 1, NOWHERE)?, EFAULT)?;
    nothing_is_mapped(&bench.ioas())
}

/// On every kernel, for ever: it has no pages that could be pinned.
pub(crate) fn a_bars_address_is_efault(bench: &mut dyn Bench) -> Verdict {
    let bar = bench.bar();
    refused(map(bench, 1, bar.address)?, EFAULT)?;
    refused(map(bench, bar.size / PAGE, bar.address)?, EFAULT)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn unaligned_address_is_einval(bench: &mut dyn Bench) -> Verdict {
    let inside = HostVa::new(bench.anonymous().address.raw() + 0x10);
    refused(map(bench, 1, inside)?, EINVAL)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn address_that_wraps_is_eoverflow(bench: &mut dyn Bench) -> Verdict {
    let last_page = HostVa::new(u64::MAX - (PAGE - 1));
    refused(map(bench, 2, last_page)?, EOVERFLOW)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn overlap_is_found_before_missing_memory(bench: &mut dyn Bench) -> Verdict {
    granted(map(bench, 1, bench.anonymous().address)?)?;
    refused(map(bench, 1, NOWHERE)?, EEXIST)
}
