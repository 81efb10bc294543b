//! BARs, which are mapped as dma-bufs and revoked without a word.

use libc::{EEXIST, EINVAL, ENODEV};
use memory_map::Access;

use super::cases::{Space, map_ram, move_to, nothing_is_mapped, unmaps};
use super::dma_cases::{DESTINATION, OTHER, SOURCE, TEXT, iova, ram, two_pages};
use super::{Bench, Function};
use crate::Verdict;
use crate::cases::{AT, PAGE, pages, range};
use crate::verdict::{granted, other, refused, same};

/// Where the cases map the BAR.
pub(crate) const BAR: u64 = 32;

/// Tries to map the BAR's first pages there.
pub(crate) fn map_bar(bench: &dyn Bench, ioas: &Space, count: u64) -> Result<(), crate::Complaint> {
    granted(ioas.map_file(pages(BAR, count)?, bench.dma_buf(), 0, Access::ReadWrite))
}

/// Turns decoding off and on again.
fn blink(bench: &dyn Bench) -> Verdict {
    bench.set_decoding(false)?;
    Ok(bench.set_decoding(true)?)
}

/// Has the engine write the text to the BAR's first bytes, through what is mapped of it, and tells
/// what is there then.
pub(crate) fn write_to_bar(bench: &mut dyn Bench) -> Result<[u8; 8], crate::Complaint> {
    bench.bar_write(0, OTHER)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(BAR), 8)?;
    granted(bench.bar_read(0))
}

pub(crate) fn a_bar_maps_as_a_whole_and_in_slices(bench: &mut dyn Bench) -> Verdict {
    let (ioas, size) = (bench.ioas(), bench.bar().size);
    let whole = range(AT, size)?;
    granted(ioas.map_file(whole, bench.dma_buf(), 0, Access::ReadWrite))?;
    unmaps(&ioas, whole, size)?;
    let last = size - PAGE;
    for (page, count, offset) in [(0, 2, 3 * PAGE), (2, 1, last), (8, 1, 0)] {
        let iova = pages(page, count)?;
        granted(ioas.map_file(iova, bench.dma_buf(), offset, Access::ReadWrite))?;
    }
    unmaps(&ioas, pages(0, 3)?, 3 * PAGE)?;
    unmaps(&ioas, pages(8, 1)?, PAGE)
}

pub(crate) fn past_the_end_of_the_bar_is_einval(bench: &mut dyn Bench) -> Verdict {
    let (ioas, size) = (bench.ioas(), bench.bar().size);
    for (offset, bytes) in [(0, size + PAGE), (size - PAGE, 2 * PAGE), (size, PAGE)] {
        let result = ioas.map_file(
            range(AT, bytes)?,
            bench.dma_buf(),
            offset,
            Access::ReadWrite,
        );
        refused(result, EINVAL)?;
    }
    nothing_is_mapped(&ioas)
}

pub(crate) fn unaligned_offset_in_the_bar_is_einval(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let result = ioas.map_file(pages(0, 1)?, bench.dma_buf(), 0x10, Access::ReadWrite);
    refused(result, EINVAL)?;
    nothing_is_mapped(&ioas)
}

pub(crate) fn overlap_of_a_bar_is_eexist(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    map_bar(bench, &ioas, 4)?;
    let again = ioas.map_file(pages(BAR + 3, 2)?, bench.dma_buf(), 0, Access::ReadWrite);
    refused(again, EEXIST)?;
    let ram = ioas.map_file(pages(BAR, 1)?, bench.ram(), 0, Access::ReadWrite);
    refused(ram, EEXIST)?;
    unmaps(&ioas, pages(BAR, 4)?, 4 * PAGE)
}

pub(crate) fn ram_reaches_the_bar_and_back(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.bar_write(PAGE, [0; 8])?;
    map_bar(bench, &bench.ioas(), bench.bar().size / PAGE)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(BAR + 1), 8)?;
    same("in the BAR", granted(bench.bar_read(PAGE))?, TEXT)?;
    bench.bar_write(PAGE, OTHER)?;
    bench.engine().load(iova(BAR + 1), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("back in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn a_slice_shows_its_part_of_the_bar(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    for page in [0, 5] {
        bench.bar_write(page * PAGE, OTHER)?;
    }
    let slice = pages(BAR, 2)?;
    granted(ioas.map_file(slice, bench.dma_buf(), 4 * PAGE, Access::ReadWrite))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(BAR + 1), 8)?;
    same("in the slice", granted(bench.bar_read(5 * PAGE))?, TEXT)?;
    same("elsewhere", granted(bench.bar_read(0))?, OTHER)
}

