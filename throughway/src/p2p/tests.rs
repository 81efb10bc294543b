//! The same examination, of simulated devices.

use std::sync::Arc;

use iommu::Type1Target;
use memory_map::{
    Backing, DmaTarget, Errno, Gpa, IovaRange, MapRequest, TargetError, TargetLimits,
};
use sim_host::{BrokenTranslation, Call, FunctionSpec, SimContainer, SimHost};

use super::assembly::{Assembly, Parts};
use super::report::{Exercised, Observed, P2pReport};
use super::witness::Evidence;
use super::{examine, windows};

#[expect(
    unsafe_code,
    reason = "a simulated container takes any number for an address"
)]
fn target(container: SimContainer) -> Box<dyn DmaTarget> {
    // SAFETY: the container is simulated and follows no address.
    Box::new(unsafe { Type1Target::new(Arc::new(container)) })
}

/// edu and shared memory behind one container, another edu behind a second.
fn assembly(host: &SimHost) -> Assembly {
    let edu = host
        .add_function(FunctionSpec::edu("0000:00:05.0"))
        .unwrap();
    let peer = FunctionSpec::shared_memory("0000:00:06.0", 4 << 20);
    let peer = host.add_function(peer).unwrap();
    let other = host
        .add_function(FunctionSpec::edu("0000:00:07.0"))
        .unwrap();
    let first = target(host.container(&[&edu, &peer]).unwrap());
    let second = target(host.container(&[&other]).unwrap());
    let allowed = windows::common(
        &first.limits().unwrap().allowed,
        &second.limits().unwrap().allowed,
    );
    Assembly::new(Parts {
        targets: vec![first, second],
        functions: vec![(edu, 0), (peer, 0), (other, 1)],
        allowed,
        ram: Backing::new(host.ram(16 << 20).unwrap()),
        page: Backing::new(host.ram(0x1000).unwrap()),
    })
    .unwrap()
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
    let mut witness = || -> anyhow::Result<Box<dyn Evidence>> {
        drop(host.take_faults());
        Ok(Box::new(SimFaults(host.clone())))
    };
    examine(assembly, Some(&mut witness)).unwrap()
}

#[test]
fn every_pair_is_told_exercised_and_controlled() {
    let host = SimHost::default();
    let mut assembly = assembly(&host);
    let report = report(&host, &mut assembly);
    assert!(report.ok, "{report}");
    let pair = |from: &str, to: &str, bar| {
        let found = report
            .pairs
            .iter()
            .find(|p| p.from.ends_with(from) && p.to.ends_with(to) && p.bar == bar);
        found.unwrap()
    };
    for from in ["05.0", "07.0"] {
        let bar2 = pair(from, "06.0", 2);
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
        let bar0 = pair(from, "06.0", 0);
        assert_eq!((bar0.reach, bar0.counts), ("unavailable", false));
    }
    // Two edus, each with a page of RAM, the peer's BAR2 off and moved, and all of RAM at the end.
    assert_eq!(report.controls.len(), 8);
    for control in &report.controls {
        assert_eq!(control.observed, Observed::Blocked);
        assert!(control.witness.contains("DMA write"), "{}", control.witness);
    }
    drop(assembly);
    assert_eq!(host.mappings(), []);
    assert_eq!(host.violations(), []);
}

#[test]
fn data_that_do_not_arrive_are_a_mismatch() {
    let host = SimHost::default();
    let mut assembly = assembly(&host);
    let mut pairs = assembly.pairs().unwrap();
    host.break_translation(Some(BrokenTranslation::Shift(0x1000)));
    super::exercise::all(&mut assembly, &mut pairs).unwrap();
    let report = P2pReport::new(pairs, Vec::new());
    assert!(!report.ok);
    let mismatches = report.pairs.iter();
    let mismatches = mismatches.filter(|p| p.exercised == Some(Exercised::Mismatch));
    assert_eq!(mismatches.count(), 2);
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
    let edu = host
        .add_function(FunctionSpec::edu("0000:00:05.0"))
        .unwrap();
    let peer = FunctionSpec::shared_memory("0000:00:06.0", 4 << 20);
    let peer = host.add_function(peer).unwrap();
    let container = target(host.container(&[&edu, &peer]).unwrap());
    let allowed = container.limits().unwrap().allowed;
    let mut assembly = Assembly::new(Parts {
        targets: vec![Box::new(Deaf(container))],
        functions: vec![(edu, 0), (peer, 0)],
        allowed,
        ram: Backing::new(host.ram(16 << 20).unwrap()),
        page: Backing::new(host.ram(0x1000).unwrap()),
    })
    .unwrap();
    let report = report(&host, &mut assembly);
    assert!(!report.ok);
    let control = &report.controls[0];
    assert_eq!(control.observed, Observed::Arrived);
    assert_eq!(control.witness, "none");
}

#[test]
fn a_bar_that_cannot_be_mapped_counts_and_is_told() {
    let host = SimHost::default();
    let edu = host
        .add_function(FunctionSpec::edu("0000:00:05.0"))
        .unwrap();
    let peer = FunctionSpec::shared_memory("0000:00:06.0", 4 << 20);
    let peer = host.add_function(peer).unwrap();
    let container = target(host.container(&[&edu, &peer]).unwrap());
    let allowed = container.limits().unwrap().allowed;
    // RAM and the control page are mapped; every BAR after them is refused.
    host.fail(Call::MapDma, 3, 14);
    let mut assembly = Assembly::new(Parts {
        targets: vec![container],
        functions: vec![(edu, 0), (peer, 0)],
        allowed,
        ram: Backing::new(host.ram(16 << 20).unwrap()),
        page: Backing::new(host.ram(0x1000).unwrap()),
    })
    .unwrap();
    let report = examine(&mut assembly, None).unwrap();
    assert!(!report.ok);
    let refused = report.pairs.iter().find(|pair| pair.counts).unwrap();
    assert_eq!(refused.reach, "unavailable");
    assert!(refused.reason.as_ref().unwrap().contains("Bad address"));
}
