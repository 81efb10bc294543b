//! A base address register as the guest sees it (PCI Local Bus 3.0, 6.2.5.1).
//!
//! The register is emulated whole: nothing of it reaches the device, whose real BARs stay where
//! the host put them. A [`Bar`] knows bytes and states; what follows from them for the memory
//! map is the [function's](crate::AssignedFunction) to do, which owns it.
//!
//! # When a BAR may be visible
//! While memory decoding is off, writes change the register and nothing else. While it is on, a
//! write that changes the address begins a *transition*, and the BAR is down until one of these
//! ends it:
//! - every byte of the BAR's one or two registers that holds address bits has been written. One
//!   dword write to a 32-bit BAR does that at once: the BAR moves and was never down. (A half
//!   without address bits, the lower one of a BAR of 4 GiB or more, has to be written all the
//!   same: the guest does not think in bytes that matter.)
//! - the guest writes the command register, or touches the address that resulted: both say that
//!   it thinks it is done ([`Bar::settle`]).
//!
//! A register that holds all ones is being *sized*, not placed: while it does, nothing ends the
//! transition, and its bytes do not count as written. All ones means as written, without regard
//! to the low four bits; 0xc0000000 in the register of a 1 GiB BAR is an address.
//!
//! A write that leaves the address as it is begins no transition, so that a guest that rewrites
//! one half with what it held keeps its BAR.

use crate::{BarIndex, BarProblem};

