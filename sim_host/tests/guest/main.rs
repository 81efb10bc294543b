//! A guest that does to an assigned function whatever has the kernel revoke, while another device
//! reaches its BAR: data arrives, is blocked, and arrives again, and nothing is mapped of a
//! function at the moment at which it is revoked.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

mod interrupts;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use assigned_pci::{
    AssignedFunction, BarIndex, BusyRetry, CutOffSwitch, FunctionOptions, HostFunction, Outcome,
    ResetSet,
};
use iommu::Type1Target;
use memory_map::{Iova, Reach, RegionId, RegionManager, TargetHandle, TargetId, TargetOptions};
use sim_host::{
    BarKind, BarSpec, Call, FunctionSpec, PowerManagement, Revocation, SimBus, SimContainer,
    SimFunction, SimHost,
};

const COMMAND: u16 = 0x04;
const PMCSR: u16 = 0xc4;
const DEVICE_CONTROL: u16 = 0xd0;
const AF_CONTROL: u16 = 0xf8;
const BAR: BarIndex = BarIndex::ALL[2];
const AT: u64 = 0x8_0000_0000;

fn spec(name: &str, power: PowerManagement) -> FunctionSpec {
    FunctionSpec::new(name, 0x1234, 0x5678)
        .with_bar(BAR, BarSpec::new(BarKind::Memory64Prefetchable, 0x1_0000))
        .with_power_management(power)
        .with_express_flr()
        .with_advanced_flr()
}

/// A device that writes, and a peer that it writes to, in one container.
struct Machine {
    host: SimHost,
    writer: Arc<SimFunction>,
    /// The writer as the guest has it.
    writer_function: Arc<AssignedFunction>,
    peer: Arc<SimFunction>,
    function: Arc<AssignedFunction>,
    map: RegionManager,
    target: TargetHandle,
    switch: Arc<CutOffSwitch>,
    revoked: Arc<AtomicUsize>,
}

impl Machine {
    fn new(spec: FunctionSpec) -> Self {
        let host = SimHost::default();
        let map = RegionManager::new();
        let writer = host
            .add_function(FunctionSpec::edu("0000:00:05.0"))
            .unwrap();
        let peer = host.add_function(spec).unwrap();
        let container = host.container(&[&writer, &peer]).unwrap();
        let switch = Arc::new(CutOffSwitch::new());
        let mut options = TargetOptions::new("container");
        options.cut_off = Some(switch.clone());
        let target = map.register(Box::new(type1(container)), options).unwrap();
        let assign = |host: &Arc<SimFunction>| {
            let host: Arc<dyn HostFunction> = host.clone();
            let function = AssignedFunction::new(host, map.clone(), &FunctionOptions::default());
            let function = Arc::new(function.unwrap());
            switch.add(&function);
            function
        };
        let (writer_function, function) = (assign(&writer), assign(&peer));
        let _ = writer_function.config_write(COMMAND, &[6, 0]);
        let machine = Self {
            host,
            writer,
            writer_function,
            function,
            map,
            target,
            switch,
            revoked: watch(&peer),
            peer,
        };
        machine.boot();
        machine
    }

    /// What a driver does after a reset: it wakes the function and writes BARs and command.
    fn boot(&self) {
        let _ = self.function.config_write(PMCSR, &[0]);
        let _ = self.function.config_write(0x18, &[0, 0, 0, 0]);
        let _ = self.function.config_write(0x1c, &[8, 0, 0, 0]);
        let _ = self.function.config_write(COMMAND, &[6, 0]);
    }

    fn region(&self) -> RegionId {
        self.function.region_of(BAR).unwrap()
    }

    fn mapped(&self) -> usize {
        let label = format!("{} BAR2", self.function.name());
        let mappings = self.host.mappings();
        mappings.iter().filter(|m| *m.object == *label).count()
    }

    /// Whether what the writer writes arrives.
    fn reaches(&self, value: u8) -> bool {
        let memory = self.peer.bar_memory(BAR).unwrap();
        let mut before = [0; 4];
        memory.read(0x100, &mut before).unwrap();
        assert_ne!(before, [value; 4], "a control that could not fail");
        self.writer.dma_write(Iova::new(AT + 0x100), &[value; 4]);
        let mut after = [0; 4];
        memory.read(0x100, &mut after).unwrap();
        let faults = self.host.take_faults().len();
        let arrived = after == [value; 4];
        assert_eq!(faults, usize::from(!arrived), "blocked by the IOMMU alone");
        arrived
    }

    /// Has `event` happen, and checks that data is blocked after it, if it is to be, and arrives
    /// again after `recover`.
    fn ok_blocked_ok(
        &self,
        event: impl FnOnce(&Self) -> Outcome,
        blocked: bool,
        recover: impl FnOnce(&Self),
    ) {
        assert!(self.reaches(1));
        let epoch = self.epoch();
        let revoked = self.revoked.load(Ordering::SeqCst);
        let _ = event(self);
        assert!(
            self.revoked.load(Ordering::SeqCst) > revoked,
            "nothing proved"
        );
        assert!(self.epoch() > epoch);
        assert_eq!(self.reaches(2), !blocked);
        assert_eq!(self.mapped(), usize::from(!blocked));
        recover(self);
        assert!(self.reaches(3));
        assert_eq!(self.mapped(), 1);
        assert_eq!(self.host.violations(), []);
    }

