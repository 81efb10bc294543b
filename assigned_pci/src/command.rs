//! The command register (PCI Local Bus 3.0, 6.2.2), whose memory space bit says whether the BARs
//! are visible.
//!
//! The guest's writes reach the physical register as they are: same offset, same width, so that a
//! write to the command register does not touch the status register beside it, whose bits are
//! cleared by ones. Only their order against the map is chosen:
//!
//! - *on*: the physical register first, then the BARs enter the map, in one commit. The kernel maps
//!   a BAR only while it is decoded. A physical write that fails leaves decoding off.
//! - *off*: the BARs leave the map first, in one commit, then the physical register is written: a
//!   peer must not reach a BAR that does not answer. Then the kernel has revoked what was
//!   exported of the BARs, so their revocation epoch advances; as nothing is mapped any more, that
//!   takes nothing down. A physical write that fails leaves decoding off for the guest all the
//!   same.
//!
//! A virtual function has no memory space bit of its own (PCI Express Base 6.0, 9.3.4.1.3): it
//! decodes as long as its physical function lets it, and the kernel makes the bit up. It revokes by
//! what is written all the same, so each write to a virtual function's command register counts as
//! revoking: the BARs leave the map before it and come back after it.
//!
//! A function that sleeps takes the bit, and decodes when it is awake.
//!
//! A function with a controller for its interrupts has no INTx: *interrupt disable* is set in
//! whatever is written to the physical register, and the guest reads its own.

use memory_map::DisabledBecause;

use crate::config_space::COMMAND;
use crate::function::State;
use crate::{AssignedFunction, Outcome};

/// A value of the command register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Command(u16);

impl Command {
    /// Answer to I/O ports.
    pub(crate) const IO: u16 = 1;
    /// Answer to memory addresses.
    pub(crate) const MEMORY: u16 = 1 << 1;
    /// Start transactions.
    pub(crate) const BUS_MASTER: u16 = 1 << 2;

    /// Do not raise INTx.
    pub(crate) const INTX_DISABLE: u16 = 1 << 10;

    /// As at power-on.
    pub(crate) const OFF: Self = Self(0);

    pub(crate) const fn new(value: u16) -> Self {
        Self(value)
    }

    pub(crate) const fn to_bytes(self) -> [u8; 2] {
        self.0.to_le_bytes()
    }

    /// The same with INTx held off.
    pub(crate) const fn without_intx(self) -> Self {
        Self(self.0 | Self::INTX_DISABLE)
    }

    /// Whether the function neither decodes nor starts anything, and does not raise INTx if `off`
    /// does not.
    pub(crate) const fn is_as_off_as(self, off: Self) -> bool {
        self.0 & (Self::IO | Self::MEMORY | Self::BUS_MASTER) == 0
            && !self.0 & off.0 & Self::INTX_DISABLE == 0
    }

    /// Whether it answers to memory addresses.
    pub(crate) const fn decodes_memory(self) -> bool {
        self.0 & Self::MEMORY != 0
    }

    /// Whether it may start transactions.
    pub(crate) const fn masters_bus(self) -> bool {
        self.0 & Self::BUS_MASTER != 0
    }

    /// The same with bus mastering off.
    pub(crate) const fn without_bus_master(self) -> Self {
        Self(self.0 & !Self::BUS_MASTER)
    }

    /// The same with the memory space bit as the guest is to see it.
    pub(crate) const fn with_memory(self, decoding: bool) -> Self {
        if decoding {
            Self(self.0 | Self::MEMORY)
        } else {
            Self(self.0 & !Self::MEMORY)
        }
    }
}

/// The byte of an access at `offset` that is the register's upper one, with *interrupt disable*.
fn upper_byte(offset: u16, data: &mut [u8]) -> Option<&mut u8> {
    let at = COMMAND.saturating_add(1).checked_sub(offset)?;
    data.get_mut(usize::from(at))
}

impl State {
    /// The physical register of a function that is off.
    pub(crate) const fn command_off(&self) -> Command {
        match self.interrupts {
            Some(_) => Command::OFF.without_intx(),
            None => Command::OFF,
        }
    }

    /// Puts what the guest is to see into what was read at `offset`, the register's first or second
    /// byte. A device that is gone stays all ones, which the register never is.
    pub(crate) fn show_command(&self, offset: u16, data: &mut [u8]) {
        if data.len() > 1 && data.iter().all(|byte| *byte == 0xff) {
            return;
        }
        if let (COMMAND, Some(low)) = (offset, data.first_mut()) {
            let command = Command::new((*low).into());
            [*low, _] = command.with_memory(self.decoding).to_bytes();
        }
        if let (Some(interrupts), Some(upper)) = (&self.interrupts, upper_byte(offset, data)) {
            let [_, intx] = Command(Command::INTX_DISABLE).to_bytes();
            *upper = (*upper & !intx) | if interrupts.intx_disabled { intx } else { 0 };
        }
    }

    /// Takes the guest's *interrupt disable* from what it writes, and sets it there.
    fn hold_intx_off(&mut self, offset: u16, data: &mut [u8]) {
        if let (Some(interrupts), Some(upper)) = (&mut self.interrupts, upper_byte(offset, data)) {
            let [_, intx] = Command(Command::INTX_DISABLE).to_bytes();
            interrupts.intx_disabled = *upper & intx != 0;
            *upper |= intx;
        }
    }
}

impl AssignedFunction {
    /// The guest writes at least a byte of the command register: one of its bytes, both, or both
    /// with the status register.
    pub(crate) fn write_command(
        &self,
        state: &mut State,
        offset: u16,
        data: &[u8],
        outcome: &mut Outcome,
    ) {
        let decode = match data.first() {
            Some(low) if offset == COMMAND => {
                let [memory, _] = Command(Command::MEMORY).to_bytes();
                low & memory != 0
            }
            // The upper byte alone: the bit stays as it is.
            _ => state.decoding,
        };
        // On the way up only a virtual function's mappings are at stake.
        let down = (!decode || self.host.is_virtual())
            .then(|| self.take_down(state, DisabledBecause::DecodingOff, outcome));
        if !decode {
            state.decoding = false;
        }
        let mut data = data.to_vec();
        state.hold_intx_off(offset, &mut data);
        let written = self.write_host(offset, &data, outcome);
        if decode && written {
            state.decoding = true;
            if state.decodes() {
                state.settle();
            }
        }
        match down {
            Some(down) => self.bring_back(state, down, outcome),
            None => self.sync(state, false, outcome),
        }
    }
}
