//! Which devices may be attached to which address spaces, and what that changes.

use libc::{EADDRINUSE, EINVAL, ENOMEM};
use memory_map::Access;

use super::cases::{Space, map_ram, map_ram_into, move_to, unmaps};
use super::dma_cases::{DESTINATION, TEXT, iova, ram, two_pages};
use super::{Bench, Function};
use crate::cases::{AT, MSI, MSI_SIZE, PAGE, pages, range};
use crate::verdict::{granted, refused, same};
use crate::{Complaint, Verdict};

/// Attaches the function with the BAR, which is attached to the bench's own until then, to
/// another address space. If both functions are in one group, they must come along together.
fn attach(bench: &dyn Bench, to: &Space) -> Result<std::io::Result<()>, Complaint> {
    granted(bench.detach(Function::Memory))?;
    if bench.share_a_group() {
        granted(bench.detach(Function::Engine))?;
    }
    Ok(bench.attach(Function::Memory, to))
}

pub(crate) fn without_a_device_everything_is_allowed(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.alloc()?;
    let ranges = granted(ioas.ranges())?;
    same("the alignment", ranges.alignment, 1)?;
    same("the number of ranges", ranges.allowed.len(), 1)?;
    same(
        "the start",
        ranges.allowed.first().map(|it| it.start().raw()),
        Some(0),
    )?;
    map_ram_into(bench, &ioas, range(MSI, PAGE)?, 0)?;
    map_ram_into(bench, &ioas, range(u64::MAX - (16 * PAGE - 1), PAGE)?, 1)?;
    let (odd, offset) = (range(AT + 1, 0x123)?, 0x11);
    granted(ioas.map_file(odd, bench.ram(), offset, Access::ReadWrite))?;
    unmaps(&ioas, odd, 0x123)
}

/// What cannot be pinned is not found out either.
pub(crate) fn without_a_device_nothing_is_pinned(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.alloc()?;
    granted(ioas.map_file(pages(0, 1)?, bench.ram(), 1 << 40, Access::ReadWrite))?;
    let bar = bench.bar().address;
    granted(bench.map_address(&ioas, pages(1, 1)?, bar, Access::ReadWrite))?;
    unmaps(&ioas, pages(0, 2)?, 2 * PAGE)
}

pub(crate) fn what_cannot_be_pinned_keeps_devices_out(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.alloc()?;
    granted(ioas.map_file(pages(0, 1)?, bench.ram(), 1 << 40, Access::ReadWrite))?;
    refused(attach(bench, &ioas)?, EINVAL)?;
    unmaps(&ioas, pages(0, 1)?, PAGE)?;
    map_ram_into(bench, &ioas, pages(0, 1)?, 0)?;
    granted(bench.attach(Function::Memory, &ioas))
}

pub(crate) fn a_mapping_in_a_reserved_window_keeps_devices_out(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.alloc()?;
    let window = range(MSI + MSI_SIZE - PAGE, 2 * PAGE)?;
    map_ram_into(bench, &ioas, window, 0)?;
    refused(attach(bench, &ioas)?, EADDRINUSE)?;
    unmaps(&ioas, window, 2 * PAGE)?;
    granted(bench.attach(Function::Memory, &ioas))
}

pub(crate) fn a_misaligned_mapping_keeps_devices_out(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.alloc()?;
    for (iova, offset) in [
        (range(AT + 0x10, PAGE)?, 0),
        (range(AT, PAGE + 0x10)?, 0),
        (range(AT, PAGE)?, 0x10),
    ] {
        granted(ioas.map_file(iova, bench.ram(), offset, Access::ReadWrite))?;
        refused(attach(bench, &ioas)?, EADDRINUSE)?;
        unmaps(&ioas, iova, iova.size())?;
    }
    granted(bench.attach(Function::Memory, &ioas))
}

pub(crate) fn a_promise_keeps_devices_out(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.alloc()?;
    granted(ioas.allow(&[pages(0, 16)?, range(MSI - PAGE, 2 * PAGE)?]))?;
    refused(attach(bench, &ioas)?, EADDRINUSE)?;
    granted(ioas.allow(&[pages(0, 16)?]))?;
    granted(bench.attach(Function::Memory, &ioas))
}

pub(crate) fn a_promise_of_what_is_reserved_is_eaddrinuse(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    refused(ioas.allow(&[range(MSI, PAGE)?]), EADDRINUSE)?;
    refused(ioas.allow(&[pages(0, 1)?, range(MSI, PAGE)?]), EADDRINUSE)?;
    granted(ioas.allow(&[pages(0, 1)?]))
}

pub(crate) fn impossible_promises_are_einval(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    refused(ioas.allow(&[pages(0, 2)?, pages(1, 2)?]), EINVAL)?;
    refused(ioas.allow(&[range(AT, 1)?]), EINVAL)
}

pub(crate) fn promises_limit_no_mapping_at_a_fixed_address(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    granted(ioas.allow(&[pages(0, 1)?]))?;
    map_ram(bench, pages(8, 1)?, 0)?;
    unmaps(&ioas, pages(8, 1)?, PAGE)
}

pub(crate) fn ranges_widen_when_the_last_device_is_detached(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    let narrow = granted(ioas.ranges())?;
    granted(bench.detach(Function::Memory))?;
    same("with one device", granted(ioas.ranges())?, narrow.clone())?;
    granted(bench.detach(Function::Engine))?;
    let wide = granted(ioas.ranges())?;
    same("the number of ranges", wide.allowed.len(), 1)?;
    map_ram(bench, range(MSI, PAGE)?, 0)?;
    refused(bench.attach(Function::Engine, &ioas), EADDRINUSE)?;
    unmaps(&ioas, range(MSI, PAGE)?, PAGE)?;
    granted(bench.attach(Function::Engine, &ioas))?;
    same("with a device again", granted(ioas.ranges())?, narrow)
}

