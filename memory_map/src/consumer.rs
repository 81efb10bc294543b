//! The consumers of the map: what they say of themselves, and what they are asked to do.
//!
//! The embedder makes a consumer and hands it over at registration; the map owns it and calls it,
//! one call at a time, never under the lock that readers of the map take. It leaves when its
//! handle is dropped.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::{Access, Backing, Errno, HostAddress, HostVa, IovaRange, Reason, RegionKind};

/// An IOMMU address space that follows the map: a VFIO container, an IOAS.
///
/// It is asked to map and unmap whole pieces; it never sees a request that its own
/// [`limits`](Self::limits) rule out, two mappings that overlap, or an unmap that bisects a
/// mapping.
pub trait DmaTarget: Send {
    /// What the target can do. Asked at registration and again when
    /// [`RegionManager::limits_changed`](crate::RegionManager::limits_changed) is called.
    ///
    /// # Errors
    /// The errno with which the kernel refused to tell.
    fn limits(&self) -> Result<TargetLimits, Errno>;

    /// Whether a mapping of `backing` goes by its host address. If so, every [`MapRequest`] for
    /// it carries one.
    fn needs_host_address(&self, backing: &Backing) -> bool;

    /// Makes one mapping.
    ///
    /// # Errors
    /// See [`TargetError`]; the error says whether anything may be mapped all the same.
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError>;

    /// Takes down every mapping in `range`, which is made of whole mappings: one, or several if
    /// [`TargetLimits::unmap_spans`].
    ///
    /// # Errors
    /// [`TargetError::Refused`] where all of it is still mapped; [`TargetError::Unknown`] where
    /// that cannot be told. Either way the target is quarantined.
    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError>;
}

/// A consumer that shares guest RAM with another process, such as a vhost-user back-end. It is
/// shown regions marked as shareable RAM and nothing else: never a BAR.
pub trait SharingConsumer: Send {
    /// Shows one piece of RAM. The guest-physical range has the numbers of
    /// [`MapRequest::iova`].
    ///
    /// # Errors
    /// As for [`DmaTarget::map`].
    fn share(&mut self, request: &MapRequest) -> Result<(), TargetError>;

    /// Takes a piece back, exactly as it was shown.
    ///
    /// # Errors
    /// As for [`DmaTarget::unmap`].
    fn unshare(&mut self, range: IovaRange) -> Result<(), TargetError>;
}

/// What a target can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetLimits {
    /// Its smallest page in bytes: a power of two of at least [`GRANULE`](crate::GRANULE).
    pub page_size: u64,
    /// Where mappings may lie: sorted, disjoint. The gaps between two are reserved windows.
    pub allowed: Vec<IovaRange>,
    /// How many mappings it holds at the most, if that is limited.
    pub entry_limit: Option<u64>,
    /// The largest single mapping in bytes: a power of two of at least the page size. Longer
    /// pieces are cut at its multiples.
    pub largest_mapping: u64,
    /// Whether it can hold read-only mappings.
    pub read_only: bool,
    /// Whether it takes device memory at all.
    pub device_memory: bool,
    /// Whether one unmap may cover several adjacent mappings.
    pub unmap_spans: bool,
}

/// One mapping to be made.
#[derive(Debug, Clone)]
pub struct MapRequest {
    /// Where, in whole pages of the target.
    pub iova: IovaRange,
    /// What devices may do there.
    pub access: Access,
    /// What kind of region asks for it.
    pub kind: RegionKind,
    /// What is to be found there. A target that keeps the pages in use keeps a clone.
    pub backing: Backing,
    /// Where in the backing it starts, in bytes; a multiple of the target's page size.
    pub offset: u64,
    /// The backing's host address, if the target [needs one](DmaTarget::needs_host_address).
    pub host: Option<HostAddress>,
}

impl MapRequest {
    /// The host address of the first byte to be mapped, if the request carries one.
    #[must_use]
    pub fn host_va(&self) -> Option<HostVa> {
        self.host
            .as_ref()
            .and_then(|host| host.address().checked_add(self.offset))
    }
}

/// How a call to a target ended, if not well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Refused: nothing has changed.
    #[error("refused, nothing changed: {0}")]
    Refused(Reason),
    /// The backing was revoked: nothing is mapped.
    #[error("the backing was revoked")]
    Revoked,
    /// It cannot be told what is mapped. The target will be quarantined.
    #[error("the outcome is unknown: {0}")]
    Unknown(Errno),
}

