//! The same examination, of simulated devices.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use assigned_pci::HostFunction;
use iommu::{IoasTarget, RamCopies, Type1Target};
use memory_map::{
    Backing, DmaTarget, Errno, Gpa, IovaRange, MapRequest, TargetError, TargetLimits,
};
use sim_host::{
    BrokenTranslation, Call, FunctionSpec, PowerManagement, SimBus, SimContainer, SimFunction,
    SimHost, SimIoas,
};
use vfio_sys::Bdf;

use super::Plan;
use super::assembly::{Assembly, Parts};
use super::hold::Holding;
use super::report::{Exercised, Observed, P2pReport};
use super::scratch::NvmeScratch;
use super::witness::{Evidence, Source};
use crate::host::Bus;
use crate::host::choice::{Choice, Kind};
use crate::host::policy::Policy;
use crate::host::space::{MakeTarget, PartFunction, Space};

const EDU: &str = "0000:00:05.0";
const PEER: &str = "0000:00:06.0";
const OTHER: &str = "0000:00:07.0";
const KINDS: [Kind; 2] = [Kind::Type1, Kind::Iommufd];

#[expect(
    unsafe_code,
    reason = "a simulated container takes any number for an address"
)]
fn container(container: &SimContainer) -> Box<dyn DmaTarget> {
    // SAFETY: the container is simulated and follows no address.
    Box::new(unsafe { Type1Target::new(Arc::new(container.clone())) })
}

#[expect(
    unsafe_code,
    reason = "a simulated address space takes any number for an address"
)]
fn ioas(ioas: &SimIoas, copies: &RamCopies) -> Box<dyn DmaTarget> {
    // SAFETY: the address space is simulated and follows no address.
    Box::new(unsafe { IoasTarget::new(Arc::new(ioas.clone()), copies.clone()) })
}

mod hold;
mod nvme;
mod stress;

/// An edu, shared memory that can sleep and be reset, another edu.
fn three_functions(host: &SimHost) -> Vec<Arc<SimFunction>> {
    let peer = FunctionSpec::shared_memory(PEER, 4 << 20)
        .with_power_management(PowerManagement::SoftReset)
        .with_express_flr();
    [FunctionSpec::edu(EDU), peer, FunctionSpec::edu(OTHER)]
        .map(|spec| host.add_function(spec).unwrap())
        .into()
}

