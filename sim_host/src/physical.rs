//! What lies on the simulated host's memory bus: RAM, and the BARs of functions.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use assigned_pci::BarIndex;

use crate::gate::Gate;
use crate::sparse::SparseMemory;

/// Where RAM starts on the bus.
const RAM_BASE: u64 = 0x1_0000_0000;
/// Where 32-bit BARs start, and where they end.
const BAR32_BASE: u64 = 0x8000_0000;
const BAR32_END: u64 = 0xf000_0000;
/// Where 64-bit BARs start.
const BAR64_BASE: u64 = 0x100_0000_0000;

/// Registers that act when they are accessed.
pub(crate) trait Registers: Send + Sync + fmt::Debug {
    fn size(&self) -> u64;
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
    fn reset(&self);
}

/// What answers accesses.
#[derive(Debug)]
pub(crate) enum Storage {
    Memory(SparseMemory),
    Registers(Arc<dyn Registers>),
}

/// Whose BAR an object is.
#[derive(Debug)]
pub(crate) struct BarOwner {
    pub function: Arc<str>,
    pub bar: BarIndex,
    pub gate: Arc<Gate>,
}

/// One object on the bus.
#[derive(Debug)]
pub(crate) struct PhysicalObject {
    /// For people.
    pub label: Arc<str>,
    /// Where it lies on the bus.
    pub base: u64,
    pub storage: Storage,
    /// Nothing for RAM.
    pub owner: Option<BarOwner>,
}

impl PhysicalObject {
    pub fn size(&self) -> u64 {
        match &self.storage {
            Storage::Memory(memory) => memory.size(),
            Storage::Registers(registers) => registers.size(),
        }
    }

    pub fn is_ram(&self) -> bool {
        self.owner.is_none()
    }

    /// Whether an access would be answered at this moment.
    pub fn answers(&self) -> bool {
        self.owner
            .as_ref()
            .is_none_or(|owner| owner.gate.decodes_memory())
    }

    /// Reads; what does not exist reads as all ones.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        match &self.storage {
            Storage::Memory(memory) => {
                if memory.read(offset, data).is_err() {
                    data.fill(0xff);
                }
            }
            Storage::Registers(registers) => registers.read(offset, data),
        }
    }

    /// Writes; what does not exist drops it.
    pub fn write(&self, offset: u64, data: &[u8]) {
        match &self.storage {
            Storage::Memory(memory) => {
                // Outside: nothing claims the write.
                let _ = memory.write(offset, data);
            }
            Storage::Registers(registers) => registers.write(offset, data),
        }
    }
}

/// The address windows of the bus, and who lies where.
#[derive(Debug)]
pub(crate) struct PhysicalBus {
    next_ram: u64,
    next_bar32: u64,
    next_bar64: u64,
    objects: BTreeMap<u64, Weak<PhysicalObject>>,
}

impl PhysicalBus {
    pub fn new() -> Self {
        Self {
            next_ram: RAM_BASE,
            next_bar32: BAR32_BASE,
            next_bar64: BAR64_BASE,
            objects: BTreeMap::new(),
        }
    }

    /// Room for RAM; `None` where there is no more.
    pub fn place_ram(&mut self, size: u64) -> Option<u64> {
        place(&mut self.next_ram, size, BAR64_BASE)
    }

    /// Room for a BAR; `None` where there is no more.
    pub fn place_bar(&mut self, size: u64, wide: bool) -> Option<u64> {
        if wide {
            place(&mut self.next_bar64, size, 1 << 46)
        } else {
            place(&mut self.next_bar32, size, BAR32_END)
        }
    }

    pub fn add(&mut self, object: &Arc<PhysicalObject>) {
        self.objects.retain(|_, object| object.strong_count() > 0);
        self.objects.insert(object.base, Arc::downgrade(object));
    }

    /// The object at a bus address, and where in it the address lies.
    pub fn find(&self, address: u64) -> Option<(Arc<PhysicalObject>, u64)> {
        let (base, object) = self.objects.range(..=address).next_back()?;
        let object = object.upgrade()?;
        let offset = address.checked_sub(*base)?;
        (offset < object.size()).then_some((object, offset))
    }
}

/// Takes `size` bytes at `next`, aligned to their own size, if they end below `end`.
fn place(next: &mut u64, size: u64, end: u64) -> Option<u64> {
    let alignment = size.checked_next_power_of_two()?.max(crate::page::PAGE);
    let base = next.checked_next_multiple_of(alignment)?;
    let after = base.checked_add(size)?;
    if after > end {
        return None;
    }
    *next = after;
    Some(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_by_address_while_they_live() {
        let mut bus = PhysicalBus::new();
        let base = bus.place_ram(0x2000).unwrap();
        let other = bus.place_ram(0x1000).unwrap();
        assert!(other >= base + 0x2000);
        let object = Arc::new(PhysicalObject {
            label: "ram".into(),
            base,
            storage: Storage::Memory(SparseMemory::new(0x2000)),
            owner: None,
        });
        bus.add(&object);
        assert_eq!(
            bus.find(base + 0x1fff).map(|(_, offset)| offset),
            Some(0x1fff)
        );
        assert!(bus.find(base + 0x2000).is_none());
        assert!(bus.find(base - 1).is_none());
        drop(object);
        assert!(bus.find(base).is_none());
    }

    #[test]
    fn the_window_of_32_bit_bars_ends() {
        let mut bus = PhysicalBus::new();
        assert!(bus.place_bar(0x4000_0000, false).is_some());
        assert!(bus.place_bar(0x4000_0000, false).is_none());
        assert!(bus.place_bar(0x4000_0000, true).is_some());
    }
}
