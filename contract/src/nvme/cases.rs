//! The cases, and how they are run.

use dma_engine::{DmaEngine, EngineError, NvmeEngine, NvmeError, ScratchBlocks};

use super::bench::{BAR, Bench, NvmeHost, Parts, RAM};
use super::guest::Guest;
use super::guest_cases::{
    a_bar_under_another_is_reached_around_it, a_bar_under_ram_is_reached_around_it,
    ram_is_copied_while_a_peers_bar_moves,
};
use super::interrupt_cases::{
    a_controllers_completions_signal_their_vector, an_interrupt_needs_bus_mastering,
    the_table_is_the_hosts, vectors_are_added_if_the_host_says_so,
    vectors_are_lent_as_the_devices_have_them, vectors_that_there_are_not_are_refused,
};
use crate::verdict::{other, same};
use crate::{CaseResult, Complaint, Verdict};

/// What is moved at once unless a case says otherwise, in bytes.
const LEN: usize = 4096;
const LEN_64: u64 = 4096;
/// More than two pages: the driver makes a list of them.
const LONG: usize = 0x1_0000;
const LONG_64: u64 = 0x1_0000;

/// Where on the disk the cases read from, in bytes; nothing is written there.
const READ: u64 = 0x10_0000;
/// Where on the disk the cases leave what they wrote from the BAR: the first byte, and the one after the
/// last one. All eight bytes there then hold [`word_from_bar`] their offset, little-endian.
pub const FROM_BAR: (u64, u64) = (0x20_0000, 0x20_0000 + LONG_64);
/// Where on the disk a blocked transfer is tried.
const BLOCKED: u64 = 0x30_0000;
/// Where on the disk the engine's scratch blocks are.
pub(super) const SCRATCH: u64 = 0x40_0000;

/// What the eight bytes at an offset of the disk must hold, little-endian. The offset is in bytes
/// and a multiple of eight. 5 MiB of it are used.
#[must_use]
pub fn word_at(offset: u64) -> u64 {
    offset ^ 0x7477_0000_0000_0000
}

/// What a case writes there instead, see [`FROM_BAR`].
#[must_use]
pub fn word_from_bar(offset: u64) -> u64 {
    offset ^ 0x6261_7200_0000_0000
}

fn text(word: fn(u64) -> u64, offset: u64, len: usize) -> Vec<u8> {
    let offsets = (offset..).step_by(8).take(len / 8);
    offsets.flat_map(|at| word(at).to_le_bytes()).collect()
}

/// Other bytes, for what is to be overwritten.
fn filler(offset: u64) -> u64 {
    !word_at(offset)
}

/// One thing that a controller and an IOMMU do.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What.
    pub name: &'static str,
    run: On,
}

/// What a case is run on.
#[derive(Debug, Clone, Copy)]
enum On {
    /// Regions that the case itself puts into a map.
    Bench(fn(&mut Bench) -> Verdict),
    /// A guest's functions.
    Guest(fn(&mut Guest) -> Verdict),
}

impl On {
    fn run(self, parts: Parts) -> Verdict {
        match self {
            Self::Bench(run) => run(&mut Bench::new(parts)?),
            Self::Guest(run) => run(&mut Guest::new(parts)?),
        }
    }
}

/// Makes [`Case`]s of functions, by their names.
macro_rules! cases {
    ($on:ident: $($case:ident),+ $(,)?) => {
        vec![$(Case { name: stringify!($case), run: On::$on($case) }),+]
    };
}

/// The cases of regions, in the order in which they are run. What they leave on the disk, see
/// [`FROM_BAR`].
#[must_use]
pub fn cases() -> Vec<Case> {
    cases![
        Bench:
        blocks_go_from_the_disk_into_ram,
        blocks_go_from_the_disk_into_the_peers_bar,
        blocks_go_from_the_peers_bar_to_the_disk,
        a_bar_that_is_not_mapped_is_not_written,
        a_bar_that_is_not_mapped_is_not_read,
        an_engine_with_scratch_blocks_copies_and_puts_them_back,
        the_memory_buffer_is_reached_by_an_engine,
        a_memory_buffer_that_is_not_mapped_is_not_reached,
        queues_that_are_not_mapped_are_an_error,
        vectors_are_lent_as_the_devices_have_them,
        a_controllers_completions_signal_their_vector,
        vectors_are_added_if_the_host_says_so,
        vectors_that_there_are_not_are_refused,
        an_interrupt_needs_bus_mastering,
        the_table_is_the_hosts,
    ]
}

/// The cases of a guest that moves its BARs and lays them over one another, in the order in which
/// they are run. They leave the disk as they found it.
#[must_use]
pub fn guest_cases() -> Vec<Case> {
    cases![
        Guest:
        ram_is_copied_while_a_peers_bar_moves,
        a_bar_under_ram_is_reached_around_it,
        a_bar_under_another_is_reached_around_it,
    ]
}

