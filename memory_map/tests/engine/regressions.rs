//! What the map promises, one promise a test; many are mistakes that other maps have made.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::page_table::{Addresses, Call, Fault, PAGE, PageTable, backing, limits};
use memory_map::{
    Access, Backing, ChangeError, ConsumerKind, CutOff, DisabledBecause, DmaTarget, Errno, Gpa,
    GpaRange, InvalidChange, Iova, IovaRange, MapRequest, Priority, Quarantine, Reach, Reason,
    RegionId, RegionKind, RegionManager, RegionSpec, SharingConsumer, SubMapping, TargetError,
    TargetHandle, TargetLimits, TargetName, TargetOptions,
};
use parking_lot::Mutex;

struct Fixture {
    map: RegionManager,
    addresses: Arc<Addresses>,
}

fn fixture() -> Fixture {
    Fixture {
        map: RegionManager::new(),
        addresses: Arc::default(),
    }
}

fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(start), pages * PAGE).unwrap()
}

impl Fixture {
    fn spec(&self, kind: RegionKind, start: u64, pages: u64) -> RegionSpec {
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

    fn add(&self, spec: RegionSpec) -> Result<RegionId, ChangeError> {
        let mut change = self.map.change();
        let id = change.add(spec);
        change.enable(id);
        change.commit().map(|_| id)
    }

    fn ram(&self, start: u64, pages: u64) -> RegionId {
        self.add(self.spec(RegionKind::Ram, start, pages)).unwrap()
    }

    fn bar(&self, start: u64, pages: u64) -> RegionId {
        let spec = self.spec(RegionKind::DeviceMemory, start, pages);
        self.add(spec).unwrap()
    }

    fn target(&self, limits: TargetLimits) -> (PageTable, TargetHandle) {
        let table = PageTable::new(limits);
        let options = TargetOptions::new("table");
        let handle = self.map.register(table.boxed(), options).unwrap();
        (table, handle)
    }

    fn reach(&self, target: &TargetHandle, region: RegionId) -> Reach {
        self.map.reach_of(target.id(), region).unwrap()
    }

    fn move_to(&self, region: RegionId, to: u64) -> memory_map::Report {
        let mut change = self.map.change();
        change.move_to(region, Gpa::new(to));
        change.commit_guest().unwrap()
    }
}

fn allow(ranges: &[(u64, u64)]) -> TargetLimits {
    let allowed = ranges
        .iter()
        .map(|&(start, last)| IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap())
        .collect();
    TargetLimits {
        allowed,
        ..limits()
    }
}

#[test]
fn bar_swap_keeps_both() {
    let f = fixture();
    let (a, b) = (f.bar(0x1_0000, 2), f.bar(0x2_0000, 2));
    let (table, handle) = f.target(limits());
    let before_a = table.translate(0x1_0000);
    let mut change = f.map.change();
    change.move_to(a, Gpa::new(0x2_0000));
    change.move_to(b, Gpa::new(0x1_0000));
    let report = change.commit_guest().unwrap();
    assert_eq!((report.unmaps(), report.maps()), (2, 2));
    assert_eq!(table.translate(0x2_0000), before_a);
    assert_eq!(f.reach(&handle, a), Reach::Mapped);
    assert_eq!(f.reach(&handle, b), Reach::Mapped);
}

#[test]
fn a_bar_that_moves_onto_its_own_old_range_never_conflicts() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 4);
    let (table, handle) = f.target(limits());
    f.move_to(bar, 0x1_2000);
    assert_eq!(table.translate(0x1_1000), None);
    assert_eq!(table.translate(0x1_5fff).unwrap().1, 0x3fff);
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn a_failed_map_is_not_recorded_as_mapped_and_is_tried_again() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 1);
    let (table, handle) = f.target(limits());
    table.fail_in(1, Fault::Refused);
    f.move_to(bar, 0x2_0000);
    let errno = Errno::new(12);
    let refused = Reason::Kernel { errno, hint: None };
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(refused));
    assert_eq!(f.map.lookup(Gpa::new(0x2_0000)).unwrap().region, bar);
    let mut change = f.map.change();
    change.disable(bar, DisabledBecause::DecodingOff);
    change.commit_guest().unwrap();
    let mut change = f.map.change();
    change.enable(bar);
    change.commit_guest().unwrap();
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
    assert!(table.translate(0x2_0000).is_some());
}

