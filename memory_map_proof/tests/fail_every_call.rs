//! Named scenarios, each with every call of it failed once in every way.
//!
//! What must hold after the failure is what [`World`] checks after every turn: the map is as the
//! class of change promises, every target holds exactly what the map says or is quarantined, the
//! reach tells what is missing and why. Here it is checked as well that the next try succeeds.

#![expect(
    clippy::unwrap_used,
    reason = "all of this file is a test: a panic there is a failed test and nothing else"
)]

use memory_map::{Access, RegionKind};
use memory_map_proof::World;
use memory_map_proof::count::show;
use memory_map_proof::kernel::Fault;
use memory_map_proof::script::{Op, Step, Turn};

fn region(kind: RegionKind, at: usize, cells: u64, slot: usize) -> Op {
    Op::Add {
        at,
        cells,
        priority: i32::from(kind == RegionKind::DeviceMemory),
        kind,
        access: Access::ReadWrite,
        shareable: true,
        label: None,
        parts: 1,
        hole: false,
        slot,
        backing_page: 0,
        enable: true,
    }
}

fn bar(at: usize, cells: u64, slot: usize) -> Op {
    region(RegionKind::DeviceMemory, at, cells, slot)
}

/// RAM of 64 KiB at 64 KiB, and two BARs beyond it.
fn ram_and_bars() -> Vec<Op> {
    vec![
        region(RegionKind::Ram, 32, 32, 0),
        bar(64, 8, 1),
        bar(80, 8, 2),
    ]
}

fn turn(step: Step) -> Turn {
    Turn {
        step,
        faults: Vec::new(),
        cancel: None,
    }
}

/// A world with the regions and with targets of those shapes.
fn world(regions: &[Op], shapes: &[usize]) -> World {
    let mut world = World::default();
    world
        .turn(&turn(Step::Change(regions.to_vec(), false)))
        .unwrap();
    for &shape in shapes {
        world.turn(&turn(Step::Register(shape))).unwrap();
    }
    world
}

/// Fails the n-th call for every n, in every way, and then tries again without. After that,
/// nothing may be missing from a target that is not quarantined.
fn fail_every_call(name: &str, regions: &[Op], shapes: &[usize], step: &Step, again: &[Step]) {
    let mut failed = 0;
    for fault in Fault::ALL {
        for number in 0.. {
            let mut world = world(regions, shapes);
            let failing = Turn {
                faults: vec![(number, fault)],
                ..turn(step.clone())
            };
            let context = format!("{name}: {fault:?} at call {number}");
            let check = |outcome: Result<(), String>| {
                outcome.unwrap_or_else(|what| panic!("{context}: {what}"));
            };
            check(world.turn(&failing));
            if world.kernel.state().fired.is_empty() {
                break;
            }
            failed += 1;
            for step in again {
                check(world.turn(&turn(step.clone())));
            }
            assert!(world.excuses.is_empty(), "{context}: {:?}", world.excuses);
            check(world.end().map(drop));
        }
    }
    show(&format!("{name}: {failed} failures"));
    assert!(failed >= 5, "{name}");
}

/// A change, by the guest and by the host; what undoes it in part or is done again is `again`.
fn change(name: &str, regions: &[Op], ops: &[Op], again: &[Op]) {
    for guest in [false, true] {
        let name = format!("{name}, the {}'s", if guest { "guest" } else { "host" });
        let step = Step::Change(ops.to_vec(), guest);
        let again = [
            Step::Change(again.to_vec(), true),
            Step::Change(ops.to_vec(), guest),
            Step::Change(touch(regions.len()), true),
        ];
        fail_every_call(&name, regions, &[0, 11, 4, 12, 7], &step, &again);
    }
}

/// Disables and enables every region, so that everything that is missing is tried again.
fn touch(regions: usize) -> Vec<Op> {
    let all = (0..regions).flat_map(|at| [Op::Disable(at), Op::Enable(at)]);
    all.collect()
}

#[test]
fn bar_swap() {
    let swap = [Op::Move(1, 80), Op::Move(2, 64)];
    change("BAR swap", &ram_and_bars(), &swap, &touch(3));
}

#[test]
fn six_bars_off() {
    let bars: Vec<Op> = (0..6).map(|n| bar(64 + 8 * n, 4, n % 4)).collect();
    let off: Vec<Op> = (0..6).map(Op::Disable).collect();
    let on: Vec<Op> = (0..6).map(Op::Enable).collect();
    change("six BARs off", &bars, &off, &on);
    let mut bars = bars;
    for bar in &mut bars {
        if let Op::Add { enable, .. } = bar {
            *enable = false;
        }
    }
    change("six BARs on", &bars, &on, &off);
}

#[test]
fn ram_bisected_by_a_bar() {
    let onto = [Op::Move(1, 40)];
    let back = [Op::Move(1, 64)];
    change("RAM bisected", &ram_and_bars(), &onto, &back);
}

#[test]
fn sub_mapping_replaced_in_an_active_region() {
    let replace = [Op::SetSub(0, 4, 2, 3, 0), Op::RemoveSub(1, 1, 1)];
    change("sub-mapping replaced", &ram_and_bars(), &replace, &touch(3));
}

#[test]
fn access_change() {
    let read_only = [Op::SetAccess(0, Access::ReadOnly)];
    let writable = [Op::SetAccess(0, Access::ReadWrite)];
    change("access change", &ram_and_bars(), &read_only, &writable);
}

#[test]
fn revoke() {
    let revoke = [Op::Revoke(0), Op::Revoke(1)];
    change("revocation", &ram_and_bars(), &revoke, &touch(3));
}

#[test]
fn a_device_leaves() {
    let remove = [Op::Remove(2), Op::Remove(1)];
    for guest in [false, true] {
        let step = Step::Change(remove.to_vec(), guest);
        let again = [Step::Change(touch(1), true)];
        fail_every_call("unplug", &ram_and_bars(), &[0, 11, 4], &step, &again);
    }
}

#[test]
fn a_third_target_is_registered() {
    for third in [0, 6, 4, 9, 7] {
        let again = [Step::Register(third), Step::Change(touch(3), true)];
        let step = Step::Register(third);
        let name = format!("registration of shape {third}");
        fail_every_call(&name, &ram_and_bars(), &[0, 11], &step, &again);
    }
}

#[test]
fn limits_shrink_and_grow() {
    // The smaller page splits what was one mapping; a window opens under the first BAR; then all
    // of it is as before.
    for (name, number) in [
        ("limits shrink: a window under a BAR", 0),
        ("limits shrink: no device memory", 6),
        ("limits shrink: smaller mappings", 3),
        ("limits grow: pages of 64 KiB", 5),
    ] {
        let step = Step::Limits(0, number);
        let again = [Step::Limits(0, 1), Step::Change(touch(3), true)];
        fail_every_call(name, &ram_and_bars(), &[0, 11], &step, &again);
    }
    let bars = [
        bar(64, 8, 1),
        region(RegionKind::Ram, 32, 32, 0),
        bar(100, 8, 2),
    ];
    let step = Step::Limits(0, 1);
    let again = [Step::Limits(0, 1), Step::Change(touch(3), true)];
    fail_every_call(
        "limits grow: a window closes",
        &bars,
        &[2, 11],
        &step,
        &again,
    );
}

#[test]
fn unregistration() {
    for shapes in [[0, 11], [4, 0], [9, 1]] {
        let again = [Step::Register(shapes[0]), Step::Change(touch(3), true)];
        let step = Step::Unregister(0);
        fail_every_call("unregistration", &ram_and_bars(), &shapes, &step, &again);
    }
}