pub(crate) fn a_detached_device_reaches_nothing(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    bench.engine().load(iova(0), 8)?;
    if bench.share_a_group() {
        granted(bench.detach(Function::Memory))?;
    }
    granted(bench.detach(Function::Engine))?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, [0; 8])?;
    granted(bench.attach(Function::Engine, &ioas))?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)
}

pub(crate) fn a_moved_device_reaches_what_is_mapped_there(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.ram_write(6 * PAGE, &[0; 8])?;
    let there = bench.alloc()?;
    map_ram_into(bench, &there, pages(2, 1)?, 6)?;
    bench.engine().load(iova(0), 8)?;
    move_to(bench, Function::Engine, &there)?;
    bench.engine().store(iova(2), 8)?;
    same("where it was", ram(bench, DESTINATION)?, [0; 8])?;
    same("where it is", ram(bench, 6 * PAGE)?, TEXT)
}

/// The engine, with two pages of RAM where it is, is to move to `there` and may not; it still
/// reaches what it reached.
fn stays_where_it_was(bench: &mut dyn Bench, there: &Space, errno: i32) -> Verdict {
    two_pages(bench)?;
    refused(bench.attach_group(Function::Engine, there), errno)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("where it was", ram(bench, DESTINATION)?, TEXT)?;
    same("the alignment", granted(there.ranges())?.alignment, 1)
}

pub(crate) fn a_device_stays_where_it_was_if_it_reserves_what_is_mapped_there(
    bench: &mut dyn Bench,
) -> Verdict {
    let there = bench.alloc()?;
    map_ram_into(bench, &there, range(MSI, PAGE)?, 6)?;
    stays_where_it_was(bench, &there, EADDRINUSE)
}

pub(crate) fn a_device_stays_where_it_was_if_what_is_mapped_there_cannot_be_pinned(
    bench: &mut dyn Bench,
) -> Verdict {
    let there = bench.alloc()?;
    granted(there.map_file(pages(0, 1)?, bench.ram(), 1 << 40, Access::ReadWrite))?;
    stays_where_it_was(bench, &there, EINVAL)
}

/// Two pages are locked where it is, and two would be there.
pub(crate) fn a_device_leaves_only_when_all_is_pinned_where_it_goes(
    bench: &mut dyn Bench,
) -> Verdict {
    let there = bench.alloc()?;
    // What is mapped without a limit is not counted when it is pinned under one.
    let limit = bench.limit_locked_memory(3 * PAGE)?;
    map_ram_into(bench, &there, pages(0, 2)?, 6)?;
    stays_where_it_was(bench, &there, ENOMEM)?;
    drop(limit);
    let _limit = bench.limit_locked_memory(4 * PAGE)?;
    granted(bench.attach_group(Function::Engine, &there))
}

/// By itself if it is the only one of its group, and not at all if others would move along
/// unasked.
pub(crate) fn a_device_moves_by_itself_or_not_at_all(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.ram_write(6 * PAGE, &[0; 8])?;
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(2, 1)?, 6)?;
    bench.engine().load(iova(0), 8)?;
    let moved = bench.attach(Function::Engine, &there);
    let (stays, leaves) = ([0; 8], TEXT);
    let (before, after) = if bench.share_a_group() {
        refused(moved, EINVAL)?;
        (leaves, stays)
    } else {
        granted(moved)?;
        (stays, leaves)
    };
    bench.engine().store(iova(2), 8)?;
    same("where it was", ram(bench, DESTINATION)?, before)?;
    same("where it was to go", ram(bench, 6 * PAGE)?, after)?;
    // The other one has not moved.
    let attached = granted(here.ranges())?.alignment;
    same("the alignment where it was", attached, PAGE)
}

pub(crate) fn a_group_moves_in_one_step(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.ram_write(6 * PAGE, &[0; 8])?;
    let (here, there) = (bench.ioas(), bench.alloc()?);
    map_ram_into(bench, &there, pages(2, 1)?, 6)?;
    bench.engine().load(iova(0), 8)?;
    // The one without an engine takes the one with it along.
    granted(bench.attach_group(Function::Memory, &there))?;
    if !bench.share_a_group() {
        granted(bench.attach_group(Function::Engine, &there))?;
    }
    bench.engine().store(iova(2), 8)?;
    same("where it was", ram(bench, DESTINATION)?, [0; 8])?;
    same("where it is", ram(bench, 6 * PAGE)?, TEXT)?;
    // What they reserve went along.
    same("the alignment", granted(here.ranges())?.alignment, 1)?;
    map_ram_into(bench, &here, range(MSI, PAGE)?, 4)?;
    let there_too = there.map_file(range(MSI, PAGE)?, bench.ram(), 0, Access::ReadWrite);
    refused(there_too, EINVAL)?;
    // Both are known to be there: detaching both leaves nobody.
    granted(bench.detach(Function::Memory))?;
    same("the alignment", granted(there.ranges())?.alignment, PAGE)?;
    granted(bench.detach(Function::Engine))?;
    same("the alignment", granted(there.ranges())?.alignment, 1)
}

pub(crate) fn devices_of_one_group_cannot_be_apart(bench: &mut dyn Bench) -> Verdict {
    let there = bench.alloc()?;
    granted(bench.detach(Function::Memory))?;
    let result = bench.attach(Function::Memory, &there);
    if bench.share_a_group() {
        refused(result, EINVAL)
    } else {
        granted(result)
    }
}
