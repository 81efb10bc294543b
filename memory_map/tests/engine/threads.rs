//! Who waits for whom, and for how long. Every order of steps: see `tests/interleavings`.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::fixture::{Fixture, at_most, fixture, without_deadlock};
use crate::page_table::{Call, PAGE, PageTable, limits};
use memory_map::{
    Access, Backing, ChangeError, DmaTarget, Errno, Gpa, IovaRange, MapRequest, Reach, RegionId,
    RegionKind, RegionManager, TargetError, TargetLimits, TargetOptions,
};
use parking_lot::Mutex;

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

/// A target during one of whose mappings another thread changes the map. That mapping goes on
/// until the map shows the change, or patience ends.
struct Meanwhile {
    table: PageTable,
    /// How many mappings are made before that one.
    before: usize,
    other: Other,
    shows: Box<dyn Fn() -> bool + Send>,
    patience: Duration,
}

/// What the other thread does, and then the thread that does it.
#[derive(Clone)]
struct Other(Arc<Mutex<Thread>>);

enum Thread {
    Waits(Box<dyn FnOnce() + Send>),
    Runs(JoinHandle<()>),
    Ended,
}

impl Other {
    fn new(act: impl FnOnce() + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Thread::Waits(Box::new(act)))))
    }

    fn start(&self) {
        let mut thread = self.0.lock();
        *thread = match std::mem::replace(&mut *thread, Thread::Ended) {
            Thread::Waits(act) => Thread::Runs(std::thread::spawn(act)),
            _ => panic!("started twice"),
        };
    }

    fn join(&self) {
        let thread = std::mem::replace(&mut *self.0.lock(), Thread::Ended);
        let Thread::Runs(thread) = thread else {
            panic!("never started");
        };
        thread.join().unwrap();
    }
}

impl DmaTarget for Meanwhile {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.table.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.table.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        if self.before == 0 {
            self.other.start();
            let step = Duration::from_millis(1);
            while !(self.shows)() && !self.patience.is_zero() {
                std::thread::sleep(step);
                self.patience = self.patience.saturating_sub(step);
            }
        }
        self.before = self.before.wrapping_sub(1);
        self.table.map(request)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.table.unmap(range)
    }
}

/// Enough for whatever is sure to happen.
const EVER: Duration = Duration::from_secs(60);
/// Enough for what must not happen to be likely to.
const A_WHILE: Duration = Duration::from_millis(100);

/// A map's question whether `region` is what the guest sees at `at`.
fn shows(f: &Fixture, region: RegionId, at: u64) -> Box<dyn Fn() -> bool + Send> {
    let map = f.map.clone();
    Box::new(move || {
        let seen = map.lookup(Gpa::new(at));
        seen.is_some_and(|seen| seen.region == region)
    })
}

const fn piece(n: u64) -> Call {
    Call::Map(n * PAGE, n * PAGE + 0xfff)
}

#[test]
fn a_bar_waits_for_one_piece_of_a_long_map_and_no_more() {
    without_deadlock(|| {
        let f = fixture();
        let bar = f.bar(0x10_0000, 1);
        let table = PageTable::new(at_most(1));
        let guest = f.clone();
        let mover = Other::new(move || {
            assert_eq!(guest.move_to(bar, 0x20_0000).maps(), 1);
        });
        let _handle = f.register(Box::new(Meanwhile {
            table: table.clone(),
            // The BAR.
            before: 1,
            other: mover.clone(),
            shows: shows(&f, bar, 0x20_0000),
            patience: EVER,
        }));
        table.take_calls();
        f.ram(0, 4);
        mover.join();
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
    });
}

#[test]
fn a_hole_that_is_to_be_closed_at_once_lets_nobody_in() {
    without_deadlock(|| {
        let f = fixture();
        let ram = f.ram(0, 4);
        let trap = f.add_disabled(f.trap(0x2000));
        let table = PageTable::new(at_most(2));
        let guest = f.clone();
        let trapper = Other::new(move || {
            let report = guest.guest(|change| change.enable(trap));
            assert_eq!(report.quarantined, []);
        });
        let handle = f.register(Box::new(Meanwhile {
            table: table.clone(),
            // Both halves of the RAM.
            before: 2,
            other: trapper.clone(),
            shows: shows(&f, trap, 0x2000),
            patience: A_WHILE,
        }));
        table.take_calls();
        f.host(|change| change.set_access(ram, Access::ReadOnly))
            .unwrap();
        trapper.join();
        assert_eq!(f.map.quarantine_of(handle.id()).unwrap(), None);
        let (low, high) = ((0, 0x1fff), (0x2000, 0x3fff));
        assert_eq!(
            table.take_calls(),
            [
                Call::Unmap(low.0, low.1),
                Call::Map(low.0, low.1),
                Call::Unmap(high.0, high.1),
                Call::Map(high.0, high.1),
                // The trap's turn.
                Call::Unmap(high.0, high.1),
                Call::Map(0x3000, 0x3fff),
            ]
        );
    });
}

#[test]
fn a_cancelled_registration_maps_nothing_more_whatever_came_in_between() {
    without_deadlock(|| {
        let f = fixture();
        f.ram(0, 64);
        let trap = f.add_disabled(f.trap(0x100_0000));
        let table = PageTable::new(at_most(1));
        let guest = f.clone();
        let trapper = Other::new(move || {
            guest.guest(|change| change.enable(trap));
        });
        let target = Box::new(Meanwhile {
            table: table.clone(),
            before: 1,
            other: trapper.clone(),
            shows: shows(&f, trap, 0x100_0000),
            patience: EVER,
        });
        let options = TargetOptions::new("table");
        let outcome = f.map.register_watched(target, options, &mut |progress| {
            if progress.done == 3 * PAGE {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        assert_eq!(outcome.unwrap_err(), ChangeError::Cancelled);
        trapper.join();
        let mut calls = table.take_calls();
        let undone = calls.split_off(3);
        assert_eq!(calls, [piece(0), piece(1), piece(2)]);
        assert!(undone.iter().all(|call| matches!(call, Call::Unmap(..))));
        assert_eq!(table.len(), 0);
        assert!(f.map.reach().is_empty());
    });
}

#[test]
fn ram_can_be_added_while_a_target_registers() {
    without_deadlock(|| {
        let f = fixture();
        let old = f.ram(0, 4);
        let new = f.add_disabled(f.spec(RegionKind::Ram, 0x10_0000, 4));
        let table = PageTable::new(at_most(1));
        let host = f.clone();
        let adder = Other::new(move || {
            host.host(|change| change.enable(new)).unwrap();
        });
        let handle = f.register(Box::new(Meanwhile {
            table: table.clone(),
            before: 0,
            other: adder.clone(),
            shows: shows(&f, new, 0x10_0000),
            patience: EVER,
        }));
        adder.join();
        assert_eq!(table.len(), 8);
        assert_eq!(f.reach(&handle, old), Reach::Mapped);
        assert_eq!(f.reach(&handle, new), Reach::Mapped);
    });
}