#[test]
fn a_bar_moved_under_another_appears_when_that_one_leaves() {
    let f = fixture();
    let mut above = f.spec(RegionKind::DeviceMemory, 0x2_0000, 1);
    above.priority = Priority(1);
    above.name = "above".into();
    let above = f.add(above).unwrap();
    let bar = f.bar(0x1_0000, 1);
    let (table, handle) = f.target(limits());
    f.move_to(bar, 0x2_0000);
    let covered = Reason::Covered { by: "above".into() };
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(covered));
    f.move_to(above, 0x3_0000);
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
    assert!(table.translate(0x2_0000).is_some());
}

#[test]
fn of_equal_regions_the_older_is_seen_whichever_was_enabled_first() {
    let f = fixture();
    let mut change = f.map.change();
    let old = change.add(f.spec(RegionKind::DeviceMemory, 0, 1));
    let new = change.add(f.spec(RegionKind::DeviceMemory, 0, 1));
    change.enable(new);
    change.commit().unwrap();
    assert_eq!(f.map.lookup(Gpa::new(0)).unwrap().region, new);
    let mut change = f.map.change();
    change.enable(old);
    change.commit().unwrap();
    assert_eq!(f.map.lookup(Gpa::new(0)).unwrap().region, old);
}

#[test]
fn making_ram_read_only_opens_one_hole_at_a_time() {
    let f = fixture();
    let ram = f.ram(0, 4);
    let (table, _handle) = f.target(TargetLimits {
        largest_mapping: 2 * PAGE,
        ..limits()
    });
    table.take_calls();
    let mut change = f.map.change();
    change.set_access(ram, Access::ReadOnly);
    change.commit().unwrap();
    let calls = table.take_calls();
    let (first, second) = ((0, 0x1fff), (0x2000, 0x3fff));
    assert_eq!(
        calls,
        [
            Call::Unmap(first.0, first.1),
            Call::Map(first.0, first.1),
            Call::Unmap(second.0, second.1),
            Call::Map(second.0, second.1),
        ]
    );
    assert_eq!(table.translate(0).unwrap().2, Access::ReadOnly);
}

#[test]
fn covering_a_page_touches_only_the_mapping_that_holds_it() {
    let f = fixture();
    f.ram(0, 8);
    let (table, _handle) = f.target(TargetLimits {
        largest_mapping: 4 * PAGE,
        ..limits()
    });
    table.take_calls();
    let mut above = f.spec(RegionKind::DeviceMemory, 5 * PAGE, 1);
    above.priority = Priority(1);
    let mut change = f.map.change();
    let above = change.add(above);
    change.enable(above);
    let report = change.commit().unwrap();
    assert_eq!(report.bisected, 1);
    assert_eq!(
        table.take_calls(),
        [
            Call::Unmap(0x4000, 0x7fff),
            Call::Map(0x4000, 0x4fff),
            Call::Map(0x6000, 0x7fff),
            Call::Map(0x5000, 0x5fff),
        ]
    );
}

#[test]
fn removing_one_of_several_mappings_keeps_the_others() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 3);
    let (table, handle) = f.target(limits());
    let mut change = f.map.change();
    change.remove_sub_mapping(bar, PAGE, PAGE);
    change.commit().unwrap();
    assert!(table.translate(0x1_0000).is_some());
    assert_eq!(table.translate(0x1_1000), None);
    assert!(table.translate(0x1_2000).is_some());
    // What has no pages is trapped by design.
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

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
fn a_map_of_unknown_outcome_is_taken_back_or_ends_in_quarantine() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 1);
    let (table, handle) = f.target(limits());
    table.fail_in(1, Fault::UnknownButDone);
    f.move_to(bar, 0x2_0000);
    assert_eq!(table.len(), 0);
    assert!(matches!(
        f.reach(&handle, bar),
        Reach::Unavailable(Reason::Kernel { .. })
    ));
    table.fail_in(0, Fault::UnknownNotDone);
    let report = f.move_to(bar, 0x3_0000);
    assert!(matches!(report.quarantined[0].1, Quarantine::Map { .. }));
}

