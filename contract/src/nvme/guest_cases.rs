//! The cases of a guest that moves its BARs and lays them over one another.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use dma_engine::{DmaEngine, EngineError, NvmeEngine, ScratchBlocks};
use memory_map::{Iova, Missing, Reach, Reason};

use super::cases::{SCRATCH, same_bytes};
use super::guest::{GUEST_RAM, Guest, GuestBar, Memory};
use crate::verdict::{other, same};
use crate::{Complaint, Verdict};

/// What is moved at once, in bytes.
const LEN: usize = 4096;
const LEN_64: u64 = 4096;
/// Of the copies of RAM.
const LONG: usize = 0x1_0000;
const LONG_64: u64 = 0x1_0000;

/// Offsets in RAM: where data come from and go to, and what covers a part of a BAR.
const FROM: u64 = 0;
const TO: u64 = 0x2_0000;
const COVER: u64 = 0x10_0000;
const COVER_SIZE: u64 = 0x2_0000;

/// Where the guest puts the BAR, one after another; there is room for 256 MiB at each. The last one
/// is over RAM, for which the BAR's size is taken off.
const PLACES: [u64; 3] = [0x6000_0000, 0x7000_0000, 0x2_4000_0000];
/// How often it is moved at least, and how many copies are made at least meanwhile.
const MOVES: usize = 400;
const COPIES: usize = 50;

/// Bytes that differ by seed and by place.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let words = (0..).step_by(8).map(|at: u64| {
        let word = (seed << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word ^ (word >> 29)
    });
    let words = words.take(len.div_ceil(8));
    words.flat_map(u64::to_le_bytes).take(len).collect()
}

/// Where on the bus an offset of RAM is.
fn at(offset: u64) -> Iova {
    Iova::new(GUEST_RAM.raw().saturating_add(offset))
}

fn engine(guest: &Guest) -> Result<NvmeEngine, Complaint> {
    let block = guest.block_size()?;
    let scratch = ScratchBlocks::new(SCRATCH / block, (SCRATCH + LONG_64) / block);
    guest.nvme(scratch.ok_or_else(|| std::io::Error::other("no blocks"))?)
}

/// RAM to RAM, with other bytes each time.
fn copy_ram(memory: &Memory, engine: &mut NvmeEngine, seed: u64) -> Verdict {
    let sent = text(seed, LONG);
    memory.write(FROM, &sent)?;
    memory.write(TO, &text(!seed >> 32, LONG))?;
    engine.copy(at(FROM), at(TO), LONG_64)?;
    same_bytes("in RAM", &memory.read(TO, LONG)?, &sent)
}

/// What the copier has to go by while the guest moves a BAR.
#[derive(Default)]
struct Meanwhile {
    copies: AtomicUsize,
    enough: AtomicBool,
}

