//! How long pages and their host addresses live, and what may be called when they end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fixture::{Fixture, at_most, fixture, without_deadlock};
use crate::page_table::{Fault, PAGE, PageTable, limits};
use memory_map::{
    Backing, BackingObject, ChangeError, CutOff, DisabledBecause, DmaTarget, Errno, HostMapping,
    InvalidChange, IovaRange, MapRequest, Quarantine, Reach, Reason, RegionKind, RegionManager,
    RegionSpec, TargetError, TargetHandle, TargetLimits, TargetName, TargetOptions,
};
use parking_lot::Mutex;

struct Recorder(Mutex<Vec<(TargetName, Quarantine)>>, RegionManager);

impl CutOff for Recorder {
    fn cut_off(&self, target: &TargetName, why: &Quarantine) {
        // No lock is held: a change and a query both go through.
        assert!(self.1.change().commit().is_ok());
        assert_eq!(self.1.view().len(), 0);
        self.0.lock().push((target.clone(), why.clone()));
    }
}

#[test]
fn a_failed_unmap_cuts_the_devices_off_and_keeps_the_pages_alive() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 1);
    let table = PageTable::new(limits());
    let recorder = Arc::new(Recorder(Mutex::default(), f.map.clone()));
    let mut options = TargetOptions::new("container 0");
    options.cut_off = Some(recorder.clone());
    let handle = f.map.register(table.boxed(), options).unwrap();
    table.fail_in(0, Fault::Refused);
    let mut change = f.map.change();
    change.remove(bar);
    let report = change.commit_guest().unwrap();
    assert_eq!(report.quarantined.len(), 1);
    let told = recorder.0.lock().clone();
    assert_eq!(told[0].0.as_str(), "container 0");
    assert!(matches!(told[0].1, Quarantine::Unmap { .. }));
    // Still reachable by the device, so still there.
    assert!(table.translate(0x1_0000).is_some());
    assert_eq!(f.addresses.held.load(Ordering::SeqCst), 1);
    table.take_calls();
    let other = f.ram(0, 1);
    assert_eq!(table.take_calls(), []);
    assert_eq!(
        f.reach(&handle, other),
        Reach::Unavailable(Reason::Quarantined)
    );
    // It fails once more at the end: kept for ever.
    table.fail_in(0, Fault::Refused);
    assert_eq!(handle.unregister().quarantined.len(), 1);
    assert_eq!(f.addresses.held.load(Ordering::SeqCst), 1);
}

#[test]
fn moving_a_bar_makes_no_host_address() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 1);
    assert_eq!(f.addresses.made.load(Ordering::SeqCst), 0);
    let (_table, handle) = f.target(limits());
    assert_eq!(f.addresses.made.load(Ordering::SeqCst), 1);
    for at in 2..10 {
        let mut change = f.map.change();
        change.disable(bar, DisabledBecause::DecodingOff);
        change.commit_guest().unwrap();
        f.move_to(bar, at * 0x1_0000);
        let mut change = f.map.change();
        change.enable(bar);
        change.commit_guest().unwrap();
    }
    assert_eq!(f.addresses.made.load(Ordering::SeqCst), 1);
    assert_eq!(f.addresses.held.load(Ordering::SeqCst), 1);
    drop(handle);
    assert_eq!(f.addresses.held.load(Ordering::SeqCst), 0);
}

#[test]
fn a_removed_region_gives_its_host_address_up() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 1);
    let (_table, _handle) = f.target(limits());
    let mut change = f.map.change();
    change.remove(bar);
    change.commit().unwrap();
    assert_eq!(f.addresses.held.load(Ordering::SeqCst), 0);
}

#[test]
fn a_target_that_maps_by_file_costs_no_host_address() {
    let f = fixture();
    f.ram(0, 4);
    let table = PageTable::new(limits());
    table.0.lock().by_address = false;
    let options = TargetOptions::new("table");
    let _handle = f.map.register(table.boxed(), options).unwrap();
    assert_eq!(f.addresses.made.load(Ordering::SeqCst), 0);
}

/// A target that takes nothing down.
struct Clinging(PageTable);

impl DmaTarget for Clinging {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.0.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.0.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.0.map(request)
    }
    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        Err(TargetError::kernel(Errno::new(5)))
    }
}

