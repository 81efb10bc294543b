//! Why iommufd cannot be had, with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::kernel_version::missing;
use crate::{Bdf, InfoError, KernelVersion, OpenError};

/// Why there is no iommufd, or not all of it. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IommufdError {
    /// The kernel has none, or its module is not loaded.
    #[error(
        "iommufd is not there ({path} cannot be opened): as root, modprobe iommufd; the kernel \
         needs CONFIG_IOMMUFD (Linux 6.2 or newer), which not every distribution's has",
        path = path.display()
    )]
    Missing {
        /// iommufd's file.
        path: PathBuf,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// Its file must not be opened.
    #[error(
        "no permission to open {path} for reading and writing: run as root, or have root do: \
         chown \"$USER\" {path}",
        path = path.display()
    )]
    Permission {
        /// iommufd's file.
        path: PathBuf,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The file that was handed in is something else.
    #[error("the file that was handed in is no iommufd")]
    NotIommufd {
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The kernel does not have a feature.
    #[error("{}", missing(feature, *found, *needed, "CONFIG_IOMMUFD"))]
    TooOld {
        /// Which one.
        feature: &'static str,
        /// The running kernel, if that can be told.
        found: Option<KernelVersion>,
        /// The first kernel that has it.
        needed: KernelVersion,
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

impl IommufdError {
    /// Why `/dev/iommu` could not be opened.
    pub(crate) fn of_file(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            // The node may be there without the module, which is then loaded on demand, or not.
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::Missing { path, source },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { path, source },
            _ => Self::Kernel {
                step: "opening an iommufd",
                source,
            },
        }
    }
}

/// Why a function cannot be used through its character device. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CdevError {
    /// There is something wrong with it whichever way it is opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// VFIO has it, but made no character device for it.
    #[error(
        "{bdf} has no character device of VFIO's: {}",
        missing(
            "VFIO character devices",
            *found,
            KernelVersion::new(6, 6),
            "CONFIG_VFIO_DEVICE_CDEV"
        )
    )]
    NoCdev {
        /// Which function.
        bdf: Bdf,
        /// The running kernel, if that can be told.
        found: Option<KernelVersion>,
    },
    /// The character device's file is missing.
    #[error(
        "the device file {path} is missing: this container or chroot may not show the host's \
         /dev/vfio/devices, or the device was just removed", path = path.display()
    )]
    NoFile {
        /// The missing file.
        path: PathBuf,
    },
    /// The character device's file must not be opened.
    #[error(
        "no permission to open {path} for reading and writing: run as root, or have root do: \
         chown \"$USER\" {path}",
        path = path.display()
    )]
    Permission {
        /// Which file.
        path: PathBuf,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// It could not be bound to the iommufd.
    #[error("binding {name} to the iommufd failed{}", bind_hint(source))]
    Bind {
        /// The device's name.
        name: String,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// It could not be attached to an address space.
    #[error("attaching {name} to its address space failed{}", attach_hint(source))]
    Attach {
        /// The device's name.
        name: String,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// Others of its IOMMU group are attached to the address space that it is to leave, and the
    /// kernel would move them along. Nothing has changed.
    #[error(
        "{name} is in one IOMMU group with {}, which would move along to the other address space: \
         move all of them at once (attach_group), or detach them first",
        others.join(", ")
    )]
    GroupWouldMove {
        /// The device's name.
        name: String,
        /// The names of those that would move along, sorted.
        others: Vec<String>,
    },
    /// The address space is another iommufd's, or the device is bound to none.
    #[error("{name} is not bound to the iommufd that the address space belongs to")]
    OtherIommufd {
        /// The device's name.
        name: String,
    },
    /// It is bound, but the kernel tells nothing usable of it.
    #[error("asking {name} what it is failed")]
    Info {
        /// The device's name.
        name: String,
        /// Why.
        #[source]
        source: InfoError,
    },
}

