//! What is left when the process has ended: nothing. The kernel's own books tell, and devices that
//! are asked again.

use super::footprint::{self, Footprint};
use super::kernel_log;
use super::nested_machine::edu_reads;
use super::p2p_run::{P2pRun, RAM_PAGES, p2p};
use super::{BOTH_KERNELS, EDU, IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios: the last ones on their machine, so that the kernel's log tells of all.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    EDU_AND_IVSHMEM:
        ended_run_leaves_nothing,
        killed_run_leaves_nothing,
        kernel_has_not_complained;
    TWO_EDUS:
        kernel_has_not_complained_of_two_edus;
];

fn ended_run_leaves_nothing(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    before.ensure_same(bench)?;
    // What the run's IOMMU mapped, and the BAR's place among it, is out of the engine's reach now.
    for control in &run.controls {
        bench.forget_faults()?;
        edu_reads(bench, control.iova)?;
        let faults = bench.dmar_faults()?;
        ensure(
            faults.first().is_some_and(|fault| {
                fault.iova == control.iova && fault.device.to_string() == EDU && !fault.write
            }),
            || format!("a read of {:#x} left {faults:?}", control.iova),
        )?;
    }
    // A second run at once is as good as the first one.
    P2pRun::exercise(bench, &[EDU, IVSHMEM])?.ensure_exercised(EDU, IVSHMEM, 2)
}

/// How long the run that is killed is left alone once it has opened a device, in milliseconds. It
/// takes more than a second in all.
const MOMENTS: [u32; 4] = [0, 50, 200, 500];

fn killed_run_leaves_nothing(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = p2p(&["--exercise"], &[EDU, IVSHMEM]).join(" ");
    let mut pinned = 0;
    for moment in MOMENTS {
        // 137 is 128 and SIGKILL: it did not end by itself before.
        let during = bench.shell(&format!(
            "{run} > /dev/null 2>&1 & pid=$!
             until ls -l /proc/$pid/fd | grep -q vfio-device; do usleep 1000; done
             usleep {moment}000
             {}
             kill -9 $pid
             status=0; wait $pid || status=$?
             [ $status = 137 ]",
            footprint::SCRIPT
        ))?;
        before.ensure_same(bench)?;
        let during = Footprint::printed(&during).pinned_pages();
        pinned = pinned.max(during.unwrap_or(0));
        P2pRun::exercise(bench, &[EDU, IVSHMEM])?.ensure_exercised(EDU, IVSHMEM, 2)?;
    }
    // Negative control of the footprint: while a run lasted, its RAM was pinned.
    ensure(pinned >= RAM_PAGES, || {
        format!("at most {pinned} pages were pinned by a run of {RAM_PAGES} pages of RAM")
    })
}

fn kernel_has_not_complained(bench: &mut Bench) -> Result<(), ScenarioError> {
    let log = kernel_log::ensure_clean(bench)?;
    ensure(log.contains("DMAR"), || {
        format!("no log of DMA faults: {log}")
    })
}

fn kernel_has_not_complained_of_two_edus(bench: &mut Bench) -> Result<(), ScenarioError> {
    kernel_has_not_complained(bench)
}