#[test]
fn a_replay_that_fails_half_way_is_taken_back() {
    let f = fixture();
    f.ram(0, 4);
    f.bar(0x1_0000, 1);
    let table = PageTable::new(TargetLimits {
        largest_mapping: PAGE,
        ..limits()
    });
    table.fail_in(2, Fault::Refused);
    let error = f
        .map
        .register(table.boxed(), TargetOptions::new("container 0"))
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("region at 0x2000-0x2fff"), "{text}");
    assert!(text.contains("container 0"), "{text}");
    assert_eq!(table.len(), 0);
    assert_eq!(f.addresses.held.load(Ordering::SeqCst), 0);
    assert!(f.map.reach().is_empty());
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

#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Vec<IovaRange>>>);

impl SharingConsumer for Shown {
    fn share(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        assert_eq!(request.kind, RegionKind::Ram);
        self.0.lock().push(request.iova);
        Ok(())
    }
    fn unshare(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.0.lock().retain(|shown| *shown != range);
        Ok(())
    }
}

#[test]
fn a_sharing_consumer_sees_shareable_ram_and_never_a_bar() {
    let f = fixture();
    f.ram(0, 1);
    let mut shareable = f.spec(RegionKind::Ram, 0x1000, 2);
    shareable.shareable = true;
    f.add(shareable).unwrap();
    let mut bar = f.spec(RegionKind::DeviceMemory, 0x1_0000, 1);
    bar.shareable = true;
    f.add(bar).unwrap();
    let shown = Shown::default();
    let options = TargetOptions::new("vhost-user");
    let handle = f.map.register_sharing(Box::new(shown.clone()), options);
    assert_eq!(*shown.0.lock(), [range(0x1000, 2).to_iova()]);
    drop(handle);
    assert!(shown.0.lock().is_empty());
}

#[test]
fn ranges_that_shrink_take_bars_out_with_a_reason_and_are_refused_by_ram() {
    let f = fixture();
    f.ram(0, 1);
    let bar = f.bar(0x1_0000, 1);
    let (table, handle) = f.target(limits());
    table.0.lock().limits = allow(&[(0, 0xffff), (0x2_0000, 0x3_ffff)]);
    f.map.limits_changed(handle.id()).unwrap();
    let Reach::Unavailable(Reason::ReservedWindow { window }) = f.reach(&handle, bar) else {
        panic!("{:?}", f.reach(&handle, bar));
    };
    assert_eq!(window, range(0x1_0000, 16).to_iova());
    assert_eq!(table.translate(0x1_0000), None);
    // RAM does not fit at all: refused, and nothing is different.
    table.0.lock().limits = allow(&[(0x2_0000, 0x3_ffff)]);
    let error = f.map.limits_changed(handle.id()).unwrap_err();
    assert!(matches!(error, ChangeError::Refused { .. }), "{error}");
    assert!(table.translate(0).is_some());
    table.0.lock().limits = limits();
    f.map.limits_changed(handle.id()).unwrap();
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn reasons_of_place_and_size() {
    let f = fixture();
    let (_table, handle) = f.target(allow(&[(0, 0xfedf_ffff), (0xfef0_0000, 0xffff_ffff)]));
    let bar = f.bar(0x1_0000_0000, 1);
    let outside = Reason::OutsideAperture { last: 0xffff_ffff };
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(outside));
    // Half of it in the window of the interrupts.
    f.move_to(bar, 0xfee0_0000);
    assert!(matches!(
        f.reach(&handle, bar),
        Reach::Unavailable(Reason::ReservedWindow { .. })
    ));
    let mut small = f.spec(RegionKind::DeviceMemory, 0x5000, 1);
    small.range = GpaRange::new(Gpa::new(0x5000), 0x100).unwrap();
    small.sub_mappings.clear();
    let small = f.add(small).unwrap();
    let page = PAGE;
    assert_eq!(
        f.reach(&handle, small),
        Reach::Unavailable(Reason::SmallerThanPage { page })
    );
    let misplaced = f.bar(0x8_0000, 1);
    f.move_to(misplaced, 0x8_0100);
    assert!(matches!(
        f.reach(&handle, misplaced),
        Reach::Unavailable(Reason::SmallerThanPage { .. } | Reason::NotPageAligned { .. })
    ));
    f.move_to(misplaced, u64::MAX - 0xff);
    assert!(matches!(
        f.reach(&handle, misplaced),
        Reach::Unavailable(Reason::Disabled(DisabledBecause::Wraps(_)))
    ));
    assert_eq!(f.map.lookup(Gpa::new(u64::MAX)), None);
    f.move_to(misplaced, 0x8_0000);
    assert_eq!(f.reach(&handle, misplaced), Reach::Mapped);
}

