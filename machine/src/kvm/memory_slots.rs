//! KVM's memory slots as a consumer of the memory map.
//!
//! A slot is a piece of guest-physical address space with pages behind it: what the guest's
//! processors see without an exit. The map owns the consumer; each slot keeps a clone of its
//! backing's host address, so that no address goes away under KVM.
#![expect(
    unsafe_code,
    reason = "KVM has to be told the address of the memory behind a slot"
)]

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use memory_map::{
    Access, Backing, DmaTarget, Errno, GRANULE, HostAddress, Iova, IovaRange, MapRequest, Reason,
    TargetError, TargetLimits,
};

/// The largest slot in bytes: KVM counts its pages in a signed 32-bit number.
const LARGEST: u64 = 1 << 42;

/// The memory slots of one virtual machine. To be registered with
/// [`ConsumerKind::MemorySlots`](memory_map::ConsumerKind::MemorySlots).
#[derive(Debug)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    most: u32,
    read_only: bool,
    address_bits: u8,
    /// By where they begin.
    slots: BTreeMap<Iova, Slot>,
    /// Numbers below `next` that no slot has.
    free: Vec<u32>,
    next: u32,
}

#[derive(Debug)]
struct Slot {
    number: u32,
    range: IovaRange,
    /// Keeps the address alive.
    _host: HostAddress,
}

impl MemorySlots {
    pub(crate) const fn new(vm: Arc<VmFd>, most: u32, read_only: bool, address_bits: u8) -> Self {
        Self {
            vm,
            most,
            read_only,
            address_bits,
            slots: BTreeMap::new(),
            free: Vec::new(),
            next: 0,
        }
    }

    fn set(&self, region: kvm_userspace_memory_region) -> Result<(), Errno> {
        // SAFETY: the memory is that of a `HostAddress` whose mapping has at least this size, as
        // the map's contract says, and which the slot keeps until after it is taken away. No
        // reference is ever made into it (`host_memory`), so that what the guest does to it breaks
        // no assumption of the compiler.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|error| Errno::new(error.errno()))
    }
}

impl DmaTarget for MemorySlots {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        let size = 1_u64
            .checked_shl(self.address_bits.into())
            .ok_or(Errno::new(libc::ERANGE))?;
        let all = IovaRange::new(Iova::new(0), size).map_err(|_| Errno::new(libc::ERANGE))?;
        Ok(TargetLimits {
            page_size: GRANULE,
            allowed: vec![all],
            entry_limit: Some(self.most.into()),
            largest_mapping: LARGEST,
            read_only: self.read_only,
            device_memory: true,
            unmap_spans: false,
        })
    }

    fn needs_host_address(&self, _: &Backing) -> bool {
        true
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        let (Some(host), Some(address)) = (&request.host, request.host_va()) else {
            return Err(TargetError::Refused(Reason::NoHostAddress(Errno::new(
                libc::EFAULT,
            ))));
        };
        let number = match self.free.pop() {
            Some(number) => number,
            None if self.next < self.most => {
                self.next = self.next.saturating_add(1);
                self.next.saturating_sub(1)
            }
            None => {
                let limit = self.most.into();
                return Err(TargetError::Refused(Reason::EntryLimit { limit }));
            }
        };
        let set = self.set(kvm_userspace_memory_region {
            slot: number,
            flags: match request.access {
                Access::ReadOnly => KVM_MEM_READONLY,
                Access::ReadWrite => 0,
            },
            guest_phys_addr: request.iova.start().raw(),
            memory_size: request.iova.size(),
            userspace_addr: address.raw(),
        });
        if let Err(errno) = set {
            self.free.push(number);
            return Err(TargetError::kernel(errno));
        }
        let slot = Slot {
            number,
            range: request.iova,
            _host: host.clone(),
        };
        self.slots.insert(request.iova.start(), slot);
        Ok(())
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        // KVM takes away whole slots, one at a time.
        let Some(slot) = self
            .slots
            .get(&range.start())
            .filter(|slot| slot.range == range)
        else {
            return Err(TargetError::kernel(Errno::new(libc::ENOENT)));
        };
        let number = slot.number;
        self.set(kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: range.start().raw(),
            memory_size: 0,
            userspace_addr: 0,
        })
        .map_err(TargetError::kernel)?;
        self.slots.remove(&range.start());
        self.free.push(number);
        Ok(())
    }
}
