//! Resets of more than one function, and while mappings are made.

use super::footprint::Footprint;
use super::p2p_run::{HOT_RESET, NOTHING_TOLD, P2pRun, RESET_UNDECODED, ways};
use super::{BOTH_KERNELS, EDU, FAR_IVSHMEM, ONE_SLOT, kernel_log};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    ROOT_PORTS:
        hot_reset_takes_a_sibling_along_which_is_reached_again,
        slot_that_is_not_all_ours_is_not_reset,
        reach_is_true_after_everything_at_once;
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

/// In how many rounds everything is changed at once.
const ROUNDS: &str = "3";

/// The functions of a slot and one alone on its bus are moved, put to sleep and reset while their
/// address spaces are registered again. What is told then is true, and QEMU's IOMMU saw nothing else.
fn reach_is_true_after_everything_at_once(bench: &mut Bench) -> Result<(), ScenarioError> {
    let [igb, nvme] = ONE_SLOT;
    P2pRun::with(bench, &[], &ONE_SLOT)?;
    for way in ways(bench)? {
        let before = Footprint::take(bench)?;
        let options = ["--stress", ROUNDS, "--iommu", way];
        let run = P2pRun::with(bench, &options, &[EDU, igb, nvme, FAR_IVSHMEM])?;
        ensure(run.ok && run.status.success(), || format!("{run:#?}"))?;
        run.ensure_way(way)?;
        for peer in [nvme, FAR_IVSHMEM] {
            run.ensure_exercised(EDU, peer, 2)?;
        }
        // Each is the other's negative control: the same places are reached at one time and blocked
        // at another.
        for what in ["moves", "events", "registrations", "reached", "blocked"] {
            let times = run.stress.get(what).copied().unwrap_or_default();
            ensure(times >= 6, || format!("{what}: {:?}", run.stress))?;
        }
        run.blocked(EDU, NOTHING_TOLD)?;
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        before.ensure_same(bench)?;
    }
    kernel_log::ensure_clean(bench).map(drop)
}