    fn epoch(&self) -> memory_map::Epoch {
        self.peer.bar(BAR).unwrap().unwrap().areas[0]
            .backing
            .epoch()
    }

    /// Has every revocation of the peer find nothing mapped, as the map has it.
    fn watched(self) -> Self {
        let (map, target, region) = (self.map.clone(), self.target.id(), self.region());
        self.peer.on_revocation(move |revocation| {
            if let Revocation::Revoked(cause) = revocation {
                assert!(!is_mapped(&map, target, region), "mapped at {cause:?}");
            }
        });
        self
    }
}

fn is_mapped(map: &RegionManager, target: TargetId, region: RegionId) -> bool {
    map.reach_of(target, region).unwrap() == Reach::Mapped
}

fn watch(function: &SimFunction) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    function.on_revocation(move |revocation| {
        if let Revocation::Revoked(_) = revocation {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    count
}

#[expect(
    unsafe_code,
    reason = "a simulated container takes any number for an address"
)]
fn type1(container: SimContainer) -> Type1Target<SimContainer> {
    // SAFETY: host addresses are looked up in a table and never followed.
    unsafe { Type1Target::new(Arc::new(container)) }
}

fn write(offset: u16, data: &'static [u8]) -> impl FnOnce(&Machine) -> Outcome {
    move |machine| {
        let outcome = machine.function.config_write(offset, data);
        assert!(outcome.is_ok());
        outcome
    }
}

#[test]
fn decoding_off_and_on() {
    for is_virtual in [false, true] {
        let mut spec = spec("peer", PowerManagement::NoSoftReset);
        if is_virtual {
            spec = spec.of_virtual_function();
        }
        let machine = Machine::new(spec).watched();
        machine.ok_blocked_ok(write(COMMAND, &[4, 0]), true, |machine| {
            let _ = machine.function.config_write(COMMAND, &[6, 0]);
        });
    }
}

#[test]
fn d3hot_and_back() {
    for power in [PowerManagement::NoSoftReset, PowerManagement::SoftReset] {
        let machine = Machine::new(spec("peer", power)).watched();
        machine.ok_blocked_ok(write(PMCSR, &[3]), true, |machine| {
            let _ = machine.function.config_write(PMCSR, &[0]);
            if power == PowerManagement::SoftReset {
                assert!(!machine.reaches(4), "the guest's driver has to set it up");
                assert!(!machine.peer.masters_bus() && !machine.peer.decodes_memory());
                machine.boot();
            }
        });
    }
}

#[test]
fn d1_and_d2_and_back() {
    for data in [&[1], &[2]] {
        let machine = Machine::new(spec("peer", PowerManagement::SoftReset)).watched();
        assert!(machine.reaches(1));
        let _ = machine.function.config_write(PMCSR, data);
        assert!(!machine.reaches(2));
        let _ = machine.function.config_write(PMCSR, &[0]);
        assert!(machine.reaches(3));
        assert_eq!(machine.host.violations(), []);
    }
}

#[test]
fn function_level_resets_with_and_without_decoding_off_first() {
    for (offset, data) in [
        (DEVICE_CONTROL, &[0, 0x80][..]),
        (DEVICE_CONTROL + 1, &[0x80]),
        (AF_CONTROL, &[1]),
    ] {
        for first in [false, true] {
            let machine = Machine::new(spec("peer", PowerManagement::NoSoftReset)).watched();
            let event = |machine: &Machine| {
                let mut outcome = Outcome::default();
                if first {
                    outcome.append(machine.function.config_write(COMMAND, &[0, 0]));
                }
                outcome.append(machine.function.config_write(offset, data));
                outcome
            };
            machine.ok_blocked_ok(event, true, Machine::boot);
        }
    }
}

#[test]
fn resets_that_work_and_resets_that_fail() {
    for spec in [
        spec("peer", PowerManagement::NoSoftReset),
        spec("peer", PowerManagement::NoSoftReset).with_failing_reset(libc::EAGAIN),
    ] {
        let machine = Machine::new(spec).watched();
        machine.ok_blocked_ok(|machine| machine.function.reset(), true, Machine::boot);
        machine.ok_blocked_ok(
            |machine| {
                let _ = machine.function.config_write(PMCSR, &[3]);
                machine.function.reset()
            },
            true,
            Machine::boot,
        );
    }
}

