//! What a function's command register and its power state let through.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

/// I/O space enable.
pub(crate) const COMMAND_IO: u16 = 1;
/// Memory space enable: the function decodes its memory BARs.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus master enable: the function may issue DMA.
pub(crate) const COMMAND_MASTER: u16 = 1 << 2;

/// D0, as PMCSR says it.
pub(crate) const AWAKE: u8 = 0;
/// D3hot.
const D3HOT: u8 = 3;

/// The physical command register and power state, seen by everything that depends on it.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    command: AtomicU16,
    /// Whether the function no longer answers at all.
    gone: AtomicBool,
    power: AtomicU8,
    /// A virtual function decodes memory whatever its command register says.
    is_virtual: bool,
}

impl Gate {
    pub fn new(command: u16) -> Self {
        Self {
            command: AtomicU16::new(command),
            ..Self::default()
        }
    }

    /// A virtual function's.
    pub fn of_virtual_function(self, is_virtual: bool) -> Self {
        Self { is_virtual, ..self }
    }

    pub fn command(&self) -> u16 {
        self.command.load(Ordering::Acquire)
    }

    pub fn set_command(&self, command: u16) {
        self.command.store(command, Ordering::Release);
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub fn set_gone(&self, gone: bool) {
        self.gone.store(gone, Ordering::Release);
    }

    pub fn is_virtual(&self) -> bool {
        self.is_virtual
    }

    pub fn power(&self) -> u8 {
        self.power.load(Ordering::Acquire)
    }

    pub fn set_power(&self, power: u8) {
        self.power.store(power, Ordering::Release);
    }

    fn is_awake(&self) -> bool {
        self.power() == AWAKE && !self.is_gone()
    }

    fn memory_bit(&self) -> bool {
        self.is_virtual || self.command() & COMMAND_MEMORY != 0
    }

    /// Whether accesses to memory BARs are answered.
    pub fn decodes_memory(&self) -> bool {
        self.memory_bit() && self.is_awake()
    }

    /// What vfio-pci takes for that: it thinks that a function in D1 or D2 answers.
    pub fn has_memory_enabled(&self) -> bool {
        self.memory_bit() && self.power() < D3HOT
    }

    /// Whether DMA leaves the function.
    pub fn masters_bus(&self) -> bool {
        self.command() & COMMAND_MASTER != 0 && self.is_awake()
    }
}
