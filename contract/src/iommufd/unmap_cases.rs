//! What may be unmapped, and what comes back.

use libc::ENOENT;

use super::Bench;
use super::cases::{Space, map_ram, nothing_is_mapped, unmaps};
use crate::Verdict;
use crate::cases::{AT, MSI, MSI_SIZE, PAGE, pages, range};
use crate::verdict::{granted, refused, same};

/// Three mappings with gaps: pages 0 to 3, 6 and 7, 9.
fn three(bench: &dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    map_ram(bench, pages(6, 2)?, 4)?;
    map_ram(bench, pages(9, 1)?, 6)
}

const THREE: u64 = 7 * PAGE;

/// Nothing is mapped there.
fn nothing_at(ioas: &Space, page: u64, count: u64) -> Verdict {
    refused(ioas.unmap(pages(page, count)?), ENOENT)
}

pub(crate) fn unmap_returns_the_bytes(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    unmaps(&bench.ioas(), pages(0, 4)?, 4 * PAGE)
}

pub(crate) fn unmapping_nothing_is_enoent(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    nothing_at(&ioas, 0, 4)?;
    map_ram(bench, pages(4, 4)?, 0)?;
    nothing_at(&ioas, 0, 4)?;
    nothing_at(&ioas, 8, 4)?;
    unmaps(&ioas, pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn unmapping_twice_is_enoent(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(0, 4)?, 0)?;
    unmaps(&bench.ioas(), pages(0, 4)?, 4 * PAGE)?;
    nothing_at(&bench.ioas(), 0, 4)
}

pub(crate) fn cutting_off_the_front_is_enoent(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    let ioas = bench.ioas();
    refused(ioas.unmap(pages(4, 1)?), ENOENT)?;
    refused(ioas.unmap(pages(2, 3)?), ENOENT)?;
    unmaps(&ioas, pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn cutting_off_the_end_is_enoent(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    let ioas = bench.ioas();
    refused(ioas.unmap(pages(7, 1)?), ENOENT)?;
    refused(ioas.unmap(pages(7, 4)?), ENOENT)?;
    unmaps(&ioas, pages(4, 4)?, 4 * PAGE)
}

pub(crate) fn cutting_out_the_middle_is_enoent(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(4, 4)?, 0)?;
    let ioas = bench.ioas();
    refused(ioas.unmap(pages(5, 2)?), ENOENT)?;
    unmaps(&ioas, pages(4, 4)?, 4 * PAGE)
}

/// Unlike type1's, an unmap of several mappings is not atomic.
pub(crate) fn cutting_the_last_of_several_is_enoent_and_the_others_are_gone(
    bench: &mut dyn Bench,
) -> Verdict {
    three(bench)?;
    let ioas = bench.ioas();
    refused(ioas.unmap(pages(0, 7)?), ENOENT)?;
    unmaps(&ioas, pages(0, 10)?, 3 * PAGE)
}

pub(crate) fn cutting_the_first_of_several_is_enoent_and_unmaps_nothing(
    bench: &mut dyn Bench,
) -> Verdict {
    three(bench)?;
    let ioas = bench.ioas();
    refused(ioas.unmap(pages(2, 10)?), ENOENT)?;
    unmaps(&ioas, pages(0, 10)?, THREE)
}

pub(crate) fn one_unmap_takes_several_mappings_and_gaps(bench: &mut dyn Bench) -> Verdict {
    three(bench)?;
    let ioas = bench.ioas();
    unmaps(&ioas, pages(0, 8)?, 6 * PAGE)?;
    unmaps(&ioas, pages(0, 64)?, PAGE)
}

pub(crate) fn unmap_needs_no_alignment(bench: &mut dyn Bench) -> Verdict {
    map_ram(bench, pages(1, 2)?, 0)?;
    unmaps(&bench.ioas(), range(AT + 0x801, 3 * PAGE)?, 2 * PAGE)
}

pub(crate) fn unmap_all_takes_everything(bench: &mut dyn Bench) -> Verdict {
    three(bench)?;
    map_ram(bench, range(MSI + MSI_SIZE, PAGE)?, 8)?;
    let bytes = granted(bench.ioas().unmap_all())?;
    same("bytes unmapped", bytes, THREE + PAGE)?;
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn unmap_all_of_nothing_returns_zero(bench: &mut dyn Bench) -> Verdict {
    nothing_is_mapped(&bench.ioas())
}

pub(crate) fn what_was_unmapped_can_be_mapped_again(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    map_ram(bench, pages(0, 4)?, 0)?;
    unmaps(&ioas, pages(0, 4)?, 4 * PAGE)?;
    map_ram(bench, pages(1, 2)?, 2)?;
    map_ram(bench, pages(3, 4)?, 0)?;
    granted(ioas.unmap_all())?;
    map_ram(bench, pages(0, 8)?, 0)?;
    unmaps(&ioas, pages(0, 8)?, 8 * PAGE)
}
