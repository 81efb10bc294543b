//! What a device reaches through mappings, and what it does not.

use memory_map::{Access, Iova};

use crate::cases::{AT, PAGE, map_ram, pages, ram_page, range};
use crate::verdict::{granted, other, same};
use crate::{Bench, Complaint, Verdict};

/// The pages of RAM that the cases use.
const SOURCE: u64 = 0;
const DESTINATION: u64 = 2 * PAGE;
/// Where nothing is ever mapped.
const UNMAPPED: Iova = Iova::new(AT + 0x100 * PAGE);

const TEXT: [u8; 8] = *b"sentinel";
const OTHER: [u8; 8] = *b"someelse";

fn iova(page: u64) -> Iova {
    Iova::new(AT + page * PAGE)
}

fn ram(bench: &dyn Bench, offset: u64) -> Result<[u8; 8], Complaint> {
    let mut data = [0; 8];
    bench.ram_read(offset, &mut data)?;
    Ok(data)
}

/// Maps page 0 of RAM at page 0, and page 2 at page 2; the first one holds the text.
fn two_pages(bench: &dyn Bench) -> Verdict {
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
    granted(bench.container().unmap_dma(pages(2, 1)?))?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn nothing_is_read_after_unmap(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    granted(bench.container().unmap_dma(pages(0, 1)?))?;
    bench.ram_write(SOURCE, &OTHER)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    other("in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn nothing_arrives_after_unmap_all(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.engine().load(iova(0), 8)?;
    granted(bench.container().unmap_all())?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, [0; 8])
}

pub(crate) fn read_only_memory_takes_no_writes(bench: &mut dyn Bench) -> Verdict {
    bench.ram_write(SOURCE, &TEXT)?;
    bench.ram_write(DESTINATION, &OTHER)?;
    granted(bench.map(pages(0, 1)?, ram_page(bench, 0), Access::ReadOnly))?;
    granted(bench.map(pages(2, 1)?, ram_page(bench, 2), Access::ReadOnly))?;
    map_ram(bench, pages(4, 1)?, 4)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in read-only RAM", ram(bench, DESTINATION)?, OTHER)?;
    bench.engine().store(iova(4), 8)?;
    same("read from read-only RAM", ram(bench, 4 * PAGE)?, TEXT)
}

pub(crate) fn another_page_at_the_same_address_shows(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.ram_write(5 * PAGE, &OTHER)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    granted(bench.container().unmap_dma(pages(0, 1)?))?;
    map_ram(bench, pages(0, 1)?, 5)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn ram_reaches_the_bar_and_back(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.bar_write(PAGE, [0; 8])?;
    let bar = bench.bar();
    let window = pages(32, bar.size / PAGE)?;
    granted(bench.map(window, bar.address, Access::ReadWrite))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(33), 8)?;
    same("in the BAR", granted(bench.bar_read(PAGE))?, TEXT)?;
    bench.bar_write(PAGE, OTHER)?;
    bench.engine().load(iova(33), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("back in RAM", ram(bench, DESTINATION)?, OTHER)
}

pub(crate) fn nothing_arrives_in_an_unmapped_bar(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.bar_write(0, OTHER)?;
    let bar = bench.bar();
    let window = range(AT + 32 * PAGE, bar.size)?;
    granted(bench.map(window, bar.address, Access::ReadWrite))?;
    granted(bench.container().unmap_dma(window))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(32), 8)?;
    same("in the BAR", granted(bench.bar_read(0))?, OTHER)
}

/// Type1 does not revoke: the mapping of a BAR outlasts its decoding, and leads nowhere meanwhile.
pub(crate) fn a_mapped_bar_is_not_revoked_when_decoding_goes_off(bench: &mut dyn Bench) -> Verdict {
    two_pages(bench)?;
    bench.bar_write(0, OTHER)?;
    let bar = bench.bar();
    let window = pages(32, bar.size / PAGE)?;
    granted(bench.map(window, bar.address, Access::ReadWrite))?;
    bench.engine().load(iova(0), 8)?;
    bench.set_decoding(false)?;
    bench.engine().store(iova(32), 8)?;
    bench.set_decoding(true)?;
    same("in the BAR", granted(bench.bar_read(0))?, OTHER)?;
    bench.engine().store(iova(32), 8)?;
    same("in the BAR", granted(bench.bar_read(0))?, TEXT)?;
    let bytes = granted(bench.container().unmap_dma(window))?;
    same("bytes unmapped", bytes, bar.size)
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
