//! One virtual machine of KVM's.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, MsrList, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::{AssignedFiles, Interrupts, MemorySlots, Processor};
use crate::platform::KVM_PAGES;

/// The page after KVM's three, for its identity map.
const IDENTITY_MAP: u64 = KVM_PAGES.raw() + 0x3000;
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// A call to KVM that failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} failed")]
pub struct KvmError {
    /// What was tried, for people.
    pub doing: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl KvmError {
    pub(crate) fn new(doing: &'static str, error: kvm_ioctls::Error) -> Self {
        Self {
            doing,
            source: io_error(error),
        }
    }
}

/// KVM's error as everybody else has it.
pub(crate) fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The file of one virtual machine, and what does not change about it.
#[derive(Debug)]
pub struct Vm {
    pub(crate) fd: Arc<VmFd>,
    pub(crate) cpuid: CpuId,
    pub(crate) msrs: MsrList,
    pub(crate) address_bits: u8,
    interrupts: Interrupts,
    at_power_on: Controllers,
}

/// The state of the interrupt controllers and of the timer.
#[derive(Debug)]
struct Controllers {
    chips: Vec<kvm_irqchip>,
    timer: kvm_pit_state2,
}

impl Vm {
    pub(crate) fn new(kvm: &Kvm, cpuid: CpuId, address_bits: u8) -> Result<Self, KvmError> {
        let fd = kvm
            .create_vm()
            .map_err(|error| KvmError::new("making a virtual machine", error))?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(|error| KvmError::new("giving KVM a page for an identity map", error))?;
        let pages = usize::try_from(KVM_PAGES.raw()).unwrap_or(usize::MAX);
        fd.set_tss_address(pages)
            .map_err(|error| KvmError::new("giving KVM pages for a task state", error))?;
        fd.create_irq_chip()
            .map_err(|error| KvmError::new("making the interrupt controllers", error))?;
        fd.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(|error| KvmError::new("making the timer", error))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(|error| KvmError::new("asking for the model-specific registers", error))?;
        let at_power_on = Controllers::read(&fd)?;
        let fd = Arc::new(fd);
        Ok(Self {
            interrupts: Interrupts::new(fd.clone()),
            fd,
            cpuid,
            msrs,
            address_bits,
            at_power_on,
        })
    }

    /// How wide a guest-physical address is, in bits.
    #[must_use]
    pub const fn address_bits(&self) -> u8 {
        self.address_bits
    }

    /// The machine's interrupts.
    #[must_use]
    pub const fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// Where files of assigned devices are announced, before the devices are opened.
    ///
    /// # Errors
    /// Where KVM has no `KVM_DEV_TYPE_VFIO`.
    pub fn assigned_files(&self) -> Result<AssignedFiles, KvmError> {
        AssignedFiles::new(&self.fd)
    }

    /// The consumer of the memory map that keeps the memory slots. One for a machine.
    #[must_use]
    pub fn memory_slots(&self) -> MemorySlots {
        let most = u32::try_from(self.fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        let read_only = self.fd.check_extension(Cap::ReadonlyMem);
        MemorySlots::new(self.fd.clone(), most, read_only, self.address_bits)
    }

    /// Makes processor number `number` of `count`, as it is at power-on.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn processor(&self, number: u8, count: u8) -> Result<Processor, KvmError> {
        Processor::new(self, number, count)
    }

    /// Makes the interrupt controllers and the timer what they were at power-on. No processor may
    /// run meanwhile.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn reset(&self) -> Result<(), KvmError> {
        for chip in &self.at_power_on.chips {
            self.fd
                .set_irqchip(chip)
                .map_err(|error| KvmError::new("resetting an interrupt controller", error))?;
        }
        self.fd
            .set_pit2(&self.at_power_on.timer)
            .map_err(|error| KvmError::new("resetting the timer", error))
    }
}

impl Controllers {
    fn read(fd: &VmFd) -> Result<Self, KvmError> {
        let mut chips = Vec::new();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            fd.get_irqchip(&mut chip)
                .map_err(|error| KvmError::new("reading an interrupt controller", error))?;
            chips.push(chip);
        }
        let timer = fd
            .get_pit2()
            .map_err(|error| KvmError::new("reading the timer", error))?;
        Ok(Self { chips, timer })
    }
}
