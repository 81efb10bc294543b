//! The simulated process's address space: which object an address shows.
//!
//! The numbers stand for nothing outside the simulation. No address is used twice, and there is
//! a page without anything behind it after each mapping.

use std::collections::BTreeMap;
use std::sync::Arc;

use memory_map::HostVa;

use crate::page::PAGE;
use crate::physical::PhysicalObject;

/// Where the first mapping lies.
const BASE: u64 = 0x7f00_0000_0000;

/// Names one mapping into the address space. Never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WindowId(u64);

/// What an address shows.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    /// By which mapping.
    pub window: WindowId,
    pub object: Arc<PhysicalObject>,
    /// Where in the object.
    pub offset: u64,
    /// How many bytes follow in that mapping, this one included.
    pub left: u64,
}

#[derive(Debug)]
struct Window {
    id: WindowId,
    object: Arc<PhysicalObject>,
    offset: u64,
    size: u64,
}

#[derive(Debug)]
pub(crate) struct AddressSpace {
    next: u64,
    next_id: u64,
    windows: BTreeMap<u64, Window>,
}

impl AddressSpace {
    pub fn new() -> Self {
        Self {
            next: BASE,
            next_id: 0,
            windows: BTreeMap::new(),
        }
    }

    /// Shows `size` bytes of `object` from `offset` on at a fresh address; `None` where there is
    /// no more room.
    pub fn map(
        &mut self,
        object: Arc<PhysicalObject>,
        offset: u64,
        size: u64,
    ) -> Option<(WindowId, HostVa)> {
        let va = self.next;
        let guard = va.checked_add(size)?.checked_next_multiple_of(PAGE)?;
        self.next = guard.checked_add(PAGE)?;
        let id = WindowId(self.next_id);
        self.next_id = self.next_id.checked_add(1)?;
        self.windows.insert(
            va,
            Window {
                id,
                object,
                offset,
                size,
            },
        );
        Some((id, HostVa::new(va)))
    }

    /// Takes a mapping away.
    pub fn unmap(&mut self, va: HostVa) {
        self.windows.remove(&va.raw());
    }

    /// What lies at `va`, if anything does.
    pub fn find(&self, va: HostVa) -> Option<Shown> {
        let (start, window) = self.windows.range(..=va.raw()).next_back()?;
        let into = va.raw().checked_sub(*start)?;
        let left = window.size.checked_sub(into).filter(|left| *left > 0)?;
        Some(Shown {
            window: window.id,
            object: Arc::clone(&window.object),
            offset: window.offset.checked_add(into)?,
            left,
        })
    }

    /// Whether a mapping is still there.
    pub fn is_live(&self, id: WindowId) -> bool {
        self.windows.values().any(|window| window.id == id)
    }

    /// How many mappings there are.
    pub fn len(&self) -> usize {
        self.windows.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physical::Storage;
    use crate::sparse::SparseMemory;

    #[test]
    fn guard_gaps_separate_mappings_and_nothing_is_used_twice() {
        let object = Arc::new(PhysicalObject {
            label: "ram".into(),
            base: 0,
            storage: Storage::Memory(SparseMemory::new(0x3000)),
            owner: None,
        });
        let mut space = AddressSpace::new();
        let (first, a) = space.map(Arc::clone(&object), 0x1000, 0x2000).unwrap();
        let (second, b) = space.map(Arc::clone(&object), 0, 0x3000).unwrap();
        assert!(b.raw() > a.raw() + 0x2000);
        let shown = space.find(HostVa::new(a.raw() + 0x1800)).unwrap();
        assert_eq!((shown.offset, shown.left), (0x2800, 0x800));
        assert!(space.find(HostVa::new(a.raw() + 0x2000)).is_none());
        space.unmap(a);
        assert!(space.find(a).is_none());
        assert!(!space.is_live(first));
        assert!(space.is_live(second));
        let (_, c) = space.map(object, 0, 0x3000).unwrap();
        assert!(c > b);
    }
}
