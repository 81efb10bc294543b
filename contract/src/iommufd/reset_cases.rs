//! What else revokes a BAR: resets, and sleep.

use std::io;

use assigned_pci::HostFunction;
use libc::{EINVAL, ENODEV};
use memory_map::Access;

use super::Bench;
use super::cases::unmaps;
use super::dma_buf_cases::{BAR, map_bar, write_to_bar};
use super::dma_cases::{DESTINATION, OTHER, TEXT, iova, ram, two_pages};
use crate::cases::{PAGE, pages};
use crate::verdict::{granted, refused, same};
use crate::{Complaint, Verdict};

/// Power management and PCI Express, by their capability ids, with the registers that matter.
const POWER: u8 = 0x01;
const PMCSR: u16 = 4;
const EXPRESS: u8 = 0x10;
const DEVICE_CONTROL: u16 = 8;
/// Initiate function-level reset.
const FLR: u16 = 1 << 15;
/// The power state in PMCSR: D0 or D3hot.
const STATE: u16 = 3;

fn read_u8(function: &dyn HostFunction, at: u16) -> io::Result<u8> {
    let mut data = [0];
    function.config_read(at, &mut data)?;
    Ok(data[0])
}

fn read_u16(function: &dyn HostFunction, at: u16) -> io::Result<u16> {
    let mut data = [0; 2];
    function.config_read(at, &mut data)?;
    Ok(u16::from_le_bytes(data))
}

/// Where a capability is.
fn capability(bench: &dyn Bench, id: u8) -> Result<u16, Complaint> {
    /// As many as there is room for.
    const MOST: usize = 48;
    let function = bench.memory();
    let mut at = u16::from(read_u8(&*function, 0x34)? & !3);
    for _ in 0..MOST {
        if at == 0 {
            break;
        }
        if read_u8(&*function, at)? == id {
            return Ok(at);
        }
        at = u16::from(read_u8(&*function, at.saturating_add(1))? & !3);
    }
    let name = function.name();
    Err(Complaint::Skipped(format!(
        "{name} has no capability {id:#x}"
    )))
}

/// Changes the bits `mask` of a register.
fn change(bench: &dyn Bench, at: u16, mask: u16, bits: u16) -> Verdict {
    let function = bench.memory();
    let value = read_u16(&*function, at)? & !mask | bits;
    Ok(function.config_write(at, &value.to_le_bytes())?)
}

fn sleep(bench: &dyn Bench, asleep: bool) -> Verdict {
    let at = capability(bench, POWER)?.saturating_add(PMCSR);
    change(bench, at, STATE, if asleep { STATE } else { 0 })
}

fn function_level_reset(bench: &dyn Bench) -> Verdict {
    let at = capability(bench, EXPRESS)?.saturating_add(DEVICE_CONTROL);
    change(bench, at, FLR, FLR)
}

/// A mapping that leads to the BAR leads nowhere after `event`, and one made anew does again. RAM
/// is not concerned.
fn dead_after(bench: &mut dyn Bench, event: fn(&dyn Bench) -> Verdict) -> Verdict {
    two_pages(bench)?;
    let ioas = bench.ioas();
    map_bar(bench, &ioas, 4)?;
    same("in the BAR, before", write_to_bar(bench)?, TEXT)?;
    event(bench)?;
    bench.set_decoding(true)?;
    same("in the BAR, after", write_to_bar(bench)?, OTHER)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    unmaps(&ioas, pages(BAR, 4)?, 4 * PAGE)?;
    map_bar(bench, &ioas, 4)?;
    same("in the BAR, mapped anew", write_to_bar(bench)?, TEXT)
}

pub(crate) fn a_mapping_is_dead_after_a_reset(bench: &mut dyn Bench) -> Verdict {
    dead_after(bench, |bench| granted(bench.memory().reset()))
}

pub(crate) fn a_mapping_is_dead_after_a_function_level_reset(bench: &mut dyn Bench) -> Verdict {
    dead_after(bench, function_level_reset)
}

/// A hot reset of the bus, which may fail after it was done, where a link does not come up again.
pub(crate) fn a_mapping_is_dead_after_a_hot_reset_whatever_it_says(
    bench: &mut dyn Bench,
) -> Verdict {
    dead_after(bench, |bench| {
        match bench.hot_reset() {
            // That is for a function without a bus of its own: nothing was tried.
            Err(error) if matches!(error.raw_os_error(), Some(EINVAL | ENODEV)) => {
                Err(error.into())
            }
            _ => Ok(()),
        }
    })
}

pub(crate) fn a_mapping_is_dead_after_sleep(bench: &mut dyn Bench) -> Verdict {
    dead_after(bench, |bench| {
        sleep(bench, true)?;
        sleep(bench, false)
    })
}

pub(crate) fn a_sleeping_functions_bar_is_enodev(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    sleep(bench, true)?;
    let result = ioas.map_file(pages(BAR, 1)?, bench.dma_buf(), 0, Access::ReadWrite);
    refused(result, ENODEV)?;
    sleep(bench, false)?;
    bench.set_decoding(true)?;
    map_bar(bench, &ioas, 1)
}

pub(crate) fn a_reset_without_decoding_leaves_the_bar_revoked(bench: &mut dyn Bench) -> Verdict {
    let ioas = bench.ioas();
    bench.set_decoding(false)?;
    granted(bench.memory().reset())?;
    let result = ioas.map_file(pages(BAR, 1)?, bench.dma_buf(), 0, Access::ReadWrite);
    refused(result, ENODEV)?;
    bench.set_decoding(true)?;
    map_bar(bench, &ioas, 1)
}
