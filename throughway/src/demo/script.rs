//! The steps, one after the other.

use anyhow::Result;
use assigned_pci::{AssignedFunction, place_bars};
use dma_engine::DmaEngine;
use memory_map::{Gpa, GpaRange, Iova, Reach, RegionId, TargetHandle};
use sim_host::BrokenTranslation;

use super::machine::{EngineDevice, Machine, PEER_BAR, RAM_SIZE, windows};
use super::space::{Held, Kind};
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
/// Config space offsets: the two halves of BAR2.
const BAR2_LOW: u16 = 0x18;
const BAR2_HIGH: u16 = 0x1c;

/// Plays the whole script, with the IOMMU's translation broken or not.
pub fn play(kind: Kind, broken: Option<BrokenTranslation>) -> Result<DemoReport> {
    let machine = Machine::new(kind)?;
    machine.host.break_translation(broken);
    let name = |number| Ok::<_, anyhow::Error>(machine.space(number)?.name().to_owned());
    let (one, two) = (name(0)?, name(1)?);
    let mut script = Script {
        machine,
        spaces: kind.plural(),
        steps: Vec::new(),
    };
    let first = script.register(0, &one)?;
    let second = script.register(1, &two)?;
    script.place()?;
    let again = format!("{one}'s edu copies a page from RAM into BAR2");
    let to_where_it_was = format!("{two}'s edu writes to where BAR2 was");
    script.ram_to_peer(
        "RAM to the peer's BAR",
        Who::First,
        1,
        &format!("{again} of 0000:00:06.0"),
    )?;
    script.peer_to_ram(&two)?;
    let old = script.machine.peer_address()?;
    script.half_written(&first, &second)?;
    script.other_half()?;
    script.faults(
        "the old address is gone",
        Who::First,
        old,
        &format!("{one}'s edu writes to where BAR2 was"),
    )?;
    script.ram_to_peer(
        "the new address works",
        Who::Second,
        2,
        &format!("{two}'s edu copies a page from RAM into BAR2 where it is now"),
    )?;
    let new = script.machine.peer_address()?;
    script.decoding(false)?;
    script.faults(
        "a BAR that is off cannot be reached",
        Who::Second,
        new,
        &to_where_it_was,
    )?;
    script.decoding(true)?;
    script.ram_to_peer("a BAR that is on again can", Who::First, 3, &again)?;
    script.power(false)?;
    script.faults(
        "a BAR that sleeps cannot be reached",
        Who::Second,
        new,
        &to_where_it_was,
    )?;
    script.power(true)?;
    script.ram_to_peer("a BAR that is awake again can", Who::First, 4, &again)?;
    let saved = script.reset()?;
    script.faults(
        "a BAR that was reset cannot be reached",
        Who::Second,
        new,
        &to_where_it_was,
    )?;
    script.put_back(&saved)?;
    script.ram_to_peer("a BAR that was put back can", Who::First, 5, &again)?;
    script.unregister(second, &two, &one)?;
    script.faults(
        "the other device reaches nothing",
        Who::Second,
        SOURCE,
        &format!("{two}'s edu writes to RAM"),
    )?;
    script.ram_to_peer("the one that stayed still works", Who::First, 6, &again)?;
    let map = MapTable::of(&script.machine.map);
    script.power_off(first, &one)?;
    Ok(DemoReport {
        ok: script.steps.iter().all(|step| step.ok),
        iommu: kind,
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

pub(super) struct Script {
    pub machine: Machine,
    /// What address spaces are called.
    pub spaces: &'static str,
    steps: Vec<Step>,
}

/// What was seen, and whether that was expected.
pub(super) struct Seen {
    pub observed: String,
    pub ok: bool,
}

impl Script {
    /// Plays one step and counts what the simulated host was asked for meanwhile.
    pub fn step<T>(
        &mut self,
        name: impl Into<String>,
        did: impl Into<String>,
        expected: impl Into<String>,
        play: impl FnOnce(&mut Machine) -> Result<(T, Seen)>,
    ) -> Result<T> {
        let mut names = Vec::new();
        self.machine.host.forget_calls();
        let (value, seen) = play(&mut self.machine)?;
        let mut step = Step {
            name: name.into(),
            did: did.into(),
            expected: expected.into(),
            observed: seen.observed,
            ok: seen.ok,
            maps: 0,
            unmaps: 0,
            changes: Vec::new(),
        };
        for number in 0..2 {
            let space = self.machine.space(number)?;
            names.push((space.label().to_owned(), space.name().to_owned()));
        }
        step.count(&self.machine.host.calls(), &names);
        self.steps.push(step);
        Ok(value)
    }

    fn register(&mut self, number: usize, name: &str) -> Result<TargetHandle> {
        self.step(
            format!("{name} joins"),
            format!("the host registers {name}"),
            "all RAM is mapped in it, and nothing else",
            |machine| {
                let handle = machine.register(number)?;
                let held = machine.space(number)?.held();
                let bytes: u64 = held.iter().map(|mapping| mapping.iova.size()).sum();
                let ok = bytes == RAM_SIZE && held.iter().all(|m| &*m.object == "ram0");
                let observed = format!("{} mapping(s), {} MiB", held.len(), bytes >> 20);
                Ok((handle, Seen { observed, ok }))
            },
        )
    }

    fn place(&mut self) -> Result<()> {
        let expected = format!(
            "three BARs of a page or more are mapped in both {}, the one of 256 bytes is trapped",
            self.spaces
        );
        self.step(
            "the guest places its BARs",
            "sizes every BAR, gives it an address, turns decoding and bus mastering on",
            expected,
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

    fn ram_to_peer(&mut self, name: &'static str, who: Who, seed: u64, did: &str) -> Result<()> {
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

    fn peer_to_ram(&mut self, space: &str) -> Result<()> {
        let expected = format!("all {LEN} bytes arrived, no fault");
        let did = format!("{space}'s edu copies that page from BAR2 back to RAM, elsewhere");
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
            format!(
                "BAR2 leaves both {} at once; reach: half written",
                self.spaces
            ),
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
        let spaces = self.spaces;
        self.step(
            "the other half is written",
            "writes the upper half",
            format!("BAR2 is mapped at 0x9040000000 in both {spaces}"),
            |machine| {
                machine.peer_write(BAR2_HIGH, 0x90_u32);
                let region = machine.peer_region()?;
                let at = machine.peer_address()?;
                let held = held_of(machine, region);
                let observed = format!("mapped in {held} {spaces} at {at}");
                let ok = held == 2 && at == Gpa::new(0x90_4000_0000);
                Ok(((), Seen { observed, ok }))
            },
        )
    }

    fn faults(&mut self, name: &'static str, who: Who, at: Gpa, did: &str) -> Result<()> {
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

    fn unregister(&mut self, handle: TargetHandle, name: &str, other: &str) -> Result<()> {
        self.step(
            format!("{name} leaves"),
            format!("the host unregisters {name}"),
            format!("nothing is left in it, {other} keeps everything"),
            |machine| {
                let kept = machine.space(0)?.held().len();
                let report = handle.unregister();
                let left = machine.space(1)?.held().len();
                let stayed = machine.space(0)?.held().len();
                let observed = format!("{left} left in {name}, {stayed} in {other}");
                let ok = left == 0 && stayed == kept && report.quarantined.is_empty();
                Ok(((), Seen { observed, ok }))
            },
        )
    }

    fn power_off(&mut self, handle: TargetHandle, name: &str) -> Result<()> {
        self.step(
            "power off",
            format!("the host unregisters {name}"),
            "no mapping and no host address is left, no page is pinned, and nothing forbidden ever \
             happened",
            |machine| {
                drop(handle);
                let host = &machine.host;
                let left = host.mappings().len() + host.ioas_mappings().len();
                let addresses = host.host_mappings();
                let pinned = host.locked_bytes() + host.iommufd_locked_bytes();
                let violations = host.violations();
                let observed = format!(
                    "{left} mappings, {addresses} host addresses, {pinned} bytes pinned, {} \
                     violations",
                    violations.len()
                );
                let ok = left == 0 && addresses == 0 && pinned == 0 && violations.is_empty();
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

/// In how many address spaces a region is really mapped where the map has it, and leads there.
pub(super) fn held_of(machine: &Machine, region: RegionId) -> usize {
    let Ok(info) = machine.map.region(region) else {
        return 0;
    };
    let range = info.range.map(GpaRange::to_iova);
    let there =
        |held: &Held| held.alive && *held.object == *info.name.as_str() && Some(held.iova) == range;
    let spaces = (0..2).filter_map(|number| machine.space(number).ok());
    spaces
        .filter(|space| space.held().iter().any(there))
        .count()
}
