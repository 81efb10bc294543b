//! Devices that reach each other, by whichever way the kernel offers, with data that move and data
//! that must not.
//!
//! `throughway p2p --exercise` compares the data; QEMU's trace tells, from outside the kernel under
//! test, which accesses the IOMMU blocked.

use super::entry_limit;
use super::footprint::{Footprint, pages_ever_pinned};
use super::p2p_run::{
    BEFORE_THE_MOVE, Control, DECODING_OFF, P2pRun, RAM_PAGES, RAM_TAKEN_AWAY, UNREGISTERED,
};
use super::{BOTH_KERNELS, EDU, IVSHMEM, SECOND_EDU, SECOND_IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// The controls that every run has.
const EVERY_KIND: [&str; 4] = [RAM_TAKEN_AWAY, DECODING_OFF, BEFORE_THE_MOVE, UNREGISTERED];

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    EDU_AND_IVSHMEM:
        edu_reaches_ivshmem_and_the_data_match,
        bar_smaller_than_a_page_is_told_and_does_not_count,
        qemu_saw_every_control_blocked_and_nothing_else,
        moved_bar_is_reached_at_its_new_place_only,
        unregistered_iommu_has_no_mapping_left,
        bar_that_the_kernel_refuses_is_told_and_counts;
    TWO_EDUS:
        two_engines_share_an_address_space_and_reach_one_peer,
        functions_of_one_group_reach_each_other_and_those_of_another;
];

fn edu_reaches_ivshmem_and_the_data_match(bench: &mut Bench) -> Result<(), ScenarioError> {
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    run.ensure_exercised(EDU, IVSHMEM, 2)?;
    for what in EVERY_KIND {
        run.blocked(EDU, what)?;
    }
    // The other way about it is mapped too; there is nobody to ask for a transfer.
    let pair = run.pair(IVSHMEM, EDU, 0)?;
    ensure(pair.reach == "mapped" && pair.exercised.is_none(), || {
        format!("{pair:?}")
    })?;

    // Who does not ask for data to be moved gets none moved: no transfer, no control, no fault.
    let run = P2pRun::with(bench, &[], &[EDU, IVSHMEM])?;
    ensure(run.ok && run.status.success(), || format!("{run:#?}"))?;
    let pair = run.pair(EDU, IVSHMEM, 2)?;
    let still = pair.reach == "mapped" && pair.exercised.is_none() && run.controls.is_empty();
    ensure(still, || format!("{run:#?}"))?;
    let faults = bench.dmar_faults()?;
    ensure(faults.is_empty(), || {
        format!("nothing was to move: {faults:?}")
    })
}

fn bar_smaller_than_a_page_is_told_and_does_not_count(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    let pair = run.pair(EDU, IVSHMEM, 0)?;
    let told = pair.reason.as_deref().unwrap_or_default();
    ensure(
        pair.reach == "unavailable" && told.contains("smaller than") && !pair.counts,
        || format!("{pair:?}"),
    )?;
    ensure(pair.exercised.is_none(), || format!("{pair:?}"))?;
    // It does not hold its large neighbour back.
    run.ensure_exercised(EDU, IVSHMEM, 2)
}

fn qemu_saw_every_control_blocked_and_nothing_else(bench: &mut Bench) -> Result<(), ScenarioError> {
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    let faults = bench.dmar_faults()?;
    run.ensure_witnessed(&faults)?;
    // Negative control of the comparison: with one control or one fault left out, it fails.
    for left_out in 0..run.controls.len() {
        let mut controls = run.controls.clone();
        controls.remove(left_out);
        let fewer = P2pRun {
            controls,
            pairs: vec![],
            iommu: run.iommu.clone(),
            removed: vec![],
            ..run
        };
        ensure(fewer.ensure_witnessed(&faults).is_err(), || {
            format!("control {left_out} is not needed to explain the faults")
        })?;
    }
    let fewer = faults.split_last().map_or(&[][..], |(_, fewer)| fewer);
    ensure(run.ensure_witnessed(fewer).is_err(), || {
        "a missing fault goes unnoticed".into()
    })
}

