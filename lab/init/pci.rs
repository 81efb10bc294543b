//! Giving the machine's PCI functions to vfio-pci.

use std::fs;
use std::io;
use std::path::Path;

use crate::Problems;

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVER: &str = "/sys/bus/pci/drivers/vfio-pci";

/// Binds every function that is not the chipset's, no bridge and no IOMMU, and gives the names of those that
/// are bound.
pub fn bind_all(problems: &mut Problems) -> Vec<String> {
    let Some(entries) = problems.check("looking for PCI functions", fs::read_dir(DEVICES)) else {
        return vec![];
    };
    let mut functions: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|function| !is_chipset(function) && !is_bridge_or_iommu(function))
        .collect();
    functions.sort();
    if !functions.is_empty() && !Path::new(DRIVER).is_dir() {
        problems.note("the kernel has no vfio-pci driver; no device is bound");
        return vec![];
    }
    functions.retain(|function| {
        problems
            .check(&format!("binding {function} to vfio-pci"), bind(function))
            .is_some()
    });
    functions
}

/// QEMU's q35 has its host bridge at 00:00.0 and the functions of its south bridge at 00:1f.
fn is_chipset(function: &str) -> bool {
    function == "0000:00:00.0" || function.starts_with("0000:00:1f.")
}

/// Class 06: host, ISA and PCI bridges, root ports. Class 08, subclass 06: an IOMMU, which AMD's is.
fn is_bridge_or_iommu(function: &str) -> bool {
    fs::read_to_string(format!("{DEVICES}/{function}/class"))
        .is_ok_and(|class| class.starts_with("0x06") || class.starts_with("0x0806"))
}

fn bind(function: &str) -> io::Result<()> {
    let sysfs = Path::new(DEVICES).join(function);
    fs::write(sysfs.join("driver_override"), "vfio-pci")?;
    if sysfs.join("driver").exists() {
        fs::write(sysfs.join("driver/unbind"), function)?;
    }
    fs::write("/sys/bus/pci/drivers_probe", function)?;
    let driver = fs::canonicalize(sysfs.join("driver"))?;
    if driver.ends_with("vfio-pci") {
        Ok(())
    } else {
        let other = format!("it went to {}", driver.display());
        Err(io::Error::other(other))
    }
}
