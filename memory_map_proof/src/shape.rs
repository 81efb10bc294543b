//! The kinds of consumer that scripts register.

use memory_map::{ConsumerKind, Filter, Iova, IovaRange, Label, TargetLimits};

use crate::GRANULE;

/// For which backings a consumer needs a host address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// For all of them: it maps by address.
    Address,
    /// For none: it maps by file.
    File,
    /// For every other one.
    Mixed,
}

impl Addressing {
    /// Whether the backing of that number needs one.
    #[must_use]
    pub const fn needs(self, key: u64) -> bool {
        match self {
            Self::Address => true,
            Self::File => false,
            Self::Mixed => key % 2 == 1,
        }
    }
}

/// What a consumer is like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Its limits. A sharing consumer has the ones that the map gives it.
    pub limits: TargetLimits,
    /// By address or by file.
    pub addressing: Addressing,
    /// What it may see.
    pub filter: Filter,
    /// What kind of consumer it is.
    pub kind: ConsumerKind,
}

/// How many shapes there are.
pub const SHAPES: usize = 14;
/// How many ways a target's limits can become different.
pub const LIMIT_CHANGES: usize = 10;

fn allowed(ranges: &[(u64, u64)]) -> Vec<IovaRange> {
    let range = |&(start, last)| IovaRange::from_inclusive(Iova::new(start), Iova::new(last));
    ranges.iter().filter_map(|r| range(r).ok()).collect()
}

/// A target without particular limits.
#[must_use]
pub fn plain() -> Shape {
    Shape {
        limits: TargetLimits {
            page_size: GRANULE,
            allowed: allowed(&[(0, 0xffff_ffff_ffff)]),
            entry_limit: None,
            largest_mapping: 1 << 30,
            read_only: true,
            device_memory: true,
            unmap_spans: false,
        },
        addressing: Addressing::Address,
        filter: Filter::All,
        kind: ConsumerKind::Iommu,
    }
}

/// The shape of that number, below [`SHAPES`].
#[must_use]
pub fn shape(number: usize) -> Shape {
    let mut shape = plain();
    let limits = &mut shape.limits;
    let x = || Label::from("x");
    match number {
        1 => {
            limits.largest_mapping = 2 * GRANULE;
            limits.unmap_spans = true;
            shape.filter = Filter::RamOnly;
        }
        2 => {
            limits.allowed = allowed(&[(0, 0x1_3fff), (0x1_6000, 0x4_ffff)]);
            shape.filter = Filter::Labelled([x()].into());
            shape.addressing = Addressing::File;
        }
        3 => {
            limits.read_only = false;
            shape.addressing = Addressing::Mixed;
        }
        4 => {
            limits.page_size = 0x1_0000;
            limits.unmap_spans = true;
        }
        5 => {
            limits.page_size = 0x1_0000;
            limits.largest_mapping = 0x1_0000;
            // A page of which only a part is allowed is not.
            limits.allowed = allowed(&[(0, 0x2_7fff), (0x2_9000, 0xffff_ffff)]);
            shape.addressing = Addressing::File;
        }
        6 => {
            limits.entry_limit = Some(6);
            limits.largest_mapping = 8 * GRANULE;
            shape.addressing = Addressing::Mixed;
        }
        7 => {
            shape.kind = ConsumerKind::Sharing;
            shape.addressing = Addressing::File;
            limits.allowed = allowed(&[(0, u64::MAX - GRANULE)]);
            limits.largest_mapping = 1 << 63;
            limits.device_memory = false;
        }
        8 => {
            limits.device_memory = false;
            limits.largest_mapping = GRANULE;
            shape.addressing = Addressing::File;
        }
        9 => {
            limits.allowed = allowed(&[(GRANULE, u64::MAX)]);
            limits.largest_mapping = 1 << 62;
            limits.unmap_spans = true;
        }
        10 => {
            limits.largest_mapping = 4 * GRANULE;
            limits.unmap_spans = true;
            shape.filter = Filter::Labelled([x(), Label::from("y")].into());
        }
        11 => {
            limits.largest_mapping = GRANULE;
            limits.unmap_spans = true;
        }
        12 => {
            shape.kind = ConsumerKind::MemorySlots;
            limits.largest_mapping = 1 << 62;
        }
        13 => {
            shape.kind = ConsumerKind::MemorySlots;
            limits.entry_limit = Some(9);
        }
        _ => {}
    }
    shape
}

/// What becomes of `limits` by the change of that number, below [`LIMIT_CHANGES`]. The last one
/// makes no sense, and is to be refused.
#[must_use]
pub fn changed(limits: &TargetLimits, number: usize) -> TargetLimits {
    let mut limits = limits.clone();
    match number {
        0 => limits.allowed = allowed(&[(0, 0xfff), (0x4000, 0x1_ffff), (0x2_4000, 0xffff_ffff)]),
        1 => limits.allowed = allowed(&[(0, 0x2_ffff)]),
        2 => limits.read_only = !limits.read_only,
        3 => limits.largest_mapping = limits.page_size,
        4 => limits.largest_mapping = limits.page_size << 3,
        5 => {
            limits.page_size = if limits.page_size == GRANULE {
                0x1_0000
            } else {
                GRANULE
            };
            limits.largest_mapping = limits.largest_mapping.max(limits.page_size);
        }
        6 => limits.device_memory = !limits.device_memory,
        7 => limits.unmap_spans = !limits.unmap_spans,
        8 => limits.allowed = allowed(&[(0, u64::MAX - 1), (u64::MAX, u64::MAX)]),
        _ => limits.allowed = allowed(&[(0x8000, 0xffff), (0, 0x1fff)]),
    }
    limits
}
