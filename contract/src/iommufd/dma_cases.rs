//! What a device reaches through mappings, and what it does not.

use memory_map::{Access, Iova};

use super::Bench;
use super::cases::{map_ram, unmaps};
use crate::cases::{AT, PAGE, pages, range};
use crate::verdict::{granted, other, same};
use crate::{Complaint, Verdict};

/// The pages of RAM that the cases use.
pub(crate) const SOURCE: u64 = 0;
pub(crate) const DESTINATION: u64 = 2 * PAGE;
/// Where nothing is ever mapped.
const UNMAPPED: Iova = Iova::new(AT + 0x100 * PAGE);

pub(crate) const TEXT: [u8; 8] = *b"sentinel";
pub(crate) const OTHER: [u8; 8] = *b"someelse";

pub(crate) fn iova(page: u64) -> Iova {
    Iova::new(AT + page * PAGE)
}

pub(crate) fn ram(bench: &dyn Bench, offset: u64) -> Result<[u8; 8], Complaint> {
    let mut data = [0; 8];
    bench.ram_read(offset, &mut data)?;
    Ok(data)
}

/// Maps page 0 of RAM at page 0, and page 2 at page 2; the first one holds the text.
pub(crate) fn two_pages(bench: &dyn Bench) -> Verdict {
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &[0; 8])?;
    map_ram(bench, pages(0, 1)?, 0)?;
    map_ram(bench, pages(2, 1)?, 2)
}

pub(crate) fn bytes_move_through_mappings(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)
}

/// Two neighbouring pages of addresses, with memory behind them that is no neighbour.
pub(crate) fn transfers_cross_mappings(bench: &mut dyn Bench) -> Verdict {
    bench.ram_write(PAGE - 4, b"sent")?;
    bench.ram_write(4 * PAGE, b"inel")?;
    bench.ram_write(8 * PAGE, &[0; 8])?;
    map_ram(bench, pages(0, 1)?, 0)?;
    map_ram(bench, pages(1, 1)?, 4)?;
    map_ram(bench, pages(2, 1)?, 8)?;
    bench.engine().load(Iova::new(AT + PAGE - 4), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, 8 * PAGE)?, TEXT)
}

pub(crate) fn nothing_moves_where_nothing_is_mapped(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(UNMAPPED, 8)?;
    bench.engine().store(iova(2), 8)?;
    other("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(UNMAPPED, 8)?;
    other("in RAM", ram(bench, DESTINATION)?, TEXT)
}

pub(crate) fn nothing_arrives_after_unmap(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    bench.ram_write(DESTINATION, &OTHER)?;
    unmaps(&bench.ioas(), pages(2, 1)?, PAGE)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn nothing_is_read_after_unmap(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    unmaps(&bench.ioas(), pages(0, 1)?, PAGE)?;
    bench.ram_write(SOURCE, &OTHER)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    other("in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn read_only_memory_takes_no_writes(bench: &mut dyn Bench) -> Verdict {
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &OTHER)?;
    let ioas = bench.ioas();
    for page in [0, 2] {
        let result = ioas.map_file(pages(page, 1)?, bench.ram(), page * PAGE, Access::ReadOnly);
        granted(result)?;
    }
    map_ram(bench, pages(4, 1)?, 4)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in read-only RAM", ram(bench, DESTINATION)?, OTHER)?;
    bench.engine().store(iova(4), 8)?;
    same("read from read-only RAM", ram(bench, 4 * PAGE)?, TEXT)
}

pub(crate) fn bytes_reach_memory_without_a_file(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    let at = bench.anonymous().address;
    granted(bench.map_address(&bench.ioas(), pages(8, 4)?, at, Access::ReadWrite))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(9), 8)?;
    let mut seen = [0; 8];
    bench.anonymous_read(PAGE, &mut seen)?;
    same("in memory without a file", seen, TEXT)
}

pub(crate) fn nothing_moves_without_bus_mastering(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    bench.set_mastering(false)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, [0; 8])?;
    bench.set_mastering(true)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)
}

pub(crate) fn addresses_above_4_gib_are_reached(bench: &mut dyn Bench) -> Verdict {
    const HIGH: u64 = 0x12_3456_7000;
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    let last = bench.engine().last_address();
    if last < Iova::new(HIGH + PAGE) {
        return Err(Complaint::Skipped(format!(
            "{} can only be given addresses up to {last}",
            bench.engine().name()
        )));
    }
    map_ram(bench, range(HIGH, PAGE)?, 6)?;
    bench.engine().store(Iova::new(HIGH), 8)?;
    same("in RAM", ram(bench, 6 * PAGE)?, TEXT)
}
