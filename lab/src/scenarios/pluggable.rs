//! Devices behind root ports, which can be pulled out and plugged in.

use std::time::Duration;

use serde_json::{Value, json};

use super::{FAR_EDU, FAR_IVSHMEM, VM_FAR_IVSHMEM};
use crate::scenario::{Bench, ScenarioError};

/// How long the nested kernel may take to notice.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Counts how often the kernel has asked whoever has a device to give it back.
const COUNT: &str = "dmesg | grep -c 'Relaying device request to user (#0)' || true";

/// A device behind a root port.
pub struct Pluggable {
    pub function: &'static str,
    /// QEMU's name for it, and for its port.
    pub id: &'static str,
    port: &'static str,
    /// Its kind, for QEMU and as its identification says, and what makes it what it is.
    driver: &'static str,
    identification: &'static str,
    property: (&'static str, Value),
    /// The memory behind it, if it is of QEMU's, and its size in bytes.
    memory: Option<(&'static str, u64)>,
}

/// Of [`super::ROOT_PORTS`].
pub fn far_edu() -> Pluggable {
    Pluggable {
        function: FAR_EDU,
        id: "far-edu",
        port: "port-b",
        driver: "edu",
        identification: "0x1234:0x11e8",
        property: ("dma_mask", json!(u64::MAX)),
        memory: None,
    }
}

/// Of [`super::ROOT_PORTS`].
pub fn far_ivshmem() -> Pluggable {
    Pluggable {
        function: FAR_IVSHMEM,
        id: "far-ivshmem",
        port: "port-c",
        driver: "ivshmem-plain",
        identification: "0x1af4:0x1110",
        property: ("memdev", json!("far")),
        memory: Some(("far", 1 << 20)),
    }
}

/// Of [`super::VM_AND_PORT`].
pub fn vm_far_ivshmem() -> Pluggable {
    Pluggable {
        function: VM_FAR_IVSHMEM,
        ..far_ivshmem()
    }
}

impl Pluggable {
    pub fn sysfs(&self) -> String {
        format!("/sys/bus/pci/devices/{}", self.function)
    }

    /// Pulls it out while the process whose number a command tells has it, and waits until that has
    /// given it back. As long as the process stands still, it does not: the negative control.
    pub fn pull_out_of(&self, bench: &mut Bench, number: &str) -> Result<(), ScenarioError> {
        let sysfs = self.sysfs();
        let before = bench.shell(COUNT)?;
        bench.shell(&format!("kill -STOP $({number})"))?;
        bench.monitor()?.device_del(self.id)?;
        bench.shell(&format!(
            "until [ $({COUNT}) -gt {} ]; do usleep 10000; done
             [ -e {sysfs} ]
             kill -CONT $({number})",
            before.trim()
        ))?;
        bench.monitor()?.wait_until_deleted(self.id, LIMIT)?;
        bench.shell(&format!("[ ! -e {sysfs} ]"))?;
        Ok(())
    }

    /// Plugs another one in and gives it to vfio-pci, so that all is as it was before.
    pub fn plug_in(&self, bench: &mut Bench) -> Result<(), ScenarioError> {
        let bus = ("bus", json!(self.port));
        let properties = [bus, self.property.clone()];
        let monitor = bench.monitor()?;
        if let Some((id, size)) = self.memory {
            // QEMU dies of a second ivshmem-plain with the same memory.
            monitor.execute("object-del", json!({ "id": id }))?;
            let kind = "memory-backend-memfd";
            let new = json!({ "qom-type": kind, "id": id, "size": size, "share": true });
            monitor.execute("object-add", new)?;
        }
        monitor.device_add(self.driver, self.id, &properties)?;
        // It is another device: nothing binds it but whoever wants it. It takes no driver until the
        // kernel is done with it, some time after it is seen.
        let (sysfs, function, expected) = (self.sysfs(), self.function, self.identification);
        bench.shell(&format!(
            "until [ -d {sysfs} ]; do usleep 10000; done
             [ ! -e {sysfs}/driver ]
             echo vfio-pci > {sysfs}/driver_override
             until [ -e {sysfs}/driver ]; do
                 echo {function} > /sys/bus/pci/drivers_probe
                 usleep 10000
             done
             readlink {sysfs}/driver | grep -q /vfio-pci$
             [ $(cat {sysfs}/vendor):$(cat {sysfs}/device) = {expected} ]"
        ))?;
        Ok(())
    }
}
