//! The simulated kernel: one page table per consumer, which enforces what a consumer may rely on,
//! keeps its own account of who is alive, and fails the calls that it is told to fail.
//!
//! A [`World`](crate::World) creates it; the consumers, the backings and the host addresses that
//! the map is given hold clones. Nothing in here asks the map anything: what it says can be held
//! against the map. What goes against the contract is noted as a violation, not a panic, so that
//! a script can be cut down to the steps that matter.

use std::collections::BTreeMap;
use std::sync::Arc;

use memory_map::{
    Access, Backing, BackingId, BackingObject, ConsumerKind, CutOff, DmaTarget, Epoch, Errno,
    HostMapping, HostVa, IovaRange, MapRequest, Quarantine, Reason, RegionKind, SharingConsumer,
    TargetError, TargetLimits, TargetName,
};
use parking_lot::{Mutex, MutexGuard};

use crate::shape::{Addressing, Shape};
use crate::{CELL, GRANULE};

/// How a call is to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Refused, nothing has changed.
    Refused,
    /// A map: the backing is revoked, and nothing is mapped. Any other call: refused.
    Revoked,
    /// Done, and reported as unknown.
    UnknownButDone,
    /// Not done, and reported as unknown.
    UnknownNotDone,
    /// Done and reported as done, but the backing was revoked meanwhile.
    RevokedMeanwhile,
}

impl Fault {
    /// Every way to fail.
    pub const ALL: [Self; 5] = [
        Self::Refused,
        Self::Revoked,
        Self::UnknownButDone,
        Self::UnknownNotDone,
        Self::RevokedMeanwhile,
    ];
}

/// Which call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallKind {
    /// A map, or a share.
    Map,
    /// An unmap, or an unshare.
    Unmap,
    /// A backing's host address.
    MapHost,
    /// The limits of a target.
    Limits,
}

/// What a device finds at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Whose pages.
    pub backing: BackingId,
    /// Where in it, in bytes.
    pub offset: u64,
    /// What may be done there.
    pub access: Access,
}

/// One mapping in a page table; its first address is its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its last address.
    pub last: u64,
    /// What its first address shows.
    pub to: Translation,
    /// The backing's epoch when it was made.
    pub epoch: Epoch,
    host: Option<HostVa>,
}

/// The page table of one consumer.
#[derive(Debug)]
pub struct Table {
    /// What it holds.
    pub mappings: BTreeMap<u64, Mapping>,
    /// What a request may go by: the limits, and while they change those before.
    pub limits: Vec<TargetLimits>,
    /// For each cell whose last map failed: what was to be mapped, and why it is not.
    pub refused: BTreeMap<u64, (Translation, Reason)>,
    /// An unmap has failed: it must be told nothing more.
    pub dead: bool,
    /// It is being unregistered, or not yet registered, so a dead one may be tried once more.
    pub ending: bool,
    /// Whether it has held as many mappings as it can since the step began.
    pub was_full: bool,
    /// How often its devices were cut off.
    pub cut_offs: usize,
    addressing: Addressing,
    /// What kind of consumer it belongs to.
    pub kind: ConsumerKind,
    /// A map ended in an unknown state: there may be nothing to unmap.
    doubtful: Option<IovaRange>,
}

impl Table {
    /// What a device finds at `address`.
    #[must_use]
    pub fn translate(&self, address: u64) -> Option<(Translation, Epoch)> {
        let (start, mapping) = self.mappings.range(..=address).next_back()?;
        (mapping.last >= address).then(|| {
            let offset = mapping.to.offset + (address - start);
            let to = Translation {
                offset,
                ..mapping.to
            };
            (to, mapping.epoch)
        })
    }
}

/// A backing object that knows whether anybody may still need it.
#[derive(Debug)]
struct Object {
    key: u64,
    size: u64,
    kernel: Kernel,
}

#[derive(Debug)]
struct Host {
    address: HostVa,
    kernel: Kernel,
}