/// As [`crate::host`] does it: an address space for all that may see the same.
fn spaces(
    host: &SimHost,
    kind: Kind,
    functions: &[Arc<SimFunction>],
    policy: &Policy,
) -> (Vec<Space>, Vec<PartFunction>) {
    let filters: Vec<_> = functions
        .iter()
        .map(|function| policy.filter_of(bdf(&HostFunction::name(&**function))))
        .collect();
    let mut distinct = Vec::new();
    for filter in &filters {
        if !distinct.contains(filter) {
            distinct.push(filter.clone());
        }
    }
    let iommufd = host.open_iommufd();
    let copies = RamCopies::new();
    let spaces = distinct.iter().enumerate().map(|(number, filter)| {
        let members = functions.iter().zip(&filters);
        let members: Vec<&SimFunction> = members
            .filter(|(_, its)| *its == filter)
            .map(|(function, _)| &**function)
            .collect();
        let target: Box<MakeTarget> = match kind {
            Kind::Type1 => {
                let space = host.container(&members).unwrap();
                Box::new(move || container(&space))
            }
            Kind::Iommufd => {
                let space = iommufd.ioas();
                for member in members {
                    space.attach(member).unwrap();
                }
                let copies = copies.clone();
                Box::new(move || ioas(&space, &copies))
            }
        };
        Space {
            target,
            name: format!("space {number}"),
            filter: filter.clone(),
        }
    });
    let spaces = spaces.collect();
    let functions = functions.iter().zip(&filters).map(|(function, filter)| {
        let space = distinct.iter().position(|known| known == filter).unwrap();
        let host: Arc<SimFunction> = Arc::clone(function);
        PartFunction { host, space }
    });
    (spaces, functions.collect())
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn policy(choices: &[&str]) -> Policy {
    let choices: Vec<_> = choices.iter().map(|text| text.parse().unwrap()).collect();
    Policy::new(&choices, &[EDU, PEER, OTHER].map(bdf)).unwrap()
}

fn assemble(host: &SimHost, parts: (Vec<Space>, Vec<PartFunction>)) -> Assembly {
    assemble_with(host, parts, Vec::new(), Vec::new())
}

fn assemble_with(
    host: &SimHost,
    (spaces, functions): (Vec<Space>, Vec<PartFunction>),
    scratch: Vec<NvmeScratch>,
    buses: Vec<Bus>,
) -> Assembly {
    let bypasses = BTreeMap::from([((0, 1), "a port without ACS".to_owned())]);
    Assembly::new(Parts {
        spaces,
        functions,
        buses,
        bypasses,
        ram: Backing::new(host.ram(16 << 20).unwrap()),
        page: Backing::new(host.ram(0x1000).unwrap()),
        scratch,
    })
    .unwrap()
}

fn assembly(host: &SimHost, kind: Kind, choices: &[&str]) -> Assembly {
    let functions = three_functions(host);
    assemble(host, spaces(host, kind, &functions, &policy(choices)))
}

/// One container with an edu and shared memory, seen through `wrap`.
fn wrapped(
    host: &SimHost,
    wrap: impl Fn(Box<dyn DmaTarget>) -> Box<dyn DmaTarget> + Send + Sync + 'static,
) -> Assembly {
    let mut functions = three_functions(host);
    functions.truncate(2);
    let (mut spaces, functions) = spaces(host, Kind::Type1, &functions, &policy(&[]));
    let space = spaces.pop().unwrap();
    let space = Space {
        target: Box::new(move || wrap((space.target)())),
        ..space
    };
    assemble(host, (vec![space], functions))
}

fn choice() -> Choice {
    Choice {
        chosen: Kind::Type1,
        because: "it is simulated".to_owned(),
    }
}

fn examine(
    assembly: &mut Assembly,
    choice: Choice,
    required: bool,
    witness: Option<&mut Source<'_>>,
) -> anyhow::Result<P2pReport> {
    let plan = Plan {
        required,
        ..Plan::default()
    };
    super::examine(assembly, choice, plan, witness, None)
}

struct SimFaults(SimHost);

impl Evidence for SimFaults {
    fn describe(&mut self, function: &str, at: Gpa) -> String {
        let faults = self.0.take_faults();
        let named = |f: &&sim_host::Fault| *f.function == *function && f.iova.raw() == at.raw();
        let found = faults.iter().find(named);
        found.map_or_else(|| "none".into(), ToString::to_string)
    }
}

fn report(host: &SimHost, assembly: &mut Assembly) -> P2pReport {
    held(host, assembly, None)
}

fn held(host: &SimHost, assembly: &mut Assembly, holding: Option<&mut dyn Holding>) -> P2pReport {
    let mut witness = || -> anyhow::Result<Box<dyn Evidence>> {
        drop(host.take_faults());
        Ok(Box::new(SimFaults(host.clone())))
    };
    let plan = Plan::default();
    super::examine(assembly, choice(), plan, Some(&mut witness), holding).unwrap()
}

fn pair<'r>(report: &'r P2pReport, from: &str, to: &str, bar: u8) -> &'r super::report::Pair {
    let mut pairs = report.pairs.iter();
    let found = pairs.find(|p| p.from == from && p.to == to && p.bar == bar);
    found.unwrap()
}

/// After everything is dropped.
fn ensure_clean(host: &SimHost) {
    assert_eq!(host.mappings(), []);
    assert_eq!(host.ioas_mappings(), []);
    assert_eq!(host.iommufd_locked_bytes(), 0);
    assert_eq!(host.violations(), []);
}

