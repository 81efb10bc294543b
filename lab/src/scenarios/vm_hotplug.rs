//! Devices that the host pulls out of a guest of `throughway run`.

use serde_json::Value;

use super::footprint::Footprint;
use super::pluggable::vm_far_ivshmem;
use super::running_vm::RunningVm;
use super::virtual_machine::{blocked_where_nobody_is, nobodies};
use super::vm_run::VmRun;
use super::{EDU, IOMMUFD_KERNEL, IVSHMEM, VM_FAR_IVSHMEM, kernel_log};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    VM_AND_PORT:
        vm_peer_that_is_pulled_out_is_given_back_and_the_others_go_on_by_type1,
        vm_peer_that_is_pulled_out_is_given_back_and_the_others_go_on_by_iommufd,
        vm_device_that_is_pulled_out_takes_its_address_space_along_by_type1,
        vm_device_that_is_pulled_out_takes_its_address_space_along_by_iommufd;
];

fn vm_peer_that_is_pulled_out_is_given_back_and_the_others_go_on_by_type1(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    peer_is_pulled_out(bench, "type1")
}

fn vm_peer_that_is_pulled_out_is_given_back_and_the_others_go_on_by_iommufd(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    peer_is_pulled_out(bench, "iommufd")
}

fn vm_device_that_is_pulled_out_takes_its_address_space_along_by_type1(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    loner_is_pulled_out(bench, "type1")
}

fn vm_device_that_is_pulled_out_takes_its_address_space_along_by_iommufd(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    loner_is_pulled_out(bench, "iommufd")
}

/// It shares its address space with the engine that has reached it until then. It stays away when the
/// guest starts anew.
fn peer_is_pulled_out(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    let steps = "p2p,pulled,enter,p2p,reboot/devices,p2p,poweroff";
    let told = [
        "boot",
        "p2p",
        "pulled-wait",
        "pulled",
        "enter",
        "p2p",
        "end",
        "boot",
        "devices",
        "p2p",
        "end",
    ];
    pulled_out(bench, iommu, steps, &told, &[])
}

/// Nobody may reach it, nor it anybody but RAM: it has an address space of its own.
fn loner_is_pulled_out(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    let steps = "pulled,enter,p2p,devices,poweroff";
    let told = [
        "boot",
        "pulled-wait",
        "pulled",
        "enter",
        "p2p",
        "devices",
        "end",
    ];
    let group = format!("group=pair:{EDU},{IVSHMEM}");
    pulled_out(bench, iommu, steps, &told, &["--p2p", &group])
}

fn pulled_out(
    bench: &mut Bench,
    iommu: &str,
    steps: &str,
    told: &[&str],
    options: &[&str],
) -> Result<(), ScenarioError> {
    let pulled = vm_far_ivshmem();
    let before = Footprint::take(bench)?.without(VM_FAR_IVSHMEM);
    let devices = [EDU, IVSHMEM, VM_FAR_IVSHMEM];
    let run = VmRun {
        options,
        ..VmRun::new(iommu, &devices, steps)
    };
    let vm = RunningVm::start(bench, &run)?;
    vm.await_step(bench, "pulled-wait", 1)?;
    pulled.pull_out_of(bench, &format!("echo {}", vm.process))?;
    // The machine runs until now: the host has not waited for its end.
    vm.press_enter(bench)?;
    let end = vm.await_end(bench)?.ensure_well(told)?;

    let found = end.lines.found("pulled")?;
    for count in ["rounds", "accesses"] {
        ensure(found[count].as_u64() > Some(0), || {
            format!("no {count}: {found:#}")
        })?;
    }
    let tried = nobodies(&end.lines.all());
    ensure(!tried.is_empty(), || format!("no control: {found:#}"))?;
    blocked_where_nobody_is(&tried, &bench.dmar_faults()?)?;
    // What is said of it is said once, and nothing else is.
    let said: Vec<&str> = end.said.lines().map(str::trim_end).collect();
    let expected = [
        format!("throughway: {VM_FAR_IVSHMEM}: the host wanted it back: it has left the machine"),
        "throughway: the guest turned itself off".to_owned(),
    ];
    ensure(said == expected, || format!("{said:#?}"))?;
    // To the guest there is one left.
    let functions = end.lines.list("devices", "functions", 1)?;
    let is_peer = |function: &&Value| function["id"].as_str() == Some("1af4:1110");
    ensure(functions.iter().filter(is_peer).count() == 1, || {
        format!("{functions:#?}")
    })?;
    kernel_log::ensure_clean(bench)?;
    pulled.plug_in(bench)?;
    let after = Footprint::take(bench)?.without(VM_FAR_IVSHMEM);
    ensure(before == after, || {
        format!("something is left.\nbefore:\n{before}\nafter:\n{after}")
    })
}
