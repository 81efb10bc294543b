//! What one thread does between two steps of another's: each a sequence that once went wrong.
//!
//! A gated target stops in every call to map until it is told how that is to end. The pauses only
//! give the other thread time to get to where it waits: without them the tests would prove less,
//! and not fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{sleep, spawn};
use std::time::Duration;

use crate::fixture::{allow, at_most, fixture, without_deadlock};
use crate::page_table::{PAGE, PageTable, limits};
use memory_map::{
    Backing, BackingObject, ChangeError, CutOff, DisabledBecause, DmaTarget, Errno, Gpa,
    HostMapping, IovaRange, MapRequest, Priority, Quarantine, Reach, Reason, RegionKind,
    RegionManager, RegionSpec, TargetError, TargetLimits, TargetName, TargetOptions,
};

/// How a call is to end: done, or failed.
type Answer = Option<TargetError>;

/// A call to map that has been stopped: where, and how to let it go on.
type Call = (u64, Sender<Answer>);

#[derive(Default)]
struct Switches {
    /// No call to map is stopped any more.
    open: AtomicBool,
    /// Every unmap fails.
    bad_unmaps: AtomicBool,
}

struct Gated {
    table: PageTable,
    calls: Sender<Call>,
    switches: Arc<Switches>,
}

/// The test's side of a gated target.
struct Gate {
    table: PageTable,
    calls: Receiver<Call>,
    switches: Arc<Switches>,
}

fn gated(limits: TargetLimits) -> (Gate, Box<Gated>) {
    let (sender, receiver) = channel();
    let table = PageTable::new(limits);
    let switches = Arc::new(Switches::default());
    let gate = Gate {
        table: table.clone(),
        calls: receiver,
        switches: switches.clone(),
    };
    let target = Gated {
        table,
        calls: sender,
        switches,
    };
    (gate, Box::new(target))
}

impl Gate {
    fn next(&self) -> Call {
        let call = self.calls.recv_timeout(Duration::from_secs(60));
        call.expect("a call to map")
    }

    fn open(&self, open: bool) {
        self.switches.open.store(open, Ordering::SeqCst);
    }
}

impl DmaTarget for Gated {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.table.limits()
    }

    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.table.needs_host_address(backing)
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        if !self.switches.open.load(Ordering::SeqCst) {
            let (sender, receiver) = channel();
            self.calls
                .send((request.iova.start().raw(), sender))
                .unwrap();
            if let Some(error) = receiver.recv().unwrap() {
                return Err(error);
            }
        }
        self.table.map(request)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        if self.switches.bad_unmaps.load(Ordering::SeqCst) {
            return Err(TargetError::Unknown(Errno::new(5)));
        }
        self.table.unmap(range)
    }
}

fn refused() -> Answer {
    Some(TargetError::kernel(Errno::new(12)))
}

fn let_others_get_there() {
    sleep(Duration::from_millis(100));
}

#[test]
fn what_an_undo_takes_back_is_not_mapped_by_one_who_planned_before() {
    let f = fixture();
    f.ram(0, 1);
    let (gate, target) = gated(limits());
    gate.open(true);
    let _handle = f.register(target);
    gate.open(false);
    let host = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0x10_0000, 1)))
    };
    let (_, go) = gate.next();
    let (joining, target) = gated(limits());
    let joins = {
        let f = f.clone();
        spawn(move || f.map.register(target, TargetOptions::new("joining")))
    };
    let (at, joining_go) = joining.next();
    assert_eq!(at, 0);
    go.send(refused()).unwrap();
    let_others_get_there();
    joining.open(true);
    joining_go.send(None).unwrap();
    assert!(host.join().unwrap().is_err());
    let handle = joins.join().unwrap().unwrap();
    assert_eq!(f.map.lookup(Gpa::new(0x10_0000)), None);
    assert_eq!(joining.table.translate(0x10_0000), None, "RAM taken back");
    assert_eq!(f.map.mappings_of(handle.id()), Ok(1));
}