/// What a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// Memory.
    Memory {
        /// Whether its address has 64 bits; it then takes the next register as well.
        is_64_bit: bool,
        /// Whether reads have no side effects.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

impl BarKind {
    const MEMORY_TYPE: u32 = 0b0110;

    /// What the low bits of a register say.
    pub(crate) fn from_register(register: u32) -> Result<Self, BarProblem> {
        if register & 1 == 1 {
            return Ok(Self::Io);
        }
        let is_64_bit = match register & Self::MEMORY_TYPE {
            0b0000 => false,
            0b0100 => true,
            _ => {
                let [low, ..] = register.to_le_bytes();
                return Err(BarProblem::ReservedType { bits: low & 0xf });
            }
        };
        Ok(Self::Memory {
            is_64_bit,
            prefetchable: register & 0b1000 != 0,
        })
    }

    /// Whether it is a memory BAR of either width.
    #[must_use]
    pub const fn is_memory(self) -> bool {
        matches!(self, Self::Memory { .. })
    }

    /// Whether it takes two registers.
    #[must_use]
    pub const fn is_64_bit(self) -> bool {
        matches!(
            self,
            Self::Memory {
                is_64_bit: true,
                ..
            }
        )
    }

    const fn type_bits(self) -> u64 {
        match self {
            Self::Io => 0b01,
            Self::Memory {
                is_64_bit,
                prefetchable,
            } => (if is_64_bit { 0b0100 } else { 0 }) | (if prefetchable { 0b1000 } else { 0 }),
        }
    }

    const fn sizes(self) -> (u64, u64) {
        match self {
            Self::Io => (4, 1 << 31),
            Self::Memory {
                is_64_bit: false, ..
            } => (16, 1 << 31),
            Self::Memory {
                is_64_bit: true, ..
            } => (16, 1 << 63),
        }
    }
}

/// The bytes of the lower register, of eight.
const LOW: u8 = 0x0f;
/// The bytes of the upper register, of eight.
const HIGH: u8 = 0xf0;

/// One BAR: its register, or its two.
#[derive(Debug, Clone)]
pub(crate) struct Bar {
    index: BarIndex,
    kind: BarKind,
    size: u64,
    /// As the guest wrote it, lower register first, bits that it cannot change included.
    written: u64,
    /// While a transition goes on: which bytes have been written since it began.
    transition: Option<u8>,
}

impl Bar {
    /// A BAR at address 0.
    pub(crate) fn new(index: BarIndex, kind: BarKind, size: u64) -> Result<Self, BarProblem> {
        if !size.is_power_of_two() {
            return Err(BarProblem::NotPowerOfTwo { size });
        }
        let (least, most) = kind.sizes();
        if size < least {
            return Err(BarProblem::TooSmall { size, least });
        }
        if size > most {
            return Err(BarProblem::TooLarge { size, most });
        }
        if kind.is_64_bit() && BarIndex::new(index.get().saturating_add(1)).is_none() {
            return Err(BarProblem::NoUpperHalf);
        }
        Ok(Self {
            index,
            kind,
            size,
            written: 0,
            transition: None,
        })
    }

    pub(crate) const fn index(&self) -> BarIndex {
        self.index
    }

    pub(crate) const fn kind(&self) -> BarKind {
        self.kind
    }

    pub(crate) const fn size(&self) -> u64 {
        self.size
    }

    /// Where in the BAR's bytes the register numbered `register` begins, if it is one of its own.
    pub(crate) fn lane_of(&self, register: u8) -> Option<usize> {
        match register.checked_sub(self.index.get())? {
            0 => Some(0),
            1 if self.kind.is_64_bit() => Some(4),
            _ => None,
        }
    }

    /// The address bits.
    const fn mask(&self) -> u64 {
        // The size is a power of two.
        let aligned = self.size.wrapping_neg();
        match self.kind {
            BarKind::Io => aligned & 0xffff_fffc,
            BarKind::Memory {
                is_64_bit: false, ..
            } => aligned & 0xffff_fff0,
            BarKind::Memory {
                is_64_bit: true, ..
            } => aligned & !0xf,
        }
    }

    /// Where it is, or would be if it were visible. A multiple of its size, so that it never
    /// wraps past the end of the address space.
    pub(crate) const fn address(&self) -> u64 {
        self.written & self.mask()
    }

    /// What the guest reads, lower register first.
    pub(crate) const fn registers(&self) -> u64 {
        self.address() | self.kind.type_bits()
    }

    /// Whether the map may show it, if the function decodes.
    pub(crate) const fn is_placed(&self) -> bool {
        self.transition.is_none()
    }

    /// Whether a register holds all ones.
    pub(crate) const fn is_sized(&self) -> bool {
        self.sized_lanes(self.written) != 0
    }

    const fn sized_lanes(&self, written: u64) -> u8 {
        const ONES: u64 = 0xffff_ffff;
        let low = if (written | 0xf) & ONES == ONES {
            LOW
        } else {
            0
        };
        let high = if self.kind.is_64_bit() && written >> 32 == ONES {
            HIGH
        } else {
            0
        };
        low | high
    }

    const fn lanes(&self) -> u8 {
        if self.kind.is_64_bit() {
            LOW | HIGH
        } else {
            LOW
        }
    }

    /// The bytes that must have been written before a transition is over.
    fn needed_lanes(&self) -> u8 {
        let address = self
            .mask()
            .to_le_bytes()
            .into_iter()
            .zip(0..8)
            .filter(|(byte, _)| *byte != 0)
            .fold(0, |lanes, (_, lane)| lanes | (1_u8 << lane));
        [LOW, HIGH]
            .into_iter()
            .map(|half| self.lanes() & half)
            .map(|half| match address & half {
                0 => half,
                some => some,
            })
            .fold(0, |lanes, half| lanes | half)
    }

    /// The guest writes `data` from byte `lane` of the BAR's registers on.
    pub(crate) fn write(&mut self, lane: usize, data: &[u8], decoding: bool) {
        let before = self.written;
        let mut bytes = before.to_le_bytes();
        let mut touched = 0_u8;
        for (byte, lane) in data.iter().zip(lane..8) {
            if let Some(place) = bytes.get_mut(lane) {
                *place = *byte;
                touched |= 1 << lane;
            }
        }
        self.written = u64::from_le_bytes(bytes);

        if !decoding || !self.kind.is_memory() {
            self.transition = None;
            return;
        }
        let sized = self.sized_lanes(self.written);
        let changes = (before ^ self.written) & self.mask() != 0;
        let sizes = sized != self.sized_lanes(before);
        if self.transition.is_none() && !changes && !sizes {
            return;
        }
        let written = (self.transition.unwrap_or(0) | touched) & !sized;
        let needed = self.needed_lanes();
        self.transition = (written & needed != needed).then_some(written);
    }

    /// The guest is done with what it wrote so far, except for a register that it is sizing.
    pub(crate) fn settle(&mut self) {
        let sized = self.sized_lanes(self.written);
        self.transition = (sized != 0 && self.kind.is_memory()).then_some(self.lanes() & !sized);
    }

    /// Back to the state at power-on.
    pub(crate) fn reset(&mut self) {
        self.written = 0;
        self.transition = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: BarKind = BarKind::Memory {
        is_64_bit: true,
        prefetchable: true,
    };
    const NARROW: BarKind = BarKind::Memory {
        is_64_bit: false,
        prefetchable: false,
    };

    fn bar(kind: BarKind, size: u64) -> Bar {
        Bar::new(BarIndex::ALL[2], kind, size).unwrap()
    }

    fn dword(bar: &mut Bar, lane: usize, value: u32) {
        bar.write(lane, &value.to_le_bytes(), true);
    }

    #[test]
    fn sizing_reads_back_the_mask_with_the_type_bits() {
        for (kind, size, expected) in [
            (NARROW, 0x10, 0xffff_fff0),
            (NARROW, 0x100, 0xffff_ff00),
            (NARROW, 1 << 31, 0x8000_0000),
            (WIDE, 0x1000, 0xffff_ffff_ffff_f00c),
            (WIDE, 1 << 32, 0xffff_ffff_0000_000c),
            (WIDE, 1 << 63, 0x8000_0000_0000_000c),
            (BarKind::Io, 0x20, 0xffff_ffe1),
        ] {
            let mut bar = bar(kind, size);
            let ones = [0xff; 8];
            let width = if kind.is_64_bit() { 8 } else { 4 };
            bar.write(0, &ones[..width], false);
            assert_eq!(bar.registers(), expected, "{kind:?} {size:#x}");
        }
    }

    #[test]
    fn sizes_that_no_register_can_say_are_refused() {
        let index = BarIndex::ALL[0];
        for (kind, size) in [
            (NARROW, 0),
            (NARROW, 8),
            (NARROW, 0x1800),
            (NARROW, 1 << 32),
            (WIDE, 8),
            (BarKind::Io, 2),
            (BarKind::Io, 1 << 32),
        ] {
            assert!(Bar::new(index, kind, size).is_err(), "{kind:?} {size:#x}");
        }
        assert_eq!(
            Bar::new(BarIndex::ALL[5], WIDE, 0x1000).unwrap_err(),
            BarProblem::NoUpperHalf
        );
        assert!(Bar::new(BarIndex::ALL[5], NARROW, 0x1000).is_ok());
    }

    #[test]
    fn a_large_address_that_looks_like_a_mask_is_an_address() {
        let mut bar = bar(NARROW, 1 << 30);
        dword(&mut bar, 0, 0xc000_0000);
        assert!(bar.is_placed());
        // Sizing changes no address bit here, and takes it down all the same.
        dword(&mut bar, 0, 0xffff_ffff);
        assert!(!bar.is_placed());
        assert_eq!(bar.registers(), 0xc000_0000);
        dword(&mut bar, 0, 0xc000_0000);
        assert!(bar.is_placed());
    }

    #[test]
    fn every_customary_way_of_sizing_ends_where_it_began() {
        const ONES: u32 = u32::MAX;
        // As Linux does it, as firmware does it, and the upper half first.
        for sequence in [
            [(0, ONES), (0, 0x1000), (4, ONES), (4, 7)],
            [(0, ONES), (4, ONES), (0, 0x1000), (4, 7)],
            [(4, ONES), (4, 7), (0, ONES), (0, 0x1000)],
            [(4, ONES), (0, ONES), (4, 7), (0, 0x1000)],
        ] {
            let mut bar = bar(WIDE, 0x1000);
            bar.write(0, &0x7_0000_1000_u64.to_le_bytes(), false);
            let (last, earlier) = sequence.split_last().unwrap();
            for (lane, value) in earlier {
                dword(&mut bar, *lane, *value);
                assert!(!bar.is_placed(), "{sequence:x?} at {lane}");
            }
            dword(&mut bar, last.0, last.1);
            assert!(bar.is_placed(), "{sequence:x?}");
            assert_eq!(bar.address(), 0x7_0000_1000);
        }
    }

    #[test]
    fn byte_writes_end_a_transition_with_the_last_byte_that_matters() {
        let mut bar = bar(WIDE, 0x1000);
        for lane in [7, 1, 6, 2, 5, 3] {
            bar.write(lane, &[0x10], true);
            assert!(!bar.is_placed(), "after byte {lane}");
        }
        // Byte 0 holds no address bits.
        bar.write(4, &[0x10], true);
        assert!(bar.is_placed());
        assert_eq!(bar.address(), 0x1010_1010_1010_1000);
    }

    #[test]
    fn rewriting_a_half_with_what_it_holds_changes_nothing() {
        let mut bar = bar(WIDE, 0x1000);
        bar.write(0, &0x7_0000_1000_u64.to_le_bytes(), false);
        dword(&mut bar, 0, 0x1000);
        dword(&mut bar, 4, 7);
        dword(&mut bar, 0, 0x100c);
        assert!(bar.is_placed());
        // Nor does such a write count for a transition that comes later.
        dword(&mut bar, 4, 8);
        assert!(!bar.is_placed());
    }

    #[test]
    fn settling_does_not_place_a_bar_that_is_being_sized() {
        let mut bar = bar(WIDE, 0x1000);
        dword(&mut bar, 0, 0x1000);
        dword(&mut bar, 4, u32::MAX);
        bar.settle();
        assert!(!bar.is_placed());
        dword(&mut bar, 4, 1);
        assert!(bar.is_placed());
        dword(&mut bar, 0, 0x2000);
        assert!(!bar.is_placed());
        bar.settle();
        assert!(bar.is_placed());
    }
}
