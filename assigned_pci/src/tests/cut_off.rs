//! Functions that have been cut off stay cut off.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use memory_map::{CutOff, Quarantine, TargetError, TargetName};

use super::fake::*;
use crate::{AssignedFunction, CutOffSwitch, FunctionOptions, PowerState};

const BUS_MASTER: u16 = 1 << 2;

/// A function with all controls, decoding and mastering the bus, BAR 0 at 0x80000000.
fn running() -> Bench {
    let host = FakeHost::new()
        .with_controls(false)
        .whole_bar(0, MEMORY_32, 0x1000);
    let bench = Bench::new(host);
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x8000_0000]);
    bench.events();
    bench
}

/// Another function of the same map.
fn neighbour(bench: &Bench, at: u32) -> (Arc<FakeHost>, Arc<AssignedFunction>) {
    let host = FakeHost::new()
        .named("neighbour")
        .whole_bar(0, MEMORY_32, 0x1000);
    let host = Arc::new(host);
    let options = FunctionOptions::default();
    let function = AssignedFunction::new(host.clone(), bench.map.clone(), &options).unwrap();
    let _ = function.config_write(0x10, &at.to_le_bytes());
    let _ = function.config_write(COMMAND, &ON.to_le_bytes());
    host.log.lock().clear();
    (host, Arc::new(function))
}

fn why() -> Quarantine {
    let all = memory_map::IovaRange::new(memory_map::Iova::new(0), 0x1000).unwrap();
    Quarantine::Unmap {
        range: all,
        error: TargetError::Unknown(memory_map::Errno::new(EIO)),
    }
}

fn masters(event: &Event) -> bool {
    match event {
        Event::ConfigWrite(COMMAND, data) => data[0] & 4 != 0,
        _ => false,
    }
}

#[test]
fn bus_mastering_goes_off_at_once_and_the_reset_follows_in_order() {
    let bench = running();
    let epoch = bench.host.backing(0).epoch();
    bench.function.cut_off().unwrap();
    let quiet = Event::ConfigWrite(COMMAND, 0x0002_u16.to_le_bytes().to_vec());
    let off = Event::ConfigWrite(COMMAND, vec![0, 0]);
    assert_eq!(
        bench.events(),
        [quiet, Event::Unmap(0x8000_0000), off, Event::Reset]
    );
    assert!(bench.function.is_cut_off());
    assert!(bench.function.cut_off_outcome().unwrap().is_ok());
    assert_ne!(bench.host.backing(0).epoch(), epoch);
    assert_eq!(bench.read(0x10), 0, "as after a reset");
    // Once is enough.
    bench.function.cut_off().unwrap();
    assert_eq!(bench.events(), []);
}

#[test]
fn whatever_the_guest_writes_bus_mastering_stays_off_and_the_rest_works() {
    let bench = running();
    bench.function.cut_off().unwrap();
    bench.events();
    let _ = bench.bar(0, 0x9000_0000);
    let all = [
        (COMMAND, &[0xff][..]),
        (COMMAND, &[0xff, 0xff]),
        (COMMAND, &[0xff, 0xff, 0, 0]),
        (COMMAND + 1, &[0x05]),
        (COMMAND, &ON.to_le_bytes()),
        (PMCSR, &[3]),
        (PMCSR, &[0, 0]),
        (DEVICE_CONTROL, &[0, 0x80]),
        (AF_CONTROL, &[1]),
    ];
    for (offset, data) in all {
        assert!(bench.function.config_write(offset, data).is_ok());
        assert_eq!(bench.host.command() & BUS_MASTER, 0, "{offset:#x}");
        assert_eq!(bench.read(COMMAND) & 4, 0, "the guest sees that it is off");
    }
    let _ = bench.function.reset();
    let _ = bench.bar(0, 0x9000_0000);
    let _ = bench.command(ON);
    assert_eq!(bench.host.command() & BUS_MASTER, 0);
    assert_eq!(bench.mapped(), [0x9000_0000], "it still decodes");
    // Nor does it help to go around the guest's side.
    bench.function.host().config_write(COMMAND, &[6]).unwrap();
    assert_eq!(bench.host.command() & BUS_MASTER, 0);
    let mut asked = bench.events();
    asked.retain(|event| matches!(event, Event::ConfigWrite(..)));
    for event in &asked {
        let Event::ConfigWrite(COMMAND | 0x05, _) = event else {
            panic!("{event:?} might wake it");
        };
        assert!(!masters(event), "{event:?}");
    }
}

