//! Where the guest's kernel puts BARs, and how much room they need with ports around them.
//!
//! A port passes two ranges of memory on: one below 4 GiB for anything, and one of 64 bits for what
//! is prefetchable (PCI-to-PCI Bridge 1.2, 3.2.5.8 to 3.2.5.10).
//!
//! | | on the root bus | behind a port |
//! |---|---|---|
//! | 32 bits | below 4 GiB | below 4 GiB, in the port's window |
//! | 64 bits, not prefetchable | high | below 4 GiB, in the port's window |
//! | 64 bits, prefetchable | high | high, in the port's prefetchable window |
//!
//! # How large a port's window is
//! At least the sum of the BARs in it. How it is aligned is up to the kernel: Linux does with less
//! than the largest BAR where smaller ones can fill what is before that one, and rounds the size up
//! to the alignment (6.18, read). Here it is aligned by the largest BAR, or by 1 MiB if that is
//! more, and its size rounded up to that. Whoever aligns it by less, and puts one behind the other
//! by descending alignment, needs no more.

use std::cmp::Reverse;

use assigned_pci::{AssignedFunction, BarIndex, BarKind};
use memory_map::{Gpa, GpaRange};

use super::{WINDOW_UNIT, next_congruent, range};
use crate::function;

/// No BAR counts for less. Linux has small ones share a page, and may be told not to.
const LEAST_BAR: u64 = 0x1000;

/// The BARs of one function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FunctionBars {
    /// Whether the function is behind a root port, which then has to pass its BARs on.
    pub behind_port: bool,
    /// Which, what it decodes, and its size in bytes, a power of two. Those of I/O ports do not
    /// count.
    pub bars: Vec<(BarIndex, BarKind, u64)>,
}

impl FunctionBars {
    /// Those of a function, which is put where the machine will put it.
    #[must_use]
    pub fn of(function: &AssignedFunction) -> Self {
        let bars = function.bars().into_iter();
        Self {
            behind_port: function::is_express(function),
            bars: bars.map(|bar| (bar.index, bar.kind, bar.size)).collect(),
        }
    }
}

/// Where a BAR is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarPlace {
    /// Which.
    pub bar: BarIndex,
    /// Where: it starts on a multiple of its size.
    pub range: GpaRange,
}

/// A BAR on the root bus, or a port's window with the BARs in it.
#[derive(Debug, Clone)]
struct Block {
    /// In bytes, a multiple of the alignment unless that is past all addresses.
    size: u64,
    alignment: u64,
    members: Vec<Member>,
}

#[derive(Debug, Clone, Copy)]
struct Member {
    /// The function's number.
    function: usize,
    bar: BarIndex,
    /// Both in bytes; where in the block it begins.
    offset: u64,
    size: u64,
}

impl Block {
    fn bar(function: usize, bar: BarIndex, size: u64) -> Self {
        let whole = size.max(LEAST_BAR);
        Self {
            size: whole,
            alignment: whole,
            members: vec![Member {
                function,
                bar,
                offset: 0,
                size,
            }],
        }
    }

    /// The window of a port, if there is anything to be in it.
    fn window(function: usize, mut bars: Vec<(BarIndex, u64)>) -> Option<Self> {
        // The largest first: then there are no gaps.
        bars.sort_by_key(|(_, size)| Reverse(*size));
        let (_, largest) = bars.first()?;
        let alignment = (*largest).max(WINDOW_UNIT);
        let mut end = 0_u64;
        let mut members = Vec::new();
        for (bar, size) in bars {
            members.push(Member {
                function,
                bar,
                offset: end,
                size,
            });
            end = end.saturating_add(size.max(LEAST_BAR));
        }
        Some(Self {
            size: end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX),
            alignment,
            members,
        })
    }
}

/// What has to go into one window, by descending alignment: so one behind the other leaves no
/// gaps.
#[derive(Debug, Clone, Default)]
pub(super) struct Blocks(Vec<Block>);

/// What has to be below 4 GiB, and what has not.
#[derive(Debug)]
pub(super) struct Needs {
    pub(super) low: Blocks,
    pub(super) high: Blocks,
}

impl Needs {
    pub(super) fn of(functions: &[FunctionBars]) -> Self {
        let (mut low, mut high) = (Vec::new(), Vec::new());
        for (number, function) in functions.iter().enumerate() {
            let (mut below, mut anywhere) = (Vec::new(), Vec::new());
            for (bar, kind, size) in &function.bars {
                let BarKind::Memory {
                    is_64_bit,
                    prefetchable,
                } = *kind
                else {
                    continue;
                };
                let passed_on = !function.behind_port || prefetchable;
                if is_64_bit && passed_on {
                    anywhere.push((*bar, *size));
                } else {
                    below.push((*bar, *size));
                }
            }
            for (bars, blocks) in [(below, &mut low), (anywhere, &mut high)] {
                if function.behind_port {
                    blocks.extend(Block::window(number, bars));
                } else {
                    let bars = bars.into_iter();
                    blocks.extend(bars.map(|(bar, size)| Block::bar(number, bar, size)));
                }
            }
        }
        Self {
            low: Blocks::new(low),
            high: Blocks::new(high),
        }
    }

    /// All of it, for one window.
    pub(super) fn together(&self) -> Blocks {
        Blocks::new([&self.low.0[..], &self.high.0[..]].concat())
    }
}

impl Blocks {
    fn new(mut blocks: Vec<Block>) -> Self {
        blocks.sort_by_key(|block| Reverse(block.alignment));
        Self(blocks)
    }

    /// How much room they need, in bytes, from an address on that suits the first.
    pub(super) fn size(&self) -> u64 {
        let sizes = self.0.iter().map(|block| block.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// From where on they lie in a window.
    pub(super) fn start_in(&self, window: GpaRange) -> Option<u64> {
        let alignment = self.0.first().map_or(1, |block| block.alignment);
        next_congruent(window.start().raw(), alignment, 0)
    }

    /// How much room there is for them in a window, in bytes.
    pub(super) fn room_in(&self, window: GpaRange) -> u64 {
        let start = self.start_in(window);
        let room = start.and_then(|start| range(start, window.last().raw()));
        room.map_or(0, |room| room.size())
    }

    pub(super) fn fit_into(&self, window: GpaRange) -> bool {
        self.size() <= self.room_in(window)
    }

    /// Puts them into a window that they fit into, each function's to the others in `places`, by
    /// its number.
    pub(super) fn place(&self, window: GpaRange, places: &mut [Vec<BarPlace>]) {
        let mut at = self.start_in(window);
        for block in &self.0 {
            for member in &block.members {
                let start = at.and_then(|at| at.checked_add(member.offset));
                let range = start.and_then(|at| GpaRange::new(Gpa::new(at), member.size).ok());
                if let (Some(range), Some(places)) = (range, places.get_mut(member.function)) {
                    let bar = member.bar;
                    places.push(BarPlace { bar, range });
                }
            }
            at = at.and_then(|at| at.checked_add(block.size));
        }
    }
}
