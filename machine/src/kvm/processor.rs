//! A guest's processor.
//!
//! Whoever runs a [`Processor`] owns it; it runs in the thread that calls [`Processor::run`] until
//! somebody says that it shall stop. What the guest does that KVM does not do itself goes to the
//! [`Board`].

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd};
use memory_map::Gpa;

use super::processor_state::{ProcessorState, TSC, write_msrs};
use super::{KvmError, Vm, cpuid};
use crate::{Access, Board};

/// The default memory type and whether there are any (Intel's manual, volume 3, 12.11.2.1).
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// On, and everything is write-back.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
/// Where the local vector table's two pins are in the local APIC's page, and what firmware sets
/// them to: interrupts of the old controller, and NMI.
const LOCAL_PINS: [(usize, u32); 2] = [(0x350, 7 << 8), (0x360, 4 << 8)];

/// Where a processor begins (Intel's manual, volume 3, 10.1.4).
const INIT_VECTOR: u64 = 0xffff_fff0;

/// Why a processor does not run on.
#[derive(Debug)]
pub enum Stop {
    /// It was told to.
    Told,
    /// It is in a state that only a reset ends, such as after a triple fault.
    Shutdown,
    /// KVM does not run it on.
    Failed(String),
}

/// One processor.
#[derive(Debug)]
pub struct Processor {
    fd: VcpuFd,
    at_power_on: ProcessorState,
}

impl Processor {
    pub(crate) fn new(vm: &Vm, number: u8, count: u8) -> Result<Self, KvmError> {
        let fd = vm
            .fd
            .create_vcpu(number.into())
            .map_err(|error| KvmError::new("making a processor", error))?;
        start_time_stamps(&fd)
            .map_err(|error| KvmError::new("setting a processor's time stamps", error))?;
        let deadline = vm.fd.check_extension_raw(Cap::TscDeadlineTimer as _) > 0;
        fd.set_cpuid2(&cpuid::of_processor(&vm.cpuid, number, count, deadline))
            .map_err(|error| KvmError::new("telling a processor what it can do", error))?;
        let caching = kvm_msr_entry {
            index: MTRR_DEFAULT_TYPE,
            data: MTRR_ON_WRITE_BACK,
            ..Default::default()
        };
        write_msrs(&fd, &[caching])
            .map_err(|error| KvmError::new("making memory cacheable", error))?;
        set_local_pins(&fd)
            .map_err(|error| KvmError::new("setting up a local interrupt controller", error))?;
        Ok(Self {
            at_power_on: ProcessorState::read(&fd, vm.msrs.as_slice())?,
            fd,
        })
    }