#[test]
fn one_that_sleeps_is_left_asleep() {
    let bench = running();
    let _ = bench.function.config_write(PMCSR, &[3]);
    bench.events();
    bench.function.cut_off().unwrap();
    let quiet = Event::ConfigWrite(COMMAND, 0x0002_u16.to_le_bytes().to_vec());
    assert_eq!(bench.events(), [quiet], "no reset, which would wake it");
    // Awake, the host would restore the command register from before it slept.
    let _ = bench.function.config_write(PMCSR, &[0]);
    assert_eq!(bench.function.power_state(), PowerState::D3Hot);
    assert_eq!(bench.host.command() & BUS_MASTER, 0);
    assert_eq!(bench.mapped(), []);
}

#[test]
fn what_is_under_way_and_restores_the_register_does_not_leave_it_on() {
    for reset in [false, true] {
        let bench = running();
        let _ = bench.function.config_write(PMCSR, &[3]);
        assert_eq!(bench.host.command() & BUS_MASTER, BUS_MASTER);
        let function = Arc::downgrade(&bench.function);
        bench.host.probe.set(move |event| {
            let awaited = match event {
                Event::Reset => reset,
                Event::ConfigWrite(offset, _) => !reset && *offset == PMCSR,
                _ => false,
            };
            // As another thread would, before the host restores what it saved.
            if awaited && let Some(function) = function.upgrade() {
                function.cut_off().unwrap();
            }
        });
        // Around the guest's side, which would do more.
        let host = bench.function.host();
        match reset {
            true => host.reset().unwrap(),
            false => host.config_write(PMCSR, &[0]).unwrap(),
        }
        bench.host.probe.set(|_| {});
        assert!(bench.function.is_cut_off());
        assert_eq!(bench.host.config.lock()[usize::from(PMCSR)] & 3, 0, "awake");
        assert_eq!(bench.host.command() & BUS_MASTER, 0, "reset: {reset}");
    }
}

#[test]
fn no_write_of_any_thread_turns_it_on_again() {
    let mut after = 0;
    for round in 0..64 {
        let bench = running();
        let cut = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(AtomicBool::new(false));
        {
            let (cut, seen) = (cut.clone(), seen.clone());
            bench.host.probe.set(move |event| {
                if masters(event) {
                    // The call takes its time, and must not end after the cut-off has.
                    for _ in 0..10 {
                        thread::yield_now();
                    }
                    if cut.load(Ordering::SeqCst) {
                        seen.store(true, Ordering::SeqCst);
                    }
                }
            });
        }
        let start = Barrier::new(5);
        let function = &bench.function;
        thread::scope(|scope| {
            for guest in 0..4_u8 {
                let (start, cut) = (&start, &cut);
                scope.spawn(move || {
                    start.wait();
                    for turn in 0..40_u8 {
                        let _ = match (guest, turn % 4) {
                            (0, 0) => function.config_write(PMCSR, &[3]),
                            (0, 1) => function.config_write(PMCSR, &[0]),
                            (0, 2) => function.config_write(DEVICE_CONTROL, &[0, 0x80]),
                            (1, 0) => function.reset(),
                            (2, _) => {
                                let _ = function.host().config_write(COMMAND, &[6, 0]);
                                continue;
                            }
                            _ => function.config_write(COMMAND, &ON.to_le_bytes()),
                        };
                        // Nothing is proved unless writes come after the cut-off.
                        if turn == 20 && guest == 3 {
                            while !cut.load(Ordering::SeqCst) {
                                thread::yield_now();
                            }
                        }
                    }
                });
            }
            start.wait();
            for _ in 0..round {
                thread::yield_now();
            }
            function.cut_off().unwrap();
            cut.store(true, Ordering::SeqCst);
        });
        assert!(!seen.load(Ordering::SeqCst), "round {round}");
        assert_eq!(bench.host.command() & BUS_MASTER, 0, "round {round}");
        assert!(function.cut_off_outcome().is_some(), "round {round}");
        after += 1;
    }
    assert_eq!(after, 64);
}