/// Runs cases, each with functions that are opened anew, and tells of each as soon as it has ended.
pub fn run(
    host: &dyn NvmeHost,
    cases: &[Case],
    tell: &mut dyn FnMut(&CaseResult),
) -> Vec<CaseResult> {
    cases
        .iter()
        .map(|case| {
            let verdict = match host.parts() {
                Ok(parts) => case.run.run(parts),
                Err(error) => Err(Complaint::Failed {
                    expected: "functions to try it with".into(),
                    got: error.to_string(),
                }),
            };
            let result = CaseResult {
                name: case.name,
                verdict,
            };
            tell(&result);
            result
        })
        .collect()
}

impl From<NvmeError> for Complaint {
    fn from(error: NvmeError) -> Self {
        EngineError::from(error).into()
    }
}

/// The block that an offset of the disk lies in.
fn block(bench: &mut Bench, offset: u64) -> Result<u64, Complaint> {
    let identity = bench.nvme.enable()?;
    Ok(offset / identity.block_size)
}

/// Too long to be shown.
pub(super) fn same_bytes(what: &str, got: &[u8], expected: &[u8]) -> Verdict {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    same(what, got.len(), expected.len())?;
    match differs {
        None => Ok(()),
        Some(at) => {
            let word = |bytes: &[u8]| {
                bytes
                    .get(at..)
                    .map(|rest| rest.iter().take(8).copied().collect::<Vec<_>>())
            };
            same(&format!("{what}, at {at:#x}:"), word(got), word(expected))
        }
    }
}