#[test]
fn every_pair_is_told_exercised_and_controlled() {
    for kind in KINDS {
        let host = SimHost::default();
        let mut assembly = assembly(&host, kind, &[]);
        let report = report(&host, &mut assembly);
        assert!(report.ok, "{report}");
        for from in [EDU, OTHER] {
            let bar2 = pair(&report, from, PEER, 2);
            assert_eq!(
                (bar2.reach, bar2.exercised),
                ("mapped", Some(Exercised::Ok))
            );
            assert_eq!(
                bar2.at.len(),
                2,
                "at its first place and where it was moved"
            );
            assert_ne!(bar2.at[0], bar2.at[1]);
            let registers = pair(&report, from, if from == EDU { OTHER } else { EDU }, 0);
            assert_eq!(registers.exercised, Some(Exercised::Ok));
            let bar0 = pair(&report, from, PEER, 0);
            assert_eq!((bar0.reach, bar0.counts), ("unavailable", false));
        }
        // Two edus, each with a page of RAM, the peer's BAR2 off, asleep, reset with its decoding on
        // and off, and moved, and all of RAM at the end.
        assert_eq!(report.controls.len(), 14);
        for control in &report.controls {
            assert_eq!(control.observed, Observed::Blocked);
            assert!(control.witness.contains("DMA write"), "{}", control.witness);
        }
        let again = report.controls.iter();
        let again = again.filter(|control| control.afterwards == Some(Exercised::Ok));
        assert_eq!(again.count(), 8, "what the kernel revoked is reached again");
        drop(assembly);
        ensure_clean(&host);
    }
}

/// The peer and an edu, as functions of one slot. The first two resets are refused.
fn busy_bus(functions: &[Arc<SimFunction>]) -> Bus {
    let bus = SimBus::new(functions.iter().skip(1).cloned());
    bus.be_busy(2);
    Bus {
        members: vec![1, 2],
        reset: Arc::new(move || bus.hot_reset()),
    }
}

#[test]
fn a_hot_reset_takes_a_sibling_along_and_both_are_reached_again() {
    for kind in KINDS {
        let host = SimHost::default();
        let functions = three_functions(&host);
        let parts = spaces(&host, kind, &functions, &policy(&[]));
        let mut assembly = assemble_with(&host, parts, Vec::new(), vec![busy_bus(&functions)]);
        let report = report(&host, &mut assembly);
        assert!(report.ok, "{report}");
        let hot = report.controls.iter();
        let hot: Vec<_> = hot
            .filter(|it| it.what == "a BAR after a hot reset of its bus")
            .collect();
        assert_eq!(hot.len(), 1, "not by the edu that is reset along with it");
        assert_eq!(
            (hot[0].from.as_str(), hot[0].observed, hot[0].afterwards),
            (EDU, Observed::Blocked, Some(Exercised::Ok))
        );
        // The edu was reset, and reaches and is reached again.
        let [at_first, later] = pair(&report, OTHER, PEER, 2).at[..] else {
            panic!("{report}");
        };
        assert_ne!(at_first, later);
        let sibling = pair(&report, EDU, OTHER, 0);
        assert_eq!(sibling.exercised, Some(Exercised::Ok));
        drop(assembly);
        ensure_clean(&host);
    }
}

