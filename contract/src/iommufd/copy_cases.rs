//! What one address space takes over from another.

use libc::{EEXIST, EINVAL, ENOENT, EPERM};
use memory_map::{Access, Iova, IovaRange};

use super::cases::{Space, map_ram, map_ram_into, move_to, nothing_is_mapped, unmaps};
use super::dma_cases::{DESTINATION, SOURCE, TEXT, iova, ram};
use super::{Bench, Function};
use crate::Verdict;
use crate::cases::{AT, MSI, PAGE, pages, range};
use crate::verdict::{granted, refused, same};

/// Copies what `from` has at the same addresses.
fn copy(to: &Space, from: &Space, range: IovaRange) -> std::io::Result<()> {
    to.copy(range, from.id(), range.start(), Access::ReadWrite)
}

pub(crate) fn copies_lead_to_the_same_memory(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &[0; 8])?;
    map_ram_into(bench, &there, pages(0, 4)?, 0)?;
    granted(here.copy(pages(16, 4)?, there.id(), iova(0), Access::ReadWrite))?;
    bench.engine().load(iova(16), 8)?;
    bench.engine().store(iova(18), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    unmaps(&here, pages(16, 4)?, 4 * PAGE)?;
    unmaps(&there, pages(0, 4)?, 4 * PAGE)
}

pub(crate) fn copying_what_is_not_mapped_is_enoent(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    refused(copy(&here, &there, pages(0, 1)?), ENOENT)?;
    map_ram_into(bench, &there, pages(1, 1)?, 0)?;
    refused(copy(&here, &there, pages(0, 1)?), ENOENT)?;
    refused(copy(&here, &there, pages(2, 1)?), ENOENT)?;
    nothing_is_mapped(&here)
}

pub(crate) fn copying_across_a_gap_is_enoent(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(0, 2)?, 0)?;
    map_ram_into(bench, &there, pages(3, 2)?, 2)?;
    for (page, count) in [(0, 5), (0, 3), (1, 2), (2, 2)] {
        refused(copy(&here, &there, pages(page, count)?), ENOENT)?;
    }
    nothing_is_mapped(&here)
}

pub(crate) fn a_part_of_a_mapping_can_be_copied(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &[0; 8])?;
    map_ram_into(bench, &there, pages(0, 8)?, 0)?;
    map_ram(bench, pages(0, 1)?, 0)?;
    granted(here.copy(pages(20, 1)?, there.id(), iova(2), Access::ReadWrite))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(20), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    unmaps(&here, pages(20, 1)?, PAGE)
}

pub(crate) fn neighbours_are_copied_as_two_mappings(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(0, 2)?, 0)?;
    map_ram_into(bench, &there, pages(2, 2)?, 8)?;
    granted(copy(&here, &there, pages(1, 2)?))?;
    unmaps(&here, pages(1, 1)?, PAGE)?;
    unmaps(&here, pages(2, 1)?, PAGE)
}

pub(crate) fn copying_read_only_memory_to_be_written_is_eperm(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    let iova = pages(0, 2)?;
    granted(there.map_file(iova, bench.ram(), 0, Access::ReadOnly))?;
    refused(copy(&here, &there, iova), EPERM)?;
    nothing_is_mapped(&here)?;
    granted(here.copy(iova, there.id(), iova.start(), Access::ReadOnly))?;
    unmaps(&here, iova, 2 * PAGE)
}

pub(crate) fn copying_for_less_access_is_allowed(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &[0; 8])?;
    map_ram(bench, pages(0, 1)?, 0)?;
    map_ram_into(bench, &there, pages(2, 1)?, 2)?;
    granted(here.copy(pages(2, 1)?, there.id(), iova(2), Access::ReadOnly))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in read-only RAM", ram(bench, DESTINATION)?, [0; 8])?;
    // What it was made for does not limit a copy of the copy: the pages may be written.
    let again = bench.alloc()?;
    granted(copy(&again, &here, pages(2, 1)?))
}

pub(crate) fn copying_onto_a_mapping_is_eexist(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(0, 4)?, 0)?;
    map_ram(bench, pages(2, 1)?, 8)?;
    refused(copy(&here, &there, pages(0, 4)?), EEXIST)?;
    unmaps(&here, pages(0, 8)?, PAGE)
}

pub(crate) fn copying_to_a_reserved_or_misaligned_place_is_einval(
    bench: &mut dyn Bench,
) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(0, 4)?, 0)?;
    for place in [range(MSI, PAGE)?, range(AT + 0x10, PAGE)?, range(AT, 0x10)?] {
        let result = here.copy(place, there.id(), iova(0), Access::ReadWrite);
        refused(result, EINVAL)?;
    }
    // A part that does not start on a page.
    let inside = Iova::new(AT + 0x800);
    refused(
        here.copy(pages(0, 1)?, there.id(), inside, Access::ReadWrite),
        EINVAL,
    )?;
    nothing_is_mapped(&here)
}

pub(crate) fn a_missing_source_is_found_before_a_bad_place(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    let result = here.copy(range(MSI, PAGE)?, there.id(), iova(0), Access::ReadWrite);
    refused(result, ENOENT)
}

pub(crate) fn a_copy_outlives_its_source(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &[0; 8])?;
    map_ram_into(bench, &there, pages(0, 4)?, 0)?;
    granted(copy(&here, &there, pages(0, 4)?))?;
    unmaps(&there, pages(0, 4)?, 4 * PAGE)?;
    bench.destroy(there);
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    unmaps(&here, pages(0, 4)?, 4 * PAGE)
}

pub(crate) fn copies_within_an_address_space_are_allowed(bench: &mut dyn Bench) -> Verdict {
    let here = bench.ioas();
    map_ram(bench, pages(0, 4)?, 0)?;
    granted(here.copy(pages(8, 4)?, here.id(), iova(0), Access::ReadWrite))?;
    refused(copy(&here, &here, pages(0, 4)?), EEXIST)?;
    unmaps(&here, pages(0, 16)?, 8 * PAGE)
}

pub(crate) fn copying_from_a_destroyed_address_space_is_enoent(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(0, 4)?, 0)?;
    // One that a device was attached to is destroyed all the same.
    move_to(bench, Function::Memory, &there)?;
    granted(bench.detach(Function::Memory))?;
    let id = there.id();
    bench.destroy(there);
    let result = here.copy(pages(0, 4)?, id, iova(0), Access::ReadWrite);
    refused(result, ENOENT)
}
