//! A type1 container as a DMA target.
//!
//! Who owns what: the embedder owns the container, and shares it, to attach groups while it is
//! registered. The memory map owns the target, and a host address for as long as some target
//! needs it. The target in turn keeps a clone of every request it has mapped, and with it the
//! backing and the host address, so that what [`Type1Container::map_dma`] demands holds by this
//! file alone: no address goes away before the IOMMU mapping that was made from it. A request
//! whose mapping cannot be taken down is kept for ever.
#![expect(
    unsafe_code,
    reason = "mapping memory for DMA is unsafe by nature; see Type1Target::new"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use memory_map::{
    Backing, DmaTarget, Errno, GRANULE, Iova, IovaRange, MapRequest, Reason, TargetError,
    TargetLimits,
};

use crate::{Type1Container, refusal};

/// A type1 v2 container that follows a memory map.
pub struct Type1Target<C: Type1Container> {
    container: Arc<C>,
    largest_mapping: u64,
    /// What is mapped, or may be, by its first address.
    held: BTreeMap<Iova, MapRequest>,
}

/// A size that no target can have as its largest mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a largest mapping of {bytes:#x} bytes: it must be a power of two of at least {GRANULE:#x}"
)]
pub struct InvalidLargestMapping {
    /// The size that was given.
    pub bytes: u64,
}

impl InvalidLargestMapping {
    /// `bytes`, if a target can have that as its largest mapping.
    pub(crate) fn check(bytes: u64) -> Result<u64, Self> {
        if bytes.is_power_of_two() && bytes >= GRANULE {
            Ok(bytes)
        } else {
            Err(Self { bytes })
        }
    }
}

impl<C: Type1Container> Type1Target<C> {
    /// The largest mapping unless another is set: 1 GiB. Longer pieces of the map are mapped in
    /// several calls, between which progress is reported and work can be cancelled.
    pub const DEFAULT_LARGEST_MAPPING: u64 = 1 << 30;

    /// A target that maps through `container`, which nobody else maps through.
    ///
    /// # Safety
    /// Every backing of the map that the target is registered with must be such that the host
    /// address it returns is a real mapping of this process, as large as the backing says, that
    /// stays in place for as long as its [`HostMapping`](memory_map::HostMapping) lives, and
    /// whose contents devices may read and change at any time without breaking what the compiler
    /// assumes: never memory that Rust references point into. What `host_memory` has is of that
    /// kind. If the target is used without a map, each [`MapRequest`] must carry the host address
    /// of its own backing.
    #[must_use]
    pub unsafe fn new(container: Arc<C>) -> Self {
        Self {
            container,
            largest_mapping: Self::DEFAULT_LARGEST_MAPPING,
            held: BTreeMap::new(),
        }
    }

    /// The same with another largest mapping, in bytes.
    ///
    /// # Errors
    /// [`InvalidLargestMapping`] unless it is a power of two of at least [`GRANULE`].
    pub fn with_largest_mapping(mut self, bytes: u64) -> Result<Self, InvalidLargestMapping> {
        self.largest_mapping = InvalidLargestMapping::check(bytes)?;
        Ok(self)
    }

    /// The container.
    #[must_use]
    pub const fn container(&self) -> &Arc<C> {
        &self.container
    }

    /// How many mappings it holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Takes `range` down in the container, which is to say that it had as many bytes.
    fn unmap_exactly(&self, range: IovaRange) -> Result<(), TargetError> {
        match self.container.unmap_dma(range) {
            Ok(bytes) if bytes == range.size() => Ok(()),
            // Some of it was not mapped, or mapped by somebody else: what else is not as it
            // should be, nobody knows.
            Ok(_) => Err(TargetError::Unknown(Errno::new(libc::EIO))),
            Err(error) => Err(refusal::of_unmap(&error)),
        }
    }
}

/// The whole of a 64-bit space, for kernels that do not tell the allowed ranges (before Linux
/// 5.4): without the MSI window on x86, which they would map and never translate.
fn untold_ranges() -> Vec<IovaRange> {
    const LAST: u64 = u64::MAX - GRANULE;
    let ranges: &[(u64, u64)] = if cfg!(target_arch = "x86_64") {
        &[(0, 0xfedf_ffff), (0xfef0_0000, LAST)]
    } else {
        &[(0, LAST)]
    };
    ranges
        .iter()
        .filter_map(|(start, last)| {
            IovaRange::from_inclusive(Iova::new(*start), Iova::new(*last)).ok()
        })
        .collect()
}

impl<C: Type1Container> DmaTarget for Type1Target<C> {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        let info = self.container.info()?;
        // What the kernel wants is that nothing is finer than its finest page. A kernel that
        // tells of none has pages of its processor's size.
        let finest = info.page_sizes & info.page_sizes.wrapping_neg();
        let page_size = finest.max(GRANULE);
        // The kernel counts what it has left, so what is held here comes on top: the sum stays
        // the same while mappings come and go.
        let held = self.held.len() as u64;
        let entry_limit = info
            .entries_left
            .map(|left| u64::from(left).saturating_add(held));
        let allowed = if info.allowed.is_empty() {
            untold_ranges()
        } else {
            info.allowed
        };
        Ok(TargetLimits {
            page_size,
            allowed,
            entry_limit,
            largest_mapping: self.largest_mapping.max(page_size),
            read_only: true,
            device_memory: true,
            unmap_spans: true,
        })
    }

    fn needs_host_address(&self, _backing: &Backing) -> bool {
        true
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        let no_address = |raw| TargetError::Refused(Reason::NoHostAddress(Errno::new(raw)));
        let inside = request
            .offset
            .checked_add(request.iova.size())
            .is_some_and(|end| end <= request.backing.size());
        if !inside {
            return Err(TargetError::kernel(Errno::new(libc::EINVAL)));
        }
        let vaddr = request.host_va().ok_or_else(|| no_address(libc::EFAULT))?;
        // SAFETY: the bytes lie in the backing, as has been checked, and so in its host mapping,
        // which whoever made this target has vouched for: it stays in place while its guard is
        // held. The guard is held in `held` until the container says that the mapping is gone.
        let mapped = unsafe { self.container.map_dma(request.iova, vaddr, request.access) };
        if let Err(error) = mapped {
            return Err(refusal::of_map(&error, request));
        }
        let replaced = self.held.insert(request.iova.start(), request.clone());
        // A container that maps the same address twice is not what it should be. The older
        // mapping may still be there, so its address is never given back.
        std::mem::forget(replaced);
        Ok(())
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.unmap_exactly(range)?;
        let gone: Vec<Iova> = self
            .held
            .range(range.start()..=range.last())
            .map(|(iova, _)| *iova)
            .collect();
        for iova in gone {
            self.held.remove(&iova);
        }
        Ok(())
    }
}

impl<C: Type1Container> Drop for Type1Target<C> {
    /// Takes down what is left, which is nothing if the map unregistered the target.
    fn drop(&mut self) {
        for request in std::mem::take(&mut self.held).into_values() {
            if self.unmap_exactly(request.iova).is_err() {
                // The mapping may still be there: its memory stays for as long as the process.
                std::mem::forget(request);
            }
        }
    }
}

impl<C: Type1Container> fmt::Debug for Type1Target<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Type1Target")
            .field("largest_mapping", &self.largest_mapping)
            .field("held", &self.held.keys())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "type1_target_tests.rs"]
mod tests;