/// What the kernel's lock guards.
#[derive(Debug, Default)]
pub struct State {
    /// One for every consumer there ever was.
    pub tables: Vec<Table>,
    /// The host addresses that are alive, and the backing's number.
    pub hosts: BTreeMap<HostVa, u64>,
    /// Which calls of this step are to fail, by number.
    pub faults: Vec<(u32, Fault)>,
    /// How many calls there have been in this step.
    pub calls: u32,
    /// Which kinds they were of.
    pub log: Vec<CallKind>,
    /// Which of them failed.
    pub fired: Vec<(CallKind, Fault)>,
    /// Backings whose host address was refused in this step.
    pub host_failures: Vec<u64>,
    /// Mappings of this step that were revoked while they were made: of which table, where, of which
    /// backing, and in which epoch.
    pub revoked: Vec<(usize, u64, BackingId, Epoch)>,
    /// Map calls in this step.
    pub maps: u64,
    /// Unmap calls in this step.
    pub unmaps: u64,
    /// The maps and unmaps of this step in order: of which table, whether a map, and where.
    pub order: Vec<(usize, bool, IovaRange)>,
    /// What went against the contract.
    pub violations: Vec<String>,
    /// At the very end: to unmap what is not there is no error, so that nothing is kept for ever.
    pub lenient: bool,
    /// Off for scripts whose ranges are too long to be followed cell by cell.
    pub by_cell: bool,
    epochs: BTreeMap<BackingId, Epoch>,
    keys: BTreeMap<BackingId, u64>,
    next_host: u64,
    next_key: u64,
}

/// A handle on the simulated kernel.
#[derive(Debug, Clone, Default)]
pub struct Kernel(Arc<Mutex<State>>);

/// The number in every refusal.
pub const ERRNO: Errno = Errno::new(12);

impl Kernel {
    /// Its state. The map must not be called, nor a backing dropped, while this is held.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    /// A backing of `size` bytes.
    #[must_use]
    pub fn backing(&self, size: u64) -> Backing {
        let key = {
            let mut state = self.state();
            state.next_key += 1;
            state.next_key
        };
        let kernel = self.clone();
        let backing = Backing::new(Object { key, size, kernel });
        self.state().keys.insert(backing.id(), key);
        self.note_epoch(&backing);
        backing
    }

    /// Takes note that a backing's epoch may have advanced.
    pub fn note_epoch(&self, backing: &Backing) {
        self.state().epochs.insert(backing.id(), backing.epoch());
    }

    /// A new consumer, and the number of its table.
    #[must_use]
    pub fn driver(&self, shape: &Shape) -> Driver {
        let mut state = self.state();
        state.tables.push(Table {
            mappings: BTreeMap::new(),
            limits: vec![shape.limits.clone()],
            refused: BTreeMap::new(),
            dead: false,
            // Until it is registered: what was mapped is taken back if that fails.
            ending: true,
            was_full: false,
            cut_offs: 0,
            addressing: shape.addressing,
            kind: shape.kind,
            doubtful: None,
        });
        Driver {
            kernel: self.clone(),
            table: state.tables.len() - 1,
        }
    }

    /// Begins a step in which the calls numbered in `faults` fail.
    pub fn begin(&self, faults: &[(u32, Fault)]) {
        let mut state = self.state();
        state.faults.clear();
        state.faults.extend_from_slice(faults);
        state.calls = 0;
        state.log.clear();
        state.order.clear();
        state.maps = 0;
        state.unmaps = 0;
        state.fired.clear();
        state.host_failures.clear();
        state.revoked.clear();
        for table in &mut state.tables {
            let held = table.mappings.len() as u64;
            let limits = table.limits.last();
            table.refused.clear();
            table.was_full = limits.is_some_and(|l| l.entry_limit.is_some_and(|n| held >= n));
        }
    }
}

impl State {
    /// Whether a mapping made in `epoch` has been revoked since.
    #[must_use]
    pub fn is_stale(&self, backing: BackingId, epoch: Epoch) -> bool {
        self.epochs.get(&backing) != Some(&epoch)
    }

    /// Whether the backing's host address was refused in this step.
    #[must_use]
    pub fn host_failed(&self, backing: BackingId) -> bool {
        let key = self.keys.get(&backing);
        key.is_some_and(|key| self.host_failures.contains(key))
    }

    /// A mapping that was revoked while it was made must not stay as it was made, unless its target
    /// would not let go of it.
    #[must_use]
    pub fn left_revoked(&self) -> Option<String> {
        let mut revoked = self.revoked.iter();
        let left = revoked.find(|(number, start, backing, epoch)| {
            let table = &self.tables[*number];
            let mapping = table.mappings.get(start);
            let as_made = |m: &Mapping| m.to.backing == *backing && m.epoch == *epoch;
            !table.dead && mapping.is_some_and(as_made)
        });
        left.map(|(number, start, ..)| {
            format!("table {number}: revoked while it was made, and left at {start:#x}")
        })
    }

    /// Whether a mapping of it is left in any table.
    fn holds(&self, held: impl Fn(&Mapping) -> bool) -> bool {
        let mut tables = self.tables.iter();
        tables.any(|table| table.mappings.values().any(&held))
    }

