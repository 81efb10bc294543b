//! MSI-X as the guest sees it (PCI Local Bus 3.0, 6.8.2): message control in config space, the
//! table and the pending bits in a BAR. All of it is emulated; the device's own table is the
//! host's.
//!
//! The table takes accesses of four and of eight bytes, aligned, as the specification has them.
//! Other writes to it are ignored, other reads read what is there.

use crate::{MsiMessage, Msix};

/// Message control: enabled.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const MASK_ALL: u16 = 1 << 14;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;
/// The bytes of a table entry.
const ENTRY: u64 = 16;

/// A function's MSI-X registers, as the guest wrote them.
#[derive(Debug)]
pub(crate) struct MsixTable {
    place: Msix,
    /// Where the capability ends, or in broken devices another one begins.
    end: u16,
    enabled: bool,
    all_masked: bool,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
}

impl Entry {
    /// As after a reset.
    const RESET: Self = Self {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
    };

    /// One of its four registers.
    fn read(&self, register: u64) -> u32 {
        let MsiMessage { address, data } = self.message;
        match register {
            0 => u32::try_from(address & 0xffff_ffff).unwrap_or(0),
            1 => u32::try_from(address >> 32).unwrap_or(0),
            2 => data,
            _ => u32::from(self.masked),
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        let MsiMessage { address, data } = &mut self.message;
        match register {
            0 => *address = *address & !0xffff_ffff | u64::from(value & !0b11),
            1 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            2 => *data = value,
            _ => self.masked = value & MASKED != 0,
        }
    }
}

impl MsixTable {
    /// The table at its place, of a capability that ends at `end`.
    pub(crate) fn new(place: Msix, end: u16) -> Self {
        Self {
            place,
            end,
            enabled: false,
            all_masked: false,
            entries: vec![Entry::RESET; place.vectors.into()],
        }
    }

    /// As after a reset.
    pub(crate) fn reset(&mut self) {
        (self.enabled, self.all_masked) = (false, false);
        self.entries.fill(Entry::RESET);
    }

    pub(crate) const fn is_enabled(&self) -> bool {
        self.enabled
    }

    pub(crate) const fn vectors(&self) -> u16 {
        self.place.vectors
    }

    /// How a vector is to be delivered; none while it is masked.
    pub(crate) fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.entries.get(usize::from(vector))?;
        (!self.all_masked && !entry.masked).then_some(entry.message)
    }

    /// Whether the four bytes at `at` begin with the capability's header.
    pub(crate) const fn is_header(&self, at: u16) -> bool {
        at == self.place.offset
    }

    /// What the four bytes at `at`, a multiple of four, hold, if they are the capability's. The
    /// header in the low half of the first is not its business.
    pub(crate) fn read_register(&self, at: u16) -> Option<u32> {
        if at >= self.end {
            return None;
        }
        match at.checked_sub(self.place.offset)? {
            0 => {
                let mut control = self.place.vectors.saturating_sub(1);
                control |= if self.enabled { ENABLE } else { 0 };
                control |= if self.all_masked { MASK_ALL } else { 0 };
                Some(u32::from(control) << 16)
            }
            4 => Some(self.place.table.pointer()),
            8 => Some(self.place.pending_bits.pointer()),
            _ => None,
        }
    }

    /// Writes the bits of `mask` in the four bytes at `at`, and tells whether they are the
    /// capability's.
    pub(crate) fn write_register(&mut self, at: u16, mask: u32, value: u32) -> bool {
        let Some(before) = self.read_register(at) else {
            return false;
        };
        if at == self.place.offset {
            let [_, _, low, high] = ((before & !mask) | (value & mask)).to_le_bytes();
            let control = u16::from_le_bytes([low, high]);
            self.enabled = control & ENABLE != 0;
            self.all_masked = control & MASK_ALL != 0;
        }
        true
    }

    /// Reads the table at an offset in it.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let register = self.entry_at(at).map_or(0, |entry| entry.read(at / 4 % 4));
            *byte = lane(register, at);
        }
    }

    /// Writes the table at an offset in it, and tells which vector was concerned.
    pub(crate) fn write_table(&mut self, offset: u64, data: &[u8]) -> Option<u16> {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return None;
        }
        let vector = u16::try_from(offset / ENTRY).ok()?;
        let entry = self.entries.get_mut(usize::from(vector))?;
        let (registers, _) = data.as_chunks();
        for (register, value) in (offset / 4 % 4..4).zip(registers) {
            entry.write(register, u32::from_le_bytes(*value));
        }
        Some(vector)
    }

    /// Reads the pending bits at an offset in them.
    pub(crate) fn read_pending(offset: u64, data: &mut [u8], pending: impl Fn(u16) -> bool) {
        for (at, byte) in (offset..).zip(data) {
            *byte = (0..8)
                .filter(|bit| {
                    let vector = at.saturating_mul(8).saturating_add(*bit);
                    u16::try_from(vector).is_ok_and(&pending)
                })
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    fn entry_at(&self, offset: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(offset / ENTRY).ok()?)
    }
}

/// The byte of a register that lies at `at`.
fn lane(register: u32, at: u64) -> u8 {
    let [a, b, c, d] = register.to_le_bytes();
    match at % 4 {
        0 => a,
        1 => b,
        2 => c,
        _ => d,
    }
}
