//! The threads, and what holds in every order of their steps.

use std::io;
use std::sync::Arc;

use assigned_pci::{
    AssignedFunction, BarIndex, BusyRetry, CutOffSwitch, FunctionOptions, HostBar, HostBarArea,
    HostFunction, ResetSet,
};
use memory_map::{
    Backing, BackingObject, CutOff, DmaTarget, Errno, HostMapping, Iova, IovaRange, MapRequest,
    Quarantine, RegionManager, TargetError, TargetHandle, TargetLimits, TargetName, TargetOptions,
};
use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;

const SCHEDULES: usize = 20_000;
const COMMAND: u16 = 0x04;
const PMCSR: u16 = 0x44;
const ON: [u8; 2] = [6, 0];
const OFF: [u8; 2] = [4, 0];
const BUS_MASTER: u8 = 4;

#[derive(Debug)]
struct Page;

impl BackingObject for Page {
    fn size(&self) -> u64 {
        0x1000
    }
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        Err(Errno::new(5))
    }
}

#[derive(Debug)]
struct Registers {
    bytes: [u8; 256],
    /// The command register as it was when the function went to sleep.
    saved: Option<u8>,
}

/// A function that forgets its registers when it sleeps and gets them back from the host.
#[derive(Debug)]
struct Host {
    name: &'static str,
    registers: Mutex<Registers>,
    backing: Backing,
    /// Set by the test when a cut-off has returned.
    cut: AtomicBool,
}

impl Host {
    fn new(name: &'static str) -> Arc<Self> {
        let mut bytes = [0; 256];
        bytes[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        bytes[6] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x40..0x44].copy_from_slice(&[1, 0, 3, 0]);
        Arc::new(Self {
            name,
            registers: Mutex::new(Registers { bytes, saved: None }),
            backing: Backing::new(Page),
            cut: AtomicBool::new(false),
        })
    }

    fn masters_bus(&self) -> bool {
        let registers = self.registers.lock().unwrap();
        registers.bytes[4] & BUS_MASTER != 0
    }
}

impl HostFunction for Host {
    fn name(&self) -> String {
        self.name.into()
    }
    fn config_size(&self) -> u16 {
        256
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        let registers = self.registers.lock().unwrap();
        let offset = usize::from(offset);
        data.copy_from_slice(&registers.bytes[offset..offset + data.len()]);
        Ok(())
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        // The call takes its time.
        thread::yield_now();
        let mut registers = self.registers.lock().unwrap();
        let Registers { bytes, saved } = &mut *registers;
        match offset {
            COMMAND => {
                let masters = data[0] & BUS_MASTER != 0;
                assert!(
                    !(masters && self.cut.load(Ordering::SeqCst)),
                    "after a cut-off"
                );
                bytes[4] = data[0];
            }
            PMCSR => {
                match (bytes[usize::from(PMCSR)], data[0] & 3) {
                    (0, 3) => *saved = Some(bytes[4]),
                    (3, 0) => bytes[4] = saved.take().unwrap_or(0),
                    _ => {}
                }
                bytes[usize::from(PMCSR)] = data[0] & 3;
            }
            _ => {}
        }
        Ok(())
    }
    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>> {
        Ok((bar == BarIndex::ALL[0]).then(|| HostBar {
            size: 0x1000,
            areas: vec![HostBarArea {
                offset: 0,
                size: 0x1000,
                backing: self.backing.clone(),
            }],
        }))
    }
    fn bar_read(&self, _: BarIndex, _: u64, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
    fn bar_write(&self, _: BarIndex, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn reset(&self) -> io::Result<()> {
        thread::yield_now();
        Ok(())
    }
}

/// A target whose unmaps fail if it is told so.
struct Target(Arc<AtomicBool>);

impl DmaTarget for Target {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        Ok(TargetLimits {
            page_size: 0x1000,
            allowed: vec![IovaRange::new(Iova::new(0), 1 << 40).unwrap()],
            entry_limit: None,
            largest_mapping: 1 << 30,
            read_only: true,
            device_memory: true,
            unmap_spans: true,
        })
    }
    fn needs_host_address(&self, _: &Backing) -> bool {
        false
    }
    fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
        Ok(())
    }
    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        if self.0.load(Ordering::SeqCst) {
            Err(TargetError::Unknown(Errno::new(5)))
        } else {
            Ok(())
        }
    }
}