#[test]
fn what_an_undo_puts_back_is_not_mapped_over() {
    let f = fixture();
    let (gate, target) = gated(at_most(1));
    gate.open(true);
    let handle = f.register(target);
    let mut spec = f.spec(RegionKind::DeviceMemory, 0x10_1000, 1);
    spec.priority = Priority(1);
    let bar = f.add(spec).unwrap();
    gate.open(false);
    let first = {
        let f = f.clone();
        spawn(move || {
            f.host(|change| {
                change.disable(bar, DisabledBecause::Owner);
                let ram = change.add(f.spec(RegionKind::Ram, 0, 1));
                change.enable(ram);
            })
        })
    };
    let (_, first_go) = gate.next();
    let second = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0x10_0000, 2)))
    };
    let_others_get_there();
    first_go.send(refused()).unwrap();
    let (at, second_go) = gate.next();
    assert_eq!(at, 0x10_0000);
    let_others_get_there();
    gate.open(true);
    second_go.send(None).unwrap();
    assert!(first.join().unwrap().is_err());
    // The table panics where a mapping would overlap.
    second.join().unwrap().unwrap();
    assert_eq!(f.reach(&handle, bar), Reach::Mapped);
}

#[test]
fn a_refused_registration_waits_for_what_others_map_into_it() {
    let f = fixture();
    f.ram(0, 1);
    let (gate, target) = gated(limits());
    let joins = {
        let f = f.clone();
        let options = TargetOptions::new("joining");
        spawn(move || f.map.register(target, options).map(drop))
    };
    let (_, joining_go) = gate.next();
    let host = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0x10_0000, 1)))
    };
    let_others_get_there();
    joining_go.send(refused()).unwrap();
    let (at, host_go) = gate.next();
    assert_eq!(at, 0x10_0000);
    let_others_get_there();
    host_go.send(None).unwrap();
    assert!(joins.join().unwrap().is_err());
    let ram = host.join().unwrap().unwrap();
    f.host(|change| change.remove(ram)).unwrap();
    assert_eq!(gate.table.len(), 0);
    assert_eq!(f.addresses_held(), 0, "nothing keeps the pages");
}

struct Counted(Arc<AtomicUsize>);

impl CutOff for Counted {
    fn cut_off(&self, _: &TargetName, _: &Quarantine) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn devices_are_cut_off_though_their_target_leaves_meanwhile() {
    let f = fixture();
    let (gate, target) = gated(limits());
    let cut_off = Arc::new(AtomicUsize::new(0));
    let mut options = TargetOptions::new("leaving");
    options.cut_off = Some(Arc::new(Counted(cut_off.clone())));
    let handle = f.map.register(target, options).unwrap();
    let host = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0, 1)))
    };
    let (_, go) = gate.next();
    let leaves = spawn(move || handle.unregister());
    let_others_get_there();
    gate.switches.bad_unmaps.store(true, Ordering::SeqCst);
    go.send(Some(TargetError::Unknown(Errno::new(5)))).unwrap();
    assert!(host.join().unwrap().is_err());
    assert!(!leaves.join().unwrap().quarantined.is_empty());
    assert_eq!(cut_off.load(Ordering::SeqCst), 1);
}

#[test]
fn what_is_in_flight_counts_against_the_entry_limit() {
    let f = fixture();
    let (gate, target) = gated(TargetLimits {
        entry_limit: Some(1),
        ..limits()
    });
    let handle = f.register(target);
    let bar = f.add_disabled(f.spec(RegionKind::DeviceMemory, 0x10_0000, 1));
    let host = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0, 1)))
    };
    let (_, go) = gate.next();
    let guest = {
        let f = f.clone();
        spawn(move || f.guest(|change| change.enable(bar)))
    };
    let_others_get_there();
    gate.open(true);
    go.send(None).unwrap();
    host.join().unwrap().unwrap();
    // The table panics where a mapping would be against its limits.
    guest.join().unwrap();
    let full = Reach::Unavailable(Reason::EntryLimit { limit: 1 });
    assert_eq!(f.reach(&handle, bar), full);
}

#[test]
fn ram_that_was_missing_before_is_lost_by_no_undo() {
    let f = fixture();
    let (gate, target) = gated(allow(&[(0, 0x1fff), (0x3000, 0xffff_ffff)]));
    let _handle = f.register(target);
    gate.open(true);
    let cover = f.add(f.trap(0x2000)).unwrap();
    f.ram(0, 4);
    let report = f.guest(|change| change.disable(cover, DisabledBecause::Owner));
    assert_eq!(report.ram_missing.len(), 1);
    gate.open(false);
    let other = f.add_disabled(f.trap(0x20_0000));
    let host = {
        let f = f.clone();
        spawn(move || {
            f.host(|change| {
                change.enable(cover);
                let ram = change.add(f.spec(RegionKind::Ram, 0x10_0000, 1));
                change.enable(ram);
            })
        })
    };
    let (_, go) = gate.next();
    // Somebody takes a step in between, so that the undo is not one of single steps.
    f.guest(|change| change.enable(other));
    gate.open(true);
    go.send(refused()).unwrap();
    let error = host.join().unwrap().unwrap_err();
    assert!(matches!(error, ChangeError::Refused { .. }), "{error}");
}

