//! What a guest's driver does to its device through config space.
//!
//! As an operating system does it: what a sleep or a reset may cost is saved before and put back
//! afterwards, the BARs first, the command register last.

use assigned_pci::{AssignedFunction, BarInfo, Capability, CapabilityList};
use memory_map::Gpa;

/// The command register (PCI 3.0, 6.2.2).
const COMMAND: u16 = 0x04;
/// Memory decoding, in its lower byte.
const MEMORY: u8 = 0x02;
/// The first base address register (6.2.5).
const BAR0: u16 = 0x10;
/// From the power management capability to PMCSR.
const PMCSR: u16 = 4;
/// PMCSR: the power state.
const POWER_STATE: u8 = 0b11;
/// From the PCI Express capability to device capabilities, and to device control.
const DEVICE_CAPABILITIES: u16 = 4;
const DEVICE_CONTROL: u16 = 8;
/// Device capabilities, and device control: function-level reset.
const HAS_FLR: u32 = 1 << 28;
const INITIATE_FLR: u16 = 1 << 15;

/// A driver of one function. What comes of what it does is in the memory map.
#[derive(Debug, Clone, Copy)]
pub struct GuestDriver<'f>(pub &'f AssignedFunction);

/// What is put back after a sleep or a reset.
#[derive(Debug)]
pub struct Saved {
    command: [u8; 2],
    bars: Vec<BarInfo>,
}

impl GuestDriver<'_> {
    /// Turns memory decoding on or off.
    pub fn set_decoding(self, on: bool) {
        let [low, high] = self.command();
        let low = if on { low | MEMORY } else { low & !MEMORY };
        let _in_the_map = self.0.config_write(COMMAND, &[low, high]);
    }

    /// Writes a memory BAR's registers, the lower first.
    pub fn write_bar(self, bar: &BarInfo, to: Gpa) {
        let register = BAR0 + 4 * u16::from(bar.index.get());
        let [a, b, c, d, e, f, g, h] = to.raw().to_le_bytes();
        let _in_the_map = self.0.config_write(register, &[a, b, c, d]);
        if bar.kind.is_64_bit() {
            let _in_the_map = self.0.config_write(register + 4, &[e, f, g, h]);
        }
    }

    /// Whether it can sleep.
    pub fn can_sleep(self) -> bool {
        self.capability(Capability::POWER_MANAGEMENT).is_some()
    }

    /// Sends it to D3hot, or wakes it, if it can sleep.
    pub fn set_asleep(self, asleep: bool) {
        if let Some(at) = self.capability(Capability::POWER_MANAGEMENT) {
            let [low] = self.read(at + PMCSR);
            let state = if asleep { POWER_STATE } else { 0 };
            let _in_the_map = self
                .0
                .config_write(at + PMCSR, &[low & !POWER_STATE | state]);
        }
    }

    /// Whether it has a function-level reset.
    pub fn can_reset(self) -> bool {
        self.capability(Capability::EXPRESS).is_some_and(|at| {
            u32::from_le_bytes(self.read(at + DEVICE_CAPABILITIES)) & HAS_FLR != 0
        })
    }

    /// Initiates a function-level reset, if it has one.
    pub fn reset(self) {
        if let Some(at) = self.capability(Capability::EXPRESS) {
            let control = u16::from_le_bytes(self.read(at + DEVICE_CONTROL)) | INITIATE_FLR;
            let _in_the_map = self
                .0
                .config_write(at + DEVICE_CONTROL, &control.to_le_bytes());
        }
    }

    /// What a sleep or a reset may cost.
    pub fn save(self) -> Saved {
        let bars = self.0.bars().into_iter();
        Saved {
            command: self.command(),
            bars: bars.filter(|bar| bar.region.is_some()).collect(),
        }
    }

    /// Puts back what has changed.
    pub fn restore(self, saved: &Saved) {
        let now = self.0.bars();
        for bar in &saved.bars {
            if !now
                .iter()
                .any(|now| (now.index, now.address) == (bar.index, bar.address))
            {
                self.write_bar(bar, Gpa::new(bar.address));
            }
        }
        if self.command() != saved.command {
            let _in_the_map = self.0.config_write(COMMAND, &saved.command);
        }
    }

    fn command(self) -> [u8; 2] {
        self.read(COMMAND)
    }

    fn capability(self, id: u16) -> Option<u16> {
        let mut capabilities = self.0.capabilities().iter();
        let found = capabilities.find(|it| it.list == CapabilityList::Standard && it.id == id)?;
        Some(found.offset)
    }

    fn read<const N: usize>(self, at: u16) -> [u8; N] {
        let mut bytes = [0; N];
        // What the host refuses reads as all ones, as on the bus.
        let _refused = self.0.config_read(at, &mut bytes);
        bytes
    }
}
