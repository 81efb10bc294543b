//! What cannot be held or put back is told, and what was missing before is nobody's fault.

use std::ops::ControlFlow;

use crate::fixture::{allow, at_most, fixture, range};
use crate::page_table::{Fault, PAGE, PageTable, backing, limits};
use memory_map::{
    Access, ChangeError, Errno, Gpa, Iova, Missing, Priority, Reach, Reason, RegionKind,
    SubMapping, TargetError, TargetLimits, TargetOptions,
};

#[test]
fn ram_that_is_lost_in_the_undo_of_its_own_change_is_told() {
    let f = fixture();
    let ram = f.ram(0x1_0000, 2);
    let (table, _handle) = f.target(limits());
    table.0.lock().refuse_maps = Some(TargetError::kernel(Errno::new(12)));
    let error = f
        .host(|change| change.set_access(ram, Access::ReadOnly))
        .unwrap_err();
    assert_eq!(table.len(), 0, "neither read-only nor as it was");
    assert!(
        matches!(&error, ChangeError::UndoIncomplete { report, .. } if !report.ram_missing.is_empty()),
        "the RAM is gone, and all that is said is {error}"
    );
}

#[test]
fn a_bar_that_is_lost_in_an_undo_is_told() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 2);
    let (table, target) = f.target(limits());
    table.0.lock().refuse_maps = Some(TargetError::kernel(Errno::new(12)));
    let ram = f.spec(RegionKind::Ram, 0x10_0000, 2);
    let error = f
        .host(|change| {
            change.move_to(bar, Gpa::new(0x2_0000));
            let ram = change.add(ram);
            change.enable(ram);
        })
        .unwrap_err();
    let ChangeError::UndoIncomplete {
        cause,
        range,
        report,
        ..
    } = &error
    else {
        panic!("the BAR is gone, and all that is said is {error}");
    };
    assert!(matches!(**cause, ChangeError::Refused { .. }));
    assert_eq!(range.start(), Iova::new(0x1_0000));
    assert!(report.ram_missing.is_empty());
    assert!(matches!(
        f.reach(&target, bar),
        Reach::Unavailable(Reason::Kernel { .. })
    ));

    // What was missing before is not lost: the same again, with nothing to lose.
    let again = f.host(|change| {
        let ram = change.add(f.spec(RegionKind::Ram, 0x10_0000, 2));
        change.enable(ram);
    });
    assert!(
        matches!(again, Err(ChangeError::Refused { .. })),
        "{again:?}"
    );
}

#[test]
fn a_quarantine_on_the_way_back_from_a_registration_is_told() {
    let f = fixture();
    f.ram(0x1_0000, 4);
    // There is no room for the second mapping, and the first cannot be taken down again.
    let table = PageTable::new(TargetLimits {
        entry_limit: Some(1),
        ..at_most(2)
    });
    table.fail_in(1, Fault::UnknownNotDone);
    let error = f
        .map
        .register(table.boxed(), TargetOptions::new("x"))
        .unwrap_err();
    let ChangeError::UndoIncomplete { report, .. } = &error else {
        panic!("the target may still reach the RAM, and all that is said is {error}");
    };
    assert_eq!(report.quarantined.len(), 1);
}