#[test]
fn ram_missing_in_a_target_that_joined_meanwhile_is_somebodys_to_tell() {
    let f = fixture();
    let (gate, target) = gated(at_most(1));
    let _handle = f.register(target);
    let cover = f.add(f.trap(0x10_0000)).unwrap();
    let host = {
        let f = f.clone();
        spawn(move || {
            f.host(|change| {
                let ram = change.add(f.spec(RegionKind::Ram, 0x10_0000, 30));
                change.enable(ram);
            })
        })
    };
    let mut pending = gate.next();
    let table = PageTable::new(at_most(32));
    let joins = {
        let (f, target) = (f.clone(), table.boxed());
        let options = TargetOptions::new("joining");
        spawn(move || f.map.register(target, options).unwrap())
    };
    loop {
        let_others_get_there();
        if joins.is_finished() {
            break;
        }
        pending.1.send(None).unwrap();
        pending = gate.next();
    }
    let _joined = joins.join().unwrap();
    table.0.lock().refuse_maps = Some(TargetError::kernel(Errno::new(12)));
    let guest = {
        let f = f.clone();
        spawn(move || f.guest(|change| change.disable(cover, DisabledBecause::Owner)))
    };
    let_others_get_there();
    gate.open(true);
    pending.1.send(None).unwrap();
    let by_guest = guest.join().unwrap();
    let by_host = host.join().unwrap();
    assert_eq!(table.translate(0x10_0000), None, "it is missing");
    assert!(
        !by_guest.ram_missing.is_empty() || by_host.is_err(),
        "and nobody tells: {by_host:?}"
    );
}

/// All but the page at 0x2000.
fn with_a_hole() -> TargetLimits {
    allow(&[(0, 0x1fff), (0x3000, 0xffff_ffff)])
}

#[test]
fn ram_that_is_uncovered_where_a_target_cannot_hold_it_is_told_by_whoever_adds_it() {
    let f = fixture();
    let (gate, target) = gated(with_a_hole());
    let _handle = f.register(target);
    let cover = f.add(f.trap(0x2000)).unwrap();
    let host = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0, 4)))
    };
    let (_, go) = gate.next();
    let report = f.guest(|change| change.disable(cover, DisabledBecause::Owner));
    assert!(report.ram_missing.is_empty(), "it is not counted on yet");
    gate.open(true);
    go.send(None).unwrap();
    let error = host.join().unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            ChangeError::Refused {
                reason: Reason::ReservedWindow { .. },
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(gate.table.translate(0), None, "it is undone");
}

#[test]
fn ram_that_is_uncovered_where_a_joining_target_cannot_hold_it_keeps_it_out() {
    let f = fixture();
    f.ram(0, 4);
    let cover = f.add(f.trap(0x2000)).unwrap();
    let (gate, target) = gated(with_a_hole());
    let joins = {
        let f = f.clone();
        spawn(move || f.map.register(target, TargetOptions::new("joining")))
    };
    let (_, go) = gate.next();
    f.guest(|change| change.disable(cover, DisabledBecause::Owner));
    gate.open(true);
    go.send(None).unwrap();
    let error = joins.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("reserved window"), "{error}");
    assert_eq!(gate.table.translate(0), None, "it holds nothing");
}

#[test]
fn an_interrupted_undo_maps_what_remained_of_a_bar_that_was_cut() {
    let f = fixture();
    let bar = f.bar(0x10_0000, 3);
    let (first, target) = gated(limits());
    first.open(true);
    let first_handle = f.register(target);
    let (second, target) = gated(limits());
    second.open(true);
    let second_handle = f.register(target);
    let other = f.add_disabled(f.trap(0x20_0000));
    first.open(false);
    second.open(false);
    let answer = |gate: &Gate, at, answer| {
        let (start, go) = gate.next();
        assert_eq!(start, at);
        go.send(answer).unwrap();
    };
    let host = {
        let f = f.clone();
        spawn(move || {
            f.add(RegionSpec {
                priority: Priority(1),
                ..f.spec(RegionKind::Ram, 0x10_1000, 1)
            })
        })
    };
    answer(&first, 0x10_0000, None);
    answer(&first, 0x10_2000, refused());
    answer(&second, 0x10_0000, None);
    answer(&second, 0x10_2000, None);
    let (at, go) = second.next();
    assert_eq!(at, 0x10_1000);
    f.guest(|change| change.enable(other));
    go.send(None).unwrap();
    let (at, go) = first.next();
    assert_eq!(at, 0x10_1000);
    first.open(true);
    second.open(true);
    go.send(refused()).unwrap();
    let error = host.join().unwrap().unwrap_err();
    assert!(matches!(error, ChangeError::Refused { .. }), "{error}");
    assert_eq!(f.reach(&first_handle, bar), Reach::Mapped);
    assert_eq!(f.reach(&second_handle, bar), Reach::Mapped);
}

