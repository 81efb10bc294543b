//! An I/O address space (IOAS) of an iommufd as a DMA target.
//!
//! **How each kind of memory is mapped.** Whatever has a file is mapped by it, with no host
//! address at all: RAM by its memfd, a BAR by its dma-buf. Only RAM without a file is mapped by
//! its address. Device memory never is: the kernel refuses it, since it could not revoke it.
//! RAM that another target has mapped, through the same iommufd, is copied from there, so that it
//! is pinned and counted once ([`RamCopies`]); BARs are never copied, since the copy of a revoked
//! one succeeds and maps nothing.
//!
//! **One unmap, one mapping.** `IOMMU_IOAS_UNMAP` over several mappings is not atomic: it may
//! fail after a prefix of them is gone. So the target says that it cannot
//! ([`TargetLimits::unmap_spans`]), takes down one mapping by each call, and checks that the
//! kernel took down as many bytes as it has. Anything else means that the address space does not
//! hold what it is thought to hold.
//!
//! **What revocation does here.** Mapping a dma-buf that is revoked is refused with `ENODEV`, and
//! told to the map as [`TargetError::Revoked`]. A mapping that is revoked while it is made, or
//! afterwards, looks like any other: the map finds those by the backing's epoch. Taking a dead
//! mapping down is like taking down any other.
//!
//! **Who owns what.** The embedder owns the IOAS, and shares it, to attach devices while it is
//! registered. The memory map owns the target. The target keeps a clone of every request it has
//! mapped, and with it the backing, its file and its host address, so that what
//! [`IoAddressSpace::map`] demands holds by this file alone. A request whose mapping cannot be
//! taken down is kept for ever.
#![expect(
    unsafe_code,
    reason = "mapping memory by address for DMA is unsafe by nature; see IoasTarget::new"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use memory_map::{
    Backing, DmaTarget, Errno, GRANULE, Iova, IovaRange, MapRequest, NoFile, Reason, RegionKind,
    TargetError, TargetLimits,
};

use crate::ram_copies::{Offer, RamCopies};
use crate::{InvalidLargestMapping, IoAddressSpace, refusal};

/// An IOAS that follows a memory map: a certain kind of one, or `dyn IoAddressSpace`.
pub struct IoasTarget<I: IoAddressSpace + ?Sized> {
    ioas: Arc<I>,
    copies: RamCopies,
    largest_mapping: u64,
    /// What is mapped, or may be, by its first address.
    held: BTreeMap<Iova, Held>,
}

/// One mapping.
struct Held {
    request: MapRequest,
    /// That others may copy it; never of device memory.
    offer: Option<Offer>,
}

impl<I: IoAddressSpace + ?Sized> IoasTarget<I> {
    /// The largest mapping unless another is set: 1 GiB. Longer pieces of the map are mapped in
    /// several calls, between which progress is reported and work can be cancelled.
    pub const DEFAULT_LARGEST_MAPPING: u64 = 1 << 30;