#[test]
fn a_hot_reset_of_both_busy_or_not() {
    for busy in [0, 3, 1000] {
        let machine = Machine::new(spec("peer", PowerManagement::NoSoftReset)).watched();
        let bus = SimBus::new([machine.peer.clone(), machine.writer.clone()]);
        bus.be_busy(busy);
        let functions = [machine.function.clone(), machine.writer_function.clone()];
        let set = ResetSet::new(functions).unwrap();
        let event = |_: &Machine| {
            let outcome = set.hot_reset(BusyRetry::default(), &mut || bus.hot_reset());
            assert_eq!(outcome.is_ok(), busy < 1000);
            // Its driver has the writer master the bus again.
            let _ = set.functions()[0].config_write(COMMAND, &[6, 0]);
            outcome
        };
        machine.ok_blocked_ok(event, true, Machine::boot);
    }
}

#[test]
fn a_hot_reset_behind_our_back_is_repaired() {
    let machine = Machine::new(spec("peer", PowerManagement::NoSoftReset));
    let sibling = machine.host.add_function(FunctionSpec::edu("sibling"));
    let bus = SimBus::new([machine.peer.clone(), sibling.unwrap()]);
    let revoked = machine.revoked.load(Ordering::SeqCst);
    bus.hot_reset().unwrap();
    assert!(machine.revoked.load(Ordering::SeqCst) > revoked);
    let unmaps = machine.host.count(Call::UnmapDma);
    let epoch = machine.epoch();
    let outcome = machine.function.mappings_may_be_revoked();
    assert_eq!((outcome.unmaps(), outcome.maps()), (1, 1));
    assert_eq!(machine.host.count(Call::UnmapDma), unmaps + 1);
    assert!(machine.epoch() > epoch);
    assert!(machine.reaches(1));
}

#[test]
fn an_unmap_that_fails_cuts_the_devices_off_and_they_stay_cut_off() {
    let machine = Machine::new(spec("peer", PowerManagement::SoftReset));
    assert!(machine.reaches(1));
    machine.host.fail(Call::UnmapDma, 1, libc::EIO);
    let outcome = machine.function.config_write(COMMAND, &[4, 0]);
    assert_eq!(outcome.reports[0].quarantined.len(), 1);
    assert_eq!(machine.switch.state().unwrap().failed, []);
    for (function, assigned) in [
        (&machine.writer, &machine.writer_function),
        (&machine.peer, &machine.function),
    ] {
        assert!(!function.masters_bus());
        assert!(assigned.cut_off_outcome().is_some());
        for (offset, data) in [
            (COMMAND, &[6, 0][..]),
            (PMCSR, &[3]),
            (PMCSR, &[0]),
            (AF_CONTROL, &[1]),
            (COMMAND, &[6]),
        ] {
            let _ = assigned.config_write(offset, data);
            assert!(!function.masters_bus(), "{offset:#x} {data:x?}");
        }
        let _ = assigned.reset();
        assert!(!function.masters_bus());
    }
    // The stale mapping is there, and nobody can use it.
    let memory = machine.peer.bar_memory(BAR).unwrap();
    machine.writer.dma_write(Iova::new(AT + 0x100), &[9; 4]);
    let mut data = [0; 4];
    memory.read(0x100, &mut data).unwrap();
    assert_eq!(data, [1; 4]);
}

/// What one of many vCPUs writes, in turn.
const WRITES: [(u16, &[u8]); 12] = [
    (COMMAND, &[6, 0]),
    (PMCSR, &[3]),
    (0x1c, &[9, 0, 0, 0]),
    (PMCSR, &[0]),
    (COMMAND, &[4]),
    (0x18, &[0, 0, 1, 0]),
    (COMMAND, &[6]),
    (DEVICE_CONTROL, &[0, 0x80]),
    (0x1c, &[8, 0, 0, 0]),
    (COMMAND, &[6, 0]),
    (AF_CONTROL, &[1]),
    (0x18, &[0xff, 0xff, 0xff, 0xff]),
];

#[test]
fn many_vcpus_at_once_leave_nothing_mapped_that_does_not_answer() {
    for power in [PowerManagement::NoSoftReset, PowerManagement::SoftReset] {
        let machine = Machine::new(spec("peer", power)).watched();
        let revoked = machine.revoked.load(Ordering::SeqCst);
        std::thread::scope(|scope| {
            for vcpu in 0..4_usize {
                let machine = &machine;
                scope.spawn(move || {
                    for turn in 0..300_usize {
                        let (offset, data) = WRITES[(turn * (vcpu * 2 + 1) + vcpu) % WRITES.len()];
                        assert!(machine.function.config_write(offset, data).is_ok());
                        if turn % 50 == 0 {
                            let _ = machine.function.mappings_may_be_revoked();
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..300 {
                    machine.writer.dma_write(Iova::new(AT + 0x100), &[7; 4]);
                }
            });
        });
        assert!(machine.revoked.load(Ordering::SeqCst) > revoked + 100);
        assert_eq!(machine.host.violations(), []);
        let enabled = machine.function.bars()[0].enabled;
        assert_eq!(machine.mapped(), usize::from(enabled));
        // No DMA was let through that nobody answered.
        assert_eq!(machine.host.take_bus_errors(), []);
        let _ = machine.host.take_faults();
        machine.boot();
        assert!(machine.reaches(3));
    }
}
