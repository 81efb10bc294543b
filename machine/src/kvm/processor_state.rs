//! All that a processor is, to be put back at a reset.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::KvmError;

/// The time stamp counter, which goes on over a reset.
pub(super) const TSC: u32 = 0x10;
/// Whether guests may be run (`IA32_FEATURE_CONTROL`, Intel's processors).
const FEATURE_CONTROL: u32 = 0x3a;
/// How many registers KVM takes in one call, at least.
const AT_ONCE: usize = 64;

/// A processor's registers and what else KVM keeps of it.
#[derive(Debug)]
pub(super) struct ProcessorState {
    pub(super) registers: kvm_regs,
    pub(super) segments: kvm_sregs,
    extended: kvm_xsave,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    model_specific: Vec<kvm_msr_entry>,
    local_apic: kvm_lapic_state,
    events: kvm_vcpu_events,
    running: kvm_mp_state,
}

impl ProcessorState {
    /// Reads it. `msrs` are the model-specific registers that KVM knows; those that this processor
    /// does not have are left out.
    pub(super) fn read(processor: &VcpuFd, msrs: &[u32]) -> Result<Self, KvmError> {
        let failed = |error| KvmError::new("reading a processor's state", error);
        Ok(Self {
            registers: processor.get_regs().map_err(failed)?,
            segments: processor.get_sregs().map_err(failed)?,
            extended: processor.get_xsave().map_err(failed)?,
            extended_control: processor.get_xcrs().map_err(failed)?,
            debug: processor.get_debug_regs().map_err(failed)?,
            model_specific: read_msrs(processor, msrs).map_err(failed)?,
            local_apic: processor.get_lapic().map_err(failed)?,
            events: processor.get_vcpu_events().map_err(failed)?,
            running: processor.get_mp_state().map_err(failed)?,
        })
    }

    /// Makes the processor what it was. It must not run meanwhile.
    pub(super) fn write(&self, processor: &VcpuFd) -> Result<(), KvmError> {
        let failed = |error| KvmError::new("setting a processor's state", error);
        // A guest may have left while it ran guests of its own: that ends with this register, and
        // changes what the others may be.
        let features = self.model_specific.iter();
        let features: Vec<_> = features
            .filter(|entry| entry.index == FEATURE_CONTROL)
            .copied()
            .collect();
        write_msrs(processor, &features).map_err(failed)?;
        // What runs comes first, so that an interrupt controller that is set afterwards does not
        // wake a processor that is to sleep.
        processor.set_mp_state(self.running).map_err(failed)?;
        processor.set_sregs(&self.segments).map_err(failed)?;
        processor.set_regs(&self.registers).map_err(failed)?;
        write_xsave(processor, &self.extended).map_err(failed)?;
        processor.set_xcrs(&self.extended_control).map_err(failed)?;
        processor.set_debug_regs(&self.debug).map_err(failed)?;
        write_msrs(processor, &self.model_specific).map_err(failed)?;
        processor.set_lapic(&self.local_apic).map_err(failed)?;
        processor.set_vcpu_events(&self.events).map_err(failed)
    }
}

#[expect(
    unsafe_code,
    reason = "KVM may read past the struct where a process enabled dynamic features"
)]
fn write_xsave(processor: &VcpuFd, state: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads more than the struct only for features that the process has asked for with
    // arch_prctl, and this one asks for none. The state was read from the same kernel.
    unsafe { processor.set_xsave(state) }
}

fn entry(index: u32) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        ..Default::default()
    }
}

/// Reads those of the registers that can be read.
fn read_msrs(processor: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut found = Vec::new();
    let wanted: Vec<_> = indices
        .iter()
        .filter(|index| **index != TSC)
        .map(|index| entry(*index))
        .collect();
    let mut rest = wanted.as_slice();
    while let Some(chunk) = rest
        .get(..rest.len().min(AT_ONCE))
        .filter(|c| !c.is_empty())
    {
        let mut msrs = list(chunk)?;
        let read = processor.get_msrs(&mut msrs)?;
        found.extend(msrs.as_slice().iter().take(read).copied());
        // KVM stops at the first one that it cannot read.
        let skipped = usize::from(read < chunk.len());
        rest = rest.get(read.saturating_add(skipped)..).unwrap_or_default();
    }
    Ok(found)
}

/// Writes those of the registers that can be written. Some can only be read.
pub(super) fn write_msrs(
    processor: &VcpuFd,
    entries: &[kvm_msr_entry],
) -> Result<(), kvm_ioctls::Error> {
    let mut rest = entries;
    while let Some(chunk) = rest
        .get(..rest.len().min(AT_ONCE))
        .filter(|c| !c.is_empty())
    {
        let written = processor.set_msrs(&list(chunk)?)?;
        let skipped = usize::from(written < chunk.len());
        rest = rest
            .get(written.saturating_add(skipped)..)
            .unwrap_or_default();
    }
    Ok(())
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}
