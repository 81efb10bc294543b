//! The memory map of a virtual machine, and the IOMMUs that follow it live.
//!
//! A guest decides where its RAM and its devices' BARs lie, and moves them while they are in
//! use. An assigned device addresses them all by guest-physical address, so the host's IOMMU has
//! to hold, at every moment, what the guest's map says. This crate is that map: it owns the
//! regions, works out what is visible where, and tells each consumer which mappings to make and
//! which to take down.
//!
//! ```
//! use memory_map::*;
//!
//! // What backs a region is the embedder's: here, something that only has a size.
//! #[derive(Debug)]
//! struct Bar;
//! impl BackingObject for Bar {
//!     fn size(&self) -> u64 { 0x1000 }
//!     fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> { Err(Errno::new(19)) }
//! }
//!
//! // An IOMMU that says what it is told.
//! struct Printer;
//! impl DmaTarget for Printer {
//!     fn limits(&self) -> Result<TargetLimits, Errno> {
//!         let all = IovaRange::new(Iova::new(0), 1 << 39).unwrap();
//!         Ok(TargetLimits {
//!             page_size: 0x1000,
//!             allowed: vec![all],
//!             entry_limit: None,
//!             largest_mapping: 1 << 30,
//!             read_only: true,
//!             device_memory: true,
//!             unmap_spans: true,
//!         })
//!     }
//!     fn needs_host_address(&self, _: &Backing) -> bool { false }
//!     fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
//!         println!("map   {}", request.iova);
//!         Ok(())
//!     }
//!     fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
//!         println!("unmap {range}");
//!         Ok(())
//!     }
//! }
//!
//! let map = RegionManager::new();
//! let iommu = map.register(Box::new(Printer), TargetOptions::new("iommu"))?;
//!
//! // The host plugs a device in, and the guest enables its BAR.
//! let mut change = map.change();
//! let bar = change.add(RegionSpec {
//!     name: "gpu BAR0".into(),
//!     range: GpaRange::new(Gpa::new(0xe000_0000), 0x1000)?,
//!     priority: Priority(0),
//!     kind: RegionKind::DeviceMemory,
//!     access: Access::ReadWrite,
//!     shareable: false,
//!     label: None,
//!     sub_mappings: vec![SubMapping {
//!         offset: 0,
//!         size: 0x1000,
//!         backing: Backing::new(Bar),
//!         backing_offset: 0,
//!     }],
//! });
//! change.commit()?;
//! let mut change = map.change();
//! change.enable(bar);
//! change.commit_guest()?;                            // map   0xe0000000-0xe0000fff
//!
//! // The guest moves it: one unmap, one map.
//! let mut change = map.change();
//! change.move_to(bar, Gpa::new(0xf000_0000));
//! let report = change.commit_guest()?;               // unmap 0xe0000000-0xe0000fff
//! assert_eq!((report.unmaps(), report.maps()), (1, 1)); // map   0xf0000000-0xf0000fff
//! assert_eq!(map.reach_of(iommu.id(), bar)?, Reach::Mapped);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Who owns what
//! The embedder creates one [`RegionManager`] per virtual machine and clones it freely. The
//! manager owns regions and consumers. A [`Backing`] is owned by all who hold a clone: the
//! regions that show it and the mappings made from it. A consumer lives until its
//! [`TargetHandle`] is dropped.
//!
//! # What always holds
//! 1. What the guest sees at an address is the enabled region of highest [`Priority`] there; of
//!    equals, the one that was added first.
//! 2. When a commit returns, every target that is not quarantined holds exactly the visible
//!    sub-mappings that its limits and its [`Filter`] allow, less what it refused; what it
//!    refused has its [`Reason`] in the [`Reach`].
//! 3. Nothing counts as mapped that is not: a ledger entry is made after a map has succeeded,
//!    and removed after an unmap has. The reach is derived from ledger and view.
//! 4. A page whose translation and access do not change is not unmapped, unless the mapping that
//!    holds it must be cut; then only that mapping is, and what remains of it is mapped again
//!    before anything else is done.
//! 5. All unmaps of a commit come before all other maps, in every target, so two BARs can swap.
//!    On the way down IOMMUs come before memory slots and those before sharing consumers, on the
//!    way up they come after them ([`ConsumerKind`]).
//! 6. Pages, and their host address, outlive every mapping made from them. If an unmap fails,
//!    the target is quarantined: it is told nothing more, its devices are [cut off](CutOff), and
//!    the pages it may still reach are kept for ever. So is a target that panics in a call; the
//!    panic goes on when the commit is done for all others.
//! 7. A mapping counts only if its backing's [`Epoch`] was the same before and after it was
//!    made.
//!
//! # Two classes of change
//! The *host's* ([`Change::commit`], registration) may be refused and is then undone whole. The
//! *guest's* ([`Change::commit_guest`]) cannot be refused, because a write to config space cannot
//! fail: what goes, goes; what comes and cannot be mapped is at its place, unavailable.
//!
//! # Threads
//! Changes take turns, first come, first served. When a commit returns, every target has been
//! told everything. Three things keep turns short:
//!
//! - A host's commit gives its turn up while a target makes a mapping, so a BAR can move while a
//!   terabyte of RAM is being mapped in pieces of [`TargetLimits::largest_mapping`]. The BAR
//!   waits for one such piece at the most, and only where it needs the same target, which is
//!   called by one at a time.
//! - Meanwhile nobody else may change the regions that this commit touches, or plan for addresses
//!   in which a mapping is just being made: who wants to, waits. What somebody else has changed in
//!   between is planned anew.
//! - Queries take a lock that is only held for short steps, never while a consumer, a backing, a
//!   watcher, a subscriber or a cut-off handle is called. They do not wait for the kernel.
//!
//! A config write or a reset of a device happens outside of the map, before or after a commit. The
//! order of locks is: an assigned function's, the turn, the state, a target's. A consumer or a
//! watcher must not change the map it is called from.
//!
//! # What this crate does not do
//! It opens no files, makes no system calls and contains no `unsafe`: host addresses are numbers
//! here. It does not read or write memory, and does not dispatch the guest's own accesses, beyond
//! saying which region answers ([`RegionManager::lookup`]).

#![forbid(unsafe_code)]

mod address;
mod addresses;
mod backing;
mod change;
mod commit;
mod consumer;
mod errno;
mod layout;
mod ledger;
mod manager;
mod mapping;
mod pages;
mod plan;
mod planned;
mod query;
mod reach;
mod region;
mod registration;
mod sharing;
mod state;
mod stretches;
mod subscription;
mod sync;
mod translation;
mod turn;
mod undo;
mod up;
mod view;

pub use address::{Address, AddressRange, Gpa, GpaRange, HostVa, Iova, IovaRange, RangeError};
pub use backing::{
    Backing, BackingFile, BackingId, BackingObject, Epoch, HostAddress, HostMapping, NoFile,
};
pub use change::{Action, Change, ChangeError, InvalidChange, MappingChange, Progress, Report};
pub use consumer::{
    ConsumerKind, CutOff, DmaTarget, Filter, Label, MapRequest, Quarantine, SharingConsumer,
    TargetError, TargetId, TargetLimits, TargetName, TargetOptions,
};
pub use errno::Errno;
pub use manager::{RegionInfo, RegionManager, ViewSegment};
pub use reach::{Missing, Reach, ReachEntry, Reason};
pub use region::{
    Access, DisabledBecause, GRANULE, Priority, RegionId, RegionKind, RegionName, RegionSpec,
    SubMapping,
};
pub use registration::TargetHandle;
pub use subscription::{ReachChanges, ReachSubscription};
