//! Hosts that cannot pass devices through as they are: what is missing is told.

use super::bad_input::{NOT_DONE, works};
use super::p2p_run::p2p;
use super::{EDU, IOMMUFD_KERNEL, IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios. Their negative control is every scenario on a host that has what these
/// lack.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    NO_IOMMU:
        host_without_an_iommu_is_told_to_turn_it_on;
    NO_INTERRUPT_REMAPPING:
        host_without_interrupt_remapping_is_told_how_to_go_on_without;
];

/// And on the kernel that has iommufd, which has a parameter of its own for it.
pub static BY_IOMMUFD: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    NO_INTERRUPT_REMAPPING:
        iommufd_without_interrupt_remapping_is_told_how_to_go_on_without;
];

fn host_without_an_iommu_is_told_to_turn_it_on(bench: &mut Bench) -> Result<(), ScenarioError> {
    let groups = bench.run_ok(&["ls", "/sys/kernel/iommu_groups"])?;
    ensure(groups.trim().is_empty(), || {
        format!("this host has an IOMMU: {groups}")
    })?;
    let missing = format!("{EDU} is behind no IOMMU");
    let said = [missing.as_str(), "VT-d, AMD-Vi", "intel_iommu=on"];
    bench.run_refused(&p2p(&[], &[EDU, IVSHMEM]), NOT_DONE, &said)?;
    // The simulated host needs none.
    bench.run_ok(&["throughway", "demo"])?;
    Ok(())
}

fn host_without_interrupt_remapping_is_told_how_to_go_on_without(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let command = "echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    let said = ["does not remap interrupts", "intremap=off", command];
    bench.run_refused(&p2p(&[], &[EDU, IVSHMEM]), NOT_DONE, &said)?;
    bench.shell(command)?;
    works(bench, &[EDU, IVSHMEM])
}

fn iommufd_without_interrupt_remapping_is_told_how_to_go_on_without(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let command = "echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts";
    let said = ["does not remap interrupts", "intremap=off", command];
    let iommufd = p2p(&["--iommu", "iommufd"], &[EDU, IVSHMEM]);
    bench.run_refused(&iommufd, NOT_DONE, &said)?;
    // Whoever leaves the choice to the program is told of both.
    let type1 = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    let either = p2p(&[], &[EDU, IVSHMEM]);
    bench.run_refused(&either, NOT_DONE, &[&said[..], &[type1]].concat())?;
    bench.shell(command)?;
    bench.run_ok(&iommufd)?;
    works(bench, &[EDU, IVSHMEM])
}