fn moved_bar_is_reached_at_its_new_place_only(bench: &mut Bench) -> Result<(), ScenarioError> {
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    // A pair that fails at either of its places is a mismatch.
    run.ensure_exercised(EDU, IVSHMEM, 2)?;
    let moved = run.blocked(EDU, BEFORE_THE_MOVE)?;
    let off = run.blocked(EDU, DECODING_OFF)?;
    // The old place is the one that was in use before.
    let places = |controls: &[&Control]| -> Vec<u64> {
        controls.iter().map(|control| control.iova).collect()
    };
    ensure(places(&moved) == places(&off), || {
        format!("moved from elsewhere: {:#?}", run.controls)
    })?;
    // At the new place nothing faulted, nor at the old one before the move.
    run.ensure_witnessed(&bench.dmar_faults()?)
}

fn unregistered_iommu_has_no_mapping_left(bench: &mut Bench) -> Result<(), ScenarioError> {
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    let faults = bench.dmar_faults()?;
    for control in run.blocked(EDU, UNREGISTERED)? {
        // All transfers began in this RAM: it was mapped until then, and only the control faulted.
        let at = |iova| faults.iter().filter(|fault| fault.iova == iova).count();
        ensure(at(control.iova) == 1, || {
            format!("{} faults at {:#x}", at(control.iova), control.iova)
        })?;
    }
    run.ensure_witnessed(&faults)
}

/// The negative control of "mapped": a kernel that takes two mappings has none left for BARs.
fn bar_that_the_kernel_refuses_is_told_and_counts(bench: &mut Bench) -> Result<(), ScenarioError> {
    let run = entry_limit::while_it_is(2, bench, |bench| {
        P2pRun::with(bench, &["--exercise", "--iommu", "type1"], &[EDU, IVSHMEM])
    })?;
    ensure(!run.ok && run.status.code() == 1, || format!("{run:#?}"))?;
    let pair = run.pair(EDU, IVSHMEM, 2)?;
    ensure(
        pair.reach == "unavailable" && pair.reason.is_some() && pair.counts,
        || format!("{pair:?}"),
    )?;
    ensure(pair.exercised.is_none(), || format!("{pair:?}"))?;
    // RAM was mapped, so its controls hold.
    run.blocked(EDU, RAM_TAKEN_AWAY)?;
    run.ensure_witnessed(&bench.dmar_faults()?)?;
    P2pRun::exercise(bench, &[EDU, IVSHMEM])?.ensure_exercised(EDU, IVSHMEM, 2)
}

fn two_engines_share_an_address_space_and_reach_one_peer(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = pages_ever_pinned(bench)?;
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM, SECOND_EDU])?;
    for edu in [EDU, SECOND_EDU] {
        run.ensure_exercised(edu, IVSHMEM, 2)?;
        for what in EVERY_KIND {
            run.blocked(edu, what)?;
        }
    }
    run.ensure_witnessed(&bench.dmar_faults()?)?;
    // Seen from outside: with an address space for each group, RAM would have been pinned twice.
    let pinned = pages_ever_pinned(bench)?.saturating_sub(before);
    ensure(
        (RAM_PAGES..RAM_PAGES.saturating_mul(2)).contains(&pinned),
        || format!("{pinned} pages were pinned, for {RAM_PAGES} pages of RAM"),
    )
}

fn functions_of_one_group_reach_each_other_and_those_of_another(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = P2pRun::exercise(bench, &[SECOND_EDU, SECOND_IVSHMEM, EDU, IVSHMEM])?;
    for from in [EDU, SECOND_EDU] {
        for to in [IVSHMEM, SECOND_IVSHMEM] {
            run.ensure_exercised(from, to, 2)?;
        }
        // Both peers were moved, and tried where they were.
        let moved = run.blocked(from, BEFORE_THE_MOVE)?;
        ensure(moved.len() == 2, || format!("{moved:#?}"))?;
    }
    run.ensure_witnessed(&bench.dmar_faults()?)?;
    before.ensure_same(bench)
}