#[test]
fn a_config_write_that_quarantines_its_own_target_cuts_its_own_function_off() {
    let bench = running();
    let (other_host, other) = neighbour(&bench, 0x9000_0000);
    bench.switch.add(&other);
    // A second target, which reaches the neighbour and is well.
    let (_second, second_mapped) = bench.second_target(&other_host.log);
    other_host.log.lock().clear();
    bench.stuck.store(true, Ordering::SeqCst);
    // The thread that cuts off has the function's lock.
    let outcome = bench.command(OFF);
    assert_eq!(outcome.reports[0].quarantined.len(), 1);
    let state = bench.switch.state().unwrap();
    assert_eq!(state.target, TargetName::from("recorder"));
    assert_eq!(state.failed, []);
    for (host, function) in [(&bench.host, &bench.function), (&other_host, &other)] {
        assert_eq!(host.command() & BUS_MASTER, 0);
        assert!(function.is_cut_off());
        assert!(function.cut_off_outcome().is_some(), "the reset is over");
        let log = host.log.lock();
        let resets = log.iter().filter(|event| **event == Event::Reset);
        assert_eq!(resets.count(), 1);
    }
    // The neighbour left the well target's IOMMU before it was reset.
    let log = other_host.log.lock();
    let of = |wanted: &Event| log.iter().position(|event| event == wanted);
    assert!(of(&Event::Unmap(0x9000_0000)).unwrap() < of(&Event::Reset).unwrap());
    assert!(second_mapped.lock().is_empty());
}

#[test]
fn functions_that_cut_each_other_off_do_not_wait_for_each_other() {
    for _ in 0..64 {
        let a = running();
        let (_, b) = neighbour(&a, 0x9000_0000);
        let functions = [a.function.clone(), b];
        let switches = functions.each_ref().map(|f| CutOffSwitch::of([f]));
        let start = Barrier::new(4);
        thread::scope(|scope| {
            for function in &functions {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..20 {
                        let _ = function.config_write(COMMAND, &OFF.to_le_bytes());
                        let _ = function.config_write(COMMAND, &ON.to_le_bytes());
                    }
                });
            }
            for switch in &switches {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    switch.cut_off(&TargetName::from("target"), &why());
                });
            }
        });
        for function in &functions {
            assert!(function.cut_off_outcome().is_some());
        }
    }
}

#[test]
fn a_function_that_is_added_too_late_is_cut_off_all_the_same() {
    let bench = running();
    let switch = CutOffSwitch::new();
    assert_eq!(switch.state(), None);
    switch.cut_off(&TargetName::from("target"), &why());
    assert_eq!(bench.host.command() & BUS_MASTER, BUS_MASTER);
    switch.add(&bench.function);
    assert_eq!(bench.host.command() & BUS_MASTER, 0);
    // It keeps nobody alive.
    let (host, gone) = neighbour(&bench, 0x9000_0000);
    let other = CutOffSwitch::of([&gone]);
    drop(gone);
    host.log.lock().clear();
    other.cut_off(&TargetName::from("target"), &why());
    assert_eq!(*host.log.lock(), []);
}

#[test]
fn a_host_that_does_not_turn_it_off_is_told_of_and_asked_again() {
    let bench = running();
    bench.host.refuse.lock().config_write = true;
    bench.switch.cut_off(&TargetName::from("target"), &why());
    let failed = bench.switch.state().unwrap().failed;
    assert_eq!(failed, [("fake".to_owned(), memory_map::Errno::new(EIO))]);
    assert_eq!(bench.host.command() & BUS_MASTER, BUS_MASTER);
    bench.host.refuse.lock().config_write = false;
    let _ = bench.function.config_write(0x3c, &[1]);
    assert_eq!(bench.host.command() & BUS_MASTER, 0);
}

#[test]
fn a_device_that_reads_all_ones_gets_the_whole_register_cleared() {
    let bench = running();
    bench.host.config.lock()[4..6].fill(0xff);
    bench.events();
    bench.function.cut_off().unwrap();
    let off = Event::ConfigWrite(COMMAND, vec![0, 0]);
    assert_eq!(bench.events()[0], off);
}
