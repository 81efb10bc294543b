//! Functions that are pulled out while the guest runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use assigned_pci::HostFunction as _;
use machine::pci::Place;
use machine::platform::ECAM;
use machine::{Access, Board as _, PulledOut};
use memory_map::{
    Backing, DmaTarget, Errno, Gpa, IovaRange, MapRequest, TargetError, TargetLimits,
};
use sim_host::{BusErrorCause, Call};

use crate::check::compare;
use crate::rig::{Abused, PAIR, Rig};
use crate::{ACCESSES, run};

/// The abused function that is pulled out: shared memory on the root bus, which has MSI.
const SHARED: usize = 1;
/// Where its memory is put.
const MEMORY: u64 = 0x9_0000_0000;
const COMMAND: u64 = 0x04;
const BAR2: u64 = 0x18;

/// A guest that has `SHARED` decode its memory and master the bus.
struct Guest<'r> {
    rig: &'r Rig,
    config: u64,
}

impl<'r> Guest<'r> {
    fn new(rig: &'r Rig) -> Self {
        let Place::OnRoot(device) = rig.abused[SHARED].place else {
            panic!("it is no PCI Express function");
        };
        let guest = Self {
            rig,
            config: ECAM.raw() + (u64::from(device) << 15),
        };
        guest.bring_up();
        guest
    }

    fn bring_up(&self) {
        self.write(self.config + BAR2, 0);
        self.write(self.config + BAR2 + 4, u32::try_from(MEMORY >> 32).unwrap());
        self.write(self.config + COMMAND, 6);
    }

    fn write(&self, at: u64, value: u32) {
        let data = value.to_le_bytes();
        self.rig.board.memory(Gpa::new(at), Access::Write(&data));
    }

    fn read(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.rig.board.memory(Gpa::new(at), Access::Read(&mut data));
        u32::from_le_bytes(data)
    }

    /// That nothing answers for the function, whatever is tried.
    fn ensure_nobody(&self) {
        for offset in (0..0x100).step_by(4) {
            self.write(self.config + offset, 0x1234_5678);
            assert_eq!(self.read(self.config + offset), u32::MAX, "{offset:#x}");
        }
        self.bring_up();
        self.write(MEMORY, 7);
        assert_eq!(self.read(MEMORY), u32::MAX);
        assert_eq!(self.rig.map.lookup(Gpa::new(MEMORY)), None);
    }
}

fn maps(rig: &Rig) -> u64 {
    rig.host.count(Call::MapDma) + rig.host.count(Call::MapFile)
}

fn unmaps(rig: &Rig) -> u64 {
    rig.host.count(Call::UnmapDma) + rig.host.count(Call::IoasUnmap)
}

#[test]
fn a_function_that_is_pulled_out_is_nobody_and_the_others_go_on() {
    let rig = Rig::new(|target| target);
    let guest = Guest::new(&rig);
    let Abused { host, .. } = &rig.abused[SHARED];
    // Negative control of all that follows.
    assert_eq!(guest.read(guest.config), 0x1110_1af4);
    guest.write(MEMORY, 7);
    assert_eq!(guest.read(MEMORY), 7);
    assert!(host.masters_bus() && host.decodes_memory());
    let findings = compare(&rig);
    assert_eq!(findings.wrong, Vec::<String>::new());
    let pages = findings.bar_pages;
    let before = (maps(&rig), unmaps(&rig));

    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let two_more = || {
        let now = rounds.load(Ordering::Relaxed);
        while rounds.load(Ordering::Relaxed) < now + 2 {
            std::thread::yield_now();
        }
    };
    let pulled = std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rig.verify_pair(rounds.fetch_add(1, Ordering::Relaxed));
            }
        });
        two_more();
        let pulled = rig.board.pull_out(PAIR + SHARED).unwrap();
        two_more();
        guest.ensure_nobody();
        stop.store(true, Ordering::Relaxed);
        moving.join().unwrap();
        pulled
    });
    assert!(pulled.outcome.is_ok());
    assert_eq!(pulled.function.name(), "shared");
    assert!(!host.masters_bus(), "it starts nothing any more");
    assert!(host.decodes_memory(), "what is missing are the mappings");
    // One mapping in each of the two address spaces, and none of anybody else's.
    let after = (maps(&rig), unmaps(&rig));
    assert_eq!(after, (before.0, before.1 + 2));
    let findings = compare(&rig);
    assert_eq!(findings.wrong, Vec::<String>::new());
    assert_eq!(pages - findings.bar_pages, 2 * 0x100);
    rig.verify_pair(1 << 20);
    assert_eq!(rig.host.faults(), []);
    assert_eq!(rig.lines.load(Ordering::Relaxed), 0, "nothing was refused");

    // It can be pulled out once, and a reset does not bring it back.
    assert!(rig.board.pull_out(PAIR + SHARED).is_none());
    assert!(rig.board.pull_out(1000).is_none());
    rig.board.reset();
    guest.ensure_nobody();
    // Nor does a processor that could not get at the memory behind a slot.
    for before in 0..5 {
        assert!(rig.board.memory_fault(before));
    }
    guest.ensure_nobody();
    assert_eq!(compare(&rig).wrong, Vec::<String>::new());
    assert_eq!(rig.host.violations(), []);
}