/// A controller copies from RAM to RAM all the time that another function's BAR moves: not one copy
/// fails, or has other data. Then the BAR is reached where it is, and not where it was.
pub(super) fn ram_is_copied_while_a_peers_bar_moves(guest: &mut Guest) -> Verdict {
    let guest = &*guest;
    let bar = &guest.peer;
    let over_ram = GUEST_RAM.raw() & !(bar.size.max(0x20_0000) - 1);
    let places = [PLACES[0], PLACES[1], PLACES[2], over_ram];
    let mut engine = engine(guest)?;
    copy_ram(&guest.memory, &mut engine, 1)?;
    let (meanwhile, memory) = (Meanwhile::default(), guest.memory.clone());
    let (moved, copied) = thread::scope(|scope| {
        let copier = scope.spawn(|| -> Verdict {
            for seed in 2.. {
                if meanwhile.enough.load(Ordering::Relaxed) {
                    break;
                }
                copy_ram(&memory, &mut engine, seed)?;
                meanwhile.copies.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let copies = || meanwhile.copies.load(Ordering::Relaxed);
        let mut moved = Ok(());
        for (number, place) in (0..).zip(places.iter().cycle()) {
            if copier.is_finished() || (number >= MOVES && copies() >= COPIES) {
                break;
            }
            moved = move_and_look(guest, bar, *place, *place == over_ram);
            if moved.is_err() {
                break;
            }
        }
        meanwhile.enough.store(true, Ordering::Relaxed);
        let died = || std::io::Error::other("the copier has panicked").into();
        (moved, copier.join().unwrap_or_else(|_| Err(died())))
    });
    copied?;
    moved?;

    let [old, new, ..] = places;
    let offset = bar.size / 2;
    for (was, is) in [(old, new), (new, old)] {
        bar.move_to(was)?;
        bar.move_to(is)?;
        reached(guest, &mut engine, bar, is, offset)?;
        not_reached(guest, &mut engine, bar, was, offset)?;
    }
    Ok(engine.finish()?)
}

/// Moves a BAR, and sees that it is there and mapped, as far as RAM leaves it.
fn move_and_look(guest: &Guest, bar: &GuestBar, to: u64, over_ram: bool) -> Verdict {
    bar.move_to(to)?;
    if over_ram {
        return covered_by(&guest.reach(bar)?, "ram").map(drop);
    }
    same("at its place", guest.seen_at(to), Some(bar.region))?;
    same("reach", guest.reach(bar)?, Reach::Mapped)
}

/// That an engine gets at an offset of a BAR, both ways, at the address where that is.
fn reached(
    guest: &Guest,
    engine: &mut dyn DmaEngine,
    bar: &GuestBar,
    start: u64,
    offset: u64,
) -> Verdict {
    let bus = Iova::new(start.saturating_add(offset));
    let sent = text(0x51, LEN);
    bar.write(offset, &text(0x52, LEN))?;
    guest.memory.write(FROM, &sent)?;
    engine.copy(at(FROM), bus, LEN_64)?;
    same_bytes("in the BAR", &bar.read(offset, LEN)?, &sent)?;
    let back = text(0x53, LEN);
    bar.write(offset, &back)?;
    engine.copy(bus, at(TO), LEN_64)?;
    same_bytes("in RAM", &guest.memory.read(TO, LEN)?, &back)
}

/// That it does not, where that was.
fn not_reached(
    guest: &Guest,
    engine: &mut dyn DmaEngine,
    bar: &GuestBar,
    start: u64,
    offset: u64,
) -> Verdict {
    let bus = Iova::new(start.saturating_add(offset));
    let before = text(0x54, LEN);
    bar.write(offset, &before)?;
    guest.memory.write(FROM, &text(0x55, LEN))?;
    told_or_not(engine.copy(at(FROM), bus, LEN_64))?;
    same_bytes("in the BAR that has left", &bar.read(offset, LEN)?, &before)
}

/// A blocked transfer may be told or not.
fn told_or_not(done: Result<(), EngineError>) -> Verdict {
    match done {
        Err(error) if error.is_of_the_bus() => Ok(()),
        done => Ok(done?),
    }
}

/// What is missing of a BAR that is partly covered, by that alone: from where on the bus, and how
/// many bytes.
fn covered_by(reach: &Reach, name: &str) -> Result<(u64, u64), Complaint> {
    let Reach::Partly { missing, .. } = reach else {
        return Err(Complaint::Failed {
            expected: "a BAR that is partly reached".into(),
            got: reach.to_string(),
        });
    };
    let [Missing { range, reason }] = missing.as_slice() else {
        return Err(Complaint::Failed {
            expected: "one piece to be missing".into(),
            got: reach.to_string(),
        });
    };
    match reason {
        Reason::Covered { by } => same("covered by", by.to_string().contains(name), true)?,
        _ => {
            return Err(Complaint::Failed {
                expected: format!("it to be covered by {name}"),
                got: reach.to_string(),
            });
        }
    }
    Ok((range.start().raw(), range.size()))
}

/// RAM in the middle of a BAR, then at its start, at its end, and gone: what is seen of the BAR is
/// reached at its own offsets, and what is covered answers as RAM.
pub(super) fn a_bar_under_ram_is_reached_around_it(guest: &mut Guest) -> Verdict {
    let bar = guest.peer.clone();
    let mut engine = engine(guest)?;
    let [start, ..] = PLACES;
    bar.move_to(start)?;
    let last = bar.size - COVER_SIZE;
    for offset in [bar.size / 2, 0, last] {
        // Negative control: without it, the BAR is reached there.
        reached(guest, &mut engine, &bar, start, offset)?;
        let cover = guest.add_cover(start + offset, COVER, COVER_SIZE)?;
        let missing = covered_by(&guest.reach(&bar)?, "cover")?;
        same("missing", missing, (start + offset, COVER_SIZE))?;
        for inside in [0, COVER_SIZE - LEN_64] {
            let under = text(0x61, LEN);
            bar.write(offset + inside, &under)?;
            let sent = text(0x62, LEN);
            guest.memory.write(FROM, &sent)?;
            guest.memory.write(COVER + inside, &text(0x63, LEN))?;
            let bus = Iova::new(start + offset + inside);
            engine.copy(at(FROM), bus, LEN_64)?;
            same_bytes(
                "in the cover",
                &guest.memory.read(COVER + inside, LEN)?,
                &sent,
            )?;
            same_bytes("under the cover", &bar.read(offset + inside, LEN)?, &under)?;
            let back = text(0x64, LEN);
            guest.memory.write(COVER + inside, &back)?;
            engine.copy(bus, at(TO), LEN_64)?;
            same_bytes("from the cover", &guest.memory.read(TO, LEN)?, &back)?;
        }
        for beside in around(offset, COVER_SIZE, bar.size) {
            reached(guest, &mut engine, &bar, start, beside)?;
        }
        guest.remove(cover)?;
        same("reach", guest.reach(&bar)?, Reach::Mapped)?;
        reached(guest, &mut engine, &bar, start, offset)?;
    }
    Ok(engine.finish()?)
}

/// The pages of a BAR next to a piece of it, and its first and last.
fn around(offset: u64, size: u64, whole: u64) -> Vec<u64> {
    let before = offset.checked_sub(LEN_64).into_iter();
    let after = [offset + size].into_iter();
    let mut pages: Vec<u64> = before
        .chain(after)
        .chain([0, whole - LEN_64])
        .filter(|page| *page < whole && !(offset..offset + size).contains(page))
        .collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

/// A BAR that the guest puts into a larger one, and out of it again.
pub(super) fn a_bar_under_another_is_reached_around_it(guest: &mut Guest) -> Verdict {
    let skipped = |why: &str| Complaint::Skipped(why.into());
    let mut engine = guest
        .engine
        .take()
        .ok_or_else(|| skipped("there is no other DMA engine"))?;
    let buffer = guest.buffer.clone();
    let buffer = buffer.ok_or_else(|| skipped("the controller has no memory buffer"))?;
    let peer = guest.peer.clone();
    let (large, small) = if buffer.size > peer.size {
        (buffer, peer)
    } else {
        (peer, buffer)
    };
    other("sizes", large.size, small.size)?;
    let [start, elsewhere, _] = PLACES;
    large.move_to(start)?;
    small.move_to(elsewhere)?;
    same("reach", guest.reach(&large)?, Reach::Mapped)?;
    let offset = large.size / 2;
    reached(guest, &mut *engine, &large, start, offset)?;
    small.move_to(start + offset)?;
    let missing = covered_by(&guest.reach(&large)?, small.function.name())?;
    same("missing", missing, (start + offset, small.size))?;
    same("reach of what covers", guest.reach(&small)?, Reach::Mapped)?;
    // What is written there arrives in the one that covers, and only there.
    let under = text(0x71, LEN);
    large.write(offset, &under)?;
    reached(guest, &mut *engine, &small, start + offset, 0)?;
    same_bytes("under the other", &large.read(offset, LEN)?, &under)?;
    for beside in around(offset, small.size, large.size) {
        reached(guest, &mut *engine, &large, start, beside)?;
    }
    small.move_to(elsewhere)?;
    same("reach", guest.reach(&large)?, Reach::Mapped)?;
    reached(guest, &mut *engine, &large, start, offset)
}