#[test]
fn a_hot_reset_that_fails_counts_and_is_told() {
    for kind in KINDS {
        let host = SimHost::default();
        let functions = three_functions(&host);
        let parts = spaces(&host, kind, &functions, &policy(&[]));
        let mut bus = busy_bus(&functions);
        let reset = bus.reset;
        bus.reset = Arc::new(move || {
            reset()?;
            // As when the link does not come up again.
            Err(io::Error::from_raw_os_error(25))
        });
        let mut assembly = assemble_with(&host, parts, Vec::new(), vec![bus]);
        let report = report(&host, &mut assembly);
        assert!(report.ok, "{report}");
        let failed = report.controls.iter();
        let failed: Vec<_> = failed.filter(|control| control.failed.is_some()).collect();
        assert_eq!(failed.len(), 1, "the other events do not fail");
        assert_eq!(failed[0].what, "a BAR after a hot reset of its bus");
        assert_eq!(
            (failed[0].observed, failed[0].afterwards),
            (Observed::Blocked, Some(Exercised::Ok))
        );
        let told = report.to_string();
        assert!(told.contains(", though the hot reset failed: "), "{told}");
        drop(assembly);
        ensure_clean(&host);
    }
}

#[test]
fn one_in_a_container_and_one_on_iommufd_reach_each_other() {
    let host = SimHost::default();
    let functions = three_functions(&host);
    let (old, new) = functions.split_at(1);
    let (mut all, mut parts) = spaces(&host, Kind::Type1, old, &policy(&[]));
    let (more, rest) = spaces(&host, Kind::Iommufd, new, &policy(&[]));
    all.extend(more);
    parts.extend(
        rest.into_iter()
            .map(|part| PartFunction { space: 1, ..part }),
    );
    let mut assembly = assemble(&host, (all, parts));
    let report = report(&host, &mut assembly);
    assert!(report.ok, "{report}");
    for from in [EDU, OTHER] {
        assert_eq!(pair(&report, from, PEER, 2).exercised, Some(Exercised::Ok));
    }
    drop(assembly);
    ensure_clean(&host);
}

#[test]
fn policy_none_blocks_and_is_no_failure() {
    for kind in KINDS {
        let host = SimHost::default();
        let mut assembly = assembly(&host, kind, &["none"]);
        let report = report(&host, &mut assembly);
        assert!(report.ok, "{report}");
        for from in [EDU, OTHER] {
            let bar2 = pair(&report, from, PEER, 2);
            assert_eq!((bar2.reach, bar2.counts), ("unavailable", false));
            assert_eq!(bar2.reason.as_deref(), Some("kept out by policy"));
            assert_eq!(bar2.exercised, None);
        }
        let kept_out = report.controls.iter();
        let kept_out = kept_out.filter(|control| control.what == "a BAR that policy keeps out");
        assert_eq!(kept_out.count(), 2);
        drop(assembly);
        ensure_clean(&host);
    }
}

#[test]
fn a_group_reaches_within_itself_only_and_ram_is_pinned_once() {
    for kind in KINDS {
        let host = SimHost::default();
        let choices = ["group=fast:00:05.0,00:06.0"];
        let mut assembly = assembly(&host, kind, &choices);
        assert_eq!(assembly.targets.len(), 2);
        if kind == Kind::Iommufd {
            assert_eq!(host.iommufd_locked_bytes(), (16 << 20) + 0x1000);
        }
        let report = report(&host, &mut assembly);
        assert!(report.ok, "{report}");
        assert_eq!(pair(&report, EDU, PEER, 2).exercised, Some(Exercised::Ok));
        let outside = pair(&report, OTHER, PEER, 2);
        assert!(outside.filtered && outside.exercised.is_none());
        assert!(pair(&report, PEER, OTHER, 0).filtered);
        let kept_out = report.controls.iter();
        let kept_out = kept_out.filter(|control| control.what == "a BAR that policy keeps out");
        assert!(kept_out.clone().all(|control| control.from == OTHER));
        assert_eq!(kept_out.count(), 1);
        drop(assembly);
        ensure_clean(&host);
    }
}

