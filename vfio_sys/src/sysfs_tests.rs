use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::{CdevError, IommufdError};

/// A made-up host in a temporary directory, which goes when it is dropped.
struct FakeHost {
    root: PathBuf,
}

impl FakeHost {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root =
            std::env::temp_dir().join(format!("throughway-sysfs-{}-{number}", std::process::id()));
        fs::create_dir_all(root.join("sys/bus/pci/devices")).unwrap();
        fs::create_dir_all(root.join("dev/vfio")).unwrap();
        fs::write(root.join("dev/vfio/vfio"), "").unwrap();
        Self { root }
    }

    fn sysfs(&self) -> Sysfs {
        Sysfs::new(self.root.join("sys"), self.root.join("dev"))
    }

    /// Adds a function, with a driver and an IOMMU group if it has them.
    fn function(&self, name: &str, driver: Option<&str>, group: Option<u32>) -> Bdf {
        let sys = self.root.join("sys");
        let path = sys.join("devices/pci0000:00").join(name);
        fs::create_dir_all(&path).unwrap();
        symlink(&path, sys.join("bus/pci/devices").join(name)).unwrap();
        if let Some(driver) = driver {
            let target = sys.join("bus/pci/drivers").join(driver);
            fs::create_dir_all(&target).unwrap();
            symlink(target, path.join("driver")).unwrap();
        }
        if let Some(group) = group {
            let target = sys.join("kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(target.join("devices")).unwrap();
            symlink(&path, target.join("devices").join(name)).unwrap();
            symlink(&target, path.join("iommu_group")).unwrap();
            fs::write(self.root.join(format!("dev/vfio/{group}")), "").unwrap();
        }
        name.parse().unwrap()
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

#[test]
fn a_function_as_it_should_be() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), Some(7));
    assert_eq!(host.sysfs().check(bdf).unwrap(), 7);
    assert!(host.sysfs().function(bdf).unwrap().is_bound_to_vfio());
    let variant = host.function("0000:00:06.0", Some("mlx5_vfio_pci"), Some(8));
    assert_eq!(host.sysfs().check(variant).unwrap(), 8);
}

#[test]
fn a_function_that_does_not_exist() {
    let host = FakeHost::new();
    let error = host
        .sysfs()
        .open_group("0000:00:1f.7".parse().unwrap())
        .unwrap_err();
    assert!(matches!(error, OpenError::NoSuchFunction { .. }));
    let text = error.to_string();
    assert!(text.contains("0000:00:1f.7"), "{text}");
    assert!(text.contains("lspci -D"), "{text}");
}

#[test]
fn a_function_without_an_iommu() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("e1000e"), None);
    let error = host.sysfs().open_group(bdf).unwrap_err();
    assert!(matches!(error, OpenError::NoIommu { .. }));
    let text = error.to_string();
    assert!(text.contains("intel_iommu=on"), "{text}");
    assert!(text.contains("amd_iommu"), "{text}");
}

#[test]
fn a_group_that_vfio_made_up_is_no_iommu() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), Some(0));
    let group = host.root.join("sys/kernel/iommu_groups/0");
    fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
    let error = host.sysfs().open_group(bdf).unwrap_err();
    assert!(matches!(error, OpenError::NoIommu { .. }));
    fs::write(group.join("name"), "something else\n").unwrap();
    assert_eq!(host.sysfs().check(bdf).unwrap(), 0);
}

#[test]
fn a_function_of_another_driver_prints_the_commands() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("e1000e"), Some(7));
    let error = host.sysfs().open_group(bdf).unwrap_err();
    let OpenError::NotBound { driver, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(driver.as_deref(), Some("e1000e"));
    let sys = host.root.join("sys");
    let pci = sys.join("bus/pci");
    let pci = pci.display();
    assert_eq!(
        error.to_string(),
        format!(
            "0000:00:05.0 is not bound to vfio-pci: the driver e1000e has it. To bind it, as root:
  modprobe vfio-pci
  echo vfio-pci > {pci}/devices/0000:00:05.0/driver_override
  echo 0000:00:05.0 > {pci}/devices/0000:00:05.0/driver/unbind
  echo 0000:00:05.0 > {pci}/drivers_probe"
        )
    );
}

