//! KVM, fenced in: the only part of this crate that makes system calls to it.
//!
//! A [`Hypervisor`] is what the host offers, a [`Vm`] one virtual machine of it. The [`Vm`] is made
//! before any device is opened, because VFIO wants to know of it first ([`Vm::assigned_files`]);
//! RAM comes later, through the memory map ([`MemorySlots`]). All handles keep the machine's file
//! open between them.

mod assigned_files;
mod cpuid;
mod hypervisor;
mod interrupts;
mod memory_slots;
mod processor;
mod processor_state;
mod vm;

pub use assigned_files::{AssignedFile, AssignedFiles};
pub use hypervisor::{Hypervisor, HypervisorError};
pub use interrupts::{FunctionInterrupts, InterruptLine, Interrupts};
pub use memory_slots::MemorySlots;
pub use processor::{Processor, Stop};
pub use vm::{KvmError, Vm};
