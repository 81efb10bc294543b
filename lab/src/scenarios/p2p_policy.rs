//! Who may reach whom, enforced by the address spaces themselves.

use super::bad_input::NOT_DONE;
use super::entry_limit;
use super::footprint::{Footprint, pages_ever_pinned};
use super::p2p_run::{BEFORE_THE_MOVE, KEPT_OUT, P2pRun, RAM_PAGES, p2p};
use super::{BOTH_KERNELS, EDU, IVSHMEM, SECOND_EDU, SECOND_IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    EDU_AND_IVSHMEM:
        policy_none_blocks_what_is_reached_without_it,
        required_pair_that_is_not_mapped_is_named_and_nothing_moves;
    TWO_EDUS:
        engine_outside_of_a_group_is_blocked_by_its_own_address_space,
        functions_in_several_address_spaces_reach_each_other,
        policy_that_divides_a_group_is_refused_and_its_advice_works,
        functions_of_one_group_may_bypass_the_iommu_and_that_is_told;
];

fn policy_none_blocks_what_is_reached_without_it(bench: &mut Bench) -> Result<(), ScenarioError> {
    // Negative control: without it the same engine gets to the same address.
    let run = P2pRun::exercise(bench, &[EDU, IVSHMEM])?;
    run.ensure_exercised(EDU, IVSHMEM, 2)?;
    let reached: Vec<u64> = run
        .blocked(EDU, BEFORE_THE_MOVE)?
        .iter()
        .map(|control| control.iova)
        .collect();

    let run = P2pRun::exercise_with(bench, &["--p2p", "none"], &[EDU, IVSHMEM])?;
    let pair = run.pair(EDU, IVSHMEM, 2)?;
    let told = pair.reason.as_deref().unwrap_or_default();
    ensure(
        pair.reach == "unavailable" && told.contains("policy") && !pair.counts,
        || format!("{pair:?}"),
    )?;
    ensure(pair.exercised.is_none(), || format!("{pair:?}"))?;
    let kept_out = run.blocked(EDU, KEPT_OUT)?;
    ensure(
        kept_out
            .iter()
            .map(|control| control.iova)
            .eq(reached.iter().copied()),
        || format!("reached was {reached:x?}, not {kept_out:#?}"),
    )?;
    run.ensure_witnessed(&bench.dmar_faults()?)
}

fn required_pair_that_is_not_mapped_is_named_and_nothing_moves(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let options = ["--exercise", "--p2p", "required", "--iommu", "type1"];
    let argv = p2p(&options, &[EDU, IVSHMEM]);
    // A kernel that takes two mappings has none left for BARs.
    bench.forget_faults()?;
    entry_limit::while_it_is(2, bench, |bench| {
        let pair = format!("{EDU} does not reach BAR2 of {IVSHMEM}: ");
        bench.run_refused(&argv, 1, &[&pair, "--p2p required"])
    })?;
    let faults = bench.dmar_faults()?;
    ensure(faults.is_empty(), || format!("something moved: {faults:?}"))?;
    // Negative control: where they are mapped, data move.
    let run = P2pRun::exercise_with(bench, &["--p2p", "required"], &[EDU, IVSHMEM])?;
    run.ensure_exercised(EDU, IVSHMEM, 2)
}

fn engine_outside_of_a_group_is_blocked_by_its_own_address_space(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let functions = [EDU, IVSHMEM, SECOND_EDU];
    let before = Footprint::take(bench)?;
    for (inside, outside) in [(EDU, SECOND_EDU), (SECOND_EDU, EDU)] {
        let group = format!("group=fast:{inside},{IVSHMEM}");
        let run = P2pRun::exercise_with(bench, &["--p2p", &group], &functions)?;
        run.ensure_exercised(inside, IVSHMEM, 2)?;
        let kept = run.pair(outside, IVSHMEM, 2)?;
        ensure(
            kept.reach == "unavailable" && kept.exercised.is_none(),
            || format!("{kept:?}"),
        )?;
        let controls = run.blocked(outside, KEPT_OUT)?;
        ensure(controls.len() == 1, || format!("{controls:#?}"))?;
        run.ensure_witnessed(&bench.dmar_faults()?)?;
    }
    before.ensure_same(bench)
}

/// Each engine shares the peer with it alone, so there are three address spaces: in each, the BAR
/// is mapped, moved, and made anew when it decodes again. By iommufd, RAM is pinned once for all.
fn functions_in_several_address_spaces_reach_each_other(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let functions = [EDU, IVSHMEM, SECOND_EDU];
    let groups = [
        format!("group=one:{EDU},{IVSHMEM}"),
        format!("group=two:{SECOND_EDU},{IVSHMEM}"),
    ];
    let [one, two] = &groups;
    let before = pages_ever_pinned(bench)?;
    let run = P2pRun::exercise_with(bench, &["--p2p", one, "--p2p", two], &functions)?;
    let pinned = pages_ever_pinned(bench)?.saturating_sub(before);
    for (engine, other) in [(EDU, SECOND_EDU), (SECOND_EDU, EDU)] {
        run.ensure_exercised(engine, IVSHMEM, 2)?;
        let apart = run.pair(engine, other, 0)?;
        ensure(apart.reach == "unavailable", || format!("{apart:?}"))?;
    }
    run.ensure_witnessed(&bench.dmar_faults()?)?;
    let times = match run.iommu.chosen.as_str() {
        "iommufd" => 1,
        // Each container pins for itself.
        _ => 3,
    };
    let expected = RAM_PAGES.saturating_mul(times);
    ensure(
        (expected..expected.saturating_add(RAM_PAGES)).contains(&pinned),
        || format!("{pinned} pages were pinned, not {times} times {RAM_PAGES}"),
    )
}

fn policy_that_divides_a_group_is_refused_and_its_advice_works(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let functions = [SECOND_EDU, SECOND_IVSHMEM];
    let before = Footprint::take(bench)?;
    for policy in ["none", &format!("group=alone:{SECOND_EDU}")] {
        let argv = p2p(&["--p2p", policy], &functions);
        let advice = format!("--p2p group=NAME:{SECOND_EDU},{SECOND_IVSHMEM}");
        let said = ["IOMMU group", SECOND_EDU, SECOND_IVSHMEM, &advice];
        bench.run_refused(&argv, NOT_DONE, &said)?;
    }
    before.ensure_same(bench)?;
    let group = format!("group=pair:{SECOND_EDU},{SECOND_IVSHMEM}");
    let run = P2pRun::exercise_with(bench, &["--p2p", &group], &functions)?;
    run.ensure_exercised(SECOND_EDU, SECOND_IVSHMEM, 2)
}

fn functions_of_one_group_may_bypass_the_iommu_and_that_is_told(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let functions = [EDU, SECOND_EDU, SECOND_IVSHMEM];
    let run = P2pRun::with(bench, &[], &functions)?;
    let within = run.pair(SECOND_EDU, SECOND_IVSHMEM, 2)?;
    let told = within.bypass.as_deref().unwrap_or_default();
    ensure(told.contains("IOMMU group"), || format!("{within:?}"))?;
    // Negative control: others send everything by the IOMMU.
    let across = run.pair(EDU, SECOND_IVSHMEM, 2)?;
    ensure(across.bypass.is_none(), || format!("{across:?}"))?;
    let text = bench.run_ok(&p2p(&[], &functions))?;
    let warnings: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("warning:"))
        .collect();
    ensure(warnings.len() == 2, || format!("{warnings:#?}"))
}
