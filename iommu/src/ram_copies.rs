//! Which RAM is mapped where, so that the next address space copies it instead of pinning it anew.
//!
//! One [`RamCopies`] is shared by the targets of a virtual machine. Each of them offers what it
//! has mapped, and takes its offer back **before** it unmaps: an offer that is being copied from
//! holds up its withdrawal, so that what is copied is what was offered, never what was mapped at
//! the same address afterwards. Nobody waits for anything but a copy of the very mapping that is
//! to go.
//!
//! ```text
//!   copying:     find the offer ─ hold it ─ IOMMU_IOAS_COPY ─ let go
//!   unmapping:   take the offer back (waits for who holds it) ─ IOMMU_IOAS_UNMAP
//! ```
//!
//! Device memory is never offered: the copy of a revoked BAR succeeds and maps nothing.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use memory_map::{Access, BackingId, Iova, MapRequest};
use parking_lot::{Mutex, RwLock};
use vfio_sys::{IoasId, IommufdId};

/// Which memory, of whose.
type Memory = (IommufdId, BackingId);

/// One mapping that may be copied.
#[derive(Debug)]
struct Source {
    ioas: IoasId,
    iova: Iova,
    /// Which part of the memory it is.
    offset: u64,
    size: u64,
    access: Access,
    /// Whether it is there. Held for reading while it is copied.
    there: RwLock<bool>,
}

impl Source {
    /// Where what `request` asks for is in it, if all of that is.
    fn holds(&self, request: &MapRequest) -> Option<Iova> {
        let ahead = request.offset.checked_sub(self.offset)?;
        let behind = self.size.checked_sub(ahead)?;
        let enough = request.access == Access::ReadOnly || self.access == Access::ReadWrite;
        (enough && request.iova.size() <= behind)
            .then(|| self.iova.checked_add(ahead))
            .flatten()
    }
}

/// The RAM that is mapped in the address spaces of an iommufd, or of several. Clones are handles
/// on the same one.
#[derive(Clone, Default)]
pub struct RamCopies(Arc<Mutex<HashMap<Memory, Vec<Arc<Source>>>>>);

impl RamCopies {
    /// Knows of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many mappings are offered.
    #[must_use]
    pub fn offers(&self) -> usize {
        self.0.lock().values().map(Vec::len).sum()
    }

    /// Has `copy` copy what `request` asks for, from one of the mappings that have it or more, and
    /// tells whether that succeeded. A mapping that went meanwhile is no reason not to try the next
    /// one.
    pub(crate) fn copy(
        &self,
        iommufd: IommufdId,
        request: &MapRequest,
        mut copy: impl FnMut(IoasId, Iova) -> io::Result<()>,
    ) -> bool {
        let all = self.0.lock();
        let mapped = all.get(&(iommufd, request.backing.id()));
        let sources: Vec<(Arc<Source>, Iova)> = mapped
            .into_iter()
            .flatten()
            .filter_map(|source| Some((Arc::clone(source), source.holds(request)?)))
            .collect();
        drop(all);
        for (source, iova) in sources {
            let there = source.there.read();
            if !*there {
                continue;
            }
            match copy(source.ioas, iova) {
                Ok(()) => return true,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                // It has to do with where it is to go; to map it will say what.
                Err(_) => return false,
            }
        }
        false
    }

    /// Offers what has been mapped, for as long as the offer is held.
    pub(crate) fn offer(&self, iommufd: IommufdId, ioas: IoasId, request: &MapRequest) -> Offer {
        let source = Arc::new(Source {
            ioas,
            iova: request.iova.start(),
            offset: request.offset,
            size: request.iova.size(),
            access: request.access,
            there: RwLock::new(true),
        });
        let memory = (iommufd, request.backing.id());
        let mut all = self.0.lock();
        all.entry(memory).or_default().push(Arc::clone(&source));
        drop(all);
        Offer {
            copies: self.clone(),
            memory,
            source,
        }
    }
}

impl fmt::Debug for RamCopies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamCopies")
            .field("offers", &self.offers())
            .finish()
    }
}

/// An offer, which is taken back by dropping it: when that is done, nobody copies the mapping any
/// more.
#[derive(Debug)]
pub(crate) struct Offer {
    copies: RamCopies,
    memory: Memory,
    source: Arc<Source>,
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut all = self.copies.0.lock();
        if let Some(sources) = all.get_mut(&self.memory) {
            sources.retain(|source| !Arc::ptr_eq(source, &self.source));
            if sources.is_empty() {
                all.remove(&self.memory);
            }
        }
        drop(all);
        // Whoever found it before this waits for it, or is waited for.
        *self.source.there.write() = false;
    }
}

#[cfg(test)]
#[path = "ram_copies_tests.rs"]
mod tests;