#[test]
fn an_undo_keeps_to_a_largest_mapping_that_has_shrunk_since() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 4);
    let (table, handle) = f.target(limits());
    table.0.lock().limits.largest_mapping = PAGE;
    f.map.limits_changed(handle.id()).unwrap();
    assert_eq!(table.len(), 1, "what is mapped stays, however large");
    let mut change = f.map.change();
    change.move_to(bar, Gpa::new(0x2_0000));
    let mut calls = 0;
    let outcome = change.commit_watched(&mut |_| {
        calls += 1;
        if calls < 2 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    assert_eq!(outcome, Err(ChangeError::Cancelled));
    assert_eq!(
        table.len(),
        4,
        "the table takes no more than a page at a time"
    );
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn mappings_that_are_no_whole_pages_any_more_are_made_anew() {
    let f = fixture();
    let bar = f.bar(0x1_0000, 16);
    let small_pages = TargetLimits {
        largest_mapping: PAGE,
        ..limits()
    };
    let (table, handle) = f.target(small_pages);
    assert_eq!(table.len(), 16);
    let large_pages = TargetLimits {
        page_size: 0x1_0000,
        ..limits()
    };
    table.0.lock().limits = large_pages;
    let report = f.map.limits_changed(handle.id()).unwrap();
    assert_eq!((report.unmaps(), report.maps()), (16, 1));
    // With sixteenths of a page, to put them back would be against the limits.
    f.move_to(bar, 0x2_0000);
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn what_was_revoked_does_not_hide_why_its_neighbour_is_missing() {
    let f = fixture();
    let mut spec = f.spec(RegionKind::DeviceMemory, 0x1_0000, 3);
    let revoked = backing(2, &f.addresses);
    spec.sub_mappings[0].size = PAGE;
    spec.sub_mappings.push(SubMapping {
        offset: PAGE,
        size: 2 * PAGE,
        backing: revoked.clone(),
        backing_offset: 0,
    });
    let bar = f.add(spec).unwrap();
    let (_table, handle) = f.target(TargetLimits {
        largest_mapping: PAGE,
        entry_limit: Some(2),
        ..limits()
    });
    revoked.advance_epoch();
    let missing = |start, reason| Missing {
        range: range(start, 1),
        reason,
    };
    let expected = Reach::Partly {
        mapped: PAGE,
        missing: vec![
            missing(0x1_1000, Reason::Pending),
            missing(0x1_2000, Reason::EntryLimit { limit: 2 }),
        ],
    };
    assert_eq!(f.reach(&handle, bar), expected);
}

#[test]
fn ram_that_takes_the_place_of_other_missing_ram_is_told_all_the_same() {
    let f = fixture();
    let moving = f.ram(0x2000, 2);
    let (_table, _handle) = f.target(allow(&[(0x1000, 0xffff)]));
    // The target cannot hold the first page.
    let spec = f.spec(RegionKind::Ram, 0, 2);
    let report = f.guest(|change| {
        let id = change.add(spec);
        change.enable(id);
    });
    assert_eq!(report.ram_missing.len(), 1);
    // The older one is seen there.
    let outcome = f.host(|change| change.move_to(moving, Gpa::new(0)));
    assert!(matches!(outcome, Err(ChangeError::Refused { .. })));
    let report = f.move_to(moving, 0);
    assert_eq!(report.ram_missing.len(), 1, "of the region that moved");
}

#[test]
fn ram_that_was_missing_before_refuses_nothing_in_however_many_pieces_it_was_noted() {
    let f = fixture();
    let (_table, _handle) = f.target(allow(&[(0, 0xffff)]));
    let ram = f.spec(RegionKind::Ram, 0x1_0000, 4);
    let report = f.guest(|change| {
        let id = change.add(ram);
        change.enable(id);
    });
    assert_eq!(report.ram_missing.len(), 1);
    let below = |start, pages| {
        let mut spec = f.spec(RegionKind::DeviceMemory, start, pages);
        spec.priority = Priority(-1);
        f.add(spec)
    };
    // Only the middle is looked at again, then all of it.
    below(0x1_1000, 1).unwrap();
    below(0x1_0000, 4).unwrap();
}

#[test]
fn only_what_has_become_too_large_is_cut_when_a_mapping_is() {
    let f = fixture();
    let bar = f.bar(0x1_2000, 16);
    let (table, handle) = f.target(limits());
    table.0.lock().limits.largest_mapping = 4 * PAGE;
    f.map.limits_changed(handle.id()).unwrap();
    // The three pages left of the hole are small enough, though they lie across a multiple.
    let report = f.guest(|change| change.remove_sub_mapping(bar, 3 * PAGE, PAGE));
    assert_eq!((report.unmaps(), report.maps()), (1, 1 + 4));
}

#[test]
fn subscribers_are_told_of_every_region_that_a_quarantine_takes_away() {
    let f = fixture();
    let (leaving, other) = (f.bar(0x1_0000, 1), f.bar(0x8_0000, 1));
    let (table, handle) = f.target(limits());
    let subscription = f.map.subscribe(|| {});
    assert!(subscription.take().reach.is_empty());
    table.fail_in(0, Fault::Refused);
    f.guest(|change| change.remove(leaving));
    let told = subscription.take();
    assert_eq!(told.removed, [leaving]);
    let mut told = told.reach.iter().filter(|entry| entry.region == other);
    let entry = told.next().expect("far away, and gone all the same");
    assert_eq!(entry.target, handle.id());
    assert_eq!(entry.reach, Reach::Unavailable(Reason::Quarantined));
}

#[test]
fn ram_that_came_to_show_what_a_bar_had_mapped_is_missed_as_ram() {
    let f = fixture();
    let bar = f.spec(RegionKind::DeviceMemory, 0x1_0000, 3);
    let mut ram = f.spec(RegionKind::Ram, 0x1_0000, 3);
    ram.priority = Priority(1);
    ram.sub_mappings.clone_from(&bar.sub_mappings);
    f.add(bar).unwrap();
    let one_mapping = TargetLimits {
        entry_limit: Some(1),
        ..limits()
    };
    let (table, handle) = f.target(one_mapping);
    let ram = f.add(ram).unwrap();
    assert_eq!(table.take_calls().len(), 1, "the same bytes: nothing to do");
    let report = f.guest(|change| change.remove_sub_mapping(ram, PAGE, PAGE));
    let missing: Vec<_> = report.ram_missing.iter().map(|(id, ..)| *id).collect();
    assert_eq!(
        missing,
        [handle.id()],
        "there is no room for the other half"
    );
}
