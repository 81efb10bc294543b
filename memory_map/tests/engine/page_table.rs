//! A target that enforces what a target may rely on, and whose every call can be made to fail.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use memory_map::{
    Access, Backing, BackingId, BackingObject, DmaTarget, Errno, HostMapping, HostVa, Iova,
    IovaRange, MapRequest, TargetError, TargetLimits,
};
use parking_lot::Mutex;

pub const PAGE: u64 = 0x1000;

/// How often backings were made addressable, and how many of them are.
#[derive(Debug, Default)]
pub struct Addresses {
    pub made: AtomicUsize,
    pub held: AtomicUsize,
}

#[derive(Debug)]
pub struct Pages {
    size: u64,
    addresses: Arc<Addresses>,
}

#[derive(Debug)]
struct Mapped(Arc<Addresses>);

impl HostMapping for Mapped {
    fn address(&self) -> HostVa {
        HostVa::new(0x7f00_0000_0000)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BackingObject for Pages {
    fn size(&self) -> u64 {
        self.size
    }

    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        self.addresses.made.fetch_add(1, Ordering::SeqCst);
        self.addresses.held.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Mapped(self.addresses.clone())))
    }
}

/// A backing of `pages` pages.
pub fn backing(pages: u64, addresses: &Arc<Addresses>) -> Backing {
    Backing::new(Pages {
        size: pages * PAGE,
        addresses: addresses.clone(),
    })
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub last: u64,
    pub backing: BackingId,
    pub offset: u64,
    pub access: Access,
}

/// How a call is to fail.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Refused, nothing changed.
    Refused,
    /// The backing is revoked.
    Revoked,
    /// Done, but reported as unknown.
    UnknownButDone,
    /// Not done, and reported as unknown.
    UnknownNotDone,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Map(u64, u64),
    Unmap(u64, u64),
}

#[derive(Debug)]
pub struct Table {
    pub entries: BTreeMap<u64, Entry>,
    pub limits: TargetLimits,
    pub by_address: bool,
    pub calls: Vec<Call>,
    /// Fails the call of that number, counted from the moment this is set.
    pub fail_in: Option<(usize, Fault)>,
    /// Fails every map.
    pub refuse_maps: Option<TargetError>,
    /// Called during every map, before it takes effect.
    pub during_map: Option<fn(&MapRequest)>,
}

/// A handle on a table that stays with the test when the target is registered.
#[derive(Debug, Clone)]
pub struct PageTable(pub Arc<Mutex<Table>>);

pub fn limits() -> TargetLimits {
    TargetLimits {
        page_size: PAGE,
        allowed: vec![
            IovaRange::from_inclusive(Iova::new(0), Iova::new(0xffff_ffff_ffff)).unwrap(),
        ],
        entry_limit: None,
        largest_mapping: 1 << 30,
        read_only: true,
        device_memory: true,
        unmap_spans: false,
    }
}

impl PageTable {
    pub fn new(limits: TargetLimits) -> Self {
        Self(Arc::new(Mutex::new(Table {
            entries: BTreeMap::new(),
            limits,
            by_address: true,
            calls: Vec::new(),
            fail_in: None,
            refuse_maps: None,
            during_map: None,
        })))
    }

    pub fn boxed(&self) -> Box<Self> {
        Box::new(self.clone())
    }

    /// What a device finds at an address: backing, offset in it, access.
    pub fn translate(&self, address: u64) -> Option<(BackingId, u64, Access)> {
        let table = self.0.lock();
        let (start, entry) = table.entries.range(..=address).next_back()?;
        (entry.last >= address).then(|| {
            let offset = entry.offset + (address - start);
            (entry.backing, offset, entry.access)
        })
    }

    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().calls)
    }

    pub fn len(&self) -> usize {
        self.0.lock().entries.len()
    }

    pub fn fail_in(&self, calls: usize, fault: Fault) {
        self.0.lock().fail_in = Some((calls, fault));
    }
}

