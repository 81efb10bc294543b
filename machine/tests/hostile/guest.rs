//! A processor that runs nonsense: the same for the same seed.

use std::sync::atomic::{AtomicU64, Ordering};

use assigned_pci::{Capability, CapabilityList};
use machine::pci::Place;
use machine::platform::{
    CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, ECAM, ECAM_SIZE, IO_APIC, KVM_PAGES, LOCAL_APIC,
};
use machine::{Access, Board as _};
use memory_map::{Gpa, Iova};

use crate::rig::{APERTURE_LAST, Abused, ENGINES, HIGH_RAM, PEER, RAM_SIZE, RESERVED, Rig};

/// Random choices (xorshift64*).
pub struct Dice(u64);

impl Dice {
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        let at = self.below(choices.len() as u64);
        choices[usize::try_from(at).unwrap()]
    }
}

/// One virtual processor.
pub struct Processor<'r> {
    pub rig: &'r Rig,
    pub dice: Dice,
    /// How many accesses were made, by all.
    pub made: &'r AtomicU64,
}

impl Processor<'_> {
    /// Something, of up to a few accesses.
    pub fn step(&mut self) {
        match self.dice.below(16) {
            0..=2 => self.config_nonsense(),
            3..=5 => self.move_bar(),
            6 => self.set_up(),
            7..=8 => self.control(),
            9..=12 => self.touch_bar(),
            13 => self.anywhere(),
            14 => self.ports(),
            _ => self.device(),
        }
    }

    fn memory(&mut self, at: u64, size: u64, write: Option<u64>) {
        if self.rig.is_of_pair(at, size) {
            return;
        }
        self.made.fetch_add(1, Ordering::Relaxed);
        let mut data = write.unwrap_or(0).to_le_bytes();
        let data = &mut data[..usize::try_from(size).unwrap()];
        let access = match write {
            Some(_) => Access::Write(data),
            None => Access::Read(data),
        };
        self.rig.board.memory(Gpa::new(at), access);
    }

    fn port(&mut self, port: u16, size: usize, write: Option<u64>) {
        self.made.fetch_add(1, Ordering::Relaxed);
        let mut data = write.unwrap_or(0).to_le_bytes();
        let access = match write {
            Some(_) => Access::Write(&data[..size]),
            None => Access::Read(&mut data[..size]),
        };
        self.rig.board.port(port, access);
    }

    fn victim(&mut self) -> usize {
        let all = self.rig.abused.len() as u64;
        usize::try_from(self.dice.below(all)).unwrap()
    }

    /// Where a function's config space is, in ECAM, if its port's bus has a number.
    fn config_base(&mut self, victim: usize) -> u64 {
        let Abused { place, .. } = self.rig.abused[victim];
        match place {
            Place::OnRoot(device) => ECAM.raw() + (u64::from(device) << 15),
            Place::Behind(port) => {
                if self.dice.below(4) == 0 {
                    let bus = ECAM.raw() + (u64::from(port) << 15) + 0x18;
                    self.memory(bus, 4, Some(u64::from(port) << 8 | u64::from(port) << 16));
                }
                ECAM.raw() + (u64::from(port) << 20)
            }
        }
    }

    /// By ECAM, or by the ports.
    fn config(&mut self, base: u64, offset: u16, size: u64, write: Option<u64>) {
        if self.dice.below(4) > 0 || offset > 0xff {
            return self.memory(base + u64::from(offset), size, write);
        }
        if self.rig.is_of_pair(base, 0x1000) {
            return;
        }
        let address = 1 << 31 | (base - ECAM.raw()) >> 4 & 0xff_ff00 | u64::from(offset & 0xfc);
        self.port(CONFIG_ADDRESS_PORT, 4, Some(address));
        let size = usize::try_from(size.min(4)).unwrap();
        self.port(CONFIG_DATA_PORT | offset & 3, size, write);
    }

    fn value(&mut self) -> u64 {
        match self.dice.below(4) {
            0 => u64::MAX,
            1 => 0,
            2 => 1 << self.dice.below(64),
            _ => self.dice.next(),
        }
    }

    fn config_nonsense(&mut self) {
        let victim = self.victim();
        let base = match self.dice.below(8) {
            0 => ECAM.raw() + self.dice.below(4) * 0x8000 * 3,
            1 => ECAM.raw() + (self.dice.below(ECAM_SIZE) & !0xfff),
            2 => match self.rig.abused[victim].place {
                Place::OnRoot(device) | Place::Behind(device) => {
                    ECAM.raw() + (u64::from(device) << 15)
                }
            },
            _ => self.config_base(victim),
        };
        let mask = self.dice.of(&[0x3f, 0xff, 0xff, 0xfff]);
        let offset = u16::try_from(self.dice.next() & mask).unwrap();
        let size = self.dice.of(&[1, 2, 4, 4, 8]);
        let offset = match self.dice.below(8) {
            0 => offset,
            _ => offset & !u16::try_from(size - 1).unwrap(),
        };
        let write = (self.dice.below(3) > 0).then(|| self.value());
        self.config(base, offset, size, write);
    }

    /// An address that a BAR should not have, or one that it may.
    fn chosen(&mut self) -> u64 {
        let page = self.dice.below(64) << 12;
        match self.dice.below(20) {
            0 => page,
            1 => HIGH_RAM + page,
            2 => HIGH_RAM + RAM_SIZE - 0x1000,
            3 => RAM_SIZE - 0x1000 + page,
            4 => IO_APIC.raw(),
            5 => LOCAL_APIC.raw() - 0x8000 + page,
            6 => KVM_PAGES.raw() - page,
            7 => ECAM.raw() + page,
            8 => ECAM.raw() - page,
            9 => RESERVED[1].0 - 0x8000 + page,
            10 => APERTURE_LAST - 0x4_0000 + page,
            11 => u64::MAX - page,
            12 => 0xffff_ffff - page,
            13 => PEER + page,
            14 => ENGINES[0] + page,
            15..=16 => {
                let victim = self.victim();
                let bars = self.rig.abused[victim].function.bars();
                bars.first().map_or(0, |bar| bar.address)
            }
            17 => self.dice.next(),
            18 => 0xc100_0000 + (self.dice.below(64) << 18),
            _ => 0x10_0000_0000 + (self.dice.below(64) << 18),
        }
    }

    /// Writes a BAR's registers: all, half, or to size it.
    fn move_bar(&mut self) {
        let victim = self.victim();
        let base = self.config_base(victim);
        let register = 0x10 + 4 * u16::try_from(self.dice.below(6)).unwrap();
        let at = self.chosen();
        match self.dice.below(6) {
            0 => self.config(base, register, 4, Some(0xffff_ffff)),
            1 => self.config(base, register, 4, Some(at >> 32)),
            2 => self.config(base, register, 4, Some(at & 0xffff_ffff)),
            3 => self.config(base, register + 1, 1, Some(at >> 8 & 0xff)),
            _ => {
                self.config(base, register, 4, Some(at & 0xffff_ffff));
                self.config(base, register + 4, 4, Some(at >> 32));
            }
        }
        if self.dice.below(8) == 0 {
            self.config(base, register, 4, None);
        }
    }

    /// What a driver does.
    fn set_up(&mut self) {
        let victim = self.victim();
        let base = self.config_base(victim);
        for (register, at) in [(0x10, self.chosen()), (0x18, self.chosen())] {
            self.config(base, register, 4, Some(at & 0xffff_ffff));
            self.config(base, register + 4, 4, Some(at >> 32));
        }
        if let Some(power) = self.capability(victim, Capability::POWER_MANAGEMENT) {
            self.config(base, power + 4, 2, Some(0));
        }
        self.config(base, 0x04, 2, Some(6));
    }

    fn capability(&self, victim: usize, id: u16) -> Option<u16> {
        let capabilities = self.rig.abused[victim].function.capabilities();
        let mut all = capabilities.iter();
        all.find(|found| found.list == CapabilityList::Standard && found.id == id)
            .map(|found| found.offset)
    }

    /// Command, power state, resets, interrupts.
    fn control(&mut self) {
        let victim = self.victim();
        let base = self.config_base(victim);
        let at = |id| self.capability(victim, id);
        let (power, express, advanced) = (
            at(Capability::POWER_MANAGEMENT),
            at(Capability::EXPRESS),
            at(Capability::ADVANCED_FEATURES),
        );
        let (msi, msix) = (at(Capability::MSI), at(Capability::MSIX));
        match (self.dice.below(8), power, express, advanced, msi, msix) {
            (0, Some(power), ..) => {
                let state = self.dice.below(4);
                self.config(base, power + 4, 2, Some(state));
            }
            (1, _, Some(express), ..) => self.config(base, express + 8, 2, Some(0x8000)),
            (1, _, _, Some(advanced), ..) => self.config(base, advanced + 4, 1, Some(1)),
            (2, _, _, _, _, Some(msix)) => {
                let control = self.dice.of(&[0, 0x8000, 0x8000, 0xc000, 0x4000]);
                self.config(base, msix + 2, 2, Some(control));
            }
            (2, _, _, _, Some(msi), _) => {
                let control = self.dice.of(&[0, 1, 1, 0x11, 0x71]);
                self.config(base, msi + 2, 2, Some(control));
            }
            (3, ..) => {
                // The port's bus is reset, or gets another number.
                if let Place::Behind(port) = self.rig.abused[victim].place {
                    let port = ECAM.raw() + (u64::from(port) << 15);
                    let register = self.dice.of(&[0x18, 0x3e, 0x3e]);
                    let value = self.dice.next();
                    self.config(port, register, 2, Some(value));
                }
            }
            _ => {
                let command = self.dice.of(&[0, 2, 4, 6, 6, 6, 7, 0x406]);
                self.config(base, 0x04, 2, Some(command));
            }
        }
    }

    /// An access to where a BAR of a function is, its MSI-X table among it.
    fn touch_bar(&mut self) {
        let victim = self.victim();
        let bars = self.rig.abused[victim].function.bars();
        let bar = self.dice.of(&bars);
        let offset = match self.dice.below(4) {
            0 => 0x4000 + self.dice.below(0x100),
            1 => 0x80 + self.dice.below(0x20),
            2 => bar.size.saturating_sub(self.dice.below(16)),
            _ => self.dice.below(bar.size),
        };
        let size = self.dice.of(&[1, 2, 4, 4, 8]);
        let offset = match self.dice.below(8) {
            0 => offset,
            _ => offset & !(size - 1),
        };
        let value = self.value();
        // An engine must not be told to write to the pair.
        let write = self.dice.below(2) == 0 && !self.is_near_pair(value);
        let at = bar.address.wrapping_add(offset);
        self.memory(at, size, write.then_some(value));
    }

    fn is_near_pair(&self, value: u64) -> bool {
        let low = value & 0xffff_ffff;
        self.rig.is_of_pair(value, 0x1000) || self.rig.is_of_pair(low, 0x1000)
    }

    fn anywhere(&mut self) {
        let at = self.chosen().wrapping_add(self.dice.below(0x2000));
        let size = self.dice.of(&[1, 2, 4, 8]);
        let value = self.value();
        let write = self.dice.below(2) == 0 && !self.is_near_pair(value);
        self.memory(at, size, write.then_some(value));
    }

    fn ports(&mut self) {
        let any = u16::try_from(self.dice.next() & 0xffff).unwrap();
        let port = self
            .dice
            .of(&[any, 0x3f8, 0x3f9, 0x64, 0x505, 0x600, 0x602, 0x603, 0xcf9]);
        // The address port goes to nobody, or a processor would be sent to the pair.
        let port = if port == CONFIG_ADDRESS_PORT { 0 } else { port };
        let size = self.dice.of(&[1, 1, 2, 4]);
        let write = (self.dice.below(2) == 0).then(|| self.value());
        self.port(port, size, write);
    }

    /// The device does something of its own: DMA, an interrupt.
    fn device(&mut self) {
        let victim = self.victim();
        let at = self.chosen();
        let host = &self.rig.abused[victim].host;
        if self.rig.is_of_pair(at, 64) {
            host.raise(u16::try_from(at & 0xf).unwrap());
            return;
        }
        match at >> 12 & 1 {
            0 => host.dma_write(Iova::new(at), &[0xa5; 64]),
            _ => host.dma_read(Iova::new(at), &mut [0; 64]),
        }
    }
}
