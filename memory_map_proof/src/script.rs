//! Scripts: what is done to a map, step by step, and what goes wrong meanwhile.

use memory_map::{Access, RegionKind};

use crate::kernel::Fault;
use crate::model::LOW;
use crate::shape::{LIMIT_CHANGES, SHAPES};

/// How many backings there are at a time.
pub const SLOTS: usize = 4;
/// Granules of each.
pub const BACKING_PAGES: u64 = 48;

/// One operation of a change. Regions are meant by their place among those that there are.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are those of the map's own operations"
)]
pub enum Op {
    Add {
        at: usize,
        cells: u64,
        priority: i32,
        kind: RegionKind,
        access: Access,
        shareable: bool,
        label: Option<&'static str>,
        /// How many sub-mappings, in even parts; the last may be left out.
        parts: u64,
        hole: bool,
        slot: usize,
        backing_page: u64,
        enable: bool,
    },
    Remove(usize),
    Enable(usize),
    Disable(usize),
    /// To a cell, which may be so near the top that the region wraps.
    Move(usize, usize),
    SetAccess(usize, Access),
    /// Region, offset, size, slot and offset in the backing, in granules.
    SetSub(usize, u64, u64, usize, u64),
    /// Region, offset and size in granules.
    RemoveSub(usize, u64, u64),
    Revoke(usize),
    /// Something that makes no sense, of which there are several kinds.
    Nonsense(usize),
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Several operations, committed as one; the guest's or the host's.
    Change(Vec<Op>, bool),
    /// Registers a target of that shape.
    Register(usize),
    /// Unregisters one of the targets.
    Unregister(usize),
    /// The limits of one of the targets change, in one of several ways.
    Limits(usize, usize),
    /// A backing's epoch advances, and nobody tells the map.
    Advance(usize),
    /// The embedder lets go of a backing, and takes a new one in its place.
    Renew(usize),
}

/// A step, and what goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// What is done.
    pub step: Step,
    /// Which calls fail, counted from the step's first.
    pub faults: Vec<(u32, Fault)>,
    /// At which call the one who watches cancels.
    pub cancel: Option<u32>,
}

/// Where the choices in a script come from.
pub trait Source {
    /// A number below `n`, which is not zero.
    fn below(&mut self, n: usize) -> usize;
    /// Whether there is nothing more.
    fn is_empty(&self) -> bool {
        false
    }
    /// True once in `n` times.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }
}

/// Random choices (xorshift64*), the same for the same seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Choices from a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
}

impl Source for Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        crate::model::index(number) % n
    }
}

/// Choices from arbitrary bytes, one byte each.
#[derive(Debug, Clone)]
pub struct Bytes<'b>(pub &'b [u8]);

impl Source for Bytes<'_> {
    fn below(&mut self, n: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first) % n
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What kind of scripts are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// With failures.
    pub failures: bool,
    /// The shapes that may be registered.
    pub shapes: &'static [usize],
}

/// Everything.
pub const EVERYTHING: Style = Style {
    failures: true,
    shapes: &{
        let mut all = [0; SHAPES];
        let mut at = 0;
        while at < SHAPES {
            all[at] = at;
            at += 1;
        }
        all
    },
};

/// Steps without failures, and no target that may run full.
pub const QUIET: Style = Style {
    failures: false,
    shapes: &[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12],
};

/// Makes up one turn.
pub fn turn(source: &mut dyn Source, style: Style) -> Turn {
    let step = match source.below(16) {
        0 | 1 => Step::Register(style.shapes[source.below(style.shapes.len())]),
        2 => Step::Unregister(source.below(4)),
        3 => Step::Limits(source.below(4), source.below(LIMIT_CHANGES)),
        4 if style.failures && source.once_in(2) => Step::Advance(source.below(SLOTS)),
        5 if source.once_in(3) => Step::Renew(source.below(SLOTS)),
        _ => {
            let count = 1 + source.below(5);
            let ops = (0..count).map(|_| op(source)).collect();
            Step::Change(ops, source.once_in(2))
        }
    };
    let mut turn = Turn {
        step,
        faults: Vec::new(),
        cancel: None,
    };
    if style.failures && source.once_in(2) {
        for _ in 0..1 + source.below(2) {
            let at = u32::try_from(source.below(8)).unwrap_or(0);
            turn.faults.push((at, fault(source)));
        }
        if source.once_in(6) {
            turn.cancel = u32::try_from(source.below(6)).ok();
        }
    }
    turn
}

fn fault(source: &mut dyn Source) -> Fault {
    match source.below(8) {
        0..4 => Fault::Refused,
        4 => Fault::Revoked,
        5 => Fault::UnknownButDone,
        6 => Fault::UnknownNotDone,
        _ => Fault::RevokedMeanwhile,
    }
}

fn place(source: &mut dyn Source) -> usize {
    let cell = source.below(128);
    match source.below(16) {
        // On a page of 64 KiB, on a granule, anywhere; at the very top.
        0..6 => cell & !31,
        6..13 => cell & !1,
        13 | 14 => cell,
        _ => LOW + source.below(crate::model::HIGH),
    }
}

fn granule(source: &mut dyn Source, below: usize) -> u64 {
    source.below(below) as u64
}

fn access(source: &mut dyn Source) -> Access {
    if source.once_in(4) {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    }
}

fn op(source: &mut dyn Source) -> Op {
    let region = source.below(8);
    match source.below(32) {
        0..6 => Op::Add {
            at: place(source),
            cells: match source.below(8) {
                0 => 1 + granule(source, 8),
                1..4 => 2 * (1 + granule(source, 8)),
                4 | 5 => 32,
                6 => 64,
                _ => 2 * (1 + granule(source, 32)),
            },
            priority: [0, 0, 0, 1, 2, -1][source.below(6)],
            kind: if source.once_in(3) {
                RegionKind::Ram
            } else {
                RegionKind::DeviceMemory
            },
            access: access(source),
            shareable: source.once_in(2),
            label: [None, Some("x"), Some("y")][source.below(3)],
            parts: [1, 1, 2, 3][source.below(4)],
            hole: source.once_in(4),
            slot: source.below(SLOTS),
            backing_page: [0, 0, 16, 3][source.below(4)],
            enable: !source.once_in(3),
        },
        6 | 7 => Op::Remove(region),
        8..13 => Op::Enable(region),
        13..16 => Op::Disable(region),
        16..21 => Op::Move(region, place(source)),
        21 | 22 => Op::SetAccess(region, access(source)),
        23..26 => Op::SetSub(
            region,
            granule(source, 16),
            1 + granule(source, 8),
            source.below(SLOTS),
            granule(source, 16),
        ),
        26..28 => Op::RemoveSub(region, granule(source, 16), 1 + granule(source, 8)),
        28..30 => Op::Revoke(source.below(SLOTS)),
        30 if source.once_in(4) => Op::Nonsense(source.below(4)),
        _ => Op::Enable(region),
    }
}
