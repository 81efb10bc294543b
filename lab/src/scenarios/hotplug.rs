//! Devices that come and go while the machine runs: the host pulls one out and plugs one in.

use std::time::Duration;

use serde_json::json;

use super::{BOTH_KERNELS, FAR_EDU, kernel_log};
use crate::monitor::MonitorError;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    ROOT_PORTS:
        device_that_nobody_holds_leaves_and_another_comes,
        device_that_is_not_there_cannot_leave;
];

/// The edu behind a root port, its identifier and its port's, see `ROOT_PORTS`.
const PULLED: &str = FAR_EDU;
const PULLED_ID: &str = "far-edu";
const PULLED_PORT: &str = "port-b";
/// How long the nested kernel may take to notice.
const LIMIT: Duration = Duration::from_secs(60);

fn device_that_nobody_holds_leaves_and_another_comes(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let sysfs = format!("/sys/bus/pci/devices/{PULLED}");
    // Negative control of "it has left".
    bench.run_ok(&["test", "-d", &sysfs])?;
    let monitor = bench.monitor()?;
    monitor.device_del(PULLED_ID)?;
    monitor.wait_until_deleted(PULLED_ID, LIMIT)?;
    bench.shell(&format!("[ ! -e {sysfs} ]"))?;
    kernel_log::ensure_clean(bench)?;

    let mask = ("dma_mask", json!(u64::MAX));
    let bus = ("bus", json!(PULLED_PORT));
    bench
        .monitor()?
        .device_add("edu", PULLED_ID, &[bus, mask])?;
    // It is another device: nothing binds it but whoever wants it. It takes no driver until the
    // kernel is done with it, some time after it is seen.
    bench.shell(&format!(
        "until [ -d {sysfs} ]; do usleep 10000; done
         [ ! -e {sysfs}/driver ]
         echo vfio-pci > {sysfs}/driver_override
         until [ -e {sysfs}/driver ]; do
             echo {PULLED} > /sys/bus/pci/drivers_probe
             usleep 10000
         done
         readlink {sysfs}/driver | grep -q /vfio-pci$
         [ $(cat {sysfs}/vendor):$(cat {sysfs}/device) = 0x1234:0x11e8 ]"
    ))?;
    kernel_log::ensure_clean(bench).map(drop)
}

fn device_that_is_not_there_cannot_leave(bench: &mut Bench) -> Result<(), ScenarioError> {
    match bench.monitor()?.device_del("nobody") {
        Err(MonitorError::Refused { class, .. }) if class == "DeviceNotFound" => Ok(()),
        other => Err(ScenarioError::unexpected(format!(
            "pulling out a device that is not there gave {other:?}"
        ))),
    }?;
    // The monitor is none the worse for it.
    let status = bench.monitor()?.query_status()?;
    ensure(status.running, || format!("{status:?}"))
}
