//! The threads, and what holds in every order of their steps.

use std::sync::Arc;

use memory_map::{
    Access, Backing, DisabledBecause, DmaTarget, Errno, Gpa, GpaRange, IovaRange, MapRequest,
    Priority, Reach, RegionId, RegionKind, RegionManager, RegionSpec, SubMapping, TargetError,
    TargetHandle, TargetLimits, TargetOptions,
};
use shuttle::thread;

use crate::page_table::{Addresses, Fault, PAGE, PageTable, backing, limits};

const SCHEDULES: usize = 20_000;
const RAM_PAGES: u64 = 4;
const LOW: u64 = 0x10_0000;
const HIGH: u64 = 0x20_0000;

/// A target that lets other threads in while it is called.
struct Slow(PageTable);

impl DmaTarget for Slow {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.0.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.0.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        thread::yield_now();
        let outcome = self.0.map(request);
        thread::yield_now();
        outcome
    }
    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        thread::yield_now();
        self.0.unmap(range)
    }
}

struct World {
    map: RegionManager,
    table: PageTable,
    handle: TargetHandle,
    bar: RegionId,
    bar_backing: Backing,
}

fn spec(kind: RegionKind, start: u64, backing: &Backing, priority: i32) -> RegionSpec {
    RegionSpec {
        name: "region".into(),
        range: GpaRange::new(Gpa::new(start), backing.size()).unwrap(),
        priority: Priority(priority),
        kind,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: vec![SubMapping {
            offset: 0,
            size: backing.size(),
            backing: backing.clone(),
            backing_offset: 0,
        }],
    }
}

/// RAM goes in page by page.
fn paged() -> TargetLimits {
    TargetLimits {
        largest_mapping: PAGE,
        ..limits()
    }
}

fn register(map: &RegionManager) -> (PageTable, TargetHandle) {
    let table = PageTable::new(paged());
    let slow = Box::new(Slow(table.clone()));
    let handle = map.register(slow, TargetOptions::new("table")).unwrap();
    (table, handle)
}

fn world() -> World {
    let addresses = Arc::new(Addresses::default());
    let map = RegionManager::new();
    let (table, handle) = register(&map);
    let bar_backing = backing(1, &addresses);
    let mut change = map.change();
    let bar = change.add(spec(RegionKind::DeviceMemory, LOW, &bar_backing, 1));
    change.enable(bar);
    change.commit().unwrap();
    World {
        map,
        table,
        handle,
        bar,
        bar_backing,
    }
}

fn add_ram(map: &RegionManager) -> Result<RegionId, memory_map::ChangeError> {
    let ram = backing(RAM_PAGES, &Arc::default());
    let mut change = map.change();
    let id = change.add(spec(RegionKind::Ram, 0, &ram, 0));
    change.enable(id);
    change.commit().map(|_| id)
}

fn move_bar(map: &RegionManager, bar: RegionId, to: u64) {
    let mut change = map.change();
    change.move_to(bar, Gpa::new(to));
    let report = change.commit_guest().unwrap();
    assert_eq!(report.ram_missing, []);
    assert_eq!(report.quarantined, []);
}

/// What a device finds at a page is what the map shows there.
fn check(map: &RegionManager, table: &PageTable, target: &TargetHandle) {
    for page in (0..RAM_PAGES).map(|n| n * PAGE).chain([LOW, HIGH]) {
        let shown = map.lookup(Gpa::new(page)).is_some();
        assert_eq!(table.translate(page).is_some(), shown, "page {page:#x}");
    }
    for region in map.regions() {
        let reach = map.reach_of(target.id(), region.id).unwrap();
        let whole = reach == Reach::Mapped;
        let covered = matches!(reach, Reach::Partly { .. });
        assert!(whole || covered || region.disabled.is_some(), "{reach}");
    }
}

#[test]
fn a_bar_moves_while_ram_is_being_mapped() {
    shuttle::check_random(
        || {
            let w = world();
            let (map, bar) = (w.map.clone(), w.bar);
            let mover = thread::spawn(move || move_bar(&map, bar, HIGH));
            add_ram(&w.map).unwrap();
            mover.join().unwrap();
            check(&w.map, &w.table, &w.handle);
        },
        SCHEDULES,
    );
}

#[test]
fn a_bar_placed_over_ram_that_is_being_mapped_covers_it_and_uncovers_it() {
    shuttle::check_random(
        || {
            let w = world();
            let (map, bar) = (w.map.clone(), w.bar);
            let mover = thread::spawn(move || {
                move_bar(&map, bar, PAGE);
                move_bar(&map, bar, 2 * PAGE);
            });
            add_ram(&w.map).unwrap();
            mover.join().unwrap();
            check(&w.map, &w.table, &w.handle);
            assert_eq!(
                w.table.translate(2 * PAGE).unwrap().0,
                w.bar_backing.id(),
                "the BAR has the higher priority"
            );
        },
        SCHEDULES,
    );
}

