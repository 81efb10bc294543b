//! Where a machine's RAM and its windows for BARs lie: chosen before any of it is made, from what
//! the IOMMUs of the host allow.
//!
//! ```text
//!   0                        RAM, in pieces of whole 2 MiB
//!   LOW_HOLE     3 GiB       the low window: 32-bit BARs, and what ports pass on only there
//!   ECAM         3.5 GiB     config space, interrupt controllers
//!                4 GiB       RAM goes on, around what is reserved
//!                            the high window: 64-bit BARs, up to the next reserved address or
//!                            to the end of what the guest can address
//! ```
//!
//! An assigned device uses guest-physical addresses for its DMA, so neither RAM nor a BAR that a
//! peer is to reach may lie where an IOMMU takes no mapping. AMD's processors keep 12 GiB below
//! 1 TiB for themselves; those are left out on every host, so that a machine has the same
//! addresses on all of them and a device behind such an IOMMU may come later.

mod bars;
mod error;
mod size;

use memory_map::{Gpa, GpaRange, IovaRange};

use bars::{Blocks, Needs};

pub use bars::{BarPlace, FunctionBars};
pub use error::{Bound, LayoutError};
pub use size::Bytes;

use crate::platform;

/// What RAM is made of, in bytes: pieces of it start and end on multiples of this, and so do their
/// offsets, so that huge pages stay huge in every page table.
pub const RAM_UNIT: u64 = 2 << 20;

/// Above 4 GiB a piece's address and its offset differ by a multiple of this, where there is room.
const BEST_ALIGNMENT: u64 = 1 << 30;
const FOUR_GIB: u64 = 1 << 32;
/// A PC's processor has at least 32 address bits, and at most 52 (Intel SDM volume 3A, 4.1.4).
const ADDRESS_BITS: std::ops::RangeInclusive<u8> = 32..=52;
/// What AMD's processors use for HyperTransport, whatever the IOMMU says.
const HYPER_TRANSPORT: (u64, u64) = (0xfd_0000_0000, 0xff_ffff_ffff);
/// The high window has at least this much where there is room, so that devices can be added.
const AMPLE_WINDOW: u64 = 64 << 30;
/// What a bridge's memory windows are made of (PCI-to-PCI Bridge 1.2, 3.2.5.8).
const WINDOW_UNIT: u64 = 1 << 20;

/// Where the video memory and the option ROMs of a PC lie: no RAM for the guest.
const PC_HOLE: (u64, u64) = (0xa_0000, 0xf_ffff);

/// What a layout is chosen from.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// RAM in bytes, a multiple of [`RAM_UNIT`].
    pub ram: u64,
    /// What all IOMMUs allow, sorted and disjoint. Empty where there is no IOMMU: then everything
    /// is allowed.
    pub allowed: &'a [IovaRange],
    /// How many bits the guest's physical addresses have.
    pub address_bits: u8,
    /// The functions that there will be.
    pub functions: &'a [FunctionBars],
}

/// A part of the guest's RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamPiece {
    /// Where the guest sees it; both ends on multiples of [`RAM_UNIT`].
    pub range: GpaRange,
    /// Where in the RAM object it begins, in bytes; a multiple of [`RAM_UNIT`].
    pub offset: u64,
}

/// What a range of the guest's memory is, as both boot protocols say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// RAM that the guest may use: type 1 of the BIOS's map (ACPI 6.5, 15, table 15.4).
    Ram,
    /// Not for the guest: type 2.
    Reserved,
}

/// An entry of the memory map that is given to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEntry {
    /// Which addresses.
    pub range: GpaRange,
    /// What they are.
    pub kind: MemoryKind,
}

/// Where everything goes. What it says never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    ram: Vec<RamPiece>,
    low_window: GpaRange,
    high_window: Option<GpaRange>,
    bars: Vec<Vec<BarPlace>>,
}

impl Layout {
    /// Chooses where everything goes.
    ///
    /// # Errors
    /// [`LayoutError`] where RAM or the BARs do not fit into what is allowed. It says which limit
    /// that was, how much there is room for, and what to do.
    pub fn choose(wanted: &Wanted<'_>) -> Result<Self, LayoutError> {
        if wanted.ram == 0 || !wanted.ram.is_multiple_of(RAM_UNIT) {
            return Err(LayoutError::RamUnit { ram: wanted.ram });
        }
        if wanted.address_bits < *ADDRESS_BITS.start() {
            return Err(LayoutError::AddressBits {
                bits: wanted.address_bits,
            });
        }
        let space = Space::new(wanted);
        let needs = Needs::of(wanted.functions);
        let low_window = low_window(&space, &needs.low)?;
        // The better alignment costs addresses, which may be what there is too little of.
        Self::above(&space, wanted, &needs, low_window, BEST_ALIGNMENT)
            .or_else(|_| Self::above(&space, wanted, &needs, low_window, RAM_UNIT))
    }