#[test]
fn traffic_that_may_go_past_the_iommu_is_warned_of() {
    let host = SimHost::default();
    let mut assembly = assembly(&host, Kind::Type1, &[]);
    let report = examine(&mut assembly, choice(), false, None).unwrap();
    assert!(report.ok);
    let text = report.to_string();
    let warning = format!("warning: what {EDU} sends to {PEER} may go past the IOMMU: a port");
    assert_eq!(text.matches("warning:").count(), 1, "{text}");
    assert!(text.contains(&warning), "{text}");
    let json = serde_json::to_value(&report).unwrap();
    let warned = json["pairs"].as_array().unwrap().iter();
    let warned = warned.filter(|pair| pair["bypass"] == "a port without ACS");
    assert_eq!(warned.count(), 2, "one for each BAR");
    assert_eq!(json["iommu"]["chosen"], "type1");
    assert_eq!(json["iommu"]["because"], "it is simulated");
}

#[test]
fn data_that_do_not_arrive_are_a_mismatch() {
    let host = SimHost::default();
    let mut assembly = assembly(&host, Kind::Type1, &[]);
    let mut pairs = assembly.pairs().unwrap();
    host.break_translation(Some(BrokenTranslation::Shift(0x1000)));
    super::exercise::all(&mut assembly, &mut pairs).unwrap();
    let report = P2pReport::new(choice(), pairs, Vec::new());
    assert!(!report.ok);
    let mismatches = report.pairs.iter();
    let mismatches = mismatches.filter(|p| p.exercised == Some(Exercised::Mismatch));
    assert_eq!(
        mismatches.count(),
        4,
        "the peer's BAR2 and each other's registers"
    );
}

/// An IOMMU that says it has unmapped, and has not.
struct Deaf(Box<dyn DmaTarget>);

impl DmaTarget for Deaf {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.0.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.0.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        // What is still there is refused with EEXIST.
        self.0.map(request).or(Ok(()))
    }
    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        Ok(())
    }
}

#[test]
fn a_control_that_arrives_is_told() {
    let host = SimHost::default();
    let mut assembly = wrapped(&host, |target| Box::new(Deaf(target)));
    let report = report(&host, &mut assembly);
    assert!(!report.ok);
    let control = &report.controls[0];
    assert_eq!(control.observed, Observed::Arrived);
    assert_eq!(control.witness, "none");
}

#[test]
fn a_bar_that_cannot_be_mapped_counts_and_is_told() {
    let host = SimHost::default();
    // RAM and the control page are mapped; every BAR after them is refused.
    host.fail(Call::MapDma, 3, 14);
    let mut assembly = wrapped(&host, |target| target);
    let report = examine(&mut assembly, choice(), false, None).unwrap();
    assert!(!report.ok);
    let refused = report.pairs.iter().find(|pair| pair.counts).unwrap();
    assert_eq!(refused.reach, "unavailable");
    assert!(refused.reason.as_ref().unwrap().contains("Bad address"));
}

#[test]
fn a_required_pair_that_is_not_mapped_is_named_and_nothing_is_exercised() {
    let host = SimHost::default();
    host.fail(Call::MapDma, 3, 14);
    let mut assembly = wrapped(&host, |target| target);
    let mut asked = 0;
    let mut witness = || -> anyhow::Result<Box<dyn Evidence>> {
        asked += 1;
        Ok(Box::new(SimFaults(host.clone())))
    };
    let report = examine(&mut assembly, choice(), true, Some(&mut witness)).unwrap();
    assert!(!report.ok);
    let missing: Vec<String> = report.missing().collect();
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert!(missing[0].contains("Bad address"), "{missing:?}");
    let exercised = report.pairs.iter().filter(|pair| pair.exercised.is_some());
    assert_eq!((asked, exercised.count(), report.controls.len()), (0, 0, 0));

    // Negative control: where all is mapped, it is exercised.
    let host = SimHost::default();
    let mut assembly = wrapped(&host, |target| target);
    let mut witness =
        || -> anyhow::Result<Box<dyn Evidence>> { Ok(Box::new(SimFaults(host.clone()))) };
    let report = examine(&mut assembly, choice(), true, Some(&mut witness)).unwrap();
    assert!(report.ok && report.missing().count() == 0, "{report}");
}
