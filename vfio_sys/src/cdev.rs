//! A device's own character device, by which it is bound to an iommufd.
//!
//! ```text
//! Sysfs ──finds──▶ Cdev ──bind──▶ Device ──attach──▶ Ioas
//! ```
//!
//! Between opening and binding there is room for what must come before a device is used: telling
//! KVM of it (kvm-vfio, `KVM_DEV_VFIO_FILE_ADD`). A bound [`Device`] holds its iommufd, and an
//! attached one its address space, from which it detaches before it lets go of it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::attachment::Binding;
use crate::{
    Bdf, CdevError, Device, Iommufd, IommufdError, KernelVersion, OpenError, Sysfs, device_ioctls,
};

/// A device's file, such as `/dev/vfio/devices/vfio0`, open and not bound yet (Linux 6.6).
#[derive(Debug)]
pub struct Cdev {
    file: File,
    name: String,
    group: Option<u32>,
}

impl Cdev {
    /// Opens it by its path. `name` is for messages: the device's BDF.
    ///
    /// # Errors
    /// [`CdevError::NoFile`], [`CdevError::Permission`], or the kernel's refusal.
    pub fn open(path: &Path, name: impl Into<String>) -> Result<Self, CdevError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| CdevError::of_file(path, source))?;
        Ok(Self::from_fd(file.into(), name))
    }

    /// Takes over one that someone else opened, and nobody has bound. Say in which
    /// [group](Self::in_group) it is if you know.
    #[must_use]
    pub fn from_fd(fd: OwnedFd, name: impl Into<String>) -> Self {
        Self {
            file: fd.into(),
            name: name.into(),
            group: None,
        }
    }

    /// Says that its device is in the IOMMU group of that number, as sysfs numbers them.
    /// [`Sysfs::open_cdev`] has said so already. Only what is known to be in one group is moved
    /// from one address space to another [in one step](Device::attach).
    #[must_use]
    pub const fn in_group(mut self, number: u32) -> Self {
        self.group = Some(number);
        self
    }

    /// Binds it to an iommufd (`VFIO_DEVICE_BIND_IOMMUFD`): from then on it is open, and its
    /// group belongs to that iommufd. It reaches nothing by DMA until it is attached.
    ///
    /// # Errors
    /// [`CdevError::Bind`]; [`CdevError::Info`] where the kernel then tells nothing of it.
    pub fn bind(self, iommufd: Arc<Iommufd>) -> Result<Device, CdevError> {
        let Self { file, name, group } = self;
        let id = match device_ioctls::bind_iommufd(file.as_fd(), iommufd.as_fd()) {
            Ok(id) => id,
            Err(source) => return Err(CdevError::Bind { name, source }),
        };
        let file = Arc::new(file);
        let binding = Binding::new(Arc::clone(&file), name, iommufd, id, group);
        Device::bound(file, binding)
    }
}

impl AsFd for Cdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Sysfs {
    /// iommufd's file.
    #[must_use]
    pub fn iommufd_path(&self) -> PathBuf {
        self.dev().join("iommu")
    }

    /// Opens a fresh iommufd.
    ///
    /// # Errors
    /// As for [`Iommufd::open`].
    pub fn open_iommufd(&self) -> Result<Iommufd, IommufdError> {
        Iommufd::open(&self.iommufd_path())
    }

    /// The file of a function's character device.
    ///
    /// # Errors
    /// [`CdevError`], in this order: there is no such function, no IOMMU, VFIO does not have it,
    /// it has no character device.
    pub fn cdev_path(&self, bdf: Bdf) -> Result<PathBuf, CdevError> {
        self.check_bound(bdf)?;
        let directory = self.function_path(bdf).join("vfio-dev");
        let none = || CdevError::NoCdev {
            bdf,
            found: KernelVersion::running(),
        };
        let unreadable = |source| {
            CdevError::Open(OpenError::Sysfs {
                path: directory.clone(),
                source,
            })
        };
        let mut entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(none()),
            Err(source) => return Err(unreadable(source)),
        };
        let entry = entries.next().ok_or_else(none)?.map_err(unreadable)?;
        // The directory is there without CONFIG_VFIO_DEVICE_CDEV; the device number is not.
        match entry.path().join("dev").try_exists() {
            Ok(true) => Ok(self.dev().join("vfio/devices").join(entry.file_name())),
            Ok(false) => Err(none()),
            Err(source) => Err(unreadable(source)),
        }
    }

    /// Opens a function's character device.
    ///
    /// # Errors
    /// As for [`cdev_path`](Self::cdev_path) and [`Cdev::open`].
    pub fn open_cdev(&self, bdf: Bdf) -> Result<Cdev, CdevError> {
        let cdev = Cdev::open(&self.cdev_path(bdf)?, bdf.to_string())?;
        let group = self.function(bdf)?.group;
        Ok(Cdev { group, ..cdev })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_and_one_that_is_no_device_are_told_apart() {
        let error = Cdev::open(Path::new("/nowhere/vfio0"), "0000:00:05.0").unwrap_err();
        assert!(matches!(error, CdevError::NoFile { .. }), "{error:?}");
        let cdev = Cdev::open(Path::new("/dev/null"), "0000:00:05.0").unwrap();
        let error = device_ioctls::bind_iommufd(cdev.as_fd(), cdev.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
