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

    /// As at power-on.
    pub(crate) const OFF: Self = Self(0);

    pub(crate) const fn new(value: u16) -> Self {
        Self(value)
    }

    pub(crate) const fn to_bytes(self) -> [u8; 2] {
        self.0.to_le_bytes()
    }

    /// Whether the function neither decodes nor starts anything.
    pub(crate) const fn is_off(self) -> bool {
        self.0 & (Self::IO | Self::MEMORY | Self::BUS_MASTER) == 0
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
        let written = self.write_host(offset, data, outcome);
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
