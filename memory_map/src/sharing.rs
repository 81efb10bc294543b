//! Sharing consumers, seen by the map as targets without limits.

use crate::{
    Backing, DmaTarget, Errno, GRANULE, Iova, IovaRange, MapRequest, SharingConsumer, TargetError,
    TargetLimits,
};

/// Gives a sharing consumer the shape of a target.
pub(crate) struct Sharing(pub(crate) Box<dyn SharingConsumer>);

impl DmaTarget for Sharing {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        Ok(TargetLimits {
            page_size: GRANULE,
            // All but the last page, which no RAM can lie in: a range cannot hold all 2^64.
            allowed: vec![IovaRange::of(
                Iova::new(0).raw(),
                u64::MAX.wrapping_sub(GRANULE),
            )],
            entry_limit: None,
            largest_mapping: 1 << 63,
            read_only: true,
            device_memory: false,
            unmap_spans: false,
        })
    }

    fn needs_host_address(&self, _backing: &Backing) -> bool {
        false
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.0.share(request)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.0.unshare(range)
    }
}
