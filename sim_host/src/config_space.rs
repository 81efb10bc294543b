//! Config space as vfio-pci presents it: the BARs are virtual, the command register is real.

use crate::function_spec::FunctionSpec;
use crate::gate::{COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY};

const COMMAND: usize = 0x04;
const BARS: usize = 0x10;
const BARS_END: usize = 0x28;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The command bits that can be set: the three enables, parity, SERR, no INTx.
const COMMAND_WRITABLE: u16 = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | 0x0540;

/// One of the six registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    /// Not there: reads as zero.
    None,
    /// The only register of a BAR, or the lower one.
    Low { size: u64, type_bits: u32 },
    /// The upper one.
    High { size: u64 },
}

impl Register {
    /// What is read back where `written` was written.
    fn read(self, written: u32) -> u32 {
        // Bits below the size are zero; a size that is no power of two gives what the kernel's
        // arithmetic gives.
        let mask = |size: u64| !size.wrapping_sub(1);
        let low = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
        match self {
            Self::None => 0,
            Self::Low { size, type_bits } => (written & low(mask(size))) | type_bits,
            Self::High { size } => written & low(mask(size) >> 32),
        }
    }
}

#[derive(Debug)]
pub(crate) struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    command: u16,
    registers: [Register; 6],
    written: [u32; 6],
}

impl ConfigSpace {
    /// The config space of a function whose BARs the host has put at `addresses`.
    pub fn new(spec: &FunctionSpec, addresses: [u64; 6]) -> Self {
        let size = usize::from(spec.config_size);
        let mut config = Self {
            bytes: vec![0; size],
            writable: vec![0; size],
            command: spec.command,
            registers: [Register::None; 6],
            written: [0; 6],
        };
        config.lay(0x00, &spec.vendor.to_le_bytes());
        config.lay(0x02, &spec.device.to_le_bytes());
        config.lay(0x08, &[0x10]);
        for (offset, byte) in (0x09usize..).zip(spec.class.to_le_bytes().iter().take(3)) {
            config.lay(offset, &[*byte]);
        }
        config.lay(0x2c, &0x1af4u16.to_le_bytes());
        config.lay(0x2e, &0x1100u16.to_le_bytes());
        // Interrupt pin INTA; the line is whatever the guest writes.
        config.lay(0x3d, &[1]);
        for (offset, bytes) in &spec.raw {
            config.lay(usize::from(*offset), bytes);
        }
        config.permit(INTERRUPT_LINE, &[0xff]);
        config.permit_msi();
        for (index, bar) in spec.bars.iter().enumerate() {
            let (Some(bar), Some(address)) = (bar, addresses.get(index)) else {
                continue;
            };
            let type_bits = bar.kind.type_bits();
            config.set_register(
                index,
                Register::Low {
                    size: bar.size,
                    type_bits,
                },
                *address,
            );
            if bar.kind.is_wide() {
                let high = Register::High { size: bar.size };
                config.set_register(index + 1, high, address >> 32);
            }
        }
        config
    }

    pub fn command(&self) -> u16 {
        self.command
    }

    /// Whether `len` bytes at `offset` lie within config space.
    pub fn has(&self, offset: u16, len: usize) -> bool {
        usize::from(offset)
            .checked_add(len)
            .is_some_and(|end| end <= self.bytes.len())
    }

    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.byte(at);
        }
    }

    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            self.set_byte(at, *byte);
        }
    }

    fn lay(&mut self, offset: usize, bytes: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *slot = *byte;
        }
    }

    fn permit(&mut self, offset: usize, mask: &[u8]) {
        for (slot, byte) in self.writable.iter_mut().skip(offset).zip(mask) {
            *slot = *byte;
        }
    }

    /// Lets an MSI capability at the head of the list be written: enable, the number of vectors,
    /// address and data.
    fn permit_msi(&mut self) {
        let Some(at) = self.bytes.get(CAPABILITY_POINTER).copied().map(usize::from) else {
            return;
        };
        if self.bytes.get(at) == Some(&0x05) {
            let mut mask = [0xff; 14];
            mask[..4].copy_from_slice(&[0, 0, 0x71, 0]);
            self.permit(at, &mask);
        }
    }

    fn set_register(&mut self, index: usize, register: Register, address: u64) {
        if let (Some(slot), Some(written)) =
            (self.registers.get_mut(index), self.written.get_mut(index))
        {
            *slot = register;
            *written = u32::try_from(address & u64::from(u32::MAX)).unwrap_or(0);
        }
    }

    fn byte(&self, at: usize) -> u8 {
        let of = |value: u32, at: usize| value.to_le_bytes().get(at % 4).copied().unwrap_or(0);
        match at {
            COMMAND | 0x05 => of(self.command.into(), at),
            BARS..BARS_END => {
                let index = (at - BARS) / 4;
                match (self.registers.get(index), self.written.get(index)) {
                    (Some(register), Some(written)) => of(register.read(*written), at),
                    _ => 0,
                }
            }
            _ => self.bytes.get(at).copied().unwrap_or(0xff),
        }
    }

    fn set_byte(&mut self, at: usize, byte: u8) {
        let put = |value: u32| {
            let mut bytes = value.to_le_bytes();
            if let Some(slot) = bytes.get_mut(at % 4) {
                *slot = byte;
            }
            u32::from_le_bytes(bytes)
        };
        match at {
            COMMAND | 0x05 => {
                let command = u16::try_from(put(self.command.into()) & 0xffff).unwrap_or(0);
                self.command = command & COMMAND_WRITABLE;
            }
            BARS..BARS_END => {
                if let Some(written) = self.written.get_mut((at - BARS) / 4) {
                    *written = put(*written);
                }
            }
            _ => {
                if let (Some(slot), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                    *slot = (*slot & !mask) | (byte & mask);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "config_space_tests.rs"]
mod tests;