    fn above(
        space: &Space,
        wanted: &Wanted<'_>,
        needs: &Needs,
        low_window: GpaRange,
        alignment: u64,
    ) -> Result<Self, LayoutError> {
        let ram = place_ram(space, wanted.ram, alignment)?;
        let high_window = high_window(space, &ram, needs, low_window)?;
        let mut bars = vec![Vec::new(); wanted.functions.len()];
        match high_window {
            Some(high_window) => {
                needs.low.place(low_window, &mut bars);
                needs.high.place(high_window, &mut bars);
            }
            None => needs.together().place(low_window, &mut bars),
        }
        Ok(Self {
            ram,
            low_window,
            high_window,
            bars,
        })
    }

    /// The pieces of RAM, by address. The first begins at address 0. Their offsets follow on each
    /// other.
    #[must_use]
    pub fn ram(&self) -> &[RamPiece] {
        &self.ram
    }

    /// The size of all RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram.iter().map(|piece| piece.range.size()).sum()
    }

    /// The window below 4 GiB, for 32-bit BARs and, behind a port, for 64-bit ones that are not
    /// prefetchable. In whole MiB.
    #[must_use]
    pub const fn low_window(&self) -> GpaRange {
        self.low_window
    }

    /// The window above all RAM, for the other 64-bit BARs: it starts on a multiple of the largest of
    /// them. `None` where nothing is allowed there; the low window then holds them all.
    #[must_use]
    pub const fn high_window(&self) -> Option<GpaRange> {
        self.high_window
    }

    /// Where a guest's kernel that places BARs like Linux puts them, function by function as they
    /// were given. All that were given have a place, in one of the two windows. The guest is not
    /// told: it does what it likes.
    #[must_use]
    pub fn bars(&self) -> &[Vec<BarPlace>] {
        &self.bars
    }

    /// The memory map that is given to the guest, by address.
    #[must_use]
    pub fn memory_map(&self) -> Vec<MemoryEntry> {
        let mut entries = Vec::new();
        let mut add = |range: Option<GpaRange>, kind| {
            entries.extend(range.map(|range| MemoryEntry { range, kind }));
        };
        let (hole_start, hole_last) = PC_HOLE;
        let (hole, ecam) = (range(hole_start, hole_last), ecam());
        for piece in &self.ram {
            let last = piece.range.last().raw();
            if piece.range.start().raw() == 0 {
                add(range(0, hole_start - 1), MemoryKind::Ram);
                add(hole, MemoryKind::Reserved);
                add(range(hole_last + 1, last), MemoryKind::Ram);
            } else {
                add(Some(piece.range), MemoryKind::Ram);
            }
        }
        add(ecam, MemoryKind::Reserved);
        let kvm_pages = range(platform::KVM_PAGES.raw(), FOUR_GIB - 1);
        add(kvm_pages, MemoryKind::Reserved);
        entries.sort_by_key(|entry| entry.range.start());
        entries
    }
}

/// The addresses that may be used at all.
struct Space {
    /// Sorted and disjoint.
    stretches: Vec<GpaRange>,
    bound: Bound,
}

impl Space {
    fn new(wanted: &Wanted<'_>) -> Self {
        let bits = wanted.address_bits.min(*ADDRESS_BITS.end());
        let width_last = (1_u64 << bits) - 1;
        let mut bound = Bound::AddressBits { bits };
        let mut stretches: Vec<GpaRange> = range(0, width_last).into_iter().collect();
        if let Some(top) = wanted.allowed.last() {
            if top.last().raw() < width_last {
                bound = Bound::Iommu { last: top.last() };
            }
            let within = |allowed: &IovaRange| {
                let whole = range(0, width_last)?;
                allowed.to_gpa().intersection(&whole)
            };
            stretches = wanted.allowed.iter().filter_map(within).collect();
        }
        let (start, last) = HYPER_TRANSPORT;
        let parts = stretches.iter().flat_map(|stretch| {
            let below = range(0, start - 1).and_then(|part| stretch.intersection(&part));
            let above = range(last + 1, width_last).and_then(|part| stretch.intersection(&part));
            [below, above].into_iter().flatten()
        });
        Self {
            stretches: parts.collect(),
            bound,
        }
    }

