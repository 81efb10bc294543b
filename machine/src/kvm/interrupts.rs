//! Interrupt lines: wired interrupts that lead to the interrupt controllers, as KVM has them by
//! default.

use std::fmt;
use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::KvmError;

/// The interrupts of one machine. Clones are handles on the same.
#[derive(Debug, Clone)]
pub struct Interrupts {
    vm: Arc<VmFd>,
}

/// A wired interrupt that the machine's own devices raise.
pub struct InterruptLine {
    event: EventFd,
}

impl Interrupts {
    pub(crate) const fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }

    /// The line of a wired interrupt, edge-triggered.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn line(&self, gsi: u32) -> Result<InterruptLine, KvmError> {
        let doing = "connecting an interrupt line";
        let event = new_event().map_err(|source| KvmError { doing, source })?;
        self.vm
            .register_irqfd(&event, gsi)
            .map_err(|error| KvmError::new(doing, error))?;
        Ok(InterruptLine { event })
    }
}

impl InterruptLine {
    /// Raises it.
    ///
    /// # Errors
    /// Where the counter is full, which means that it is raised anyway.
    pub fn raise(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.raise()
    }
}

impl fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptLine").finish_non_exhaustive()
    }
}

fn new_event() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}