/// A blocked transfer may be told or not, but nothing else may go wrong.
fn told_or_not(done: Result<(), NvmeError>) -> Verdict {
    match done.map_err(EngineError::from) {
        Ok(()) => Ok(()),
        Err(error) if error.is_of_the_bus() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn blocks_go_from_the_disk_into_ram(bench: &mut Bench) -> Verdict {
    let first = block(bench, READ)?;
    for (len, len_64) in [(LEN, LEN_64), (LONG, LONG_64)] {
        bench.ram_write(0, &text(filler, 0, len))?;
        bench.nvme.read(first, RAM, len_64)?;
        same_bytes("in RAM", &bench.ram(0, len)?, &text(word_at, READ, len))?;
    }
    Ok(())
}

fn blocks_go_from_the_disk_into_the_peers_bar(bench: &mut Bench) -> Verdict {
    let first = block(bench, READ)?;
    for (len, len_64) in [(LEN, LEN_64), (LONG, LONG_64)] {
        bench.bar_write(0, &text(filler, 0, len))?;
        bench.nvme.read(first, BAR, len_64)?;
        same_bytes("in the BAR", &bench.bar(0, len)?, &text(word_at, READ, len))?;
    }
    Ok(())
}

fn blocks_go_from_the_peers_bar_to_the_disk(bench: &mut Bench) -> Verdict {
    let (from, _) = FROM_BAR;
    let first = block(bench, from)?;
    let written = text(word_from_bar, from, LONG);
    bench.bar_write(0, &written)?;
    bench.nvme.write(first, BAR, LONG_64)?;
    bench.ram_write(0, &text(filler, 0, LONG))?;
    bench.nvme.read(first, RAM, LONG_64)?;
    same_bytes("on the disk", &bench.ram(0, LONG)?, &written)
}

/// `ok`, `blocked`, `ok`.
fn a_bar_that_is_not_mapped_is_not_written(bench: &mut Bench) -> Verdict {
    let first = block(bench, READ)?;
    let (before, after) = (text(filler, 0, LEN), text(word_at, READ, LEN));
    for mapped in [true, false, true] {
        bench.set_bar(mapped)?;
        bench.bar_write(0, &before)?;
        let done = bench.nvme.read(first, BAR, LEN_64);
        if mapped {
            done?;
            same_bytes("in the BAR", &bench.bar(0, LEN)?, &after)?;
        } else {
            told_or_not(done)?;
            same_bytes("in the unmapped BAR", &bench.bar(0, LEN)?, &before)?;
        }
    }
    Ok(())
}

fn a_bar_that_is_not_mapped_is_not_read(bench: &mut Bench) -> Verdict {
    let first = block(bench, BLOCKED)?;
    for (mapped, word) in [
        (true, word_at as fn(u64) -> u64),
        (false, word_from_bar),
        (true, filler),
    ] {
        bench.set_bar(mapped)?;
        let wanted = text(word, BLOCKED, LEN);
        bench.bar_write(0, &wanted)?;
        let done = bench.nvme.write(first, BAR, LEN_64);
        if mapped {
            done?;
        } else {
            told_or_not(done)?;
        }
        bench.nvme.read(first, RAM, LEN_64)?;
        let found = bench.ram(0, LEN)?;
        if mapped {
            same_bytes("on the disk", &found, &wanted)?;
        } else {
            // Nowhere: not a word of it.
            let leaked = found.chunks(8).zip(wanted.chunks(8)).any(|(a, b)| a == b);
            other("words of the unmapped BAR on the disk", leaked, true)?;
        }
    }
    Ok(())
}

fn an_engine_with_scratch_blocks_copies_and_puts_them_back(bench: &mut Bench) -> Verdict {
    let (first, end) = (block(bench, SCRATCH)?, block(bench, SCRATCH + LONG_64)?);
    bench.nvme.read(first, RAM, LONG_64)?;
    let before = bench.ram(0, LONG)?;
    bench.nvme.disable()?;
    let scratch = ScratchBlocks::new(first, end).ok_or_else(|| Complaint::Failed {
        expected: "blocks".into(),
        got: format!("{first}..{end}"),
    })?;
    let mut engine =
        NvmeEngine::new(bench.function(), bench.lent(), scratch).with_time_limit(bench.time_limit);
    let there = text(word_from_bar, SCRATCH, LEN);
    bench.ram_write(0, &there)?;
    engine.copy(RAM, BAR, LEN_64)?;
    same_bytes("in the BAR", &bench.bar(0, LEN)?, &there)?;
    let back = text(filler, SCRATCH, LEN);
    bench.bar_write(0, &back)?;
    engine.copy(BAR, RAM, LEN_64)?;
    same_bytes("in RAM", &bench.ram(0, LEN)?, &back)?;
    engine.finish()?;
    drop(engine);
    bench.nvme.read(first, RAM, LONG_64)?;
    same_bytes("back on the disk", &bench.ram(0, LONG)?, &before)
}

/// The other engine, if there is one.
fn engine(bench: &mut Bench) -> Result<Box<dyn DmaEngine>, Complaint> {
    let none = || Complaint::Skipped("there is no other DMA engine".into());
    bench.engine.take().ok_or_else(none)
}

fn the_memory_buffer_is_reached_by_an_engine(bench: &mut Bench) -> Verdict {
    let mut engine = engine(bench)?;
    // The controller works at the same time.
    let first = block(bench, READ)?;
    let buffer = bench.add_buffer()?;
    let offset = buffer.size() - LEN_64;
    let there = text(word_from_bar, 0, LEN);
    bench.ram_write(0, &there)?;
    buffer.write(offset, &text(filler, 0, LEN))?;
    engine.copy(RAM, buffer.at(offset), LEN_64)?;
    same_bytes("in the buffer", &buffer.read(offset, LEN)?, &there)?;
    let back = text(filler, 0x1000, LEN);
    buffer.write(offset, &back)?;
    engine.copy(buffer.at(offset), RAM, LEN_64)?;
    same_bytes("in RAM", &bench.ram(0, LEN)?, &back)?;
    bench.nvme.read(first, RAM, LEN_64)?;
    same_bytes(
        "in RAM, from the disk",
        &bench.ram(0, LEN)?,
        &text(word_at, READ, LEN),
    )
}

fn a_memory_buffer_that_is_not_mapped_is_not_reached(bench: &mut Bench) -> Verdict {
    let mut engine = engine(bench)?;
    let buffer = bench.add_buffer()?;
    let (before, after) = (text(filler, 0, LEN), text(word_from_bar, 0, LEN));
    bench.ram_write(0, &after)?;
    for mapped in [true, false, true] {
        buffer.set(mapped)?;
        buffer.write(0, &before)?;
        engine.copy(RAM, buffer.at(0), LEN_64)?;
        let expected = if mapped { &after } else { &before };
        same_bytes("in the buffer", &buffer.read(0, LEN)?, expected)?;
    }
    Ok(())
}

/// RAM that was mapped when the queues were made, and is not when they are used.
fn queues_that_are_not_mapped_are_an_error(bench: &mut Bench) -> Verdict {
    let first = block(bench, READ)?;
    bench.set_ram(false)?;
    let error = match bench.nvme.read(first, BAR, LEN_64) {
        Ok(()) => return same("a command in unmapped memory", "done", "an error"),
        Err(error) => EngineError::from(error),
    };
    same("of the bus", error.is_of_the_bus(), true)?;
    bench.set_ram(true)?;
    bench.nvme.read(first, RAM, LEN_64)?;
    same_bytes("in RAM", &bench.ram(0, LEN)?, &text(word_at, READ, LEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_places_on_the_disk_are_apart() {
        let places = [READ, FROM_BAR.0, BLOCKED, SCRATCH];
        assert!(places.windows(2).all(|two| two[0] + LONG_64 <= two[1]));
    }
}
