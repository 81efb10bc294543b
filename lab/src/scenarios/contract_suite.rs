//! The contract that the simulated host keeps too, tried on the real kernel.

use serde_json::Value;

use super::entry_limit;
use super::footprint::Footprint;
use super::{BOTH_KERNELS, EDU, IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    EDU_AND_IVSHMEM:
        kernel_keeps_the_type1_contract,
        kernel_that_breaks_the_contract_is_noticed,
];

/// How many cases there are at least: a suite that has lost its cases passes too easily.
pub(super) const FEWEST: usize = 60;

fn kernel_keeps_the_type1_contract(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    kept(bench, &["type1-contract", "--json", EDU, IVSHMEM], FEWEST)?;
    before.ensure_same(bench)
}

/// Runs a contract's program, which must pass all of its cases, at least so many.
///
/// # Errors
/// [`ScenarioError::Unexpected`] with what did not pass.
pub(super) fn kept(bench: &mut Bench, argv: &[&str], fewest: usize) -> Result<(), ScenarioError> {
    let (status, report) = bench.run_json(argv)?;
    let cases = report.get("cases").and_then(Value::as_array);
    let cases = cases.map_or(&[][..], Vec::as_slice);
    let not_passed: Vec<&Value> = cases
        .iter()
        .filter(|case| case.get("ok") != Some(&Value::Bool(true)))
        .collect();
    ensure(status.success() && not_passed.is_empty(), || {
        format!("{status}, not passed: {not_passed:#?}")
    })?;
    ensure(cases.len() >= fewest, || {
        format!("only {} cases", cases.len())
    })
}

/// With another entry limit than the one in the contract, that case fails, and says how.
fn kernel_that_breaks_the_contract_is_noticed(bench: &mut Bench) -> Result<(), ScenarioError> {
    let filter = "--filter=info_tells_pages_ranges_and_entries";
    let argv = ["type1-contract", filter, EDU, IVSHMEM];
    let output = entry_limit::while_it_is(100, bench, |bench| bench.run(&argv))?;
    let text = output.stdout_text();
    ensure(output.status.code() == 1 && text.contains("FAILED"), || {
        format!("{}: {text}", output.status)
    })
}
