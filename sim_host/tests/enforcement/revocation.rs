//! Power states, resets, and what the kernel revokes at each.

use std::sync::{Arc, Mutex};

use assigned_pci::{BarIndex, HostFunction};
use sim_host::{
    BarKind, BarSpec, BusErrorCause, FunctionSpec, PowerManagement, Revocation, RevocationCause,
    SimBus, SimFunction, SimHost,
};

use crate::rig::errno;

const COMMAND: u16 = 0x04;
const PMCSR: u16 = 0xc4;
const DEVICE_CONTROL: u16 = 0xd0;
const AF_CONTROL: u16 = 0xf8;
const BAR0: BarIndex = BarIndex::ALL[0];
const ON: u16 = 6;

fn spec(power: PowerManagement) -> FunctionSpec {
    FunctionSpec::new("f", 1, 2)
        .with_bar(BAR0, BarSpec::new(BarKind::Memory64, 0x1000))
        .with_power_management(power)
        .with_express_flr()
        .with_advanced_flr()
        .with_command(ON)
}

/// A function, and what was revoked of it since the last look.
struct Watched {
    function: Arc<SimFunction>,
    seen: Arc<Mutex<Vec<Revocation>>>,
}

fn watched(spec: FunctionSpec) -> Watched {
    let function = SimHost::default().add_function(spec).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&seen);
    function.on_revocation(move |revocation| into.lock().unwrap().push(revocation));
    Watched { function, seen }
}

impl Watched {
    fn write(&self, offset: u16, data: &[u8]) -> Vec<Revocation> {
        self.function.config_write(offset, data).unwrap();
        self.seen()
    }

    fn seen(&self) -> Vec<Revocation> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn read(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.function.config_read(offset, &mut data).unwrap();
        u16::from_le_bytes(data)
    }

    fn power(&self) -> u16 {
        self.read(PMCSR) & 3
    }
}

fn both(cause: RevocationCause) -> Vec<Revocation> {
    vec![Revocation::Revoked(cause), Revocation::Restored]
}

#[test]
fn the_command_register_revokes_by_what_is_written() {
    let f = watched(spec(PowerManagement::NoSoftReset));
    let off = Revocation::Revoked(RevocationCause::CommandWrite);
    assert_eq!(f.write(COMMAND, &[4, 0]), [off]);
    assert!(!f.function.decodes_memory());
    assert_eq!(f.write(COMMAND, &[0]), [off], "also when it is off already");
    assert_eq!(f.write(COMMAND + 1, &[0]), []);
    assert_eq!(f.write(COMMAND, &[6, 0]), [Revocation::Restored]);
    assert!(f.function.decodes_memory());
}

#[test]
fn a_virtual_function_decodes_whatever_is_written_and_is_revoked_all_the_same() {
    let f = watched(spec(PowerManagement::NoSoftReset).of_virtual_function());
    assert!(f.function.is_virtual());
    assert_eq!(
        f.write(COMMAND, &[4, 0]),
        both(RevocationCause::CommandWrite)
    );
    assert!(f.function.decodes_memory());
    assert_eq!(f.read(COMMAND), 4, "the kernel makes the bit up");
    assert_eq!(f.write(COMMAND, &[6, 0]), [Revocation::Restored]);
    assert_eq!(f.read(COMMAND), 6);
}