struct World {
    hosts: [Arc<Host>; 2],
    functions: [Arc<AssignedFunction>; 2],
    stuck: Arc<AtomicBool>,
    _target: TargetHandle,
}

/// Two functions that decode and master the bus, behind one target.
fn world() -> World {
    let map = RegionManager::new();
    let stuck = Arc::new(AtomicBool::new(false));
    let switch = Arc::new(CutOffSwitch::new());
    let mut options = TargetOptions::new("target");
    options.cut_off = Some(switch.clone());
    let target = map.register(Box::new(Target(stuck.clone())), options);
    let hosts = ["a", "b"].map(Host::new);
    let functions = [0, 1].map(|number: usize| {
        let host = hosts[number].clone();
        let function = AssignedFunction::new(host, map.clone(), &FunctionOptions::default());
        let function = Arc::new(function.unwrap());
        switch.add(&function);
        let at = [0, 0, 0x80 + u8::try_from(number).unwrap(), 0];
        let _ = function.config_write(0x10, &at);
        let _ = function.config_write(COMMAND, &ON);
        function
    });
    World {
        hosts,
        functions,
        stuck,
        _target: target.unwrap(),
    }
}

impl World {
    fn is_cut_off(&self) {
        for (host, function) in self.hosts.iter().zip(&self.functions) {
            assert!(function.is_cut_off());
            assert!(!host.masters_bus(), "{}", host.name);
            assert!(function.cut_off_outcome().is_some(), "the reset is over");
        }
    }
}

fn why() -> (TargetName, Quarantine) {
    let why = Quarantine::Unmap {
        range: IovaRange::new(Iova::new(0), 0x1000).unwrap(),
        error: TargetError::Unknown(Errno::new(5)),
    };
    ("target".into(), why)
}

fn check(schedule: fn()) {
    shuttle::check_random(schedule, SCHEDULES);
    shuttle::check_pct(schedule, SCHEDULES, 3);
}

#[test]
fn a_write_that_turns_bus_mastering_on_has_ended_when_a_cut_off_returns() {
    check(|| {
        let world = Arc::new(world());
        let guest = world.clone();
        let guest = thread::spawn(move || {
            let _ = guest.functions[0].config_write(COMMAND, &OFF);
            let _ = guest.functions[0].config_write(COMMAND, &ON);
        });
        let engine = world.clone();
        let engine = thread::spawn(move || {
            let _ = engine.functions[0].host().config_write(COMMAND, &ON);
        });
        for (host, function) in world.hosts.iter().zip(&world.functions) {
            function.cut_off().unwrap();
            host.cut.store(true, Ordering::SeqCst);
        }
        guest.join().unwrap();
        engine.join().unwrap();
        world.is_cut_off();
    });
}

#[test]
fn a_function_that_wakes_while_it_is_cut_off_ends_up_quiet() {
    check(|| {
        let world = Arc::new(world());
        let guest = world.clone();
        let guest = thread::spawn(move || {
            let _ = guest.functions[0].config_write(PMCSR, &[3]);
            let _ = guest.functions[0].config_write(PMCSR, &[0]);
            let _ = guest.functions[0].reset();
        });
        for function in &world.functions {
            function.cut_off().unwrap();
        }
        guest.join().unwrap();
        world.is_cut_off();
    });
}

#[test]
fn two_functions_that_are_cut_off_by_each_others_writes_do_not_wait_for_each_other() {
    check(|| {
        let world = Arc::new(world());
        world.stuck.store(true, Ordering::SeqCst);
        let threads = [0, 1].map(|number: usize| {
            let world = world.clone();
            thread::spawn(move || {
                let _ = world.functions[number].config_write(COMMAND, &OFF);
                let _ = world.functions[number].config_write(COMMAND, &ON);
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        world.is_cut_off();
    });
}

#[test]
fn a_hot_reset_and_a_cut_off_of_the_same_functions() {
    check(|| {
        let world = Arc::new(world());
        let other = world.clone();
        let other = thread::spawn(move || {
            let set = ResetSet::new(other.functions.clone()).unwrap();
            let _ = set.hot_reset(BusyRetry::default(), &mut || {
                thread::yield_now();
                Ok(())
            });
        });
        let (target, why) = why();
        CutOffSwitch::of(&world.functions).cut_off(&target, &why);
        other.join().unwrap();
        world.is_cut_off();
    });
}
