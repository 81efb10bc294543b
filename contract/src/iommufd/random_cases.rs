//! Many calls without a plan, each held against a [`Model`].

use std::io;

use libc::{EINVAL, ENODEV};
use memory_map::{Access, Iova};

use super::cases::Space;
use super::model::{Model, Source};
use super::{Bench, Function};
use crate::cases::{MSI, PAGE, range};
use crate::random_cases::{Numbers, numbered, plain};
use crate::verdict::{granted, same};
use crate::{Complaint, Verdict};

/// How many calls are made.
const CALLS: usize = 6_000;
/// Where the addresses start; the MSI window is in the middle of them.
const FIRST: u64 = MSI - 24 * PAGE;
/// How many pages of addresses there are, and which of them are reserved.
const PAGES: u64 = 32;
const RESERVED: u64 = 24;
/// How many pages may be locked.
const LOCKED: usize = 12;

/// In two address spaces, between which copies go both ways.
pub(crate) fn random_calls_end_as_the_model_says(bench: &mut dyn Bench) -> Verdict {
    let spaces = [bench.ioas(), bench.alloc()?];
    if bench.share_a_group() {
        // Only one of them can have devices, and what has none neither pins nor reserves.
        return calls(bench, &spaces[..1]);
    }
    granted(bench.attach(Function::Memory, &spaces[1]))?;
    calls(bench, &spaces)
}

fn calls(bench: &dyn Bench, spaces: &[Space]) -> Verdict {
    let mut numbers = Numbers::new();
    let mut model = Model::new(spaces.len(), LOCKED, RESERVED..PAGES * 2);
    model.ram_pages = bench.ram_size() / PAGE;
    model.bar_pages = bench.bar().size / PAGE;
    let limit = u64::try_from(LOCKED).unwrap_or(0).saturating_mul(PAGE);
    let _limit = bench.limit_locked_memory(limit)?;
    for call in 0..CALLS {
        one_call(bench, spaces, &mut numbers, &mut model)
            .map_err(|complaint| numbered(call, complaint))?;
    }
    bench.set_decoding(true)?;
    Ok(())
}

/// One of the address spaces.
fn pick<'s>(spaces: &'s [Space], numbers: &mut Numbers) -> Result<(usize, &'s Space), Complaint> {
    let count = u64::try_from(spaces.len()).unwrap_or(1);
    let which = usize::try_from(numbers.below(count)).unwrap_or(0);
    let space = spaces.get(which).ok_or_else(|| {
        let none = io::Error::other("no address space");
        Complaint::from(none)
    })?;
    Ok((which, space))
}

fn one_call(
    bench: &dyn Bench,
    spaces: &[Space],
    numbers: &mut Numbers,
    model: &mut Model,
) -> Verdict {
    let (which, space) = pick(spaces, numbers)?;
    let start = numbers.below(PAGES);
    let writable = numbers.rarely(2);
    let access = if writable {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    match numbers.below(40) {
        0..16 => {
            let count = 1 + numbers.below(5);
            let source = source(bench, numbers);
            let (file, page) = match source {
                Source::Ram(page) => (bench.ram(), page),
                Source::Bar(page) => (bench.dma_buf(), page),
                Source::NoMemory => (bench.no_memory(), 0),
            };
            let slip = slip(numbers);
            let iova = range(FIRST + start * PAGE + slip, count * PAGE)?;
            let expected = match source {
                _ if slip == 0 => model.map(which, (start, count), source, writable),
                // A BAR is looked at before the place.
                Source::Bar(page) if !model.decoding && page + count <= model.bar_pages => {
                    Err(ENODEV)
                }
                _ => Err(EINVAL),
            };
            let result = space.map_file(iova, file, page * PAGE, access);
            let what = format!("map of {source:?} in {which} at {start}, {count} pages, {access}:");
            same(&what, plain(result), expected)
        }
        16..30 => {
            let (from, there) = pick(spaces, numbers)?;
            let (count, first) = (1 + numbers.below(3), numbers.below(PAGES));
            let expected = model.copy(which, (start, count), (from, first), writable);
            let iova = range(FIRST + start * PAGE, count * PAGE)?;
            let at = Iova::new(FIRST + first * PAGE);
            let what = format!("copy from {from} at {first} to {which} at {start}, {count} pages:");
            same(
                &what,
                plain(space.copy(iova, there.id(), at, access)),
                expected,
            )
        }
        30..38 => {
            let count = 1 + numbers.below(12);
            let iova = range(FIRST + start * PAGE, count * PAGE)?;
            let expected = model.unmap(which, start, count);
            let what = format!("unmap in {which} at {start}, {count} pages:");
            same(&what, plain(space.unmap(iova)), expected)
        }
        38 => {
            model.decoding = !model.decoding;
            granted(bench.set_decoding(model.decoding))
        }
        _ if numbers.rarely(4) => {
            let expected = Ok(model.unmap_all(which));
            same("unmap of all:", plain(space.unmap_all()), expected)
        }
        _ => Ok(()),
    }
}

/// What is to be mapped.
fn source(bench: &dyn Bench, numbers: &mut Numbers) -> Source {
    let ram_pages = bench.ram_size() / PAGE;
    let bar_pages = bench.bar().size / PAGE;
    match numbers.below(12) {
        0 => Source::NoMemory,
        1 | 2 => Source::Bar(numbers.below(8)),
        // Near their ends, so that some run past them.
        3 => Source::Bar(bar_pages.saturating_sub(1 + numbers.below(5))),
        4 => Source::Ram(ram_pages.saturating_sub(1 + numbers.below(5))),
        _ => Source::Ram(numbers.below(ram_pages.saturating_sub(8))),
    }
}

/// Now and then, by how much a number is no multiple of a page.
fn slip(numbers: &mut Numbers) -> u64 {
    if numbers.rarely(16) {
        1 + numbers.below(PAGE - 1)
    } else {
        0
    }
}
