//! The steps, one after the other.

use anyhow::Result;
use assigned_pci::{AssignedFunction, place_bars};
use dma_engine::DmaEngine;
use memory_map::{Gpa, GpaRange, Iova, Reach, RegionId, TargetHandle};
use sim_host::{BrokenTranslation, SimMapping};

use super::machine::{EngineDevice, Machine, PEER_BAR, RAM_SIZE, windows};
use super::step::{DemoReport, Step};
use crate::map_table::MapTable;
use crate::pattern::{comparison, pattern, read_bar};

/// One page, which is also what edu moves at once.
const LEN: usize = 4096;
const LEN_64: u64 = 4096;
/// Where the guest keeps what is to be sent, and where it wants things delivered.
const SOURCE: Gpa = Gpa::new(0x10_0000);
const MAILBOX: Gpa = Gpa::new(0x20_0000);
/// Where in the peer's BAR data go.
const INTO_BAR: u64 = 0x4_2000;
/// Config space offsets: the command register, and the two halves of BAR2.
const COMMAND: u16 = 0x04;
const BAR2_LOW: u16 = 0x18;
const BAR2_HIGH: u16 = 0x1c;
/// Memory decoding and bus mastering, in the command register.
const MEMORY_AND_MASTER: u16 = 0x0006;
const MASTER_ONLY: u16 = 0x0004;

/// Plays the whole script, with the IOMMU's translation broken or not.
pub fn play(broken: Option<BrokenTranslation>) -> Result<DemoReport> {
    let machine = Machine::new()?;
    machine.host.break_translation(broken);
    let mut script = Script {
        machine,
        steps: Vec::new(),
    };
    let first = script.register(0)?;
    let second = script.register(1)?;
    script.place()?;
    script.ram_to_peer(
        "RAM to the peer's BAR",
        Who::First,
        1,
        "container 0's edu copies a page from RAM into BAR2 of 0000:00:06.0",
    )?;
    script.peer_to_ram()?;
    let old = script.machine.peer_address()?;
    script.half_written(&first, &second)?;
    script.other_half()?;
    script.faults(
        "the old address is gone",
        Who::First,
        old,
        "container 0's edu writes to where BAR2 was",
    )?;
    script.ram_to_peer(
        "the new address works",
        Who::Second,
        2,
        "container 1's edu copies a page from RAM into BAR2 where it is now",
    )?;
    let new = script.machine.peer_address()?;
    script.decoding(false)?;
    script.faults(
        "a BAR that is off cannot be reached",
        Who::Second,
        new,
        "container 1's edu writes to where BAR2 was",
    )?;
    script.decoding(true)?;
    script.ram_to_peer(
        "a BAR that is on again can",
        Who::First,
        3,
        "container 0's edu copies a page from RAM into BAR2",
    )?;
    script.unregister(second)?;
    script.faults(
        "the other container's device reaches nothing",
        Who::Second,
        SOURCE,
        "container 1's edu writes to RAM",
    )?;
    script.ram_to_peer(
        "the one that stayed still works",
        Who::First,
        4,
        "container 0's edu copies a page from RAM into BAR2",
    )?;
    let map = MapTable::of(&script.machine.map);
    script.power_off(first)?;
    Ok(DemoReport {
        ok: script.steps.iter().all(|step| step.ok),
        steps: script.steps,
        map,
    })
}

/// Which of the two devices with an engine.
#[derive(Clone, Copy)]
enum Who {
    First,
    Second,
}

struct Script {
    machine: Machine,
    steps: Vec<Step>,
}

/// What was seen, and whether that was expected.
struct Seen {
    observed: String,
    ok: bool,
}

impl Script {
    /// Plays one step and counts what the simulated host was asked for meanwhile.
    fn step<T>(
        &mut self,
        name: &'static str,
        did: impl Into<String>,
        expected: impl Into<String>,
        play: impl FnOnce(&mut Machine) -> Result<(T, Seen)>,
    ) -> Result<T> {
        self.machine.host.forget_calls();
        let (value, seen) = play(&mut self.machine)?;
        let mut step = Step {
            name,
            did: did.into(),
            expected: expected.into(),
            observed: seen.observed,
            ok: seen.ok,
            maps: 0,
            unmaps: 0,
            changes: Vec::new(),
        };
        step.count(&self.machine.host.calls());
        self.steps.push(step);
        Ok(value)
    }

