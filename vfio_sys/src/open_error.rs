//! Why a function cannot be opened, with what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Bdf, Group, InfoError};

/// A device of an IOMMU group, as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupMember {
    /// Its name: the BDF, for a PCI function.
    pub name: String,
    /// The driver that has it, if one does.
    pub driver: Option<String>,
}

impl GroupMember {
    /// Whether it keeps the group from being used: a driver has it that does DMA of its own.
    #[must_use]
    pub fn is_in_the_way(&self) -> bool {
        match self.driver.as_deref() {
            None | Some("pcieport" | "pci-stub" | "shpchp") => false,
            Some(driver) => !is_vfio_driver(driver),
        }
    }
}

impl fmt::Display for GroupMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(driver) => write!(f, "{} (driver {driver})", self.name),
            None => write!(f, "{} (no driver)", self.name),
        }
    }
}

/// Whether a driver of that name hands its devices to VFIO: `vfio-pci`, or one of its variants
/// for certain devices, such as `mlx5_vfio_pci`.
pub(crate) fn is_vfio_driver(name: &str) -> bool {
    name.replace('_', "-").ends_with("vfio-pci")
}

/// Why a function could not be opened. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such function.
    #[error("there is no PCI function {bdf} on this host ({path} is missing): `lspci -D` lists them", path = path.display())]
    NoSuchFunction {
        /// Which one.
        bdf: Bdf,
        /// Where it would be.
        path: PathBuf,
    },
    /// No IOMMU translates for it.
    #[error(
        "{bdf} is behind no IOMMU: enable it in the firmware's setup (VT-d, AMD-Vi) and on the \
         kernel's command line (intel_iommu=on; on AMD, remove amd_iommu=off and iommu=off)"
    )]
    NoIommu {
        /// Which function.
        bdf: Bdf,
    },
    /// It is in the hands of another driver, or of none.
    #[error("{}", not_bound(*bdf, driver.as_deref(), sys))]
    NotBound {
        /// Which function.
        bdf: Bdf,
        /// The driver that has it, if one does.
        driver: Option<String>,
        /// Where sysfs is.
        sys: PathBuf,
    },
    /// VFIO's module is not loaded.
    #[error("VFIO is not there ({path} cannot be opened): as root, modprobe vfio-pci", path = path.display())]
    VfioNotLoaded {
        /// VFIO's file.
        path: PathBuf,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The file of the function's group is missing, though a vfio driver has the function.
    #[error(
        "the group file {path} is missing: the kernel may lack CONFIG_VFIO_GROUP, or this \
         container or chroot does not show the host's /dev/vfio", path = path.display()
    )]
    NoGroupFile {
        /// The missing file.
        path: PathBuf,
    },
    /// A file must not be opened.
    #[error(
        "no permission to open {path}: run as root, or have root do: chown \"$USER\" {path}",
        path = path.display()
    )]
    Permission {
        /// Which file.
        path: PathBuf,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// Somebody has the group open.
    #[error(
        "{path} is used by another process, or opened by this one already (a group can be opened \
         once): as root, `fuser -v {path} /dev/vfio/devices/*` names the process; end it",
        path = path.display()
    )]
    InUse {
        /// The group's file.
        path: PathBuf,
    },
    /// Other devices of the group are in the hands of the host's drivers.
    #[error("{}", not_viable(group, members))]
    NotViable {
        /// The group.
        group: String,
        /// Its other devices, if they are known.
        members: Vec<GroupMember>,
    },
    /// The IOMMU does not remap interrupts, so a device could forge them.
    #[error(
        "{group}: the IOMMU does not remap interrupts, or remapping is off, so the device could \
         forge them: enable it (x2APIC and VT-d in the firmware, no intremap=off on the kernel's \
         command line). If the devices are trusted, as root: \
         echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    )]
    NoInterruptRemapping {
        /// The group.
        group: String,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The group cannot share this container.
    #[error(
        "{group} cannot join this container: its IOMMU differs, or mappings are in its reserved \
         ranges; it needs a container of its own"
    )]
    Incompatible {
        /// The group.
        group: String,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The group is in a container already.
    #[error("{group} is attached to a container already")]
    AlreadyAttached {
        /// The group.
        group: String,
    },
    /// The group is in no container.
    #[error("{group} is attached to no container: attach it instead of adopting it")]
    NotAttached {
        /// The group.
        group: String,
    },
    /// The file is no group.
    #[error("{group} is no group of VFIO's")]
    NotAGroup {
        /// Its name.
        group: String,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The kernel speaks another version of the API.
    #[error("the kernel has version {version} of VFIO's API; this program knows version 0")]
    ApiVersion {
        /// The kernel's version.
        version: i32,
    },
    /// The kernel has no type1 v2 IOMMU.
    #[error("VFIO has no type1 v2 IOMMU: as root, modprobe vfio_iommu_type1")]
    NoType1,
    /// The device could not be opened.
    #[error("{}", device_refused(name, group, source))]
    Device {
        /// The device's name.
        name: String,
        /// Its group.
        group: String,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The device was opened, but the kernel tells nothing usable of it.
    #[error("asking {name} what it is failed")]
    Info {
        /// The device's name.
        name: String,
        /// Why.
        #[source]
        source: InfoError,
    },
    /// Sysfs could not be read.
    #[error("reading {path} failed", path = path.display())]
    Sysfs {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("{step} failed")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// Its errno.
        #[source]
        source: io::Error,
    },
}

/// The exact commands that bind a function to vfio-pci.
fn not_bound(bdf: Bdf, driver: Option<&str>, sys: &Path) -> String {
    let pci = sys.join("bus/pci");
    let pci = pci.display();
    let (state, unbind) = match driver {
        Some(driver) => (
            format!("the driver {driver} has it"),
            format!("\n  echo {bdf} > {pci}/devices/{bdf}/driver/unbind"),
        ),
        None => ("no driver has it".to_owned(), String::new()),
    };
    format!(
        "{bdf} is not bound to vfio-pci: {state}. To bind it, as root:\
         \n  modprobe vfio-pci\
         \n  echo vfio-pci > {pci}/devices/{bdf}/driver_override\
         {unbind}\
         \n  echo {bdf} > {pci}/drivers_probe"
    )
}

fn not_viable(group: &str, members: &[GroupMember]) -> String {
    let names = |chosen: &mut dyn Iterator<Item = &GroupMember>| {
        chosen
            .map(GroupMember::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let blocking = names(&mut members.iter().filter(|member| member.is_in_the_way()));
    let all = names(&mut members.iter());
    let mut text = format!(
        "{group} is not viable: the host's drivers still have devices of it, and the IOMMU cannot \
         tell its devices apart."
    );
    if !all.is_empty() {
        text.push_str(&format!(" Its other devices: {all}."));
    }
    if blocking.is_empty() {
        text.push_str(" Unbind all of its devices from their drivers, or bind them to vfio-pci.");
    } else {
        text.push_str(&format!(
            " Unbind these from their drivers, or bind them to vfio-pci too: {blocking}."
        ));
    }
    text
}

fn device_refused(name: &str, group: &str, source: &io::Error) -> String {
    let hint = match source.raw_os_error() {
        Some(libc::ENODEV) => ": it is no device of that group, or its driver is letting go of it",
        Some(libc::EINVAL) => ": the group is attached to no container that has an IOMMU",
        Some(libc::EACCES) => {
            ": it is a virtual function whose physical one is in VFIO's hands too, and needs its \
             vf_token"
        }
        Some(libc::EBUSY) => ": it is in use",
        _ => "",
    };
    format!("opening {name} of {group} failed{hint}")
}

impl OpenError {
    /// Why `/dev/vfio/vfio` could not be opened.
    pub(crate) fn of_container_file(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            // The node may be there without the module, which is then loaded on demand, or not.
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::VfioNotLoaded { path, source },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { path, source },
            _ => Self::Kernel {
                step: "opening a container",
                source,
            },
        }
    }

    /// Why a group's file could not be opened.
    pub(crate) fn of_group_file(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoGroupFile { path },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { path, source },
            Some(libc::EBUSY) => Self::InUse { path },
            _ => Self::Kernel {
                step: "opening a group",
                source,
            },
        }
    }

    /// Why a group's status could not be had.
    pub(crate) fn of_group_status(group: &Group, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOTTY) => Self::NotAGroup {
                group: group.name().to_owned(),
                source,
            },
            _ => Self::Kernel {
                step: "asking for a group's status",
                source,
            },
        }
    }

    /// Why a group, which is viable and in no container, could not join one.
    pub(crate) fn of_attach(group: &Group, has_iommu: bool, source: io::Error) -> Self {
        let name = group.name().to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM) if has_iommu => Self::NoInterruptRemapping {
                group: name,
                source,
            },
            Some(libc::EINVAL) if has_iommu => Self::Incompatible {
                group: name,
                source,
            },
            _ => Self::Kernel {
                step: "attaching a group to a container",
                source,
            },
        }
    }

    /// Why the first group's IOMMU could not be had.
    pub(crate) fn of_set_iommu(group: &Group, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM) => Self::NoInterruptRemapping {
                group: group.name().to_owned(),
                source,
            },
            Some(libc::ENODEV) => Self::NoType1,
            _ => Self::Kernel {
                step: "setting a container's IOMMU to type1 v2",
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(raw: i32) -> io::Error {
        io::Error::from_raw_os_error(raw)
    }

    #[test]
    fn a_group_files_errnos() {
        let path = Path::new("/dev/vfio/12");
        let error = OpenError::of_group_file(path, errno(libc::EBUSY));
        assert!(matches!(error, OpenError::InUse { .. }));
        assert!(error.to_string().contains("another process"), "{error}");
        assert!(error.to_string().contains("fuser -v /dev/vfio/12"));
        let error = OpenError::of_group_file(path, errno(libc::EACCES));
        assert!(matches!(error, OpenError::Permission { .. }));
        assert!(error.to_string().contains("/dev/vfio/12"), "{error}");
        let error = OpenError::of_group_file(path, errno(libc::ENOENT));
        assert!(matches!(error, OpenError::NoGroupFile { .. }));
    }

    #[test]
    fn a_containers_errnos() {
        let path = Path::new("/dev/vfio/vfio");
        for raw in [libc::ENOENT, libc::ENODEV, libc::ENXIO] {
            let error = OpenError::of_container_file(path, errno(raw));
            assert!(matches!(error, OpenError::VfioNotLoaded { .. }));
        }
        let error = OpenError::of_container_file(path, errno(libc::EACCES));
        assert!(matches!(error, OpenError::Permission { .. }));
        let error = OpenError::of_container_file(path, errno(libc::EMFILE));
        assert!(matches!(error, OpenError::Kernel { .. }));
    }

    #[test]
    fn eperm_of_the_iommu_means_no_interrupt_remapping() {
        let group = Group::open(Path::new("/dev/null")).unwrap();
        for error in [
            OpenError::of_set_iommu(&group, errno(libc::EPERM)),
            OpenError::of_attach(&group, true, errno(libc::EPERM)),
        ] {
            assert!(matches!(error, OpenError::NoInterruptRemapping { .. }));
            let text = error.to_string();
            assert!(text.contains("allow_unsafe_interrupts"), "{text}");
        }
        assert!(matches!(
            OpenError::of_attach(&group, true, errno(libc::EINVAL)),
            OpenError::Incompatible { .. }
        ));
        assert!(matches!(
            OpenError::of_attach(&group, false, errno(libc::EINVAL)),
            OpenError::Kernel { .. }
        ));
        assert!(matches!(
            OpenError::of_set_iommu(&group, errno(libc::ENODEV)),
            OpenError::NoType1
        ));
    }

    #[test]
    fn a_group_that_is_not_viable_names_who_is_in_the_way() {
        let member = |name: &str, driver: Option<&str>| GroupMember {
            name: name.to_owned(),
            driver: driver.map(str::to_owned),
        };
        let error = OpenError::NotViable {
            group: "/dev/vfio/3".to_owned(),
            members: vec![
                member("0000:01:00.1", Some("snd_hda_intel")),
                member("0000:00:01.0", Some("pcieport")),
                member("0000:01:00.2", None),
                member("0000:01:00.3", Some("mlx5_vfio_pci")),
            ],
        };
        let text = error.to_string();
        let (all, blocking) = text.split_once("Unbind these").unwrap();
        for name in ["01:00.1", "00:01.0", "01:00.2", "01:00.3"] {
            assert!(all.contains(name), "{text}");
        }
        assert!(blocking.contains("0000:01:00.1 (driver snd_hda_intel)"));
        assert!(!blocking.contains("pcieport") && !blocking.contains("01:00.2"));
    }
}
