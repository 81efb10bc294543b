//! What fits into a target, and which calls it costs.

use std::ops::ControlFlow;

use crate::fixture::{allow, at_most, fixture, range};
use crate::page_table::{Call, PAGE, limits};
use memory_map::{
    Access, ChangeError, DisabledBecause, Gpa, GpaRange, InvalidChange, Priority, Reach, Reason,
    RegionKind, SubMapping, TargetLimits,
};

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

#[test]
fn what_goes_makes_room_for_the_parts_of_what_is_cut() {
    let f = fixture();
    f.ram(0, 8);
    let bar = f.bar(0x10_0000, 1);
    let trap = f.add_disabled(f.trap(3 * PAGE));
    let (table, _handle) = f.target(TargetLimits {
        entry_limit: Some(2),
        ..limits()
    });
    let report = f.guest(|change| {
        change.disable(bar, DisabledBecause::DecodingOff);
        change.enable(trap);
    });
    assert_eq!(report.ram_missing, []);
    assert!(table.translate(2 * PAGE).is_some());
    assert_eq!(table.translate(3 * PAGE), None);
    assert!(table.translate(4 * PAGE).is_some());
}

#[test]
fn no_bar_takes_the_last_entry_from_ram() {
    let f = fixture();
    let bar = f.bar(0x1000, 1);
    let ram = f.ram(0x10_0000, 1);
    let (_table, handle) = f.target(TargetLimits {
        entry_limit: Some(1),
        ..limits()
    });
    assert_eq!(f.reach(&handle, ram), Reach::Mapped);
    let limit = Reason::EntryLimit { limit: 1 };
    assert_eq!(f.reach(&handle, bar), Reach::Unavailable(limit));
}

#[test]
fn the_parts_of_what_is_cut_are_no_larger_than_the_target_takes_now() {
    let f = fixture();
    f.ram(0, 8);
    let (table, handle) = f.target(at_most(8));
    table.0.lock().limits = at_most(2);
    f.map.limits_changed(handle.id()).unwrap();
    table.take_calls();
    f.add(f.trap(0)).unwrap();
    assert_eq!(
        table.take_calls(),
        [
            Call::Unmap(0, 0x7fff),
            Call::Map(0x1000, 0x1fff),
            Call::Map(0x2000, 0x3fff),
            Call::Map(0x4000, 0x5fff),
            Call::Map(0x6000, 0x7fff),
        ]
    );
}

#[test]
fn a_revocation_cuts_nothing() {
    let f = fixture();
    let spec = f.spec(RegionKind::DeviceMemory, 0x1_0000, 8);
    let backing = spec.sub_mappings[0].backing.clone();
    f.add(spec).unwrap();
    let (_table, _handle) = f.target(limits());
    let report = f.guest(|change| change.revoke(&backing));
    assert_eq!((report.unmaps(), report.maps()), (1, 1));
    assert_eq!(report.bisected, 0);
}

#[test]
fn pages_taken_from_a_bar_and_put_back_are_one_with_the_others_at_the_next_move() {
    let f = fixture();
    let spec = f.spec(RegionKind::DeviceMemory, 0x1_0000, 8);
    let hole = SubMapping {
        offset: 3 * PAGE,
        size: PAGE,
        backing: spec.sub_mappings[0].backing.clone(),
        backing_offset: 3 * PAGE,
    };
    let bar = f.add(spec).unwrap();
    let (table, _handle) = f.target(limits());
    table.take_calls();
    f.host(|change| change.remove_sub_mapping(bar, 3 * PAGE, PAGE))
        .unwrap();
    assert_eq!(
        table.take_calls(),
        [
            Call::Unmap(0x1_0000, 0x1_7fff),
            Call::Map(0x1_0000, 0x1_2fff),
            Call::Map(0x1_4000, 0x1_7fff),
        ]
    );
    f.host(|change| change.set_sub_mapping(bar, hole)).unwrap();
    assert_eq!(table.take_calls(), [Call::Map(0x1_3000, 0x1_3fff)]);
    f.move_to(bar, 0x10_0000);
    assert_eq!(
        table.take_calls(),
        [
            Call::Unmap(0x1_0000, 0x1_2fff),
            Call::Unmap(0x1_3000, 0x1_3fff),
            Call::Unmap(0x1_4000, 0x1_7fff),
            Call::Map(0x10_0000, 0x10_7fff),
        ]
    );
    let report = f.move_to(bar, 0x20_0000);
    assert_eq!((report.unmaps(), report.maps()), (1, 1));
}

#[test]
fn a_cancelled_map_is_undone_in_one_call_where_the_target_takes_that() {
    let f = fixture();
    let (table, _handle) = f.target(TargetLimits {
        unmap_spans: true,
        ..at_most(1)
    });
    let mut change = f.map.change();
    let ram = change.add(f.spec(RegionKind::Ram, 0, 8));
    change.enable(ram);
    let outcome = change.commit_watched(&mut |progress| {
        if progress.done == 7 * PAGE {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });
    assert_eq!(outcome.unwrap_err(), ChangeError::Cancelled);
    let mut calls = table.take_calls();
    assert_eq!(calls.split_off(7), [Call::Unmap(0, 0x6fff)]);
    assert_eq!(table.len(), 0);
}

#[test]
fn ram_that_does_not_start_on_a_page_is_refused() {
    let f = fixture();
    let (table, _handle) = f.target(limits());
    let spec = f.spec(RegionKind::Ram, 0x10_0800, 4);
    let at = Gpa::new(0x10_0800);
    let region = spec.name.clone();
    let misaligned = ChangeError::Invalid(InvalidChange::MisalignedRam { region, at });
    assert_eq!(f.add(spec).unwrap_err(), misaligned);
    assert_eq!(f.map.regions().len(), 0);
    let ram = f.ram(0, 4);
    table.take_calls();
    let moved = f.host(|change| change.move_to(ram, at));
    assert_eq!(moved.unwrap_err(), misaligned);
    assert_eq!(table.take_calls(), []);
}

#[test]
fn ram_that_was_missing_before_refuses_no_other_change() {
    let f = fixture();
    let ram = f.ram(0, 2);
    let (_table, handle) = f.target(TargetLimits {
        read_only: false,
        ..limits()
    });
    let mut change = f.map.change();
    change.set_access(ram, Access::ReadOnly);
    assert_eq!(change.commit_guest().unwrap().ram_missing.len(), 1);
    // The host adds more under a part of it, which looks at that part again.
    let spec = f.spec(RegionKind::Ram, 0x1000, 1);
    let other = f.add(spec).unwrap();
    let missing = Reason::ReadOnlyUnsupported;
    assert_eq!(f.reach(&handle, ram), Reach::Unavailable(missing));
    let mut change = f.map.change();
    change.remove(other);
    change.set_access(ram, Access::ReadWrite);
    let report = change.commit().unwrap();
    assert_eq!(report.ram_missing, []);
    assert_eq!(f.reach(&handle, ram), Reach::Mapped);
    // What is new is refused all the same.
    let mut spec = f.spec(RegionKind::Ram, 0x10_0000, 1);
    spec.access = Access::ReadOnly;
    assert!(f.add(spec).is_err());
}
