//! What a function's command register lets through.

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

/// I/O space enable.
pub(crate) const COMMAND_IO: u16 = 1;
/// Memory space enable: the function decodes its memory BARs.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus master enable: the function may issue DMA.
pub(crate) const COMMAND_MASTER: u16 = 1 << 2;

/// The physical command register, seen by everything that depends on it.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    command: AtomicU16,
    /// Whether the function no longer answers at all.
    gone: AtomicBool,
}

impl Gate {
    pub fn new(command: u16) -> Self {
        Self {
            command: AtomicU16::new(command),
            gone: AtomicBool::new(false),
        }
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

    /// Whether accesses to memory BARs are answered.
    pub fn decodes_memory(&self) -> bool {
        self.command() & COMMAND_MEMORY != 0 && !self.is_gone()
    }

    /// Whether DMA leaves the function.
    pub fn masters_bus(&self) -> bool {
        self.command() & COMMAND_MASTER != 0 && !self.is_gone()
    }
}
