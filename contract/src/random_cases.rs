//! Many calls without a plan, each held against a [`Model`].

use std::io;

use libc::EINVAL;
use memory_map::{Access, HostVa};

use crate::cases::{MSI, NOWHERE, PAGE, ram_page, range};
use crate::model::{Model, Source};
use crate::verdict::{granted, same};
use crate::{Bench, Complaint, Verdict};

/// How many calls are made.
const CALLS: usize = 4_000;
/// Where the addresses start; the MSI window is in the middle of them.
const FIRST: u64 = MSI - 24 * PAGE;
/// How many pages of addresses there are, and which of them are reserved.
const PAGES: u64 = 32;
const RESERVED: u64 = 24;
/// How many pages may be locked.
const LOCKED: usize = 8;
/// How many pages of the BAR are used.
const BAR_PAGES: u64 = 8;

/// Numbers that look random and are the same every time (xorshift).
pub(crate) struct Numbers(u64);

impl Numbers {
    /// The same ones each time.
    pub const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end.max(1)
    }

    /// Once in `of` times.
    pub fn rarely(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

/// A result as the model has it.
pub(crate) fn plain<T>(result: io::Result<T>) -> Result<T, i32> {
    result.map_err(|error| error.raw_os_error().unwrap_or(0))
}

pub(crate) fn random_calls_end_as_the_model_says(bench: &mut dyn Bench) -> Verdict {
    let mut numbers = Numbers::new();
    let ram_pages = bench.ram().size / PAGE;
    let mut model = Model::new(ram_pages, LOCKED, RESERVED..PAGES * 2);
    let limit = u64::try_from(LOCKED).unwrap_or(0).saturating_mul(PAGE);
    let _limit = bench.limit_locked_memory(limit)?;
    let all = entries_left(bench)?;
    for call in 0..CALLS {
        one_call(bench, &mut numbers, &mut model).map_err(|complaint| numbered(call, complaint))?;
        if call % 16 == 0 {
            let used = all.checked_sub(entries_left(bench)?);
            same(
                "mappings",
                used.map(u64::from),
                u64::try_from(model.mappings()).ok(),
            )
            .map_err(|complaint| numbered(call, complaint))?;
        }
    }
    bench.set_decoding(true)?;
    Ok(())
}

fn entries_left(bench: &dyn Bench) -> Result<u32, Complaint> {
    Ok(granted(bench.container().info())?.entries_left.unwrap_or(0))
}

pub(crate) fn numbered(call: usize, complaint: Complaint) -> Complaint {
    match complaint {
        Complaint::Failed { expected, got } => Complaint::Failed {
            expected: format!("of call {call}: {expected}"),
            got,
        },
        skipped @ Complaint::Skipped(_) => skipped,
    }
}

fn one_call(bench: &dyn Bench, numbers: &mut Numbers, model: &mut Model) -> Verdict {
    let start = numbers.below(PAGES);
    match numbers.below(32) {
        0..16 => {
            let count = 1 + numbers.below(5);
            let (source, vaddr) = source(bench, numbers);
            let access = if numbers.rarely(2) {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            };
            let slip = slip(numbers);
            let iova = range(FIRST + start * PAGE + slip, count * PAGE)?;
            let expected = if slip == 0 {
                model.map(start, count, source)
            } else {
                Err(EINVAL)
            };
            let what = format!("map of {source:?} at page {start}, {count} pages, {access}:");
            same(&what, plain(bench.map(iova, vaddr, access)), expected)
        }
        16..30 => {
            let count = 1 + numbers.below(12);
            let slip = slip(numbers);
            let iova = range(FIRST + start * PAGE, count * PAGE + slip)?;
            let expected = if slip == 0 {
                model.unmap(start, count)
            } else {
                Err(EINVAL)
            };
            let what = format!("unmap at page {start}, {count} pages:");
            same(&what, plain(bench.container().unmap_dma(iova)), expected)
        }
        30 => {
            model.decoding = !model.decoding;
            granted(bench.set_decoding(model.decoding))
        }
        _ if numbers.rarely(4) => {
            let expected = Ok(model.unmap_all());
            same(
                "unmap of all:",
                plain(bench.container().unmap_all()),
                expected,
            )
        }
        _ => Ok(()),
    }
}

/// What is to be mapped, and where that lies.
fn source(bench: &dyn Bench, numbers: &mut Numbers) -> (Source, HostVa) {
    let ram_pages = bench.ram().size / PAGE;
    match numbers.below(8) {
        0 => (Source::Nowhere, NOWHERE),
        1 | 2 => {
            let page = numbers.below(BAR_PAGES);
            let address = bench.bar().address.raw().saturating_add(page * PAGE);
            (Source::Bar(page), HostVa::new(address))
        }
        // Near its end, so that some run past it.
        3 => {
            let page = ram_pages.saturating_sub(1 + numbers.below(5));
            (Source::Ram(page), ram_page(bench, page))
        }
        _ => {
            let page = numbers.below(ram_pages.saturating_sub(8));
            (Source::Ram(page), ram_page(bench, page))
        }
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
