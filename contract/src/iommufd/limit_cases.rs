//! How much may be locked, and what counts.

use libc::{EINVAL, ENOMEM};
use memory_map::Access;

use super::cases::{map_ram, map_ram_into, unmaps};
use super::{Bench, Function};
use crate::Verdict;
use crate::cases::{PAGE, pages};
use crate::verdict::{granted, refused};

pub(crate) fn locked_memory_limit_is_enomem(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let limit = bench.limit_locked_memory(4 * PAGE)?;
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let five = ioas.map_file(pages(0, 5)?, bench.ram(), 0, access);
        refused(five, ENOMEM)?;
        granted(ioas.map_file(pages(0, 4)?, bench.ram(), 0, access))?;
        let fifth = ioas.map_file(pages(8, 1)?, bench.ram(), 4 * PAGE, access);
        refused(fifth, ENOMEM)?;
        unmaps(&ioas, pages(0, 16)?, 4 * PAGE)?;
    }
    drop(limit);
    map_ram(bench, pages(0, 5)?, 0)
}

pub(crate) fn locked_memory_is_given_back(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let _limit = bench.limit_locked_memory(4 * PAGE)?;
    map_ram(bench, pages(0, 3)?, 0)?;
    let two = ioas.map_file(pages(8, 2)?, bench.ram(), 3 * PAGE, Access::ReadWrite);
    refused(two, ENOMEM)?;
    unmaps(&ioas, pages(0, 3)?, 3 * PAGE)?;
    map_ram(bench, pages(8, 2)?, 3)?;
    map_ram(bench, pages(0, 2)?, 0)?;
    granted(ioas.unmap_all())?;
    map_ram(bench, pages(0, 4)?, 0)
}

pub(crate) fn same_file_twice_is_locked_twice(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let _limit = bench.limit_locked_memory(4 * PAGE)?;
    map_ram(bench, pages(0, 3)?, 0)?;
    let again = ioas.map_file(pages(8, 3)?, bench.ram(), 0, Access::ReadWrite);
    refused(again, ENOMEM)?;
    map_ram(bench, pages(8, 1)?, 0)
}

pub(crate) fn a_copy_is_locked_once(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    // So that both address spaces pin.
    if !bench.share_a_group() {
        granted(bench.attach(Function::Memory, &there))?;
    }
    let _limit = bench.limit_locked_memory(4 * PAGE)?;
    map_ram(bench, pages(0, 3)?, 0)?;
    let iova = pages(0, 3)?;
    granted(there.copy(iova, here.id(), iova.start(), Access::ReadWrite))?;
    granted(here.copy(pages(8, 3)?, here.id(), iova.start(), Access::ReadWrite))?;
    map_ram(bench, pages(16, 1)?, 8)?;
    let more = here.map_file(pages(17, 1)?, bench.ram(), 9 * PAGE, Access::ReadWrite);
    refused(more, ENOMEM)?;
    // It stays locked until the last one goes.
    unmaps(&here, iova, 3 * PAGE)?;
    unmaps(&here, pages(8, 3)?, 3 * PAGE)?;
    if !bench.share_a_group() {
        let two = here.map_file(pages(0, 2)?, bench.ram(), 0, Access::ReadWrite);
        refused(two, ENOMEM)?;
        unmaps(&there, iova, 3 * PAGE)?;
    }
    map_ram(bench, pages(0, 3)?, 0)
}

pub(crate) fn a_bar_is_no_locked_memory(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let _limit = bench.limit_locked_memory(2 * PAGE)?;
    granted(ioas.map_file(pages(0, 16)?, bench.dma_buf(), 0, Access::ReadWrite))?;
    map_ram(bench, pages(16, 2)?, 0)
}

pub(crate) fn attaching_past_the_limit_is_enomem(bench: &mut dyn Bench) -> Verdict {
    let there = bench.alloc()?;
    granted(bench.detach(Function::Memory))?;
    granted(bench.detach(Function::Engine))?;
    let limit = bench.limit_locked_memory(4 * PAGE)?;
    map_ram_into(bench, &there, pages(0, 5)?, 0)?;
    refused(bench.attach(Function::Memory, &there), ENOMEM)?;
    drop(limit);
    unmaps(&there, pages(0, 5)?, 5 * PAGE)?;
    map_ram_into(bench, &there, pages(0, 5)?, 0)?;
    granted(bench.attach(Function::Memory, &there))
}

pub(crate) fn the_end_of_the_file_is_found_before_the_locked_memory_limit(
    bench: &mut dyn Bench,
) -> Verdict {
    let ioas = bench.ioas();
    let all = bench.ram_size() / PAGE;
    let _limit = bench.limit_locked_memory(PAGE)?;
    let result = ioas.map_file(pages(0, all + 1)?, bench.ram(), 0, Access::ReadWrite);
    refused(result, EINVAL)
}
