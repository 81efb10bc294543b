//! Resets of more than one function.

use super::footprint::Footprint;
use super::p2p_run::{HOT_RESET, P2pRun, RESET_UNDECODED, ways};
use super::{BOTH_KERNELS, EDU, ONE_SLOT, kernel_log};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    ROOT_PORTS:
        hot_reset_takes_a_sibling_along_which_is_reached_again,
        slot_that_is_not_all_ours_is_not_reset;
];

/// A slot with two functions, in two IOMMU groups. The first one asks for the reset, and the second
/// one loses its mappings.
fn hot_reset_takes_a_sibling_along_which_is_reached_again(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let [igb, nvme] = ONE_SLOT;
    let group = |function| format!("readlink -f /sys/bus/pci/devices/{function}/iommu_group");
    let groups = bench.shell(&ONE_SLOT.map(group).join("\n"))?;
    let mut lines = groups.lines();
    ensure(lines.next() != lines.next(), || {
        format!("one group: {groups}")
    })?;
    // The firmware leaves the bus mastering of an NVMe on; whoever opens it first turns it off.
    P2pRun::with(bench, &[], &ONE_SLOT)?;
    for way in ways(bench)? {
        let before = Footprint::take(bench)?;
        let options = ["--iommu", way];
        let run = P2pRun::exercise_with(bench, &options, &[EDU, igb, nvme])?;
        run.ensure_way(way)?;
        run.ensure_exercised(EDU, nvme, 2)?;
        for what in [HOT_RESET, RESET_UNDECODED] {
            let controls = run.blocked_for_a_while(EDU, what)?;
            let done = controls.iter().all(|control| control.failed.is_none());
            ensure(controls.len() == 1 && done, || format!("{controls:#?}"))?;
        }
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        before.ensure_same(bench)?;
    }
    kernel_log::ensure_clean(bench).map(drop)
}

/// The negative control: the kernel refuses to reset a slot of which somebody else has a function,
/// so it is not even asked to.
fn slot_that_is_not_all_ours_is_not_reset(bench: &mut Bench) -> Result<(), ScenarioError> {
    let [_, nvme] = ONE_SLOT;
    for way in ways(bench)? {
        let run = P2pRun::exercise_with(bench, &["--iommu", way], &[EDU, nvme])?;
        run.ensure_way(way)?;
        run.blocked_for_a_while(EDU, RESET_UNDECODED)?;
        run.ensure_not_tried(HOT_RESET)?;
    }
    Ok(())
}
