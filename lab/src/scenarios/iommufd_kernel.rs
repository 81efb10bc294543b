//! The kernel that the lab builds: that it is what its configuration says, on machines with devices
//! that can be reset and with other IOMMUs.

use super::{BEHIND_PORTS, EDU, IOMMUFD_KERNEL, IVSHMEM};
use crate::monitor::QemuVersion;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on IOMMUFD_KERNEL;
    ROOT_PORTS:
        kernel_offers_cdev_iommufd_and_containers,
        functions_behind_root_ports_are_bound_and_can_be_reset,
        monitor_tells_the_machine_from_outside;
    NARROW_IOMMU:
        addresses_of_a_narrow_iommu_end_at_39_bits;
];

fn kernel_offers_cdev_iommufd_and_containers(bench: &mut Bench) -> Result<(), ScenarioError> {
    let release = bench.run_ok(&["uname", "-r"])?;
    let major = release
        .split('.')
        .next()
        .and_then(|m| m.parse::<u32>().ok());
    ensure(major.is_some_and(|major| major >= 7), || {
        format!("another kernel: {release}")
    })?;
    ensure(release.trim_end().ends_with("-throughway"), || {
        format!("not the one built here: {release}")
    })?;
    for node in ["/dev/iommu", "/dev/vfio/vfio", "/dev/kvm"] {
        bench.run_ok(&["test", "-c", node])?;
    }
    // VFIO's own container, not iommufd's stand-in, which maps no BARs: it alone has this parameter.
    bench.run_ok(&[
        "test",
        "-e",
        "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
    ])?;
    // Everything is built in, so there is nothing to load and no list of modules.
    bench.shell("[ ! -e /proc/modules ]")?;
    let problems = bench.machine().problems();
    ensure(problems.is_empty(), || problems.join("\n"))
}

/// Each function's reset methods, as the kernel tells them.
fn functions_behind_root_ports_are_bound_and_can_be_reset(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let expected = [(EDU, ""), (IVSHMEM, "")].into_iter().chain(BEHIND_PORTS);
    let functions: Vec<&str> = expected.clone().map(|(function, _)| function).collect();
    let bound = bench.machine().bound().to_vec();
    ensure(bound == functions, || format!("bound are {bound:?}"))?;
    for (function, methods) in expected {
        let sysfs = format!("/sys/bus/pci/devices/{function}");
        let cdev = bench.run_ok(&["ls", &format!("{sysfs}/vfio-dev")])?;
        bench.run_ok(&["test", "-c", &format!("/dev/vfio/devices/{}", cdev.trim())])?;
        // Nothing to read where there is no way to reset it.
        let seen = bench.shell(&format!("cat {sysfs}/reset_method 2>/dev/null || true"))?;
        ensure(seen.trim() == methods, || {
            format!("{function} can be reset by {seen:?}, not by {methods:?}")
        })?;
    }
    Ok(())
}

fn monitor_tells_the_machine_from_outside(bench: &mut Bench) -> Result<(), ScenarioError> {
    let monitor = bench.monitor()?;
    let oldest = QemuVersion {
        major: 10,
        minor: 0,
        micro: 0,
    };
    let version = monitor.version();
    ensure(version >= oldest, || format!("{version:?}"))?;
    let status = monitor.query_status()?;
    ensure(status.running && status.status == "running", || {
        format!("{status:?}")
    })?;
    // Negative control: another state is told as such, and ends.
    monitor.execute("stop", serde_json::Value::Null)?;
    let status = monitor.query_status()?;
    ensure(!status.running && status.status == "paused", || {
        format!("{status:?}")
    })?;
    monitor.execute("cont", serde_json::Value::Null)?;
    bench.run_ok(&["true"])?;
    Ok(())
}

fn addresses_of_a_narrow_iommu_end_at_39_bits(bench: &mut Bench) -> Result<(), ScenarioError> {
    let width = bench.shell("dmesg | grep -o 'DMAR: Host address width .*'")?;
    ensure(width.trim() == "DMAR: Host address width 39", || {
        format!("another width: {width}")
    })
}