    fn register(&mut self, number: usize) -> Result<TargetHandle> {
        let name = match number {
            0 => "container 0 joins",
            _ => "container 1 joins",
        };
        self.step(
            name,
            format!("the host registers container {number}"),
            "all RAM is mapped in it, and nothing else",
            |machine| {
                let handle = machine.register(number)?;
                let held = held(machine, number);
                let bytes: u64 = held.iter().map(|mapping| mapping.iova.size()).sum();
                let ok = bytes == RAM_SIZE && held.iter().all(|m| &*m.object == "ram0");
                let observed = format!("{} mapping(s), {} MiB", held.len(), bytes >> 20);
                Ok((handle, Seen { observed, ok }))
            },
        )
    }

    fn place(&mut self) -> Result<()> {
        self.step(
            "the guest places its BARs",
            "sizes every BAR, gives it an address, turns decoding and bus mastering on",
            "three BARs of a page or more are mapped in both containers, the one of 256 bytes is \
             trapped",
            |machine| {
                let functions = [
                    &machine.first.function,
                    &machine.peer,
                    &machine.second.function,
                ];
                let placed = place_bars(&functions, windows()?)?;
                let ok = placed.outcome.is_ok() && placed.outcome.maps() == 6;
                let observed = placed
                    .placements
                    .iter()
                    .map(|p| format!("{} {} at {}", p.function, p.bar, p.range))
                    .collect::<Vec<_>>()
                    .join("; ");
                Ok(((), Seen { observed, ok }))
            },
        )
    }

    fn ram_to_peer(
        &mut self,
        name: &'static str,
        who: Who,
        seed: u64,
        did: &'static str,
    ) -> Result<()> {
        let expected = format!("all {LEN} bytes arrived, no fault");
        self.step(name, did, expected, |machine| {
            let data = pattern(seed, LEN);
            machine.ram.write(SOURCE, &data)?;
            drop(machine.host.take_faults());
            let to = Iova::new(machine.peer_address()?.raw() + INTO_BAR);
            let engine = &mut device(machine, who).engine;
            engine.copy(Iova::new(SOURCE.raw()), to, LEN_64)?;
            let found = read_bar(&machine.peer, PEER_BAR, INTO_BAR, LEN);
            Ok(((), arrived(machine, &found, &data)))
        })
    }

    fn peer_to_ram(&mut self) -> Result<()> {
        let expected = format!("all {LEN} bytes arrived, no fault");
        let did = "container 1's edu copies that page from BAR2 back to RAM, elsewhere";
        self.step("the peer's BAR to RAM", did, expected, |machine| {
            drop(machine.host.take_faults());
            let from = Iova::new(machine.peer_address()?.raw() + INTO_BAR);
            let engine = &mut machine.second.engine;
            engine.copy(from, Iova::new(MAILBOX.raw()), LEN_64)?;
            let found = machine.ram.read(MAILBOX, LEN)?;
            Ok(((), arrived(machine, &found, &pattern(1, LEN))))
        })
    }

    fn half_written(&mut self, first: &TargetHandle, second: &TargetHandle) -> Result<()> {
        let targets = [first.id(), second.id()];
        self.step(
            "one half of the BAR is written",
            "with decoding on, writes the lower half of BAR2's new address",
            "BAR2 leaves both containers at once; reach: half written",
            |machine| {
                machine.peer_write(BAR2_LOW, 0x4000_0000_u32);
                let region = machine.peer_region()?;
                let mut observed = Vec::new();
                let mut ok = true;
                for target in targets {
                    let reach = machine.map.reach_of(target, region)?;
                    ok &= matches!(&reach, Reach::Unavailable(why)
                        if why.to_string().contains("half written"));
                    observed.push(reach.to_string());
                }
                ok &= held_of(machine, region) == 0;
                let observed = observed.join("; ");
                Ok(((), Seen { observed, ok }))
            },
        )
    }

    fn other_half(&mut self) -> Result<()> {
        self.step(
            "the other half is written",
            "writes the upper half",
            "BAR2 is mapped at 0x9040000000 in both containers",
            |machine| {
                machine.peer_write(BAR2_HIGH, 0x90_u32);
                let region = machine.peer_region()?;
                let at = machine.peer_address()?;
                let held = held_of(machine, region);
                let observed = format!("mapped in {held} containers at {at}");
                let ok = held == 2 && at == Gpa::new(0x90_4000_0000);
                Ok(((), Seen { observed, ok }))
            },
        )
    }