impl TargetError {
    /// The kernel refused with an errno, and nothing has changed.
    #[must_use]
    pub fn kernel(errno: impl Into<Errno>) -> Self {
        Self::Refused(Reason::Kernel {
            errno: errno.into(),
            hint: None,
        })
    }
}

/// Names one registration of a consumer. Never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetId(pub(crate) u64);

impl fmt::Debug for TargetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TargetId({})", self.0)
    }
}

/// A consumer's name for people, such as `container 0`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetName(Arc<str>);

impl TargetName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: Into<Arc<str>>> From<T> for TargetName {
    fn from(name: T) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A mark on a region that filters go by, such as the device a BAR belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(Arc<str>);

impl<T: Into<Arc<str>>> From<T> for Label {
    fn from(label: T) -> Self {
        Self(label.into())
    }
}

/// Which device memory a target may see. RAM is always seen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Filter {
    /// All of it.
    #[default]
    All,
    /// None of it.
    RamOnly,
    /// Only regions that bear one of these labels.
    Labelled(BTreeSet<Label>),
}

impl Filter {
    /// Whether a region of `kind` with `label` may be seen.
    #[must_use]
    pub fn admits(&self, kind: RegionKind, label: Option<&Label>) -> bool {
        match (kind, self) {
            (RegionKind::Ram, _) | (_, Self::All) => true,
            (RegionKind::DeviceMemory, Self::RamOnly) => false,
            (RegionKind::DeviceMemory, Self::Labelled(labels)) => {
                label.is_some_and(|label| labels.contains(label))
            }
        }
    }
}

/// Cuts a target's devices off from the bus, for good: bus mastering off and held off, reset,
/// closed. Called once, after the map's locks are dropped, when the target is quarantined because
/// a mapping may be left that the map no longer wants.
pub trait CutOff: Send + Sync {
    /// Stops all DMA of the target's devices. It cannot fail: what it cannot do gently it does
    /// by closing the device.
    fn cut_off(&self, target: &TargetName, why: &Quarantine);
}

/// Why a target was quarantined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Quarantine {
    /// An unmap failed: what was mapped there may still be.
    #[error("unmapping {range} failed, it may still be mapped: {error}")]
    Unmap {
        /// What was to be unmapped.
        range: IovaRange,
        /// What the target said.
        error: TargetError,
    },
    /// A map ended in an unknown state and could not be taken back.
    #[error("mapping {range} ended in an unknown state: {error}")]
    Map {
        /// What was to be mapped.
        range: IovaRange,
        /// What the target said.
        error: TargetError,
    },
}

/// What kind of consumer follows the map. On the way down they are told in this order, on the
/// way up in the opposite one; host addresses go last and come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum ConsumerKind {
    /// An IOMMU.
    #[default]
    Iommu,
    /// The hypervisor's memory slots: what the guest's processors see. Like an IOMMU they hold
    /// no two mappings at one address, are limited in number
    /// ([`TargetLimits::entry_limit`]) and change none in place.
    MemorySlots,
    /// Another process with which RAM is shared.
    Sharing,
}

/// What a target is registered with.
#[derive(Clone)]
pub struct TargetOptions {
    /// For people, and the key in reports.
    pub name: TargetName,
    /// An IOMMU or memory slots; [`RegionManager::register_sharing`] sets its own.
    ///
    /// [`RegionManager::register_sharing`]: crate::RegionManager::register_sharing
    pub kind: ConsumerKind,
    /// Which device memory it may see.
    pub filter: Filter,
    /// How to cut its devices off if it must be quarantined.
    pub cut_off: Option<Arc<dyn CutOff>>,
}

impl TargetOptions {
    /// A target of that name that sees everything and has no devices to be cut off.
    #[must_use]
    pub fn new(name: impl Into<TargetName>) -> Self {
        Self {
            name: name.into(),
            kind: ConsumerKind::Iommu,
            filter: Filter::All,
            cut_off: None,
        }
    }
}

impl fmt::Debug for TargetOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetOptions")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("filter", &self.filter)
            .field("cut_off", &self.cut_off.is_some())
            .finish()
    }
}