#[test]
fn ram_that_is_refused_half_way_leaves_what_others_did_meanwhile() {
    shuttle::check_random(
        || {
            let w = world();
            let (map, bar) = (w.map.clone(), w.bar);
            w.table.fail_in(2, Fault::Refused);
            let mover = thread::spawn(move || {
                let mut change = map.change();
                change.move_to(bar, Gpa::new(PAGE));
                change.commit_guest().unwrap();
            });
            let added = add_ram(&w.map);
            mover.join().unwrap();
            w.table.0.lock().fail_in = None;
            if added.is_err() {
                assert_eq!(w.map.regions().len(), 1);
                assert!(w.table.len() <= 1);
            }
            // The fault may have hit the BAR instead, which is then unavailable until it moves.
            move_bar(&w.map, w.bar, HIGH);
            check(&w.map, &w.table, &w.handle);
        },
        SCHEDULES,
    );
}

#[test]
fn a_target_joins_and_another_leaves_while_a_bar_moves() {
    shuttle::check_random(
        || {
            let w = world();
            add_ram(&w.map).unwrap();
            let (map, bar) = (w.map.clone(), w.bar);
            let mover = thread::spawn(move || {
                move_bar(&map, bar, PAGE);
                move_bar(&map, bar, HIGH);
            });
            let map = w.map.clone();
            let joiner = thread::spawn(move || register(&map));
            let (left, handle) = (w.table, w.handle);
            drop(handle);
            mover.join().unwrap();
            let (table, handle) = joiner.join().unwrap();
            assert_eq!(left.len(), 0);
            check(&w.map, &table, &handle);
        },
        SCHEDULES,
    );
}

#[test]
fn a_target_that_joins_holds_nothing_of_ram_that_is_refused_meanwhile() {
    shuttle::check_random(
        || {
            let w = world();
            // At once: that is when the other plans.
            w.table.fail_in(0, Fault::Refused);
            let map = w.map.clone();
            let joiner = thread::spawn(move || register(&map));
            let map = w.map.clone();
            let adder = thread::spawn(move || add_ram(&map).is_err());
            let (table, handle) = joiner.join().unwrap();
            assert!(adder.join().unwrap());
            check(&w.map, &w.table, &w.handle);
            check(&w.map, &table, &handle);
        },
        SCHEDULES,
    );
}

#[test]
fn a_registration_that_is_refused_leaves_nothing_of_what_others_mapped_into_it() {
    shuttle::check_random(
        || {
            let w = world();
            add_ram(&w.map).unwrap();
            let table = PageTable::new(paged());
            table.fail_in(2, Fault::Refused);
            let (map, slow) = (w.map.clone(), Box::new(Slow(table.clone())));
            let joiner = thread::spawn(move || {
                let joined = map.register(slow, TargetOptions::new("refusing"));
                joined.err()
            });
            let (map, bar) = (w.map.clone(), w.bar);
            let adder = thread::spawn(move || {
                let other = backing(2, &Arc::default());
                let mut change = map.change();
                let id = change.add(spec(RegionKind::Ram, HIGH, &other, 0));
                change.enable(id);
                // If it is this one that is refused, it is so in a target that joins.
                drop(change.commit());
                move_bar(&map, bar, LOW + PAGE);
            });
            let refused = joiner.join().unwrap();
            adder.join().unwrap();
            if refused.is_some() {
                assert_eq!(table.len(), 0);
            }
        },
        SCHEDULES,
    );
}

#[test]
fn what_is_revoked_while_it_is_being_mapped_is_mapped_again() {
    shuttle::check_random(
        || {
            let w = world();
            let (map, bar, revoked) = (w.map.clone(), w.bar, w.bar_backing.clone());
            let mut change = map.change();
            change.disable(bar, DisabledBecause::Resetting);
            change.commit_guest().unwrap();
            let revoker = thread::spawn(move || {
                let mut change = map.change();
                change.revoke(&revoked);
                change.commit_guest().unwrap();
            });
            let mut change = w.map.change();
            change.enable(bar);
            change.commit().unwrap();
            revoker.join().unwrap();
            check(&w.map, &w.table, &w.handle);
        },
        SCHEDULES,
    );
}

#[test]
fn two_hosts_changes_and_a_guests_do_not_lose_each_other() {
    shuttle::check_random(
        || {
            let w = world();
            let map = w.map.clone();
            let plugger = thread::spawn(move || {
                let other = backing(2, &Arc::default());
                let mut change = map.change();
                let id = change.add(spec(RegionKind::DeviceMemory, HIGH, &other, 0));
                change.enable(id);
                change.commit().unwrap();
            });
            let (map, bar) = (w.map.clone(), w.bar);
            let mover = thread::spawn(move || move_bar(&map, bar, HIGH));
            add_ram(&w.map).unwrap();
            plugger.join().unwrap();
            mover.join().unwrap();
            check(&w.map, &w.table, &w.handle);
        },
        SCHEDULES,
    );
}

#[test]
fn two_hosts_changes_of_the_same_addresses_do_not_conflict() {
    shuttle::check_random(
        || {
            let w = world();
            let map = w.map.clone();
            let plugger = thread::spawn(move || {
                let other = backing(3, &Arc::default());
                let mut change = map.change();
                let id = change.add(spec(RegionKind::DeviceMemory, PAGE, &other, 1));
                change.enable(id);
                change.commit().unwrap();
                let mut change = map.change();
                change.remove(id);
                change.commit().unwrap();
            });
            add_ram(&w.map).unwrap();
            plugger.join().unwrap();
            check(&w.map, &w.table, &w.handle);
        },
        SCHEDULES,
    );
}