pub(crate) fn a_read_only_bar_takes_no_writes(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    granted(ioas.map_file(pages(BAR, 1)?, bench.dma_buf(), 0, Access::ReadOnly))?;
    same("in the BAR", write_to_bar(bench)?, OTHER)?;
    bench.engine().load(iova(BAR), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("read from the BAR", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn nothing_arrives_in_an_unmapped_bar(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    map_bar(bench, &ioas, 4)?;
    same("in the mapped BAR", write_to_bar(bench)?, TEXT)?;
    unmaps(&ioas, pages(BAR, 4)?, 4 * PAGE)?;
    same("in the unmapped BAR", write_to_bar(bench)?, OTHER)
}

pub(crate) fn a_revoked_bar_is_enodev(bench: &mut dyn Bench) -> Verdict {
    let (ioas, spare) = (bench.ioas(), bench.alloc()?);
    bench.set_decoding(false)?;
    for ioas in [&ioas, &spare] {
        let whole = range(AT, bench.bar().size)?;
        let result = ioas.map_file(whole, bench.dma_buf(), 0, Access::ReadWrite);
        refused(result, ENODEV)?;
        let slice = ioas.map_file(pages(0, 1)?, bench.dma_buf(), PAGE, Access::ReadOnly);
        refused(slice, ENODEV)?;
        nothing_is_mapped(ioas)?;
    }
    Ok(())
}

pub(crate) fn revocation_is_found_before_misalignment_and_overlap(
    bench: &mut dyn Bench,
) -> Verdict {
    let ioas = bench.ioas();
    map_ram(bench, pages(0, 1)?, 0)?;
    bench.set_decoding(false)?;
    for place in [pages(0, 1)?, range(AT + 1, PAGE)?] {
        let result = ioas.map_file(place, bench.dma_buf(), 0, Access::ReadWrite);
        refused(result, ENODEV)?;
    }
    Ok(())
}

pub(crate) fn the_end_of_the_bar_is_found_before_revocation(bench: &mut dyn Bench) -> Verdict {
    bench.set_decoding(false)?;
    let size = bench.bar().size;
    let result = bench.ioas().map_file(
        pages(0, 2)?,
        bench.dma_buf(),
        size - PAGE,
        Access::ReadWrite,
    );
    refused(result, EINVAL)
}

pub(crate) fn a_bar_that_is_decoded_again_maps(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    bench.set_decoding(false)?;
    let result = ioas.map_file(pages(BAR, 1)?, bench.dma_buf(), 0, Access::ReadWrite);
    refused(result, ENODEV)?;
    bench.set_decoding(true)?;
    map_bar(bench, &ioas, 1)?;
    same("in the BAR", write_to_bar(bench)?, TEXT)
}

pub(crate) fn a_mapping_is_dead_after_decoding_was_off(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    map_bar(bench, &bench.ioas(), 4)?;
    same("in the BAR, before", write_to_bar(bench)?, TEXT)?;
    blink(bench)?;
    same("in the BAR, after", write_to_bar(bench)?, OTHER)?;
    bench.engine().load(iova(BAR), 8)?;
    bench.engine().store(iova(2), 8)?;
    other("read from the BAR", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn a_dead_mapping_keeps_its_place_and_unmaps_whole(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    map_bar(bench, &ioas, 4)?;
    blink(bench)?;
    let again = ioas.map_file(pages(BAR, 4)?, bench.dma_buf(), 0, Access::ReadWrite);
    refused(again, EEXIST)?;
    unmaps(&ioas, pages(BAR, 4)?, 4 * PAGE)?;
    map_bar(bench, &ioas, 4)?;
    bench.set_decoding(false)?;
    unmaps(&ioas, pages(BAR, 4)?, 4 * PAGE)
}

pub(crate) fn a_mapping_made_anew_leads_to_the_bar(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    map_bar(bench, &ioas, 4)?;
    for _ in 0..2 {
        blink(bench)?;
        same("through the dead one", write_to_bar(bench)?, OTHER)?;
        unmaps(&ioas, pages(BAR, 4)?, 4 * PAGE)?;
        map_bar(bench, &ioas, 4)?;
        same("through the new one", write_to_bar(bench)?, TEXT)?;
    }
    Ok(())
}

/// The engine is moved to the other address space to see.
pub(crate) fn a_mapping_is_dead_in_every_address_space(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let there = bench.alloc()?;
    let (here, source) = (bench.ioas(), pages(0, 1)?);
    granted(there.copy(source, here.id(), source.start(), Access::ReadWrite))?;
    move_to(bench, Function::Engine, &there)?;
    map_bar(bench, &here, 1)?;
    map_bar(bench, &there, 1)?;
    same("in the BAR, before", write_to_bar(bench)?, TEXT)?;
    blink(bench)?;
    same("in the BAR, after", write_to_bar(bench)?, OTHER)?;
    move_to(bench, Function::Engine, &here)?;
    same("from where it was before", write_to_bar(bench)?, OTHER)
}

pub(crate) fn a_copy_of_a_dead_mapping_succeeds_and_leads_nowhere(
    bench: &mut dyn Bench,
) -> Verdict {
    two_pages(bench)?;
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_bar(bench, &there, 1)?;
    blink(bench)?;
    let window = pages(BAR, 1)?;
    granted(here.copy(window, there.id(), window.start(), Access::ReadWrite))?;
    same("in the BAR", write_to_bar(bench)?, OTHER)?;
    unmaps(&here, window, PAGE)
}

pub(crate) fn a_copy_of_a_revoked_bar_succeeds_and_leads_nowhere(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_bar(bench, &there, 1)?;
    bench.set_decoding(false)?;
    let window = pages(BAR, 1)?;
    granted(here.copy(window, there.id(), window.start(), Access::ReadWrite))?;
    bench.set_decoding(true)?;
    same("in the BAR", write_to_bar(bench)?, OTHER)
}

pub(crate) fn a_bar_revoked_before_a_device_was_attached_leads_nowhere(
    bench: &mut dyn Bench,
) -> Verdict {
    let there = bench.alloc()?;
    bench.ram_write(SOURCE, &TEXT)?;
    let source = pages(0, 1)?;
    granted(there.map_file(source, bench.ram(), 0, Access::ReadWrite))?;
    map_bar(bench, &there, 1)?;
    blink(bench)?;
    move_to(bench, Function::Engine, &there)?;
    same("in the BAR", write_to_bar(bench)?, OTHER)?;
    unmaps(&there, pages(BAR, 1)?, PAGE)?;
    map_bar(bench, &there, 1)?;
    same("in the BAR, mapped anew", write_to_bar(bench)?, TEXT)
}

pub(crate) fn ram_is_not_revoked(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    blink(bench)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)
}