    /// What may be used from `start` to `last`.
    fn within(&self, start: u64, last: u64) -> impl Iterator<Item = GpaRange> {
        let part = range(start, last);
        let stretches = self.stretches.iter();
        stretches.filter_map(move |stretch| stretch.intersection(&part?))
    }
}

fn range(start: u64, last: u64) -> Option<GpaRange> {
    GpaRange::from_inclusive(Gpa::new(start), Gpa::new(last)).ok()
}

fn ecam() -> Option<GpaRange> {
    GpaRange::new(platform::ECAM, platform::ECAM_SIZE).ok()
}

/// The smallest address from `address` on that is `remainder` more than a multiple of `alignment`
/// (a power of two).
fn next_congruent(address: u64, alignment: u64, remainder: u64) -> Option<u64> {
    address.checked_add(remainder.wrapping_sub(address) & (alignment - 1))
}

fn place_ram(space: &Space, wanted: u64, alignment: u64) -> Result<Vec<RamPiece>, LayoutError> {
    let mut pieces: Vec<RamPiece> = Vec::new();
    let mut placed = 0;
    let low = space.within(0, platform::LOW_HOLE.raw() - 1);
    let high = space.within(FOUR_GIB, u64::MAX);
    let low = low.map(|stretch| (stretch, RAM_UNIT));
    for (stretch, alignment) in low.chain(high.map(|stretch| (stretch, alignment))) {
        let piece = next_congruent(stretch.start().raw(), alignment, placed)
            .and_then(|start| range(start, stretch.last().raw()))
            .and_then(|fitting| fitting.shrink_to(RAM_UNIT))
            .and_then(|free| GpaRange::new(free.start(), free.size().min(wanted - placed)).ok());
        if let Some(range) = piece {
            pieces.push(RamPiece {
                range,
                offset: placed,
            });
            placed += range.size();
        }
        if placed == wanted {
            break;
        }
    }
    if pieces.first().is_none_or(|p| p.range.start().raw() != 0) {
        return Err(LayoutError::NoFirstRam);
    }
    if placed < wanted {
        return Err(LayoutError::Ram {
            wanted,
            fits: placed,
            bound: space.bound,
        });
    }
    Ok(pieces)
}

fn low_window(space: &Space, blocks: &Blocks) -> Result<GpaRange, LayoutError> {
    let start = platform::LOW_HOLE.raw();
    let window = space
        .within(start, start + platform::LOW_WINDOW_SIZE - 1)
        .filter_map(|stretch| stretch.shrink_to(WINDOW_UNIT))
        .max_by_key(GpaRange::size)
        .ok_or(LayoutError::NoLowWindow)?;
    if !blocks.fit_into(window) {
        return Err(LayoutError::LowWindow {
            needed: blocks.size(),
            fits: blocks.room_in(window),
            window,
        });
    }
    Ok(window)
}

fn high_window(
    space: &Space,
    ram: &[RamPiece],
    needs: &Needs,
    low_window: GpaRange,
) -> Result<Option<GpaRange>, LayoutError> {
    let ram_last = ram.last().map_or(0, |piece| piece.range.last().raw());
    let start = ram_last.saturating_add(1).max(FOUR_GIB);
    let needed = needs.high.size();
    let windows = space.within(start, u64::MAX).filter_map(|stretch| {
        let units = stretch.shrink_to(WINDOW_UNIT)?;
        range(needs.high.start_in(units)?, units.last().raw())
    });
    let ample = needed.saturating_mul(4).max(AMPLE_WINDOW);
    let mut largest: Option<GpaRange> = None;
    for window in windows {
        if window.size() >= ample {
            return Ok(Some(window));
        }
        if largest.is_none_or(|largest| largest.size() < window.size()) {
            largest = Some(window);
        }
    }
    let free = largest.map_or(0, |window| window.size());
    if needed <= free {
        return Ok(largest);
    }
    // Small ones may do without.
    if needs.together().fit_into(low_window) {
        return Ok(None);
    }
    Err(LayoutError::HighWindow {
        needed,
        free,
        start: Gpa::new(start),
        bound: space.bound,
    })
}

#[cfg(test)]
mod tests;