#[test]
fn ram_that_was_missing_for_a_moment_is_missed_when_it_is_lost() {
    let f = fixture();
    let (gate, target) = gated(at_most(1));
    let _handle = f.register(target);
    let cover = f.add(f.trap(0x1000)).unwrap();
    let host = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0, 2)))
    };
    let (_, first) = gate.next();
    let guest = {
        let f = f.clone();
        spawn(move || f.guest(|change| change.disable(cover, DisabledBecause::Owner)))
    };
    // The guest has its turn then, and waits for the target.
    while f
        .map
        .lookup(Gpa::new(0x1000))
        .is_some_and(|seen| seen.region == cover)
    {
        sleep(Duration::from_millis(1));
    }
    first.send(None).unwrap();
    let (at, go) = gate.next();
    assert_eq!(at, 0x1000);
    go.send(refused()).unwrap();
    assert!(guest.join().unwrap().ram_missing.is_empty());
    let (at, go) = gate.next();
    assert_eq!(at, 0x1000, "whoever adds it tries again");
    go.send(None).unwrap();
    host.join().unwrap().unwrap();

    let host = {
        let f = f.clone();
        spawn(move || {
            f.host(|change| {
                change.enable(cover);
                let ram = change.add(f.spec(RegionKind::Ram, 0x10_0000, 1));
                change.enable(ram);
            })
        })
    };
    for at in [0x10_0000, 0x1000] {
        let (start, go) = gate.next();
        assert_eq!(start, at);
        go.send(refused()).unwrap();
    }
    let error = host.join().unwrap().unwrap_err();
    assert!(
        matches!(error, ChangeError::UndoIncomplete { .. }),
        "{error}"
    );
}

/// A page that takes a turn when it ends.
#[derive(Debug)]
struct Leaving(RegionManager, Arc<AtomicBool>);

impl BackingObject for Leaving {
    fn size(&self) -> u64 {
        PAGE
    }

    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        Err(Errno::new(19))
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.change().commit().unwrap();
        self.1.store(true, Ordering::SeqCst);
    }
}

#[test]
fn pages_that_leave_during_a_long_change_are_not_kept_by_its_plan() {
    without_deadlock(|| {
        let f = fixture();
        f.ram(0, 4);
        let gone = Arc::<AtomicBool>::default();
        let mut bar = f.spec(RegionKind::DeviceMemory, 0x10_0000, 1);
        bar.sub_mappings[0].backing = Backing::new(Leaving(f.map.clone(), gone.clone()));
        let bar = f.add(bar).unwrap();
        let (gate, target) = gated(at_most(1));
        let joins = {
            let f = f.clone();
            spawn(move || f.map.register(target, TargetOptions::new("joining")))
        };
        let (_, go) = gate.next();
        f.host(|change| change.remove(bar)).unwrap();
        assert!(!gone.load(Ordering::SeqCst), "it is still planned with");
        go.send(None).unwrap();
        gate.next().1.send(None).unwrap();
        let (_, go) = gate.next();
        assert!(gone.load(Ordering::SeqCst));
        gate.open(true);
        go.send(None).unwrap();
        let _handle = joins.join().unwrap().unwrap();
        assert!(gate.table.translate(0x3000).is_some());
    });
}

#[test]
fn a_target_that_panics_in_a_map_gets_no_more_calls_and_keeps_the_pages() {
    let f = fixture();
    let table = PageTable::new(limits());
    table.0.lock().during_map = Some(|_| panic!("in a target"));
    let handle = f.register(table.boxed());
    let panicked = {
        let f = f.clone();
        spawn(move || f.add(f.spec(RegionKind::Ram, 0x1000, 1))).join()
    };
    assert!(panicked.is_err());
    assert!(f.map.quarantine_of(handle.id()).unwrap().is_some());
    assert_eq!(f.map.lookup(Gpa::new(0x1000)), None, "it was refused");
    table.0.lock().during_map = None;
    table.take_calls();
    f.ram(0x20_0000, 1);
    assert_eq!(table.take_calls(), []);
    assert_eq!(f.addresses_held(), 1, "it may be mapped");
}