    /// A target that maps through `ioas`, which nobody else maps through. Targets that are given
    /// the same `copies` copy each other's RAM if their address spaces are of one iommufd.
    ///
    /// # Safety
    /// Every backing of the map that the target is registered with must be such that devices may
    /// read and change its contents at any time without breaking what the compiler assumes: it
    /// is never memory that Rust references point into, whether it is reached by a file or by an
    /// address. A host address that it returns must be a real mapping of this process, as large
    /// as the backing says, that stays in place for as long as its
    /// [`HostMapping`](memory_map::HostMapping) lives. What `host_memory` has is of that kind. If
    /// the target is used without a map, each [`MapRequest`] must carry the host address of its
    /// own backing.
    #[must_use]
    pub unsafe fn new(ioas: Arc<I>, copies: RamCopies) -> Self {
        Self {
            ioas,
            copies,
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

    /// The address space.
    #[must_use]
    pub const fn ioas(&self) -> &Arc<I> {
        &self.ioas
    }

    /// How many mappings it holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Has the kernel make a mapping, by copying it if that can be.
    fn make(&self, request: &MapRequest) -> Result<(), TargetError> {
        let refused = |error: &io::Error| Err(refusal::of_ioas_map(error, request));
        let MapRequest { iova, access, .. } = *request;
        let device_memory = request.kind == RegionKind::DeviceMemory;
        let copied = !device_memory
            && self
                .copies
                .copy(self.ioas.iommufd(), request, |source, from| {
                    self.ioas.copy(iova, source, from, access)
                });
        if copied {
            return Ok(());
        }
        match request.backing.file() {
            Ok(file) => {
                let Some(offset) = file.offset.checked_add(request.offset) else {
                    return Err(TargetError::kernel(Errno::new(libc::EOVERFLOW)));
                };
                match self.ioas.map_file(iova, file.fd, offset, access) {
                    Ok(()) => Ok(()),
                    Err(error) => refused(&error),
                }
            }
            Err(NoFile::NotExported(why)) => Err(TargetError::Refused(Reason::NoDmaBufExport(why))),
            Err(NoFile::Anonymous) if device_memory => {
                let why = "whoever made its backing gave it no file".into();
                Err(TargetError::Refused(Reason::NoDmaBufExport(why)))
            }
            Err(NoFile::Anonymous) => {
                let Some(vaddr) = request.host_va() else {
                    let errno = Errno::new(libc::EFAULT);
                    return Err(TargetError::Refused(Reason::NoHostAddress(errno)));
                };
                // SAFETY: the bytes lie in the backing, as `map` has checked, and so in its host
                // mapping, which whoever made this target has vouched for: it stays in place
                // while its guard is held. The guard is held in `held` until the kernel says that
                // the mapping is gone.
                match unsafe { self.ioas.map(iova, vaddr, access) } {
                    Ok(()) => Ok(()),
                    Err(error) => refused(&error),
                }
            }
        }
    }

    /// Whether a mapping has a byte of `range`.
    fn touches(&self, range: IovaRange) -> bool {
        let below = self.held.range(..=range.last()).next_back();
        below.is_some_and(|(_, held)| held.request.iova.overlaps(&range))
    }

    /// Takes one mapping down in the kernel, which is to say that it had as many bytes.
    fn unmap_exactly(&self, range: IovaRange) -> Result<(), TargetError> {
        match self.ioas.unmap(range) {
            Ok(bytes) if bytes == range.size() => Ok(()),
            // Some of it was not mapped, or mapped by somebody else: what else is not as it
            // should be, nobody knows.
            Ok(_) => Err(TargetError::Unknown(Errno::new(libc::EIO))),
            Err(error) => Err(refusal::of_ioas_unmap(&error)),
        }
    }
}

impl<I: IoAddressSpace + ?Sized> DmaTarget for IoasTarget<I> {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        let ranges = self.ioas.ranges()?;
        // With no device attached there is no alignment; memory comes in pages all the same.
        let page_size = ranges.alignment.max(GRANULE);
        Ok(TargetLimits {
            page_size,
            allowed: ranges.allowed,
            entry_limit: None,
            largest_mapping: self.largest_mapping.max(page_size),
            read_only: true,
            device_memory: true,
            unmap_spans: false,
        })
    }

    fn needs_host_address(&self, backing: &Backing) -> bool {
        matches!(backing.file(), Err(NoFile::Anonymous))
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        let inside = request
            .offset
            .checked_add(request.iova.size())
            .is_some_and(|end| end <= request.backing.size());
        if !inside {
            return Err(TargetError::kernel(Errno::new(libc::EINVAL)));
        }
        self.make(request)?;
        let offer = (request.kind == RegionKind::Ram).then(|| {
            let (iommufd, ioas) = (self.ioas.iommufd(), self.ioas.id());
            self.copies.offer(iommufd, ioas, request)
        });
        let held = Held {
            request: request.clone(),
            offer,
        };
        let replaced = self.held.insert(request.iova.start(), held);
        // An address space that maps the same address twice is not what it should be. The older
        // mapping may still be there, so its memory is never given back.
        if let Some(Held { request, .. }) = replaced {
            std::mem::forget(request);
        }
        Ok(())
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        let touched = self.touches(range);
        match self.held.get_mut(&range.start()) {
            Some(held) if held.request.iova == range => {
                // Before the call: whoever is copying it copies what is there.
                held.offer = None;
            }
            // A part of a mapping, or more than one: the kernel might take down some of it.
            _ if touched => {
                return Err(TargetError::kernel(Errno::new(libc::EINVAL)));
            }
            // Nothing that this target has made. If it is there all the same (a map whose end is
            // unknown), it goes.
            _ => {}
        }
        self.unmap_exactly(range)?;
        self.held.remove(&range.start());
        Ok(())
    }
}

impl<I: IoAddressSpace + ?Sized> Drop for IoasTarget<I> {
    /// Takes down what is left, which is nothing if the map unregistered the target.
    fn drop(&mut self) {
        for Held { request, offer } in std::mem::take(&mut self.held).into_values() {
            drop(offer);
            if self.unmap_exactly(request.iova).is_err() {
                // The mapping may still be there: its memory stays for as long as the process.
                std::mem::forget(request);
            }
        }
    }
}

impl<I: IoAddressSpace + ?Sized> fmt::Debug for IoasTarget<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoasTarget")
            .field("ioas", &self.ioas.id())
            .field("largest_mapping", &self.largest_mapping)
            .field("held", &self.held.keys())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "ioas_target_tests.rs"]
mod tests;
