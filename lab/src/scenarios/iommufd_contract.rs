//! The contract of iommufd that the simulated host keeps too, tried on the real kernel.

use serde_json::Value;

use super::contract_suite::{self, kept};
use super::footprint::Footprint;
use super::{EDU, IOMMUFD_KERNEL, IVSHMEM, NVME, SIBLING_IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    EDU_AND_IVSHMEM:
        kernel_keeps_the_iommufd_contract,
        device_of_a_group_that_is_not_known_stays_where_it_was_too,
        what_cannot_be_tried_breaks_the_iommufd_contract,
        events_take_the_fewest_calls_on_the_kernel_too,
        container_and_iommufd_beside_each_other_reach_each_others_bars;
    ONE_GROUP:
        kernel_keeps_the_iommufd_contract_in_one_group;
    ROOT_PORTS:
        kernel_keeps_the_iommufd_contract_through_resets;
    NARROW_IOMMU:
        kernel_keeps_both_contracts_with_addresses_of_39_bits;
    AMD_IOMMU:
        kernel_keeps_what_it_reserves_on_amds_iommu_out;
];

/// How many cases there are at least: a suite that has lost its cases passes too easily.
const FEWEST: usize = 118;

fn kernel_keeps_the_iommufd_contract(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    kept(bench, &["iommufd-contract", "--json", EDU, IVSHMEM], FEWEST)?;
    before.ensure_same(bench)
}

/// It is detached before it moves, and has to be attached again.
fn device_of_a_group_that_is_not_known_stays_where_it_was_too(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let argv = ["iommufd-contract", "--json", "--unknown-groups"];
    let filtered = ["--filter=a_device_", EDU, IVSHMEM];
    kept(bench, &[&argv[..], &filtered].concat(), 4)?;
    before.ensure_same(bench)
}

/// The two functions share an IOMMU group, and so must share an address space.
fn kernel_keeps_the_iommufd_contract_in_one_group(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let argv = ["iommufd-contract", "--json", EDU, SIBLING_IVSHMEM];
    kept(bench, &argv, FEWEST)?;
    before.ensure_same(bench)
}

/// The aperture's end is within what a BAR and RAM may be placed at.
fn kernel_keeps_both_contracts_with_addresses_of_39_bits(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    kept(bench, &["iommufd-contract", "--json", EDU, IVSHMEM], FEWEST)?;
    let type1 = ["type1-contract", "--json", EDU, IVSHMEM];
    kept(bench, &type1, contract_suite::FEWEST)?;
    before.ensure_same(bench)
}

/// Not the whole contract: no DMA works behind this IOMMU.
fn kernel_keeps_what_it_reserves_on_amds_iommu_out(bench: &mut Bench) -> Result<(), ScenarioError> {
    for filter in ["every_allowed_range", "ram_in_a_reserved_window"] {
        let filter = format!("--filter={filter}");
        kept(
            bench,
            &["iommufd-contract", "--json", &filter, EDU, IVSHMEM],
            1,
        )?;
    }
    Ok(())
}

/// The BAR is an NVMe's controller memory buffer, which has a function-level reset and sleeps.
fn kernel_keeps_the_iommufd_contract_through_resets(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let argv = ["iommufd-contract", "--json", "--resets", EDU, NVME];
    kept(bench, &argv, FEWEST + 6)?;
    before.ensure_same(bench)
}

/// What `docs/performance.md` tells of calls, with few rounds: no time counts here.
fn events_take_the_fewest_calls_on_the_kernel_too(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let few = "--turns=2 --events=2 --regions=10 --mib=4";
    let mut argv = vec!["iommufd-figures", "--json"];
    argv.extend(few.split(' ').chain([EDU, IVSHMEM]));
    let (status, report) = bench.run_json(&argv)?;
    let calls = |event: usize, kind: &str| {
        let path = format!("/events/{event}/calls/{kind}");
        report.pointer(&path).and_then(Value::as_u64)
    };
    let each = [1, 1, 1, 10, 1];
    let fewest = each.into_iter().enumerate().all(|(event, expected)| {
        ["maps", "unmaps"].map(|kind| calls(event, kind)) == [Some(expected); 2]
    });
    let mappings = report.pointer("/mappings").and_then(Value::as_array);
    let all = status.success() && fewest && mappings.is_some_and(|it| it.len() == 2);
    ensure(all, || format!("{status}: {report:#}"))?;
    before.ensure_same(bench)
}

/// One function in a type1 container, the other in an address space of an iommufd, each way about.
fn container_and_iommufd_beside_each_other_reach_each_others_bars(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    kept(bench, &["mixed-contract", "--json", EDU, IVSHMEM], 8)?;
    before.ensure_same(bench)
}

/// The negative control: an ivshmem cannot be put to sleep, and the program says so and fails.
fn what_cannot_be_tried_breaks_the_iommufd_contract(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let filter = "--filter=a_mapping_is_dead_after_sleep";
    let output = bench.run(&["iommufd-contract", "--resets", filter, EDU, IVSHMEM])?;
    let text = output.stdout_text();
    ensure(
        output.status.code() == 1 && text.contains("no capability"),
        || format!("{}: {text}", output.status),
    )
}