fn errno() -> Errno {
    Errno::new(12)
}

impl Table {
    fn due(&mut self) -> Option<Fault> {
        let (left, _) = self.fail_in.as_mut()?;
        if *left > 0 {
            *left -= 1;
            return None;
        }
        self.fail_in.take().map(|(_, fault)| fault)
    }

    fn map(&mut self, request: &MapRequest) {
        let (start, last) = (request.iova.start().raw(), request.iova.last().raw());
        assert!(request.iova.is_aligned(self.limits.page_size), "misaligned");
        assert!(request.iova.size() <= self.limits.largest_mapping, "large");
        assert!(
            self.limits.allowed.iter().any(|r| r.covers(&request.iova)),
            "reserved"
        );
        assert!(
            self.entries
                .range(..=last)
                .next_back()
                .is_none_or(|(_, entry)| entry.last < start),
            "{} overlaps",
            request.iova
        );
        let held = u64::try_from(self.entries.len()).unwrap();
        assert!(self.limits.entry_limit.is_none_or(|limit| held < limit));
        assert_eq!(request.host.is_some(), self.by_address);
        self.entries.insert(
            start,
            Entry {
                last,
                backing: request.backing.id(),
                offset: request.offset,
                access: request.access,
            },
        );
    }

    fn unmap(&mut self, range: IovaRange) {
        let (start, last) = (range.start().raw(), range.last().raw());
        let before = self.entries.range(..start).next_back();
        assert!(before.is_none_or(|(_, e)| e.last < start), "bisects");
        let hit: Vec<u64> = self.entries.range(start..=last).map(|(&s, _)| s).collect();
        assert!(!hit.is_empty(), "{range} unmaps nothing");
        assert!(self.limits.unmap_spans || hit.len() == 1, "{range} spans");
        let mut next = start;
        for at in hit {
            let entry = self.entries.remove(&at).unwrap();
            assert!(entry.last <= last, "bisects");
            assert_eq!(at, next, "{range} has a gap");
            next = entry.last.wrapping_add(1);
        }
        assert_eq!(next, last.wrapping_add(1));
    }
}

impl DmaTarget for PageTable {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        Ok(self.0.lock().limits.clone())
    }

    fn needs_host_address(&self, _backing: &Backing) -> bool {
        self.0.lock().by_address
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        let mut table = self.0.lock();
        let range = request.iova;
        let call = Call::Map(range.start().raw(), range.last().raw());
        table.calls.push(call);
        if let Some(during) = table.during_map {
            during(request);
        }
        if let Some(error) = &table.refuse_maps {
            return Err(error.clone());
        }
        match table.due() {
            None => table.map(request),
            Some(Fault::Refused) => return Err(TargetError::kernel(errno())),
            Some(Fault::Revoked) => return Err(TargetError::Revoked),
            Some(Fault::UnknownNotDone) => return Err(TargetError::Unknown(errno())),
            Some(Fault::UnknownButDone) => {
                table.map(request);
                return Err(TargetError::Unknown(errno()));
            }
        }
        Ok(())
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        let mut table = self.0.lock();
        let call = Call::Unmap(range.start().raw(), range.last().raw());
        table.calls.push(call);
        // After a map that ended in an unknown state, there may be nothing to unmap.
        let nothing = !table.entries.contains_key(&range.start().raw());
        match table.due() {
            None if nothing => return Err(TargetError::Unknown(errno())),
            None => table.unmap(range),
            Some(Fault::Refused | Fault::Revoked) => return Err(TargetError::kernel(errno())),
            Some(Fault::UnknownNotDone) => return Err(TargetError::Unknown(errno())),
            Some(Fault::UnknownButDone) => {
                if !nothing {
                    table.unmap(range);
                }
                return Err(TargetError::Unknown(errno()));
            }
        }
        Ok(())
    }
}
