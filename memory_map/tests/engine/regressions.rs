//! What the map promises, one promise a test; many are mistakes that other maps have made.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fixture::{allow, fixture, range};
use crate::page_table::{Call, Fault, PAGE, PageTable, backing, limits};
use memory_map::{
    Access, Backing, ChangeError, ConsumerKind, DisabledBecause, DmaTarget, Errno, Gpa,
    InvalidChange, IovaRange, MapRequest, Priority, Quarantine, Reach, Reason, RegionKind,
    SharingConsumer, SubMapping, TargetError, TargetLimits, TargetOptions,
};
use parking_lot::Mutex;

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

/// Others added private memory, huge pages and dma-bufs each beside their map, and the paths
/// drifted apart.
#[test]
fn whatever_lies_behind_a_region_takes_the_same_path() {
    let calls_of = |kind, by_address, largest| {
        let f = fixture();
        let table = PageTable::new(TargetLimits {
            largest_mapping: largest,
            ..limits()
        });
        table.0.lock().by_address = by_address;
        let _handle = f.register(table.boxed());
        let region = f.add(f.spec(kind, 0x10_0000, 0x200)).unwrap();
        let trap = f.add(f.trap(0x11_0000)).unwrap();
        f.guest(|change| change.set_access(region, Access::ReadOnly));
        f.move_to(region, 0x40_0000);
        f.guest(|change| change.remove_sub_mapping(region, 2 * PAGE, PAGE));
        f.move_to(trap, 0x41_0000);
        f.guest(|change| change.remove(region));
        table.take_calls()
    };
    for largest in [2 << 20, 1 << 30] {
        let ram = calls_of(RegionKind::Ram, true, largest);
        assert!(ram.len() > 10);
        // RAM by its file instead of its address; a BAR by its address; a BAR by its dma-buf.
        assert_eq!(ram, calls_of(RegionKind::Ram, false, largest));
        assert_eq!(ram, calls_of(RegionKind::DeviceMemory, true, largest));
        assert_eq!(ram, calls_of(RegionKind::DeviceMemory, false, largest));
    }
}
