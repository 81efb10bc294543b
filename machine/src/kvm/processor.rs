//! A guest's processor.
//!
//! Whoever runs a [`Processor`] owns it; it runs in the thread that calls [`Processor::run`] until
//! somebody says that it shall stop. What the guest does that KVM does not do itself goes to the
//! [`Board`].

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs};
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
            match self.enter(board) {
                Ok(stop) => {
                    faults = 0;
                    if let Some(stop) = stop {
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
        while let Ok(entered) = self.enter(board) {
            if let Some(other) = entered {
                stop = other;
                break;
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        stop
    }

    /// Enters KVM once, and does what the guest wants and KVM leaves to us.
    #[expect(
        unsafe_code,
        reason = "the crate's exit for ports has the data and not how many accesses they are"
    )]
    fn enter(&mut self, board: &dyn Board) -> Result<Option<Stop>, kvm_ioctls::Error> {
        match self.fd.run()? {
            VcpuExit::IoIn(port, data) => {
                let mut data = NonNull::from(data);
                let size = element_size(self.fd.get_kvm_run());
                // SAFETY: the data lie in a page of their own, behind `kvm_run`, which is mapped as
                // long as the processor lives; nobody else has it before KVM is entered again.
                read_port(board, port, size, unsafe { data.as_mut() });
                Ok(None)
            }
            VcpuExit::IoOut(port, data) => {
                let data = NonNull::from(data);
                let size = element_size(self.fd.get_kvm_run());
                // SAFETY: as above.
                write_port(board, port, size, unsafe { data.as_ref() });
                Ok(None)
            }
            VcpuExit::MemoryFault { .. } => Err(kvm_ioctls::Error::new(libc::EFAULT)),
            other => Ok(carry_out(other, board)),
        }
    }
}

/// Of how many bytes each access is that the guest makes to a port.
#[expect(unsafe_code, reason = "what KVM says of an exit is a union")]
fn element_size(run: &kvm_run) -> usize {
    // SAFETY: this part of the union is plain numbers, whatever is in it, and after an exit for a
    // port it is what KVM has filled in.
    let io = unsafe { run.__bindgen_anon_1.io };
    usize::from(io.size.max(1))
}

/// The guest reads a port, in accesses of `size` bytes: a string instruction (`rep insb`) is handed
/// over whole, so that four bytes may be one access or four.
fn read_port(board: &dyn Board, port: u16, size: usize, data: &mut [u8]) {
    for element in data.chunks_exact_mut(size) {
        board.port(port, Access::Read(element));
    }
}

/// And writes one.
fn write_port(board: &dyn Board, port: u16, size: usize, data: &[u8]) {
    for element in data.chunks_exact(size) {
        board.port(port, Access::Write(element));
    }
}

/// Does what the guest wants and KVM leaves to us, but for ports.
fn carry_out(exit: VcpuExit<'_>, board: &dyn Board) -> Option<Stop> {
    match exit {
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Ports that count the accesses, and keep what is written.
    #[derive(Default)]
    struct Ports(Mutex<Vec<Vec<u8>>>);

    impl Board for Ports {
        fn port(&self, _: u16, access: Access<'_>) {
            let mut seen = self.0.lock().unwrap();
            match access {
                Access::Read(data) => {
                    data.fill(u8::try_from(seen.len()).unwrap());
                    seen.push(data.to_vec());
                }
                Access::Write(data) => seen.push(data.to_vec()),
            }
        }

        fn memory(&self, _: Gpa, _: Access<'_>) {}

        fn memory_fault(&self, _: u32) -> bool {
            false
        }
    }

    #[test]
    fn strings_of_ports_are_accessed_element_by_element() {
        let bytes = [1, 2, 3, 4];
        for (size, count) in [(1, 4), (2, 2), (4, 1)] {
            let ports = Ports::default();
            write_port(&ports, 0x3f8, size, &bytes);
            let seen = ports.0.into_inner().unwrap();
            assert_eq!(seen.len(), count);
            assert_eq!(seen.concat(), bytes);
            let ports = Ports::default();
            let mut read = [0xff; 4];
            read_port(&ports, 0x3f8, size, &mut read);
            let seen = ports.0.into_inner().unwrap();
            assert_eq!(seen.len(), count);
            assert_eq!(seen.concat(), read);
        }
    }

    #[test]
    fn the_size_of_an_access_is_what_kvm_says() {
        let mut run = kvm_run::default();
        run.__bindgen_anon_1.io.size = 2;
        run.__bindgen_anon_1.io.count = 2;
        assert_eq!(element_size(&run), 2);
        run.__bindgen_anon_1.io.size = 0;
        assert_eq!(element_size(&run), 1, "never no step at all");
    }
}
