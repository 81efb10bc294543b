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

use parking_lot::Mutex;

use crate::{
    Bdf, CdevError, Device, Ioas, Iommufd, IommufdError, KernelVersion, OpenError, Sysfs,
    device_ioctls,
};

/// A device's file, such as `/dev/vfio/devices/vfio0`, open and not bound yet (Linux 6.6).
#[derive(Debug)]
pub struct Cdev {
    file: File,
    name: String,
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

    /// Takes over one that someone else opened, and nobody has bound.
    #[must_use]
    pub fn from_fd(fd: OwnedFd, name: impl Into<String>) -> Self {
        Self {
            file: fd.into(),
            name: name.into(),
        }
    }

    /// Binds it to an iommufd (`VFIO_DEVICE_BIND_IOMMUFD`): from then on it is open, and its
    /// group belongs to that iommufd. It reaches nothing by DMA until it is attached.
    ///
    /// # Errors
    /// [`CdevError::Bind`]; [`CdevError::Info`] where the kernel then tells nothing of it.
    pub fn bind(self, iommufd: Arc<Iommufd>) -> Result<Device, CdevError> {
        let Self { file, name } = self;
        let id = match device_ioctls::bind_iommufd(file.as_fd(), iommufd.as_fd()) {
            Ok(id) => id,
            Err(source) => return Err(CdevError::Bind { name, source }),
        };
        let file = Arc::new(file);
        let binding = Binding {
            file: Arc::clone(&file),
            name,
            iommufd,
            id,
            attached: Mutex::new(None),
        };
        Device::bound(file, binding)
    }
}

impl AsFd for Cdev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What a device that is bound to an iommufd holds of it.
#[derive(Debug)]
pub(crate) struct Binding {
    /// The device's own file.
    file: Arc<File>,
    pub(crate) name: String,
    iommufd: Arc<Iommufd>,
    id: u32,
    attached: Mutex<Option<Arc<Ioas>>>,
}

impl Drop for Binding {
    fn drop(&mut self) {
        // The device's file may stay open for its mappings, and with it the attachment, which
        // would keep the address space. Nothing better can be done should this fail: the kernel
        // detaches it when the file is closed.
        if self.attached.get_mut().is_some() {
            let _ = device_ioctls::detach_iommufd_pt(self.file.as_fd());
        }
    }
}

impl Device {
    /// The iommufd that it is bound to; none for a device that was opened by its group.
    #[must_use]
    pub fn iommufd(&self) -> Option<&Arc<Iommufd>> {
        self.binding().map(|binding| &binding.iommufd)
    }

    /// Its id in that iommufd.
    #[must_use]
    pub fn iommufd_device_id(&self) -> Option<u32> {
        self.binding().map(|binding| binding.id)
    }

    /// The address space that it is attached to, if it is.
    #[must_use]
    pub fn ioas(&self) -> Option<Arc<Ioas>> {
        self.binding()?.attached.lock().clone()
    }

    /// Attaches it to an address space of its iommufd, whose mappings it then reaches
    /// (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`). What the address space allows may shrink: ask for its
    /// [`ranges`](Ioas::ranges) again.
    ///
    /// If it is attached to another one, it is detached from that first. The kernel would replace
    /// the one by the other in one step, but for all devices of the IOMMU group, whose own handles
    /// would not know of it.
    ///
    /// # Errors
    /// [`CdevError::Attach`]: `EADDRINUSE` where something is mapped, or promised to be allowed,
    /// where the device reserves addresses; `EINVAL` where another device of its group is
    /// attached to another address space; `ENOMEM` where what is mapped cannot be pinned.
    /// [`CdevError::OtherIommufd`]. It is attached to nothing else then.
    pub fn attach(&self, ioas: Arc<Ioas>) -> Result<(), CdevError> {
        let Some(binding) = self
            .binding()
            .filter(|binding| Arc::ptr_eq(&binding.iommufd, ioas.iommufd()))
        else {
            let name = self.binding().map(|binding| binding.name.clone());
            return Err(CdevError::OtherIommufd {
                name: name.unwrap_or_else(|| "the device".to_owned()),
            });
        };
        let mut attached = binding.attached.lock();
        let refused = |source| CdevError::Attach {
            name: binding.name.clone(),
            source,
        };
        match &*attached {
            Some(now) if Arc::ptr_eq(now, &ioas) => return Ok(()),
            Some(_) => {
                device_ioctls::detach_iommufd_pt(self.as_fd()).map_err(refused)?;
                *attached = None;
            }
            None => {}
        }
        device_ioctls::attach_iommufd_pt(self.as_fd(), ioas.id().raw()).map_err(refused)?;
        *attached = Some(ioas);
        Ok(())
    }

    /// Detaches it: it reaches nothing by DMA any more (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    /// Detaching what is not attached does nothing.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn detach(&self) -> io::Result<()> {
        let Some(binding) = self.binding() else {
            return Ok(());
        };
        let mut attached = binding.attached.lock();
        if attached.is_some() {
            device_ioctls::detach_iommufd_pt(self.as_fd())?;
            *attached = None;
        }
        Ok(())
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
        Cdev::open(&self.cdev_path(bdf)?, bdf.to_string())
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
