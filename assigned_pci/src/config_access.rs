//! The guest's accesses to config space.
//!
//! What is intercepted: the memory space bit of the command register, the six base address
//! registers, the expansion ROM's, which is hidden, the registers with which the guest puts the
//! function to sleep or resets it, those of its interrupts, and what the [filter](crate::filter)
//! hides. Everything else goes to the host's side and is what that makes of it.

use crate::config_space::{BARS, BARS_END, COMMAND, ROM, ROM_END, STATUS, is_access};
use crate::controls::Request;
use crate::filter::Overlay;
use crate::function::State;
use crate::{AssignedFunction, HostCall, HostError, Outcome};

impl AssignedFunction {
    /// The guest reads `data.len()` bytes at `offset` of config space: 1, 2 or 4, naturally
    /// aligned. Any other access, one past the end of config space, and one that the host refuses
    /// read all ones. Returns what the host said, if it refused.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) -> Option<HostError> {
        data.fill(0xff);
        if !is_access(offset, data.len(), self.config_size) {
            return None;
        }
        let state = self.lock();
        if state.removed {
            return None;
        }
        match offset {
            BARS..BARS_END => {
                let registers = state.bar_registers(offset);
                for (byte, value) in data.iter_mut().zip(registers) {
                    *byte = value;
                }
                return None;
            }
            ROM..ROM_END => {
                data.fill(0);
                return None;
            }
            _ => {}
        }
        let overlay = self.overlay(&state, offset);
        if !overlay.covers(data.len())
            && let Err(error) = self.host.config_read(offset, data)
        {
            data.fill(0xff);
            return Some(HostError::new(HostCall::ConfigRead(offset), &error));
        }
        overlay.show(data);
        state.show_command(offset, data);
        None
    }

    /// The guest writes `data` at `offset` of config space: 1, 2 or 4 bytes, naturally aligned.
    /// Any other access, and one past the end of config space, is ignored. When this returns,
    /// every target holds what the registers say.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> Outcome {
        let mut outcome = Outcome::default();
        if !is_access(offset, data.len(), self.config_size) {
            return outcome;
        }
        let mut state = self.lock();
        if state.removed {
            return outcome;
        }
        match offset {
            COMMAND..STATUS => self.write_command(&mut state, offset, data, &mut outcome),
            BARS..BARS_END => {
                state.write_bar(offset, data);
                self.sync(&mut state, false, &mut outcome);
            }
            ROM..ROM_END => {}
            _ => match self.controls.request(offset, data) {
                Some(Request::Power(control, wanted)) => {
                    let write = (offset, data);
                    self.write_power(&mut state, (control, wanted), write, &mut outcome);
                }
                Some(Request::Reset) => {
                    self.reset_by_write(&mut state, (offset, data), &mut outcome);
                }
                None => self.write_register(&mut state, offset, data, &mut outcome),
            },
        }
        outcome
    }

    /// The guest writes registers from which nothing follows for the map: MSI's and MSI-X's, those
    /// that are hidden, and the host's.
    fn write_register(&self, state: &mut State, offset: u16, data: &[u8], outcome: &mut Outcome) {
        if let Some(interrupts) = &mut state.interrupts {
            let write = in_dword(offset, data);
            if interrupts.write_config(&*self.host, offset & !3, write, outcome) {
                return;
            }
        }
        let overlay = self.overlay(state, offset);
        if !overlay.covers_any(data.len()) {
            self.write_host(offset, data, outcome);
            return;
        }
        // Some of it is hidden: the rest goes byte by byte.
        for ((at, byte), covered) in (offset..).zip(data).zip(overlay.covered()) {
            if !covered {
                self.write_host(at, std::slice::from_ref(byte), outcome);
            }
        }
    }

    /// What the guest sees of the registers from `offset` to the end of its dword instead of the
    /// host's. The lists' pointers are in front.
    fn overlay(&self, state: &State, offset: u16) -> Overlay {
        let at = offset & !3;
        let hidden = self.filter.overlay(at);
        let interrupts = state.interrupts.as_ref();
        interrupts
            .and_then(|interrupts| interrupts.overlay(at))
            .unwrap_or_default()
            .under(hidden.mask, hidden.value)
            .at_byte(offset % 4)
    }
}

/// A write at `offset` as one to its dword: which bits, and what they become.
fn in_dword(offset: u16, data: &[u8]) -> (u32, u32) {
    let (mut mask, mut value) = ([0; 4], [0; 4]);
    let skip = usize::from(offset % 4);
    for ((mask, value), byte) in mask.iter_mut().zip(&mut value).skip(skip).zip(data) {
        (*mask, *value) = (0xff, *byte);
    }
    (u32::from_le_bytes(mask), u32::from_le_bytes(value))
}

/// Which of the six registers lies at `offset`, and which of its bytes.
fn register_at(offset: u16) -> Option<(u8, usize)> {
    let within = offset.checked_sub(BARS)?;
    let register = u8::try_from(within / 4).ok()?;
    Some((register, usize::from(within % 4)))
}

impl State {
    /// The bytes of the BAR's register at `offset`, from there on; zeroes where there is no BAR.
    fn bar_registers(&self, offset: u16) -> impl Iterator<Item = u8> {
        let found = register_at(offset).and_then(|(register, byte)| {
            self.bars.iter().find_map(|assigned| {
                let lane = assigned.bar.lane_of(register)?;
                Some((assigned.bar.registers(), lane.saturating_add(byte)))
            })
        });
        let (registers, skip) = found.unwrap_or_default();
        registers.to_le_bytes().into_iter().skip(skip)
    }

    /// Writes the BAR's register at `offset`, if there is a BAR.
    fn write_bar(&mut self, offset: u16, data: &[u8]) {
        let Some((register, byte)) = register_at(offset) else {
            return;
        };
        let decoding = self.decodes();
        for assigned in &mut self.bars {
            if let Some(lane) = assigned.bar.lane_of(register) {
                assigned
                    .bar
                    .write(lane.saturating_add(byte), data, decoding);
                return;
            }
        }
    }
}
