//! The contract of iommufd that the simulated host keeps too, tried on the real kernel.

use super::contract_suite::{self, kept};
use super::footprint::Footprint;
use super::{EDU, IOMMUFD_KERNEL, IVSHMEM, NVME, SIBLING_IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    EDU_AND_IVSHMEM:
        kernel_keeps_the_iommufd_contract,
        what_cannot_be_tried_breaks_the_iommufd_contract;
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