#[test]
fn a_small_bar_in_a_page_of_ram_takes_the_page_from_devices_and_nothing_more() {
    let f = fixture();
    let ram = f.ram(0, 4);
    let (table, handle) = f.target(limits());
    let mut small = f.spec(RegionKind::DeviceMemory, 0x1000, 1);
    small.range = GpaRange::new(Gpa::new(0x1100), 0x100).unwrap();
    small.priority = Priority(1);
    small.sub_mappings.clear();
    f.add(small).unwrap();
    assert!(table.translate(0).is_some());
    assert_eq!(table.translate(0x1000), None);
    assert!(table.translate(0x2000).is_some());
    assert!(matches!(f.reach(&handle, ram), Reach::Partly { mapped, .. } if mapped == 3 * PAGE));
}

#[test]
fn a_full_target_is_a_reason_for_a_bar_and_an_error_for_ram() {
    let f = fixture();
    f.ram(0, 1);
    let full = TargetLimits {
        entry_limit: Some(1),
        ..limits()
    };
    let (_table, handle) = f.target(full);
    let bar = f.bar(0x1_0000, 1);
    let limit = Reason::EntryLimit { limit: 1 };
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(limit));
    let error = f.add(f.spec(RegionKind::Ram, 0x10_0000, 1)).unwrap_err();
    assert!(error.to_string().contains("limit of 1"), "{error}");
}

