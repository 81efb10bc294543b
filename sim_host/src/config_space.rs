//! Config space as vfio-pci presents it: the BARs are virtual, the command register is real.

use crate::function_spec::{FunctionSpec, PowerManagement};
use crate::gate::{COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY};

const COMMAND: usize = 0x04;
const BARS: usize = 0x10;
const BARS_END: usize = 0x28;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The command bits that can be set: the three enables, parity, SERR, no INTx.
const COMMAND_WRITABLE: u16 = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | 0x0540;

/// Where the capabilities lie that a specification asks for by name, before those of its list.
const POWER_MANAGEMENT: usize = 0xc0;
const EXPRESS: usize = 0xc8;
const MSI: usize = 0x40;
const MSIX: usize = 0xb0;
const ADVANCED_FEATURES: usize = 0xf4;
/// From power management to PMCSR.
const PMCSR: usize = 4;
const NO_SOFT_RESET: u8 = 1 << 3;
/// From PCI Express to the upper byte of device control.
const DEVICE_CONTROL_HIGH: usize = 9;
const EXPRESS_FLR: u8 = 1 << 7;
/// From advanced features to its control register.
const AF_CONTROL: usize = 4;
const AF_FLR: u8 = 1;

/// What a write asks for, beyond the bytes that it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Asked {
    /// The command register's lower byte is written, with or without memory decoding.
    pub memory: Option<bool>,
    /// A power state, as PMCSR says it.
    pub power: Option<u8>,
    /// A function-level reset.
    pub reset: bool,
}

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
    /// As it was when the function went to D3hot.
    saved_command: Option<u16>,
    registers: [Register; 6],
    written: [u32; 6],
    has_power: bool,
    express_flr: bool,
    advanced_flr: bool,
}

impl ConfigSpace {
    /// The config space of a function whose BARs the host has put at `addresses`.
    pub fn new(spec: &FunctionSpec, addresses: [u64; 6]) -> Self {
        let size = usize::from(spec.config_size);
        let mut config = Self {
            bytes: vec![0; size],
            writable: vec![0; size],
            command: spec.command,
            saved_command: None,
            registers: [Register::None; 6],
            written: [0; 6],
            has_power: spec.power_management.is_some(),
            express_flr: spec.express_flr,
            advanced_flr: spec.advanced_flr,
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
        config.lay_named(spec);
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

    /// What a write of `data` at `offset` asks for.
    pub fn asked(&self, offset: u16, data: &[u8]) -> Asked {
        let byte = |at: usize| {
            let within = at.checked_sub(usize::from(offset))?;
            data.get(within).copied()
        };
        let [memory, _] = COMMAND_MEMORY.to_le_bytes();
        let power = byte(POWER_MANAGEMENT + PMCSR).filter(|_| self.has_power);
        let express = byte(EXPRESS + DEVICE_CONTROL_HIGH).filter(|_| self.express_flr);
        let advanced = byte(ADVANCED_FEATURES + AF_CONTROL).filter(|_| self.advanced_flr);
        Asked {
            memory: byte(COMMAND).map(|low| low & memory != 0),
            power: power.map(|low| low & 3),
            reset: express.is_some_and(|high| high & EXPRESS_FLR != 0)
                || advanced.is_some_and(|low| low & AF_FLR != 0),
        }
    }

    /// PMCSR says this state.
    pub fn set_power(&mut self, state: u8) {
        if let Some(low) = self.bytes.get_mut(POWER_MANAGEMENT + PMCSR) {
            *low = (*low & !3) | (state & 3);
        }
    }

    /// Whether the function keeps its registers on the way from D3hot to D0.
    pub fn keeps_registers(&self) -> bool {
        let low = self.bytes.get(POWER_MANAGEMENT + PMCSR);
        low.is_some_and(|low| low & NO_SOFT_RESET != 0)
    }

    pub fn save_command(&mut self) {
        self.saved_command = Some(self.command);
    }

    pub fn restore_command(&mut self) {
        self.command = self.saved_command.take().unwrap_or(self.command);
    }

    /// Lays the capabilities that are asked for by name, before those of the list that is there.
    fn lay_named(&mut self, spec: &FunctionSpec) {
        let mut next = self.byte(CAPABILITY_POINTER);
        let mut head = |config: &mut Self, at: usize, bytes: &[u8]| {
            config.lay(at, bytes);
            config.lay(at + 1, &[next]);
            next = u8::try_from(at).unwrap_or(0);
            config.lay(CAPABILITY_POINTER, &[next]);
            let has_list = config.byte(0x06) | 0x10;
            config.lay(0x06, &[has_list]);
        };
        if let Some(msi) = spec.msi {
            let vectors = msi.vectors.checked_ilog2().unwrap_or(0) << 1;
            let low = u8::try_from(vectors | 0x80).unwrap_or(0x80);
            head(self, MSI, &[0x05, 0, low, u8::from(msi.maskable)]);
            // Address, data and masks. Control is the kernel's, which enables it by the ioctl alone.
            self.permit(MSI + 4, &[0xff; 10]);
            if msi.maskable {
                self.permit(MSI + 16, &[0xff; 4]);
            }
        }
        if let Some(msix) = spec.msix {
            let [low, high] = msix.vectors.saturating_sub(1).to_le_bytes();
            let bar = u32::from(msix.bar.get());
            let [table, pending] = [msix.table | bar, msix.pending_bits | bar];
            head(self, MSIX, &[0x11, 0, low, high]);
            self.lay(MSIX + 4, &table.to_le_bytes());
            self.lay(MSIX + 8, &pending.to_le_bytes());
        }
        if spec.advanced_flr {
            // Six bytes; transactions pending and function-level reset.
            head(self, ADVANCED_FEATURES, &[0x13, 0, 6, 3]);
        }
        if spec.express_flr {
            // Version 2, an endpoint; bit 28 of device capabilities.
            head(self, EXPRESS, &[0x10, 0, 2, 0, 0, 0, 0, 0x10]);
            self.permit(EXPRESS + 8, &[0xff, 0x7f]);
        }
        if let Some(power) = spec.power_management {
            let low = match power {
                PowerManagement::NoSoftReset => NO_SOFT_RESET,
                PowerManagement::SoftReset => 0,
            };
            // Version 3, D1 and D2.
            head(self, POWER_MANAGEMENT, &[0x01, 0, 0x03, 0x06, low]);
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
