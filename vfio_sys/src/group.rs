//! An IOMMU group: the devices that the IOMMU cannot tell apart.
//!
//! A group's file can be opened only once at a time, so whoever opens it shares the [`Group`]:
//! the container it is attached to keeps it, and so does the caller, who may also tell KVM of it
//! before any device of it is opened (kvm-vfio, `KVM_DEV_VFIO_FILE_ADD`).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE, vfio_group_status,
};

use crate::{Device, OpenError, ioctls};

/// What state a group is in (`VFIO_GROUP_GET_STATUS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupStatus {
    flags: u32,
}

impl GroupStatus {
    /// The flags as the kernel gave them (`VFIO_GROUP_FLAGS_*`).
    #[must_use]
    pub const fn flags(self) -> u32 {
        self.flags
    }

    /// Whether all of its devices are out of the hands of the host's drivers.
    #[must_use]
    pub const fn viable(self) -> bool {
        self.flags & VFIO_GROUP_FLAGS_VIABLE != 0
    }

    /// Whether it is attached to a container.
    #[must_use]
    pub const fn attached(self) -> bool {
        self.flags & VFIO_GROUP_FLAGS_CONTAINER_SET != 0
    }
}

/// An open group (Linux 3.6, `linux/vfio.h`).
#[derive(Debug)]
pub struct Group {
    file: File,
    name: String,
}

impl Group {
    /// Opens the group's file, such as `/dev/vfio/12`.
    ///
    /// # Errors
    /// [`OpenError::Permission`], [`OpenError::InUse`], [`OpenError::NoGroupFile`] or
    /// [`OpenError::Kernel`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| OpenError::of_group_file(path, source))?;
        Ok(Self {
            file,
            name: path.display().to_string(),
        })
    }

    /// Takes over a group that someone else opened. `name` is for messages.
    #[must_use]
    pub fn from_fd(fd: OwnedFd, name: impl Into<String>) -> Self {
        Self {
            file: fd.into(),
            name: name.into(),
        }
    }

    /// Its path, or what it was named when it was handed in.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What state it is in.
    ///
    /// # Errors
    /// `ENOTTY` where the file is no group; else the kernel's errno.
    pub fn status(&self) -> io::Result<GroupStatus> {
        let mut status = vfio_group_status::default();
        ioctls::group_get_status(self.as_fd(), &mut status)?;
        Ok(GroupStatus {
            flags: status.flags,
        })
    }

    /// Opens a device of it, by the name that sysfs has for it: the BDF, for a PCI function. (For
    /// a virtual function whose physical one is in VFIO's hands too, the name is followed by
    /// ` vf_token=` and the token that its owner set.) The group must be attached to a container
    /// that has an IOMMU.
    ///
    /// # Errors
    /// [`OpenError::Device`]; [`OpenError::Info`] where the kernel then tells nothing of it.
    pub fn open_device(&self, name: &str) -> Result<Device, OpenError> {
        let refused = |source| OpenError::Device {
            name: name.to_owned(),
            group: self.name.clone(),
            source,
        };
        let c_name =
            CString::new(name).map_err(|_| refused(io::Error::from_raw_os_error(libc::EINVAL)))?;
        let fd = ioctls::group_get_device_fd(self.as_fd(), &c_name).map_err(refused)?;
        Device::from_fd(fd).map_err(|source| OpenError::Info {
            name: name.to_owned(),
            source,
        })
    }

    pub(crate) fn set_container(&self, container: BorrowedFd<'_>) -> io::Result<()> {
        ioctls::group_set_container(self.as_fd(), container)
    }

    pub(crate) fn unset_container(&self) -> io::Result<()> {
        ioctls::group_unset_container(self.as_fd())
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Group> for OwnedFd {
    fn from(group: Group) -> Self {
        group.file.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_group_is_enotty() {
        let group = Group::open(Path::new("/dev/null")).unwrap();
        let error = group.status().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        let error = group.open_device("0000:00:05.0").unwrap_err();
        assert!(matches!(error, OpenError::Device { .. }), "{error:?}");
        assert!(error.to_string().contains("0000:00:05.0"), "{error}");
        let error = group.open_device("nul\0").unwrap_err();
        assert!(matches!(error, OpenError::Device { .. }), "{error:?}");
    }
}
