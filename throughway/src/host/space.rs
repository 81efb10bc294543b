//! An address space of an IOMMU, with the functions that are behind it.

use std::sync::Arc;

use assigned_pci::HostFunction;
use memory_map::{DmaTarget, Filter, IovaRange};

/// Makes a target of an address space that nothing is mapped in.
pub type MakeTarget = dyn Fn() -> Box<dyn DmaTarget> + Send + Sync;

/// An address space of an IOMMU: a container, or an IOAS.
pub struct Space {
    /// Called once, and again whenever the one before has been unregistered.
    pub target: Box<MakeTarget>,
    /// For people.
    pub name: String,
    /// Whose BARs its functions may reach.
    pub filter: Filter,
}

/// A function, with the place of its address space among all.
pub struct PartFunction {
    pub host: Arc<dyn HostFunction>,
    pub space: usize,
}

/// The addresses that are in both lists, which are sorted and disjoint.
pub fn common(a: &[IovaRange], b: &[IovaRange]) -> Vec<IovaRange> {
    a.iter()
        .flat_map(|a| b.iter().filter_map(|b| a.intersection(b)))
        .collect()
}

#[cfg(test)]
mod tests {
    use memory_map::Iova;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn only_what_all_allow_is_common() {
        let a = [range(0, 0xff), range(0x200, 0x2ff)];
        let b = [range(0x80, 0x27f)];
        assert_eq!(common(&a, &b), [range(0x80, 0xff), range(0x200, 0x27f)]);
    }
}