#[test]
fn a_revocation_redoes_what_was_mapped_and_nothing_else() {
    let f = fixture();
    f.ram(0, 1);
    let spec = f.spec(RegionKind::DeviceMemory, 0x1_0000, 2);
    let backing = spec.sub_mappings[0].backing.clone();
    let bar = f.add(spec).unwrap();
    let (table, handle) = f.target(limits());
    table.take_calls();
    backing.advance_epoch();
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(Reason::Pending));
    let mut change = f.map.change();
    change.revoke(&backing);
    change.commit_guest().unwrap();
    let (start, last) = (0x1_0000, 0x1_1fff);
    assert_eq!(
        table.take_calls(),
        [Call::Unmap(start, last), Call::Map(start, last)]
    );
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn a_map_during_which_the_backing_is_revoked_does_not_count() {
    let f = fixture();
    let (table, handle) = f.target(limits());
    table.0.lock().during_map = Some(|request| request.backing.advance_epoch());
    let bar = f.bar(0x1_0000, 1);
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(Reason::Revoked));
    assert_eq!(table.len(), 0);
    table.0.lock().during_map = None;
    f.move_to(bar, 0x2_0000);
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn a_refused_change_still_redoes_what_was_revoked() {
    let f = fixture();
    let spec = f.spec(RegionKind::DeviceMemory, 0x1_0000, 1);
    let backing = spec.sub_mappings[0].backing.clone();
    let bar = f.add(spec).unwrap();
    let (_table, handle) = f.target(allow(&[(0, 0xf_ffff)]));
    let mut change = f.map.change();
    change.revoke(&backing);
    let ram = change.add(f.spec(RegionKind::Ram, 0x10_0000, 1));
    change.enable(ram);
    assert!(change.commit().is_err());
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn a_long_map_tells_its_progress_and_can_be_cancelled() {
    let f = fixture();
    let (table, _handle) = f.target(TargetLimits {
        largest_mapping: PAGE,
        ..limits()
    });
    let mut change = f.map.change();
    let ram = change.add(f.spec(RegionKind::Ram, 0, 8));
    change.enable(ram);
    let mut seen = Vec::new();
    let error = change
        .commit_watched(&mut |progress| {
            seen.push((progress.done, progress.total));
            if seen.len() == 4 {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
        .unwrap_err();
    assert_eq!(error, ChangeError::Cancelled);
    let total = 8 * PAGE;
    assert_eq!(
        seen,
        [
            (0, total),
            (PAGE, total),
            (2 * PAGE, total),
            (3 * PAGE, total)
        ]
    );
    assert_eq!(table.len(), 0);
    assert_eq!(
        f.map.region(ram),
        Err(InvalidChange::UnknownRegion(ram)),
        "the map is as it was"
    );
}

/// A target that reads the map while it maps.
struct Nosy(RegionManager, Arc<AtomicUsize>);

impl DmaTarget for Nosy {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        Ok(limits())
    }
    fn needs_host_address(&self, _: &Backing) -> bool {
        false
    }
    fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
        let map = self.0.clone();
        let seen = std::thread::spawn(move || map.view().len() + map.reach().len());
        self.1.store(seen.join().unwrap(), Ordering::SeqCst);
        Ok(())
    }
    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        Ok(())
    }
}

#[test]
fn reading_the_map_does_not_wait_for_a_target() {
    let f = fixture();
    let seen = Arc::new(AtomicUsize::new(0));
    let nosy = Box::new(Nosy(f.map.clone(), seen.clone()));
    let _handle = f.map.register(nosy, TargetOptions::new("nosy")).unwrap();
    f.ram(0, 1);
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

/// A target whose first mapping of RAM goes on until the map shows a BAR at its new place.
struct Waiting {
    table: PageTable,
    map: RegionManager,
    patience: usize,
}

impl DmaTarget for Waiting {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.table.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.table.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        while request.kind == RegionKind::Ram && self.patience > 0 {
            if self.map.lookup(Gpa::new(0x20_0000)).is_some() {
                self.patience = 0;
                break;
            }
            self.patience -= 1;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.table.map(request)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.table.unmap(range)
    }
}

#[test]
fn a_bar_waits_for_one_piece_of_a_long_map_and_no_more() {
    let f = fixture();
    let bar = f.bar(0x10_0000, 1);
    let table = PageTable::new(TargetLimits {
        largest_mapping: PAGE,
        ..limits()
    });
    let waiting = Box::new(Waiting {
        table: table.clone(),
        map: f.map.clone(),
        patience: 60_000,
    });
    let options = TargetOptions::new("waiting");
    let _handle = f.map.register(waiting, options).unwrap();
    table.take_calls();
    let mut change = f.map.change();
    let ram = change.add(f.spec(RegionKind::Ram, 0, 4));
    change.enable(ram);
    let map = f.map.clone();
    let mover = std::thread::spawn(move || {
        // Begins when the first piece does: the map then shows RAM.
        while map.lookup(Gpa::new(0)).is_none() {
            std::thread::yield_now();
        }
        let mut change = map.change();
        change.move_to(bar, Gpa::new(0x20_0000));
        change.commit_guest().unwrap()
    });
    change.commit().unwrap();
    assert_eq!(mover.join().unwrap().maps(), 1);
    let piece = |n: u64| Call::Map(n * PAGE, n * PAGE + 0xfff);
    assert_eq!(
        table.take_calls(),
        [
            piece(0),
            Call::Unmap(0x10_0000, 0x10_0fff),
            Call::Map(0x20_0000, 0x20_0fff),
            piece(1),
            piece(2),
            piece(3),
        ]
    );
}

#[test]
fn a_subscription_tells_what_changed_once_and_grows_no_queue() {
    let f = fixture();
    let woken = Arc::new(AtomicUsize::new(0));
    let wakes = woken.clone();
    let subscription = f.map.subscribe(move || {
        wakes.fetch_add(1, Ordering::SeqCst);
    });
    let bar = f.bar(0x1_0000, 1);
    let other = f.bar(0x5_0000, 1);
    let (_table, _handle) = f.target(limits());
    assert_eq!(woken.load(Ordering::SeqCst), 1);
    assert_eq!(subscription.take().reach.len(), 2);
    for n in 2..1000 {
        f.move_to(bar, n * 0x1_0000);
    }
    assert_eq!(woken.load(Ordering::SeqCst), 2);
    let changes = subscription.take();
    assert_eq!(
        changes.reach.len(),
        2,
        "the other one was covered for a while"
    );
    assert!(
        changes
            .reach
            .iter()
            .all(|entry| entry.reach == Reach::Mapped)
    );
    f.move_to(bar, 0x7_0000);
    assert_eq!(subscription.take().reach.len(), 1);
    let mut change = f.map.change();
    change.remove(other);
    change.commit().unwrap();
    assert_eq!(subscription.take().removed, [other]);
    assert_eq!(subscription.take(), memory_map::ReachChanges::default());
}

#[test]
fn iommus_go_first_on_the_way_down_and_last_on_the_way_up() {
    let f = fixture();
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    struct Named(&'static str, Arc<Mutex<Vec<String>>>);
    impl DmaTarget for Named {
        fn limits(&self) -> Result<TargetLimits, Errno> {
            Ok(limits())
        }
        fn needs_host_address(&self, _: &Backing) -> bool {
            false
        }
        fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
            self.1.lock().push(format!("+{}", self.0));
            Ok(())
        }
        fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
            self.1.lock().push(format!("-{}", self.0));
            Ok(())
        }
    }
    let register = |name, kind| {
        let mut options = TargetOptions::new(name);
        options.kind = kind;
        let target = Box::new(Named(name, log.clone()));
        f.map.register(target, options).unwrap()
    };
    let _slots = register("slots", ConsumerKind::MemorySlots);
    let _iommu = register("iommu", ConsumerKind::Iommu);
    let bar = f.bar(0x1_0000, 1);
    f.move_to(bar, 0x2_0000);
    let log = log.lock().join(" ");
    assert_eq!(log, "+slots +iommu -iommu -slots +slots +iommu");
}

#[test]
fn bad_input_changes_nothing() {
    let f = fixture();
    let ram = f.ram(0, 2);
    let (table, _handle) = f.target(limits());
    table.take_calls();
    let pages = |offset, size, backing_offset| SubMapping {
        offset,
        size,
        backing: backing(4, &f.addresses),
        backing_offset,
    };
    let bad = [
        pages(0x10, PAGE, 0),
        pages(0, 0x10, 0),
        pages(0, 0, 0),
        pages(0, PAGE, 0x10),
        pages(PAGE, 2 * PAGE, 0),
        pages(!0xfff, PAGE, 0),
        pages(0, PAGE, 4 * PAGE),
        pages(0, PAGE, !0xfff),
    ];
    for sub_mapping in bad {
        let mut change = f.map.change();
        change.disable(ram, DisabledBecause::Owner);
        change.set_sub_mapping(ram, sub_mapping.clone());
        let error = change.commit().unwrap_err();
        assert!(matches!(error, ChangeError::Invalid(_)), "{sub_mapping:?}");
    }
    let mut twice = f.spec(RegionKind::Ram, 0x10_0000, 2);
    twice.sub_mappings.push(twice.sub_mappings[0].clone());
    assert!(matches!(
        f.add(twice),
        Err(ChangeError::Invalid(
            InvalidChange::SubMappingsOverlap { .. }
        ))
    ));
    assert_eq!(table.take_calls(), []);
    assert_eq!(f.map.region(ram).unwrap().disabled, None);
    let limits = [
        TargetLimits {
            page_size: 0x800,
            ..limits()
        },
        TargetLimits {
            largest_mapping: 0x3000,
            ..limits()
        },
        allow(&[(0x5000, 0x5fff), (0, 0xfff)]),
    ];
    for limits in limits {
        let table = PageTable::new(limits);
        let refused = f.map.register(table.boxed(), TargetOptions::new("x"));
        assert!(matches!(refused, Err(ChangeError::ImpossibleLimits { .. })));
    }
}

#[test]
fn pages_larger_than_the_granule_are_judged_whole() {
    let f = fixture();
    let ram = f.ram(0x8000, 16);
    let (table, handle) = f.target(TargetLimits {
        page_size: 0x1_0000,
        ..limits()
    });
    // 0x8000-0x17fff holds no whole page of 64 KiB that starts on one in the backing as well.
    assert_eq!(table.len(), 0);
    assert!(matches!(f.reach(&handle, ram), Reach::Unavailable(_)));
    let mut change = f.map.change();
    change.move_to(ram, Gpa::new(0x1_0000));
    change.commit().unwrap();
    assert_eq!(f.reach(&handle, ram), Reach::Mapped);
}
