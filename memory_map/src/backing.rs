//! What lies behind a region: an object with pages, known by identity.
//!
//! The embedder creates a [`Backing`] from its own [`BackingObject`] (a memfd, a device's BAR);
//! regions and every mapping made from it hold clones. The object ends with the last of them, so
//! no freed memory stays reachable by a device.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Errno, HostVa};

/// The embedder's side of a backing.
pub trait BackingObject: Any + Send + Sync + fmt::Debug {
    /// Size in bytes. It never changes, and is asked for once.
    fn size(&self) -> u64;

    /// Makes the whole object addressable in this process, for consumers that map by host
    /// address. Called at most once at a time for one backing; the address is kept until no
    /// mapping and no consumer needs it.
    ///
    /// # Errors
    /// The errno of the refusal.
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno>;

    /// The file that the object lies in, for consumers that map by file and offset: a memfd, or
    /// a device's dma-buf, which may be exported at the first call. Called while mapping, never
    /// under the map's lock; the file stays open for as long as the object lives.
    ///
    /// # Errors
    /// Why there is none. Unless a backing says otherwise, it is memory without a file.
    fn file(&self) -> Result<BackingFile<'_>, NoFile> {
        Err(NoFile::Anonymous)
    }
}

/// Where in a file a backing lies.
#[derive(Debug, Clone, Copy)]
pub struct BackingFile<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Where in it the backing's first byte is, in bytes.
    pub offset: u64,
}

/// Why a backing has no file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoFile {
    /// It is memory of this process that lies in no file: it can be mapped by its address.
    #[error("it lies in no file")]
    Anonymous,
    /// It is a device's, and the device exports no dma-buf for it.
    #[error("{0}")]
    NotExported(Arc<str>),
}

/// A backing's pages at a host address. Dropping it takes the address away.
///
/// The address is there for the kernel's mapping calls. Nobody reads or writes device memory
/// through it: a device that stops decoding answers with SIGBUS.
pub trait HostMapping: Send + Sync + fmt::Debug {
    /// Where the object's first byte lies.
    fn address(&self) -> HostVa;
}

/// Keeps a backing's host address alive for as long as it, or a clone, is held.
#[derive(Clone)]
pub struct HostAddress(Arc<dyn HostMapping>);

impl HostAddress {
    pub(crate) fn new(mapping: Box<dyn HostMapping>) -> Self {
        Self(mapping.into())
    }

    /// Where the backing's first byte lies.
    #[must_use]
    pub fn address(&self) -> HostVa {
        self.0.address()
    }
}

impl fmt::Debug for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostAddress({})", self.0.address())
    }
}

/// The identity of a backing: unique in this process, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackingId(u64);

/// How often the kernel may have revoked what was mapped from a backing. A mapping made in one
/// epoch is dead, or may be, in the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

struct Inner {
    id: BackingId,
    epoch: AtomicU64,
    /// Asked for once, so that the embedder is not called under the map's lock.
    size: u64,
    object: Box<dyn BackingObject>,
}

/// A cloneable handle on a backing object, with its identity and its revocation epoch.
#[derive(Clone)]
pub struct Backing(Arc<Inner>);

impl Backing {
    /// Gives `object` an identity.
    #[must_use]
    pub fn new(object: impl BackingObject) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(Arc::new(Inner {
            id: BackingId(NEXT.fetch_add(1, Ordering::Relaxed)),
            epoch: AtomicU64::new(0),
            size: object.size(),
            object: Box::new(object),
        }))
    }

    /// The identity, the same for every clone.
    #[must_use]
    pub fn id(&self) -> BackingId {
        self.0.id
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The current revocation epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.0.epoch.load(Ordering::Acquire))
    }

    /// Says that the kernel may have revoked what was mapped from this backing. A map that is
    /// under way meanwhile does not count. To have existing mappings redone as well, use
    /// [`Change::revoke`](crate::Change::revoke), which calls this.
    pub fn advance_epoch(&self) {
        self.0.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// The embedder's object, if it is a `T`.
    #[must_use]
    pub fn downcast_ref<T: BackingObject>(&self) -> Option<&T> {
        let object: &dyn Any = &*self.0.object;
        object.downcast_ref()
    }

    /// The file that it lies in.
    ///
    /// # Errors
    /// Why there is none.
    pub fn file(&self) -> Result<BackingFile<'_>, NoFile> {
        self.0.object.file()
    }

    pub(crate) fn map_host(&self) -> Result<HostAddress, Errno> {
        self.0.object.map_host().map(HostAddress::new)
    }
}

impl PartialEq for Backing {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for Backing {}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backing")
            .field("id", &self.0.id.0)
            .field("epoch", &self.epoch().0)
            .field("object", &self.0.object)
            .finish()
    }
}