    /// Makes it what it was at power-on.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn reset(&self) -> Result<(), KvmError> {
        self.at_power_on.write(&self.fd)
    }

    /// Sets the registers with which a kernel is entered, starting from those of power-on.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn enter_at(
        &self,
        registers: impl FnOnce(&mut kvm_regs, &mut kvm_sregs),
    ) -> Result<(), KvmError> {
        let failed = |error| KvmError::new("setting a processor's registers", error);
        let mut general = self.at_power_on.registers;
        let mut special = self.at_power_on.segments;
        registers(&mut general, &mut special);
        self.fd.set_sregs(&special).map_err(failed)?;
        self.fd.set_regs(&general).map_err(failed)
    }

    /// Runs the guest until `stop` is set. A signal whose handler returns makes it look; one that
    /// comes just before KVM is entered is lost, so whoever stops it sends signals until it has.
    pub fn run(&mut self, board: &dyn Board, stop: &AtomicBool) -> Stop {
        let mut faults = 0;
        while !stop.load(Ordering::Acquire) {
            match self.fd.run() {
                Ok(VcpuExit::MemoryFault { .. }) => {}
                Ok(exit) => {
                    faults = 0;
                    if let Some(stop) = carry_out(exit, board) {
                        return self.reset_or(stop);
                    }
                    continue;
                }
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN => continue,
                    libc::EFAULT => {}
                    _ => return Stop::Failed(format!("KVM does not run it: {error}")),
                },
            }
            if !board.memory_fault(faults) {
                return Stop::Failed("memory behind a slot cannot be had".to_owned());
            }
            faults = faults.saturating_add(1);
        }
        self.finish_access(board)
    }

    /// What a stop means. A processor that was told to begin anew (INIT) begins at an address where
    /// a PC has its firmware, and this machine has nothing: that is a reset.
    fn reset_or(&self, stop: Stop) -> Stop {
        let begins = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(general), Ok(special)) => special.cs.base.wrapping_add(general.rip),
            _ => return stop,
        };
        if begins == INIT_VECTOR {
            Stop::Shutdown
        } else {
            stop
        }
    }

    /// Has KVM finish what it handed over: the access is complete, and the instruction over, only
    /// when KVM is entered again. Otherwise it would be finished after a reset, with the registers
    /// of another time. The guest does not run on.
    fn finish_access(&mut self, board: &dyn Board) -> Stop {
        self.fd.set_kvm_immediate_exit(1);
        let mut stop = Stop::Told;
        // An access to memory has up to two parts of up to eight bytes each, and a string of
        // accesses to ports is cut at pages.
        while let Ok(exit) = self.fd.run() {
            if let Some(other) = carry_out(exit, board) {
                stop = other;
                break;
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        stop
    }
}

/// Does what the guest wants and KVM leaves to us.
fn carry_out(exit: VcpuExit<'_>, board: &dyn Board) -> Option<Stop> {
    match exit {
        VcpuExit::IoIn(port, data) => {
            for piece in pieces(data.len()) {
                if let Some(data) = data.get_mut(piece) {
                    board.port(port, Access::Read(data));
                }
            }
        }
        VcpuExit::IoOut(port, data) => {
            for piece in pieces(data.len()) {
                if let Some(data) = data.get(piece) {
                    board.port(port, Access::Write(data));
                }
            }
        }
        VcpuExit::MmioRead(gpa, data) => board.memory(Gpa::new(gpa), Access::Read(data)),
        VcpuExit::MmioWrite(gpa, data) => board.memory(Gpa::new(gpa), Access::Write(data)),
        VcpuExit::Shutdown => return Some(Stop::Shutdown),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        VcpuExit::FailEntry(reason, _) => {
            let why = format!("the processor refuses its state (reason {reason:#x})");
            return Some(Stop::Failed(why));
        }
        VcpuExit::InternalError => {
            let why = "KVM cannot emulate what it did, such as running code from a device";
            return Some(Stop::Failed(why.to_owned()));
        }
        other => return Some(Stop::Failed(format!("KVM says {other:?}"))),
    }
    None
}

/// How `length` bytes at a port are accessed: at once, or byte by byte where KVM hands over what a
/// string instruction does, which it does for ports of bytes.
fn pieces(length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let each = if matches!(length, 1 | 2 | 4) {
        length
    } else {
        1
    };
    (0..length)
        .step_by(each)
        .map(move |at| at..at.saturating_add(each))
}

/// Has time stamps run as the host's do, from zero.
///
/// That is what KVM does by itself, unless the host has corrected what it knows of its own rate since
/// KVM was started, and cannot scale: then it goes by the old rate, refuses that, and keeps a factor
/// of zero. To KVM the guest's time stamp is always zero then, and a timer that is to go off at a time
/// stamp does so the host's age too late: measured on 7.3.4, in a host that QEMU emulates. A rate of
/// zero means the host's of now; writing the time stamp has the difference to the host's computed.
fn start_time_stamps(processor: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    processor.set_tsc_khz(0)?;
    let zero = kvm_msr_entry {
        index: TSC,
        ..Default::default()
    };
    write_msrs(processor, &[zero])
}

/// Sets the local vector table as firmware does.
fn set_local_pins(processor: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut apic = processor.get_lapic()?;
    for (at, value) in LOCAL_PINS {
        for (register, byte) in apic.regs.iter_mut().skip(at).zip(value.to_le_bytes()) {
            *register = byte.cast_signed();
        }
    }
    processor.set_lapic(&apic)
}