    fn blame(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    fn fault(&mut self, kind: CallKind) -> Option<Fault> {
        let number = self.calls;
        self.calls += 1;
        self.log.push(kind);
        let found = self.faults.iter().find(|(at, _)| *at == number);
        let fault = found.map(|(_, fault)| *fault)?;
        self.fired.push((kind, fault));
        Some(fault)
    }

    fn check_map(&mut self, number: usize, request: &MapRequest) {
        let range = request.iova;
        let (start, last) = (range.start().raw(), range.last().raw());
        let key = request.backing.downcast_ref::<Object>().map(|o| o.key);
        let host = request.host.as_ref().map(|h| h.address());
        let host_is_good = host.is_none_or(|va| self.hosts.get(&va).copied() == key);
        let table = &self.tables[number];
        let held = table.mappings.len() as u64;
        let fits = |limits: &TargetLimits| {
            range.is_aligned(limits.page_size)
                && request.offset.is_multiple_of(limits.page_size)
                && range.size() <= limits.largest_mapping
                && limits.allowed.iter().any(|r| r.covers(&range))
                && limits.entry_limit.is_none_or(|limit| held < limit)
                && (limits.read_only || request.access == Access::ReadWrite)
                && (limits.device_memory || request.kind == RegionKind::Ram)
        };
        let needs = table.addressing.needs(key.unwrap_or(0));
        let below = table.mappings.range(..=last).next_back();
        let end = request.offset.checked_add(range.size());
        let wrong = [
            (table.dead, "map after quarantine"),
            (!table.limits.iter().any(fits), "map against its limits"),
            (
                below.is_some_and(|(_, m)| m.last >= start),
                "map over a mapping",
            ),
            (
                table.kind == ConsumerKind::Sharing && request.kind != RegionKind::Ram,
                "device memory shared",
            ),
            (
                end.is_none_or(|end| end > request.backing.size()),
                "map past the backing",
            ),
            (host.is_some() != needs, "host address not as asked for"),
            (!host_is_good, "host address is not of this backing, alive"),
        ];
        for (_, what) in wrong.iter().filter(|(is_wrong, _)| *is_wrong) {
            self.blame(format!("table {number}: {what}: {request:?}"));
        }
    }

    fn map(&mut self, number: usize, request: &MapRequest) -> Result<(), TargetError> {
        self.maps += 1;
        self.order.push((number, true, request.iova));
        let fault = self.fault(CallKind::Map);
        self.check_map(number, request);
        let backing = &request.backing;
        self.epochs.insert(backing.id(), backing.epoch());
        let to = Translation {
            backing: backing.id(),
            offset: request.offset,
            access: request.access,
        };
        let done = matches!(
            fault,
            None | Some(Fault::UnknownButDone | Fault::RevokedMeanwhile)
        );
        let (start, last) = (request.iova.start().raw(), request.iova.last().raw());
        let by_cell = self.by_cell;
        let table = &mut self.tables[number];
        table.doubtful = None;
        if done {
            let mapping = Mapping {
                last,
                to,
                epoch: backing.epoch(),
                host: request.host.as_ref().map(|h| h.address()),
            };
            table.mappings.insert(start, mapping);
            let held = table.mappings.len() as u64;
            table.was_full |= (table.limits.iter())
                .any(|limits| limits.entry_limit.is_some_and(|limit| held >= limit));
        }
        let why = match fault {
            Some(Fault::Revoked | Fault::RevokedMeanwhile) => Reason::Revoked,
            _ => Reason::Kernel {
                errno: ERRNO,
                hint: None,
            },
        };
        if by_cell {
            let mut offset = 0;
            while offset < request.iova.size() {
                let at = start + offset;
                let to = Translation {
                    offset: to.offset + offset,
                    ..to
                };
                if fault.is_some() {
                    table.refused.insert(at, (to, why.clone()));
                } else {
                    table.refused.remove(&at);
                }
                offset += CELL;
            }
        }
        match fault {
            None => Ok(()),
            Some(Fault::RevokedMeanwhile) => {
                let revoked = (number, start, backing.id(), backing.epoch());
                self.revoked.push(revoked);
                backing.advance_epoch();
                self.epochs.insert(backing.id(), backing.epoch());
                Ok(())
            }
            Some(Fault::Refused) => Err(TargetError::kernel(ERRNO)),
            Some(Fault::Revoked) => Err(TargetError::Revoked),
            Some(Fault::UnknownButDone | Fault::UnknownNotDone) => {
                table.doubtful = Some(request.iova);
                Err(TargetError::Unknown(ERRNO))
            }
        }
    }

    fn unmap(&mut self, number: usize, range: IovaRange) -> Result<(), TargetError> {
        self.unmaps += 1;
        self.order.push((number, false, range));
        let fault = self.fault(CallKind::Unmap);
        let (start, last) = (range.start().raw(), range.last().raw());
        let table = &mut self.tables[number];
        let doubtful = table.doubtful.take() == Some(range);
        let hit: Vec<(u64, u64)> = (table.mappings.iter())
            .filter(|(at, m)| **at <= last && m.last >= start)
            .map(|(&at, m)| (at, m.last))
            .collect();
        let whole = match (hit.first(), hit.last()) {
            (Some(first), Some(end)) => {
                let no_gap = hit.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0);
                first.0 == start && end.1 == last && no_gap
            }
            _ => doubtful || table.ending,
        };
        let spans = hit.len() <= 1 || table.limits.iter().any(|limits| limits.unmap_spans);
        let wrong = [
            (table.dead && !table.ending, "unmap after quarantine"),
            (!whole, "unmap bisects a mapping, has a gap or finds none"),
            (!spans, "one unmap spans several mappings"),
        ];
        let done = matches!(
            fault,
            None | Some(Fault::UnknownButDone | Fault::RevokedMeanwhile)
        );
        if done {
            for (at, _) in &hit {
                table.mappings.remove(at);
            }
        }
        let outcome = match fault {
            // As the kernel: to unmap what is not there is an error.
            None | Some(Fault::RevokedMeanwhile) if hit.is_empty() && !self.lenient => {
                Err(TargetError::Unknown(ERRNO))
            }
            None | Some(Fault::RevokedMeanwhile) => Ok(()),
            Some(Fault::Refused | Fault::Revoked) => Err(TargetError::kernel(ERRNO)),
            Some(_) => Err(TargetError::Unknown(ERRNO)),
        };
        table.dead |= outcome.is_err();
        for (_, what) in wrong.iter().filter(|(is_wrong, _)| *is_wrong) {
            self.blame(format!("table {number}: {what}: {range}"));
        }
        outcome
    }
}