#[test]
fn a_sleeping_function_answers_nobody_and_starts_nothing() {
    for state in 1..=3_u8 {
        let f = watched(spec(PowerManagement::NoSoftReset));
        let seen = f.write(PMCSR, &[state]);
        if state == 3 {
            assert_eq!(seen, [Revocation::Revoked(RevocationCause::Sleep)]);
        } else {
            assert_eq!(
                seen,
                [Revocation::Restored],
                "the kernel takes it for awake"
            );
        }
        assert_eq!(f.power(), state.into());
        assert!(!f.function.decodes_memory() && !f.function.masters_bus());
        let error = f.function.bar_read(BAR0, 0, &mut [0; 4]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        f.function.dma_read(memory_map::Iova::new(0), &mut [0; 4]);
        assert_eq!(f.read(COMMAND), ON, "config space answers");
        assert_eq!(f.write(PMCSR, &[0, 0]), [Revocation::Restored]);
        assert!(f.function.decodes_memory() && f.function.masters_bus());
    }
}

#[test]
fn a_lighter_sleep_is_not_reached_from_a_deeper_one() {
    let f = watched(spec(PowerManagement::NoSoftReset));
    f.write(PMCSR, &[3]);
    f.write(PMCSR, &[1]);
    assert_eq!(f.power(), 3);
    f.write(PMCSR + 1, &[0]);
    assert_eq!(f.power(), 3, "that byte holds no state");
}

#[test]
fn without_no_soft_reset_the_command_register_from_before_comes_back() {
    for (power, after) in [
        (PowerManagement::NoSoftReset, 0),
        (PowerManagement::SoftReset, ON),
    ] {
        let f = watched(spec(power));
        f.write(PMCSR, &[3]);
        f.write(COMMAND, &[0, 0]);
        f.write(PMCSR, &[0]);
        assert_eq!(f.read(COMMAND), after, "{power:?}");
        assert_eq!(f.function.decodes_memory(), after == ON);
    }
}

#[test]
fn every_way_of_a_function_level_reset_revokes_and_restores_config_space() {
    let cause = RevocationCause::FunctionLevelReset;
    for (offset, data) in [
        (DEVICE_CONTROL, &[0x10, 0x80][..]),
        (DEVICE_CONTROL + 1, &[0x80]),
        (DEVICE_CONTROL, &[0, 0x80, 0, 0]),
        (AF_CONTROL, &[1]),
    ] {
        let f = watched(spec(PowerManagement::NoSoftReset));
        assert_eq!(f.write(offset, data), both(cause));
        assert_eq!(f.read(COMMAND), ON);
        assert_eq!(f.read(DEVICE_CONTROL) & 0x8000, 0, "reads as zero");
        assert_eq!(f.read(AF_CONTROL) & 1, 0);
        // With decoding off, nothing comes back.
        f.write(COMMAND, &[0, 0]);
        assert_eq!(f.write(offset, data), [Revocation::Revoked(cause)]);
        // It wakes the function up.
        f.write(PMCSR, &[3]);
        f.write(offset, data);
        assert_eq!(f.power(), 0);
    }
    let f = watched(FunctionSpec::edu("edu"));
    assert_eq!(f.write(DEVICE_CONTROL, &[0, 0x80]), []);
}

#[test]
fn a_reset_that_fails_revokes_and_says_so_only_where_it_can() {
    let f = watched(spec(PowerManagement::NoSoftReset).with_failing_reset(libc::EAGAIN));
    assert_eq!(errno(f.function.reset()), Some(libc::EAGAIN));
    assert_eq!(f.seen(), both(RevocationCause::Reset));
    assert_eq!(
        f.write(AF_CONTROL, &[1]),
        both(RevocationCause::FunctionLevelReset)
    );
    let f = watched(FunctionSpec::edu("edu"));
    assert_eq!(errno(f.function.reset()), Some(libc::ENOTTY));
    assert_eq!(f.seen(), [], "there is none to fail");
}

#[test]
fn a_hot_reset_revokes_all_functions_and_when_it_is_busy_the_first() {
    let host = SimHost::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let functions: Vec<_> = ["a", "b"]
        .into_iter()
        .map(|name| {
            let function = host.add_function(FunctionSpec::edu(name)).unwrap();
            let into = Arc::clone(&seen);
            function.on_revocation(move |what| into.lock().unwrap().push((name, what)));
            function
        })
        .collect();
    let bus = SimBus::new(functions);
    bus.be_busy(1);
    assert_eq!(errno(bus.hot_reset()), Some(libc::EBUSY));
    let of = |name: &'static str| {
        both(RevocationCause::HotReset)
            .into_iter()
            .map(move |r| (name, r))
    };
    let take = || std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(take(), of("a").collect::<Vec<_>>());
    bus.hot_reset().unwrap();
    assert_eq!(take(), of("a").chain(of("b")).collect::<Vec<_>>());
}

#[test]
fn dma_of_a_sleeping_function_goes_nowhere() {
    let host = SimHost::default();
    let function = host.add_function(spec(PowerManagement::SoftReset)).unwrap();
    function.config_write(PMCSR, &[3]).unwrap();
    function.dma_write(memory_map::Iova::new(0x1000), &[1]);
    let cause = host.take_bus_errors().remove(0).cause;
    assert_eq!(cause, BusErrorCause::BusMasteringOff);
}

#[test]
fn capabilities_that_are_asked_for_stand_before_the_list_that_is_there() {
    let spec = FunctionSpec::edu("edu")
        .with_power_management(PowerManagement::NoSoftReset)
        .with_express_flr()
        .with_advanced_flr();
    let f = watched(spec);
    let mut at = f.read(0x34) & 0xff;
    let mut ids = Vec::new();
    while at != 0 {
        let [id, next] = f.read(at).to_le_bytes();
        ids.push(id);
        at = next.into();
    }
    assert_eq!(ids, [0x01, 0x10, 0x13, 0x05]);
}
