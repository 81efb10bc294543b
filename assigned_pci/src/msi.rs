//! The MSI capability as the guest sees it (PCI Local Bus 3.0, 6.8.1): emulated whole.
//!
//! How many messages the device can send, the width of its address and whether it has masks is the
//! device's; all that is written is the guest's, and reaches the host as connections only.

use std::ops::Range;

use crate::config_space::ConfigReader;
use crate::{FunctionError, MsiMessage};

/// Message control: enabled.
const ENABLE: u16 = 1;
/// Message control: log2 of how many the device can send, and of how many it may, three bits each.
const CAPABLE: u32 = 1;
const GRANTED: u32 = 4;
const LOG2: u16 = 0b111;
/// Message control: the address has 64 bits.
const WIDE: u16 = 1 << 7;
/// Message control: each vector can be masked.
const MASKABLE: u16 = 1 << 8;

/// A function's MSI capability. Its registers are as the guest wrote them.
#[derive(Debug, Clone)]
pub(crate) struct Msi {
    at: u16,
    /// Where something else begins, in broken devices before its own end.
    end: u16,
    wide: bool,
    maskable: bool,
    /// Log2 of how many messages the device can send, up to 5.
    capable: u16,
    enabled: bool,
    granted: u16,
    address: u64,
    data: u16,
    masked: u32,
}

/// One of its 32-bit registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    /// The capability's header and, in the upper half, message control.
    Control,
    AddressLow,
    AddressHigh,
    Data,
    Mask,
    Pending,
}

impl Msi {
    /// Reads what the device's capability in these bytes can do, with at most so many vectors.
    pub(crate) fn read(
        config: &ConfigReader<'_>,
        Range { start: at, end }: Range<u16>,
        vectors: u16,
    ) -> Result<Self, FunctionError> {
        let control = config.u16(at.saturating_add(2))?;
        let most = u16::try_from(vectors.checked_ilog2().unwrap_or(0)).unwrap_or(0);
        Ok(Self {
            at,
            end,
            wide: control & WIDE != 0,
            maskable: control & MASKABLE != 0,
            capable: ((control >> CAPABLE) & LOG2).min(5).min(most),
            enabled: false,
            granted: 0,
            address: 0,
            data: 0,
            masked: 0,
        })
    }

    /// As after a reset.
    pub(crate) fn reset(&mut self) {
        self.enabled = false;
        (self.granted, self.address, self.data, self.masked) = (0, 0, 0, 0);
    }

    pub(crate) const fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// How many messages the device may send: 1 to 32.
    pub(crate) fn vectors(&self) -> u16 {
        1 << self.granted.min(5)
    }

    /// How a vector is to be delivered; none while it is masked.
    pub(crate) fn message(&self, vector: u16) -> Option<MsiMessage> {
        if self.maskable && bit(vector) & self.masked != 0 {
            return None;
        }
        let low = self.vectors().wrapping_sub(1);
        Some(MsiMessage {
            address: self.address,
            data: ((self.data & !low) | (vector & low)).into(),
        })
    }

    /// Whether the four bytes at `at` begin with the capability's header.
    pub(crate) const fn is_header(&self, at: u16) -> bool {
        at == self.at
    }

    /// The register whose four bytes lie at `at`, a multiple of four.
    fn register(&self, at: u16) -> Option<Register> {
        let registers: &[Register] = match (self.wide, self.maskable) {
            (false, false) => &[Register::Control, Register::AddressLow, Register::Data],
            (false, true) => &[
                Register::Control,
                Register::AddressLow,
                Register::Data,
                Register::Mask,
                Register::Pending,
            ],
            (true, false) => &[
                Register::Control,
                Register::AddressLow,
                Register::AddressHigh,
                Register::Data,
            ],
            (true, true) => &[
                Register::Control,
                Register::AddressLow,
                Register::AddressHigh,
                Register::Data,
                Register::Mask,
                Register::Pending,
            ],
        };
        if at >= self.end {
            return None;
        }
        let number = at.checked_sub(self.at)? / 4;
        registers.get(usize::from(number)).copied()
    }

    /// What the four bytes at `at`, a multiple of four, hold, if they are the capability's. The
    /// header in the low half of the first is not its business. `pending` tells whether a vector
    /// is.
    pub(crate) fn read_register(&self, at: u16, pending: impl Fn(u16) -> bool) -> Option<u32> {
        let [low, high] = [self.address & 0xffff_ffff, self.address >> 32]
            .map(|half| u32::try_from(half).unwrap_or(0));
        Some(match self.register(at)? {
            Register::Control => {
                let mut control = self.capable << CAPABLE | self.granted << GRANTED;
                for (bit, set) in [
                    (ENABLE, self.enabled),
                    (WIDE, self.wide),
                    (MASKABLE, self.maskable),
                ] {
                    control |= if set { bit } else { 0 };
                }
                u32::from(control) << 16
            }
            Register::AddressLow => low,
            Register::AddressHigh => high,
            Register::Data => self.data.into(),
            Register::Mask => self.masked,
            Register::Pending => (0..self.vectors())
                .filter(|vector| pending(*vector))
                .fold(0, |bits, vector| bits | bit(vector)),
        })
    }

    /// Writes the bits of `mask` in the four bytes at `at`, and tells whether they are the
    /// capability's.
    pub(crate) fn write_register(&mut self, at: u16, mask: u32, value: u32) -> bool {
        let (Some(register), Some(before)) = (self.register(at), self.read_register(at, |_| false))
        else {
            return false;
        };
        let value = (before & !mask) | (value & mask);
        let [a, b, c, d] = value.to_le_bytes();
        match register {
            Register::Control => {
                let control = u16::from_le_bytes([c, d]);
                self.enabled = control & ENABLE != 0;
                self.granted = ((control >> GRANTED) & LOG2).min(self.capable);
            }
            Register::AddressLow => {
                self.address = self.address & !0xffff_ffff | u64::from(value & !0b11);
            }
            Register::AddressHigh => {
                self.address = self.address & 0xffff_ffff | u64::from(value) << 32;
            }
            Register::Data => self.data = u16::from_le_bytes([a, b]),
            Register::Mask => self.masked = value & self.implemented(),
            Register::Pending => {}
        }
        true
    }

    /// The mask bits of vectors that the device can have.
    fn implemented(&self) -> u32 {
        (0..1 << self.capable.min(5)).fold(0, |bits, vector| bits | bit(vector))
    }
}

/// The bit of a vector, of which there are at most 32.
fn bit(vector: u16) -> u32 {
    1_u32.checked_shl(vector.into()).unwrap_or(0)
}