    fn faults(&mut self, name: &'static str, who: Who, at: Gpa, did: &'static str) -> Result<()> {
        let at = if at == SOURCE {
            at
        } else {
            Gpa::new(at.raw() + INTO_BAR)
        };
        let expected = format!("the IOMMU blocks it, a fault names the device and {at}");
        self.step(name, did, expected, |machine| {
            let source = machine.ram.read(SOURCE, LEN)?;
            drop(machine.host.take_faults());
            let device = device(machine, who);
            let function = device.function.name().to_owned();
            device.engine.store(Iova::new(at.raw()), LEN_64)?;
            let faults = machine.host.take_faults();
            let named = faults
                .iter()
                .any(|f| *f.function == *function && f.iova.raw() == at.raw() && f.write);
            let untouched = machine.ram.read(SOURCE, LEN)? == source;
            let observed = match faults.first() {
                Some(fault) => fault.to_string(),
                None => "no fault".into(),
            };
            let ok = named && untouched;
            Ok(((), Seen { observed, ok }))
        })
    }

    fn decoding(&mut self, on: bool) -> Result<()> {
        let (name, did, expected, command, wanted) = if on {
            (
                "decoding comes back",
                "sets memory decoding in the peer's command register",
                "BAR2 is mapped in both containers again",
                MEMORY_AND_MASTER,
                2,
            )
        } else {
            (
                "decoding goes off",
                "clears memory decoding in the peer's command register",
                "BAR2 is unmapped from both containers before the device stops decoding",
                MASTER_ONLY,
                0,
            )
        };
        self.step(name, did, expected, |machine| {
            let bytes = command.to_le_bytes();
            let outcome = machine.peer.config_write(COMMAND, &bytes);
            let held = held_of(machine, machine.peer_region()?);
            let violations = machine.host.violations();
            let observed = match violations.first() {
                Some(violation) => violation.to_string(),
                None => format!("mapped in {held} containers, in the right order"),
            };
            let ok = held == wanted && outcome.is_ok() && violations.is_empty();
            Ok(((), Seen { observed, ok }))
        })
    }

    fn unregister(&mut self, handle: TargetHandle) -> Result<()> {
        self.step(
            "container 1 leaves",
            "the host unregisters container 1",
            "nothing is left in it, container 0 keeps everything",
            |machine| {
                let kept = held(machine, 0).len();
                let report = handle.unregister();
                let (left, stayed) = (held(machine, 1).len(), held(machine, 0).len());
                let observed = format!("{left} left in container 1, {stayed} in container 0");
                let ok = left == 0 && stayed == kept && report.quarantined.is_empty();
                Ok(((), Seen { observed, ok }))
            },
        )
    }

    fn power_off(&mut self, handle: TargetHandle) -> Result<()> {
        self.step(
            "power off",
            "the host unregisters container 0",
            "no mapping and no host address is left, and nothing forbidden ever happened",
            |machine| {
                drop(handle);
                let left = machine.host.mappings().len();
                let addresses = machine.host.host_mappings();
                let violations = machine.host.violations();
                let observed = format!(
                    "{left} mappings, {addresses} host addresses, {} violations",
                    violations.len()
                );
                let ok = left == 0 && addresses == 0 && violations.is_empty();
                Ok(((), Seen { observed, ok }))
            },
        )
    }
}

impl Machine {
    /// Writes a register of the peer's config space as the guest does.
    fn peer_write(&self, offset: u16, value: u32) {
        write(&self.peer, offset, value);
    }
}

fn write(function: &AssignedFunction, offset: u16, value: u32) {
    // What came of it is looked up in the map and in the host afterwards.
    let _outcome = function.config_write(offset, &value.to_le_bytes());
}

fn device(machine: &mut Machine, who: Who) -> &mut EngineDevice {
    match who {
        Who::First => &mut machine.first,
        Who::Second => &mut machine.second,
    }
}

fn arrived(machine: &Machine, found: &[u8], expected: &[u8]) -> Seen {
    let faults = machine.host.take_faults();
    let mut observed = comparison(found, expected);
    match faults.first() {
        Some(fault) => observed = format!("{observed}; {fault}"),
        None => observed.push_str(", no fault"),
    }
    Seen {
        observed,
        ok: found == expected && faults.is_empty(),
    }
}

/// What a container's IOMMU really holds.
fn held(machine: &Machine, number: usize) -> Vec<SimMapping> {
    let container = machine.container_id(number);
    let mut mappings = machine.host.mappings();
    mappings.retain(|mapping| Some(mapping.container) == container);
    mappings
}

/// In how many containers a region is really mapped where the map has it.
fn held_of(machine: &Machine, region: RegionId) -> usize {
    let Ok(info) = machine.map.region(region) else {
        return 0;
    };
    let range = info.range.map(GpaRange::to_iova);
    let mappings = machine.host.mappings();
    let there = |mapping: &&SimMapping| {
        *mapping.object == *info.name.as_str() && Some(mapping.iova) == range
    };
    mappings.iter().filter(there).count()
}
