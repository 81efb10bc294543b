//! An IOMMU for tests.

use memory_map::{
    Backing, DmaTarget, Errno, Iova, IovaRange, MapRequest, TargetError, TargetLimits,
};

/// An IOMMU of 39 bits that takes everything and keeps nothing.
pub struct Narrow;

impl DmaTarget for Narrow {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        Ok(TargetLimits {
            page_size: 0x1000,
            allowed: vec![IovaRange::new(Iova::new(0), 1 << 39).unwrap()],
            entry_limit: None,
            largest_mapping: 1 << 30,
            read_only: true,
            device_memory: true,
            unmap_spans: true,
        })
    }

    fn needs_host_address(&self, _: &Backing) -> bool {
        false
    }

    fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
        Ok(())
    }

    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        Ok(())
    }
}