/// Enables a BAR whose mapping ends in a state that cannot be made sure of, and removes it: the
/// device still reaches its pages.
fn a_mapping_nobody_is_sure_of_keeps_its_pages(prepare: fn(&PageTable)) {
    let f = fixture();
    let table = PageTable::new(limits());
    prepare(&table);
    let handle = f.register(Box::new(Clinging(table.clone())));
    let bar = f.add_disabled(f.spec(RegionKind::DeviceMemory, 0x1_0000, 1));
    let report = f.guest(|change| change.enable(bar));
    assert_eq!(report.quarantined.len(), 1);
    assert!(f.map.quarantine_of(handle.id()).unwrap().is_some());
    f.guest(|change| change.remove(bar));
    assert!(table.translate(0x1_0000).is_some());
    assert_eq!(f.addresses_held(), 1);
    assert_eq!(handle.unregister().quarantined.len(), 1);
    assert_eq!(f.addresses_held(), 1);
}

#[test]
fn a_map_of_unknown_outcome_that_cannot_be_taken_back_keeps_its_pages() {
    a_mapping_nobody_is_sure_of_keeps_its_pages(|table| table.fail_in(0, Fault::UnknownButDone));
}

#[test]
fn a_map_revoked_meanwhile_that_cannot_be_taken_back_keeps_its_pages() {
    a_mapping_nobody_is_sure_of_keeps_its_pages(|table| {
        table.0.lock().during_map = Some(|request| request.backing.advance_epoch());
    });
}

/// A target that holds whatever it was told to, and panics when it is to let go.
struct Panicking;

impl DmaTarget for Panicking {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        Ok(limits())
    }
    fn needs_host_address(&self, _: &Backing) -> bool {
        true
    }
    fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
        Ok(())
    }
    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        panic!("a target's own mistake")
    }
}

#[test]
fn a_target_that_panics_as_it_leaves_keeps_the_pages_it_holds() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 1);
    let handle = f.register(Box::new(Panicking));
    let leaving = AssertUnwindSafe(|| drop(handle));
    assert!(catch_unwind(leaving).is_err());
    f.host(|change| change.remove(bar)).unwrap();
    assert_eq!(f.addresses_held(), 1);
}

#[test]
fn a_refused_change_gives_up_the_host_address_it_made() {
    let f = fixture();
    let ram = f.add_disabled(f.spec(RegionKind::Ram, 0, 2));
    let (table, _handle) = f.target(at_most(1));
    table.fail_in(1, Fault::Refused);
    assert!(f.host(|change| change.enable(ram)).is_err());
    assert_eq!(f.addresses.made.load(Ordering::SeqCst), 1);
    assert_eq!(f.addresses_held(), 0);
}

/// Pages whose owner uses the map when it is asked for their size, and when they end.
#[derive(Debug)]
struct Owned {
    map: RegionManager,
    when_asked: fn(&RegionManager),
    when_dropped: fn(&RegionManager),
    dropped: Arc<AtomicUsize>,
}