fn bind_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EBUSY) => {
            ": another process has it or another device of its group (`fuser -v \
             /dev/vfio/devices/* /dev/vfio/[0-9]*` names it), or a driver of the host has a device \
             of its group"
        }
        Some(libc::EINVAL) => {
            ": its group is open by the group's file, or the device is bound already, or its IOMMU \
             does not keep DMA coherent"
        }
        Some(libc::EPERM) => {
            ": the IOMMU does not remap interrupts, or remapping is off, so the device could forge \
             them: enable it (x2APIC and VT-d in the firmware, no intremap=off on the kernel's \
             command line). If the device is trusted, as root: \
             echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts"
        }
        Some(libc::EACCES) => {
            ": it is a virtual function whose physical one is in VFIO's hands too, and needs its \
             vf_token"
        }
        Some(libc::ENOTTY) => ": the file is no character device of VFIO's (Linux 6.6)",
        _ => "",
    }
}

fn attach_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            ": something is mapped, or was promised to be allowed, where the device's IOMMU \
             reserves addresses or does not reach; it needs an address space of its own"
        }
        Some(libc::EINVAL) => {
            ": another device of its IOMMU group is attached to another address space (all of a \
             group share one), or something that is mapped cannot be pinned"
        }
        Some(libc::ENOMEM) => ": what is mapped is more than may be locked (RLIMIT_MEMLOCK)",
        _ => "",
    }
}

impl CdevError {
    /// Why a character device's file could not be opened.
    pub(crate) fn of_file(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoFile { path },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { path, source },
            _ => Self::Open(OpenError::Kernel {
                step: "opening a device's file",
                source,
            }),
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
    fn a_missing_iommufd_says_what_to_load_and_a_forbidden_one_who_to_ask() {
        let path = Path::new("/dev/iommu");
        for raw in [libc::ENOENT, libc::ENODEV, libc::ENXIO] {
            let error = IommufdError::of_file(path, errno(raw));
            assert!(matches!(error, IommufdError::Missing { .. }));
            let text = error.to_string();
            assert!(text.contains("modprobe iommufd"), "{text}");
            assert!(text.contains("CONFIG_IOMMUFD"), "{text}");
        }
        for raw in [libc::EACCES, libc::EPERM] {
            let error = IommufdError::of_file(path, errno(raw));
            assert!(matches!(error, IommufdError::Permission { .. }));
            let text = error.to_string();
            assert!(text.contains("reading and writing"), "{text}");
            assert!(text.contains("chown \"$USER\" /dev/iommu"), "{text}");
        }
        let error = IommufdError::of_file(path, errno(libc::EMFILE));
        assert!(matches!(error, IommufdError::Kernel { .. }));
    }

    #[test]
    fn an_old_kernel_is_named_with_the_one_that_is_needed() {
        let error = IommufdError::TooOld {
            feature: "IOMMU_IOAS_MAP_FILE",
            found: Some(KernelVersion::new(6, 12)),
            needed: KernelVersion::new(6, 13),
        };
        let text = error.to_string();
        for part in ["IOMMU_IOAS_MAP_FILE", "6.12", "6.13"] {
            assert!(text.contains(part), "{text}");
        }
        let error = CdevError::NoCdev {
            bdf: "00:05.0".parse().unwrap(),
            found: Some(KernelVersion::new(6, 12)),
        };
        let text = error.to_string();
        assert!(text.contains("CONFIG_VFIO_DEVICE_CDEV"), "{text}");
    }

    #[test]
    fn refusals_to_bind_and_attach_say_what_is_in_the_way() {
        let bind = |raw| CdevError::Bind {
            name: "0000:00:05.0".to_owned(),
            source: errno(raw),
        };
        assert!(bind(libc::EBUSY).to_string().contains("another process"));
        let text = bind(libc::EPERM).to_string();
        assert!(text.contains("iommufd/parameters/allow_unsafe"), "{text}");
        let attach = |raw| CdevError::Attach {
            name: "0000:00:05.0".to_owned(),
            source: errno(raw),
        };
        assert!(attach(libc::EADDRINUSE).to_string().contains("reserves"));
        assert!(attach(libc::EINVAL).to_string().contains("group"));
        assert!(attach(libc::ENODEV).to_string().ends_with("failed"));
    }
}