#[test]
fn a_function_without_a_driver_need_not_be_unbound() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", None, Some(7));
    let text = host.sysfs().open_group(bdf).unwrap_err().to_string();
    assert!(text.contains("no driver has it"), "{text}");
    assert!(!text.contains("/unbind"), "{text}");
    assert!(text.contains("drivers_probe"), "{text}");
}

#[test]
fn vfio_that_is_not_loaded() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), Some(7));
    fs::remove_file(host.root.join("dev/vfio/vfio")).unwrap();
    let error = host.sysfs().open_group(bdf).unwrap_err();
    assert!(matches!(error, OpenError::VfioNotLoaded { .. }));
    assert!(error.to_string().contains("modprobe vfio-pci"), "{error}");
}

#[test]
fn a_missing_group_file() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), Some(7));
    fs::remove_file(host.root.join("dev/vfio/7")).unwrap();
    let error = host.sysfs().open_group(bdf).unwrap_err();
    assert!(matches!(error, OpenError::NoGroupFile { .. }));
}

#[test]
fn a_file_that_is_no_group() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), Some(7));
    let error = host.sysfs().open_group(bdf).unwrap_err();
    assert!(matches!(error, OpenError::NotAGroup { .. }), "{error:?}");
}

#[test]
fn a_group_that_is_not_viable_names_the_others() {
    let host = FakeHost::new();
    let bdf = host.function("0000:01:00.0", Some("vfio-pci"), Some(7));
    host.function("0000:01:00.1", Some("snd_hda_intel"), Some(7));
    host.function("0000:01:00.2", None, Some(7));
    host.function("0000:02:00.0", Some("nvme"), Some(8));
    let sysfs = host.sysfs();
    let group = Group::open(&sysfs.group_path(7)).unwrap();
    let error = sysfs.not_viable(bdf, 7, &group);
    let OpenError::NotViable { members, .. } = &error else {
        panic!("{error:?}");
    };
    let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(names, ["0000:01:00.1", "0000:01:00.2"]);
    let text = error.to_string();
    assert!(
        text.contains("0000:01:00.1 (driver snd_hda_intel)"),
        "{text}"
    );
    assert!(!text.contains("nvme"), "{text}");
}

#[test]
fn a_group_whose_number_is_none() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), None);
    let path = host.root.join("sys/devices/pci0000:00/0000:00:05.0");
    symlink("../../kernel/iommu_groups/twelve", path.join("iommu_group")).unwrap();
    let error = host.sysfs().check(bdf).unwrap_err();
    assert!(matches!(error, OpenError::Sysfs { .. }), "{error:?}");
}

#[test]
fn a_character_device_is_found_by_its_function() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("vfio-pci"), Some(7));
    let error = host.sysfs().cdev_path(bdf).unwrap_err();
    assert!(matches!(error, CdevError::NoCdev { .. }), "{error:?}");
    let directory = host.sysfs().function_path(bdf).join("vfio-dev/vfio3");
    fs::create_dir_all(&directory).unwrap();
    // As without CONFIG_VFIO_DEVICE_CDEV.
    let error = host.sysfs().cdev_path(bdf).unwrap_err();
    assert!(matches!(error, CdevError::NoCdev { .. }), "{error:?}");
    fs::write(directory.join("dev"), "511:0").unwrap();
    let path = host.sysfs().cdev_path(bdf).unwrap();
    assert!(path.ends_with("dev/vfio/devices/vfio3"), "{path:?}");
    let error = host.sysfs().open_cdev(bdf).unwrap_err();
    assert!(matches!(error, CdevError::NoFile { .. }), "{error:?}");
}

#[test]
fn a_function_that_vfio_does_not_have_has_no_character_device() {
    let host = FakeHost::new();
    let bdf = host.function("0000:00:05.0", Some("nvme"), Some(7));
    let error = host.sysfs().cdev_path(bdf).unwrap_err();
    assert!(
        matches!(error, CdevError::Open(OpenError::NotBound { .. })),
        "{error:?}"
    );
    let error = host.sysfs().open_iommufd().unwrap_err();
    assert!(matches!(error, IommufdError::Missing { .. }), "{error:?}");
}
