//! What may be unmapped, and what comes back.

use libc::EINVAL;

use crate::cases::{AT, MSI, MSI_SIZE, PAGE, map_ram, pages, range, unmaps};
use crate::map_cases::past_aperture;
use crate::verdict::{granted, refused, same};
use crate::{Bench, Verdict};

/// Three mappings with gaps: pages 0 to 3, 6 and 7, 9.
fn three(bench: &dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    map_ram(bench, pages(6, 2)?, 4)?;
    map_ram(bench, pages(9, 1)?, 6)
}

const THREE: u64 = 7 * PAGE;

pub(crate) fn unmap_returns_the_bytes(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    unmaps(bench.container(), pages(0, 4)?, 4 * PAGE)
}

pub(crate) fn unaligned_unmap_is_einval(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    let container = bench.container();
    refused(container.unmap_dma(range(AT + 1, PAGE)?), EINVAL)?;
    refused(container.unmap_dma(range(AT, PAGE + 1)?), EINVAL)?;
    refused(container.unmap_dma(range(AT, 4 * PAGE + 8)?), EINVAL)?;
    unmaps(container, pages(0, 4)?, 4 * PAGE)
}

pub(crate) fn unmapping_nothing_returns_zero(bench: &mut dyn Bench) -> Verdict {
    unmaps(bench.container(), pages(0, 4)?, 0)?;
    map_ram(bench, pages(4, 4)?, 0)?;
    unmaps(bench.container(), pages(0, 4)?, 0)?;
    unmaps(bench.container(), pages(8, 4)?, 0)
}

pub(crate) fn unmapping_a_reserved_window_returns_zero(bench: &mut dyn Bench) -> Verdict {
    unmaps(bench.container(), range(MSI, MSI_SIZE)?, 0)
}

pub(crate) fn unmapping_past_the_aperture_returns_zero(bench: &mut dyn Bench) -> Verdict {
    let after = past_aperture(bench)?;
    unmaps(bench.container(), range(after.raw(), PAGE)?, 0)
}

pub(crate) fn unmapping_twice_returns_zero(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    unmaps(bench.container(), pages(0, 4)?, 4 * PAGE)?;
    unmaps(bench.container(), pages(0, 4)?, 0)
}

pub(crate) fn cutting_off_the_front_is_einval(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    let container = bench.container();
    refused(container.unmap_dma(pages(4, 1)?), EINVAL)?;
    refused(container.unmap_dma(pages(2, 3)?), EINVAL)?;
    unmaps(container, pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn cutting_off_the_end_is_einval(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    let container = bench.container();
    refused(container.unmap_dma(pages(7, 1)?), EINVAL)?;
    refused(container.unmap_dma(pages(7, 4)?), EINVAL)?;
    unmaps(container, pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn cutting_out_the_middle_is_einval(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    let container = bench.container();
    refused(container.unmap_dma(pages(5, 2)?), EINVAL)?;
    unmaps(container, pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn cutting_the_last_of_several_is_einval_and_unmaps_nothing(
    bench: &mut dyn Bench,
) -> Verdict {
    three(bench)?;
    let container = bench.container();
    refused(container.unmap_dma(pages(0, 7)?), EINVAL)?;
    unmaps(container, pages(0, 10)?, THREE)
}

pub(crate) fn cutting_the_first_of_several_is_einval_and_unmaps_nothing(
    bench: &mut dyn Bench,
) -> Verdict {
    three(bench)?;
    let container = bench.container();
    refused(container.unmap_dma(pages(2, 10)?), EINVAL)?;
    unmaps(container, pages(0, 10)?, THREE)
}

pub(crate) fn one_unmap_takes_several_mappings_and_gaps(bench: &mut dyn Bench) -> Verdict {
    three(bench)?;
    let container = bench.container();
    unmaps(container, pages(0, 8)?, 6 * PAGE)?;
    unmaps(container, pages(0, 64)?, PAGE)
}

pub(crate) fn unmap_may_be_larger_than_the_mapping(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 2)?, 0)?;
    unmaps(bench.container(), pages(0, 16)?, 2 * PAGE)
}

pub(crate) fn unmap_all_takes_everything(bench: &mut dyn Bench) -> Verdict {
    three(bench)?;
    map_ram(bench, range(MSI + MSI_SIZE, PAGE)?, 8)?;
    let container = bench.container();
    let bytes = granted(container.unmap_all())?;
    same("bytes unmapped", bytes, THREE + PAGE)?;
    unmaps(container, pages(0, 64)?, 0)?;
    unmaps(container, range(MSI + MSI_SIZE, PAGE)?, 0)
}

pub(crate) fn unmap_all_of_nothing_returns_zero(bench: &mut dyn Bench) -> Verdict {
    same("bytes unmapped", granted(bench.container().unmap_all())?, 0)
}

pub(crate) fn what_was_unmapped_can_be_mapped_again(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    unmaps(bench.container(), pages(0, 4)?, 4 * PAGE)?;
    map_ram(bench, pages(1, 2)?, 2)?;
    map_ram(bench, pages(3, 4)?, 0)?;
    granted(bench.container().unmap_all())?;
    map_ram(bench, pages(0, 8)?, 0)?;
    unmaps(bench.container(), pages(0, 8)?, 8 * PAGE)
}