impl BackingObject for Owned {
    fn size(&self) -> u64 {
        (self.when_asked)(&self.map);
        PAGE
    }
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        Err(Errno::new(19))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        (self.when_dropped)(&self.map);
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn nothing(_: &RegionManager) {}

fn read(map: &RegionManager) {
    assert!(map.view().len() <= 1);
}

fn change(map: &RegionManager) {
    map.change().commit().unwrap();
}

/// A page of RAM with an owner, and how often such a page has ended.
fn owned(
    f: &Fixture,
    start: u64,
    when_asked: fn(&RegionManager),
    when_dropped: fn(&RegionManager),
) -> (RegionSpec, Arc<AtomicUsize>) {
    let dropped = Arc::<AtomicUsize>::default();
    let mut spec = f.spec(RegionKind::Ram, start, 1);
    spec.sub_mappings[0].backing = Backing::new(Owned {
        map: f.map.clone(),
        when_asked,
        when_dropped,
        dropped: dropped.clone(),
    });
    (spec, dropped)
}

#[test]
fn pages_that_end_with_a_refused_change_may_use_the_map() {
    without_deadlock(|| {
        let f = fixture();
        let (_table, _handle) = f.target(limits());
        // Past the aperture.
        for when_dropped in [read, change] {
            let (ram, dropped) = owned(&f, 1 << 60, nothing, when_dropped);
            let error = f.add(ram).unwrap_err();
            assert!(matches!(error, ChangeError::Refused { .. }), "{error}");
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
        }
    });
}

#[test]
fn pages_that_end_with_an_invalid_change_may_use_the_map() {
    without_deadlock(|| {
        let f = fixture();
        let removed = f.ram(0x10_0000, 1);
        f.host(|change| change.remove(removed)).unwrap();
        for when_dropped in [read, change] {
            let (ram, dropped) = owned(&f, 0, nothing, when_dropped);
            let outcome = f.host(|change| {
                change.add(ram);
                change.enable(removed);
            });
            let unknown = InvalidChange::UnknownRegion(removed);
            assert_eq!(outcome.unwrap_err(), ChangeError::Invalid(unknown));
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
        }
    });
}

#[test]
fn pages_that_end_with_their_region_may_use_the_map() {
    without_deadlock(|| {
        let f = fixture();
        for when_dropped in [read, change] {
            let (ram, dropped) = owned(&f, 0, nothing, when_dropped);
            let ram = f.add(ram).unwrap();
            assert_eq!(dropped.load(Ordering::SeqCst), 0);
            f.host(|change| change.remove(ram)).unwrap();
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
        }
    });
}

#[test]
fn pages_that_are_replaced_may_use_the_map_when_they_end() {
    without_deadlock(|| {
        let f = fixture();
        for when_dropped in [read, change] {
            let (old, dropped) = owned(&f, 0, nothing, when_dropped);
            let ram = f.add(old).unwrap();
            let pages = f.spec(RegionKind::Ram, 0, 1).sub_mappings.remove(0);
            f.host(|change| change.set_sub_mapping(ram, pages)).unwrap();
            assert_eq!(dropped.load(Ordering::SeqCst), 1);
            f.host(|change| change.remove(ram)).unwrap();
        }
    });
}

#[test]
fn pages_of_a_new_region_may_read_the_map_when_asked_for_their_size() {
    without_deadlock(|| {
        let f = fixture();
        let (ram, _) = owned(&f, 0, read, nothing);
        f.add(ram).unwrap();
    });
}

#[test]
fn pages_put_behind_a_region_may_read_the_map_when_asked_for_their_size() {
    without_deadlock(|| {
        let f = fixture();
        let ram = f.ram(0, 1);
        let pages = owned(&f, 0, read, nothing).0.sub_mappings.remove(0);
        f.host(|change| change.set_sub_mapping(ram, pages)).unwrap();
    });
}

/// Counts how often devices are cut off.
#[derive(Debug, Clone, Default)]
struct Counter(Arc<AtomicUsize>);

impl CutOff for Counter {
    fn cut_off(&self, _: &TargetName, _: &Quarantine) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn register_counted(f: &Fixture, target: Box<dyn DmaTarget>) -> (TargetHandle, Counter) {
    let counter = Counter::default();
    let mut options = TargetOptions::new("counted");
    options.cut_off = Some(Arc::new(counter.clone()));
    (f.map.register(target, options).unwrap(), counter)
}

#[test]
fn a_panic_in_a_target_keeps_nobody_else_from_being_told() {
    let f = fixture();
    let (panics, counter) = register_counted(&f, Box::new(Panicking));
    let (other, _handle) = f.target(limits());
    let bar = f.bar(0x1000, 1);
    assert!(other.translate(0x1000).is_some());
    let change = AssertUnwindSafe(|| f.guest(|change| change.disable(bar, DisabledBecause::Owner)));
    assert!(catch_unwind(change).is_err());
    assert_eq!(other.translate(0x1000), None);
    assert!(f.map.quarantine_of(panics.id()).unwrap().is_some());
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
    // It would panic once more.
    std::mem::forget(panics);
}

#[test]
fn devices_are_cut_off_though_a_panic_ends_the_change() {
    #[derive(Debug)]
    struct Treacherous;
    impl BackingObject for Treacherous {
        fn size(&self) -> u64 {
            PAGE
        }
        fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
            panic!("a backing's own mistake")
        }
    }
    let f = fixture();
    let table = PageTable::new(limits());
    let (_handle, counter) = register_counted(&f, table.boxed());
    let (_other, _other_handle) = f.target(limits());
    let bar = f.bar(0x1000, 1);
    let mut treacherous = f.spec(RegionKind::DeviceMemory, 0x9000, 1);
    treacherous.sub_mappings[0].backing = Backing::new(Treacherous);
    let treacherous = f.add_disabled(treacherous);
    table.fail_in(0, Fault::Refused);
    let change = AssertUnwindSafe(|| {
        f.guest(|change| {
            change.disable(bar, DisabledBecause::Owner);
            change.enable(treacherous);
        })
    });
    assert!(catch_unwind(change).is_err());
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
}
