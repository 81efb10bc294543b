//! `throughway p2p` by iommufd and by type1 on one kernel, and which of them is chosen.

use super::footprint::{Footprint, pages_ever_pinned};
use super::p2p_run::{
    ASLEEP, BEFORE_THE_MOVE, DECODING_OFF, HOT_RESET, P2pRun, RAM_PAGES, RAM_TAKEN_AWAY, RESET,
    RESET_UNDECODED, UNREGISTERED,
};
use super::{BOTH_KERNELS, EDU, FAR_EDU, FAR_IVSHMEM, IOMMUFD_KERNEL, IVSHMEM, NVME, SECOND_EDU};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios on the kernel that has both ways.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    EDU_AND_IVSHMEM:
        edu_reaches_ivshmem_either_way;
    TWO_EDUS:
        two_edus_reach_each_other_and_one_peer_either_way;
    ROOT_PORTS:
        peer_that_sleeps_or_is_reset_is_reached_before_and_after;
];

/// And on any.
pub static ON_BOTH_KERNELS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    EDU_AND_IVSHMEM:
        best_way_is_chosen_and_told;
];

const WAYS: [&str; 2] = ["iommufd", "type1"];

fn edu_reaches_ivshmem_either_way(bench: &mut Bench) -> Result<(), ScenarioError> {
    for way in WAYS {
        let before = Footprint::take(bench)?;
        let run = P2pRun::exercise_with(bench, &["--iommu", way], &[EDU, IVSHMEM])?;
        run.ensure_way(way)?;
        run.ensure_exercised(EDU, IVSHMEM, 2)?;
        run.blocked(EDU, RAM_TAKEN_AWAY)?;
        run.blocked_for_a_while(EDU, DECODING_OFF)?;
        // On the root bus nothing is reset with its bus.
        run.ensure_not_tried(HOT_RESET)?;
        run.blocked(EDU, BEFORE_THE_MOVE)?;
        run.blocked(EDU, UNREGISTERED)?;
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        before.ensure_same(bench)?;
    }
    Ok(())
}

fn two_edus_reach_each_other_and_one_peer_either_way(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    for way in WAYS {
        let functions = [EDU, IVSHMEM, SECOND_EDU];
        let before = pages_ever_pinned(bench)?;
        let run = P2pRun::exercise_with(bench, &["--iommu", way], &functions)?;
        run.ensure_way(way)?;
        for (from, other) in [(EDU, SECOND_EDU), (SECOND_EDU, EDU)] {
            run.ensure_exercised(from, IVSHMEM, 2)?;
            run.ensure_exercised(from, other, 0)?;
        }
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        let pinned = pages_ever_pinned(bench)?.saturating_sub(before);
        let once = RAM_PAGES..RAM_PAGES.saturating_mul(2);
        ensure(once.contains(&pinned), || {
            format!("{way}: {pinned} pages were pinned, for {RAM_PAGES} pages of RAM")
        })?;
    }
    Ok(())
}

/// NVMe's controller memory buffer, behind a port, is reached; not while its function does not
/// decode, sleeps or was reset (with decoding on and off, and with its bus); and again when its
/// driver has put back what that cost.
fn peer_that_sleeps_or_is_reset_is_reached_before_and_after(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    for way in WAYS {
        let before = Footprint::take(bench)?;
        let functions = [EDU, NVME, FAR_EDU, FAR_IVSHMEM];
        let run = P2pRun::exercise_with(bench, &["--iommu", way], &functions)?;
        run.ensure_way(way)?;
        for from in [EDU, FAR_EDU] {
            run.ensure_exercised(from, NVME, 2)?;
            run.ensure_exercised(from, FAR_IVSHMEM, 2)?;
            for what in [ASLEEP, RESET, RESET_UNDECODED] {
                let controls = run.blocked_for_a_while(from, what)?;
                // The far ivshmem can do neither.
                ensure(controls.len() == 1, || format!("{controls:#?}"))?;
            }
            for what in [DECODING_OFF, HOT_RESET] {
                let controls = run.blocked_for_a_while(from, what)?;
                // The NVMe's hot reset fails, and counts all the same.
                let failed = controls.iter().filter(|control| control.failed.is_some());
                let failures = usize::from(what == HOT_RESET);
                ensure(controls.len() == 2 && failed.count() == failures, || {
                    format!("{controls:#?}")
                })?;
            }
        }
        run.ensure_witnessed(&bench.dmar_faults()?)?;
        before.ensure_same(bench)?;
    }
    Ok(())
}

fn best_way_is_chosen_and_told(bench: &mut Bench) -> Result<(), ScenarioError> {
    let has_iommufd = bench.run(&["test", "-c", "/dev/iommu"])?.status.success();
    let asked: [&[&str]; 2] = [&[], &["--iommu", "auto"]];
    for options in asked {
        let run = P2pRun::with(bench, options, &[EDU, IVSHMEM])?;
        ensure(run.ok, || format!("{run:#?}"))?;
        let (way, because) = if has_iommufd {
            ("iommufd", "every BAR that can be mapped is exported")
        } else {
            ("type1", "0000:00:05.0 has no character device of VFIO's")
        };
        run.ensure_way(way)?;
        ensure(run.iommu.because.contains(because), || {
            format!("{:?}", run.iommu)
        })?;
    }
    if !has_iommufd {
        return Ok(());
    }
    // Where something is missing of it, the other way is taken, for that reason.
    bench.shell("mv /dev/iommu /dev/iommu.away")?;
    let run = P2pRun::with(bench, &[], &[EDU, IVSHMEM]);
    bench.shell("mv /dev/iommu.away /dev/iommu")?;
    let run = run?;
    run.ensure_way("type1")?;
    ensure(
        run.iommu.because.contains("/dev/iommu cannot be opened"),
        || format!("{:?}", run.iommu),
    )
}