#[test]
fn the_host_has_a_function_back_when_the_last_handle_on_it_is_gone() {
    let mut rig = Rig::new(|target| target);
    let _guest = Guest::new(&rig);
    let Abused { host, function, .. } = rig.abused.remove(SHARED);
    let host_side = Arc::downgrade(&host);
    drop((host, function));
    let PulledOut { function, outcome } = rig.board.pull_out(PAIR + SHARED).unwrap();
    assert!(outcome.is_ok());
    // An access that is under way has such a handle.
    let access = function.clone();
    drop(function);
    assert!(host_side.upgrade().is_some());
    let mut data = [0; 4];
    assert_eq!(access.config_read(0, &mut data), None);
    assert_eq!(data, [0xff; 4], "it has come too late");
    drop(access);
    assert!(host_side.upgrade().is_none(), "somebody still holds it");
}

#[test]
fn functions_are_pulled_out_while_the_guest_abuses_them() {
    let rig = Rig::new(|target| target);
    let each = ACCESSES / 200;
    for number in 0..rig.abused.len() {
        let made = std::thread::scope(|scope| {
            let abuse = scope.spawn(|| run(&rig, 1000 + number as u64, each));
            // In the middle of it.
            std::thread::sleep(std::time::Duration::from_millis(5));
            let pulled = rig.board.pull_out(PAIR + number).unwrap();
            // In the middle of a write the host may refuse what is asked of a function that sleeps.
            assert_eq!(pulled.outcome.map_errors, []);
            let quarantined = pulled.outcome.reports.iter();
            assert!(quarantined.flat_map(|it| &it.quarantined).next().is_none());
            let host = &rig.abused[number].host;
            assert!(!host.masters_bus(), "{}", host.name());
            abuse.join().unwrap()
        });
        assert!(made >= each);
        assert!(!rig.abused[number].host.masters_bus());
        let findings = compare(&rig);
        let first: Vec<_> = findings.wrong.iter().take(10).collect();
        assert!(first.is_empty(), "without {number}: {first:#?}");
        for error in rig.host.take_bus_errors() {
            let harmless = !matches!(error.cause, BusErrorCause::PeerNotDecoding { .. });
            assert!(harmless, "{error}");
        }
        rig.host.forget_calls();
    }
    rig.verify_pair(u64::MAX >> 16);
    assert_eq!(rig.host.violations(), []);
    assert!(rig.switch.state().is_none(), "devices were cut off");
}

/// An IOMMU that does not give back the memory of `SHARED`.
struct Clinging(Box<dyn DmaTarget>);

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

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        if range.start().raw() == MEMORY {
            return Err(TargetError::kernel(Errno::new(libc::EIO)));
        }
        self.0.unmap(range)
    }
}

#[test]
fn an_iommu_that_does_not_let_go_of_a_function_is_told_and_cut_off() {
    let rig = Rig::new(|inner| Box::new(Clinging(inner)));
    let _guest = Guest::new(&rig);
    let pulled = rig.board.pull_out(PAIR + SHARED).unwrap();
    let quarantined = pulled.outcome.reports.iter();
    let quarantined: Vec<_> = quarantined.flat_map(|it| &it.quarantined).collect();
    assert_eq!(quarantined.len(), 1, "{quarantined:?}");
    let cut_off = rig.switch.state().unwrap();
    assert_eq!(cut_off.target.to_string(), "type1");
    assert_eq!(cut_off.failed, []);
    // Also the one that left, whose memory the IOMMU holds: it is reset, as every one behind it.
    assert!(pulled.function.cut_off_outcome().is_some());
}
