//! A map to test with, and what is put into it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::page_table::{Addresses, PAGE, PageTable, backing, limits};
use memory_map::{
    Access, Change, ChangeError, DmaTarget, Gpa, GpaRange, Iova, IovaRange, Priority, Reach,
    RegionId, RegionKind, RegionManager, RegionSpec, Report, SubMapping, TargetHandle,
    TargetLimits, TargetOptions,
};

#[derive(Clone)]
pub struct Fixture {
    pub map: RegionManager,
    pub addresses: Arc<Addresses>,
}

pub fn fixture() -> Fixture {
    Fixture {
        map: RegionManager::new(),
        addresses: Arc::default(),
    }
}

pub fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(start), pages * PAGE).unwrap()
}

impl Fixture {
    pub fn spec(&self, kind: RegionKind, start: u64, pages: u64) -> RegionSpec {
        RegionSpec {
            name: "region".into(),
            range: range(start, pages),
            priority: Priority(0),
            kind,
            access: Access::ReadWrite,
            shareable: false,
            label: None,
            sub_mappings: vec![SubMapping {
                offset: 0,
                size: pages * PAGE,
                backing: backing(pages, &self.addresses),
                backing_offset: 0,
            }],
        }
    }

    /// A page that is trapped and covers what lies below it.
    pub fn trap(&self, start: u64) -> RegionSpec {
        RegionSpec {
            priority: Priority(1),
            sub_mappings: Vec::new(),
            ..self.spec(RegionKind::DeviceMemory, start, 1)
        }
    }

    /// Adds a region and enables it.
    pub fn add(&self, spec: RegionSpec) -> Result<RegionId, ChangeError> {
        let mut change = self.map.change();
        let id = change.add(spec);
        change.enable(id);
        change.commit().map(|_| id)
    }

    /// Adds a region and does not enable it.
    pub fn add_disabled(&self, spec: RegionSpec) -> RegionId {
        let mut change = self.map.change();
        let id = change.add(spec);
        change.commit().unwrap();
        id
    }

    pub fn ram(&self, start: u64, pages: u64) -> RegionId {
        self.add(self.spec(RegionKind::Ram, start, pages)).unwrap()
    }

    pub fn bar(&self, start: u64, pages: u64) -> RegionId {
        let spec = self.spec(RegionKind::DeviceMemory, start, pages);
        self.add(spec).unwrap()
    }

    pub fn register(&self, target: Box<dyn DmaTarget>) -> TargetHandle {
        let options = TargetOptions::new("table");
        self.map.register(target, options).unwrap()
    }

    pub fn target(&self, limits: TargetLimits) -> (PageTable, TargetHandle) {
        let table = PageTable::new(limits);
        let handle = self.register(table.boxed());
        (table, handle)
    }

    pub fn reach(&self, target: &TargetHandle, region: RegionId) -> Reach {
        self.map.reach_of(target.id(), region).unwrap()
    }

    /// Commits a change of the host's.
    pub fn host(&self, what: impl FnOnce(&mut Change<'_>)) -> Result<Report, ChangeError> {
        let mut change = self.map.change();
        what(&mut change);
        change.commit()
    }

    /// Commits a change of the guest's.
    pub fn guest(&self, what: impl FnOnce(&mut Change<'_>)) -> Report {
        let mut change = self.map.change();
        what(&mut change);
        change.commit_guest().unwrap()
    }

    pub fn move_to(&self, region: RegionId, to: u64) -> Report {
        self.guest(|change| change.move_to(region, Gpa::new(to)))
    }

    /// How many backings have a host address.
    pub fn addresses_held(&self) -> usize {
        self.addresses.held.load(Ordering::SeqCst)
    }
}

pub fn allow(ranges: &[(u64, u64)]) -> TargetLimits {
    let allowed = ranges
        .iter()
        .map(|&(start, last)| IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap())
        .collect();
    TargetLimits {
        allowed,
        ..limits()
    }
}

/// Mappings of at most so many pages.
pub fn at_most(pages: u64) -> TargetLimits {
    TargetLimits {
        largest_mapping: pages * PAGE,
        ..limits()
    }
}

/// Runs a test that would hang if it failed: after a minute, it fails.
pub fn without_deadlock(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        // Nobody listens any more if it took too long.
        let _late = done.send(());
    });
    if wait.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
        panic!("deadlock");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