/// What the map is given as a consumer.
#[derive(Debug)]
pub struct Driver {
    kernel: Kernel,
    /// The number of its table.
    pub table: usize,
}

impl DmaTarget for Driver {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        let mut state = self.kernel.state();
        if state.fault(CallKind::Limits).is_some() {
            return Err(ERRNO);
        }
        let limits = state.tables[self.table].limits.last().cloned();
        limits.ok_or(ERRNO)
    }

    fn needs_host_address(&self, backing: &Backing) -> bool {
        let key = backing.downcast_ref::<Object>().map_or(0, |o| o.key);
        self.kernel.state().tables[self.table].addressing.needs(key)
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.kernel.state().map(self.table, request)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.kernel.state().unmap(self.table, range)
    }
}

impl SharingConsumer for Driver {
    fn share(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.kernel.state().map(self.table, request)
    }

    fn unshare(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.kernel.state().unmap(self.table, range)
    }
}

/// Notes that a target's devices were cut off.
pub struct Cutter {
    /// Whose table to note it in.
    pub kernel: Kernel,
    /// Which table.
    pub table: usize,
}

impl CutOff for Cutter {
    fn cut_off(&self, _target: &TargetName, _why: &Quarantine) {
        self.kernel.state().tables[self.table].cut_offs += 1;
    }
}

impl std::fmt::Debug for Cutter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cutter({})", self.table)
    }
}

impl BackingObject for Object {
    fn size(&self) -> u64 {
        self.size
    }

    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        let mut state = self.kernel.state();
        if state.fault(CallKind::MapHost).is_some() {
            state.host_failures.push(self.key);
            return Err(ERRNO);
        }
        // What a quarantined target may still reach keeps its address, for ever if need be.
        let kept = state.tables.iter().any(|table| table.dead);
        if !kept && state.hosts.values().any(|key| *key == self.key) {
            state.blame(format!("backing {}: a second host address", self.key));
        }
        state.next_host += 1;
        let address = HostVa::new(0x7000_0000_0000 + state.next_host * GRANULE);
        state.hosts.insert(address, self.key);
        let kernel = self.kernel.clone();
        Ok(Box::new(Host { address, kernel }))
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let mut state = self.kernel.state();
        let key = Some(&self.key);
        if state.holds(|mapping| state.keys.get(&mapping.to.backing) == key) {
            let what = format!("backing {} freed while a device can reach it", self.key);
            state.blame(what);
        }
    }
}

impl HostMapping for Host {
    fn address(&self) -> HostVa {
        self.address
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut state = self.kernel.state();
        state.hosts.remove(&self.address);
        if state.holds(|mapping| mapping.host == Some(self.address)) {
            let what = format!("host address {} dropped under a mapping", self.address);
            state.blame(what);
        }
    }
}
