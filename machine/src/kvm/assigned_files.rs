//! KVM's own knowledge of assigned devices (`KVM_DEV_TYPE_VFIO`).
//!
//! KVM is told of every group's or device's file before the device is opened through it: drivers
//! in the kernel may want to know whose it is, and KVM whether its DMA is coherent.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use super::KvmError;
use super::vm::io_error;

/// Where files of assigned devices are announced. It has to live as long as they are used: KVM
/// forgets them when it is dropped. Until then, or until it is told to forget one, KVM keeps them open:
/// a host that wants a device back waits for that.
#[derive(Debug)]
pub struct AssignedFiles {
    device: DeviceFd,
    announced: Mutex<Announced>,
}

/// One of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AssignedFile(u64);

/// What was announced, each as a file descriptor of our own.
#[derive(Debug, Default)]
struct Announced {
    files: BTreeMap<u64, OwnedFd>,
    next: u64,
}

impl AssignedFiles {
    pub(crate) fn new(vm: &VmFd) -> Result<Self, KvmError> {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let device = vm
            .create_device(&mut device)
            .map_err(|error| KvmError::new("telling KVM of assigned devices", error))?;
        Ok(Self {
            device,
            announced: Mutex::default(),
        })
    }

    /// Announces a file: an open `/dev/vfio/<group>`, before a device is opened through it, or an
    /// open `/dev/vfio/devices/vfioN`, before it is bound (`KVM_DEV_VFIO_FILE_ADD`; as
    /// `KVM_DEV_VFIO_GROUP_ADD`, with the same numbers, since Linux 3.13; for cdevs, 6.6).
    ///
    /// # Errors
    /// `EEXIST` for a file that was announced already, `EINVAL` for one that is not VFIO's; the
    /// kernel's errno otherwise.
    pub fn add(&self, file: BorrowedFd<'_>) -> io::Result<AssignedFile> {
        let file = file.try_clone_to_owned()?;
        self.set(KVM_DEV_VFIO_FILE_ADD, file.as_fd())?;
        let mut announced = self.announced();
        let number = announced.next;
        announced.next = number.saturating_add(1);
        announced.files.insert(number, file);
        Ok(AssignedFile(number))
    }

    /// Has KVM forget a file (`KVM_DEV_VFIO_FILE_DEL`), so that it ends with its other owners. For a
    /// device that is not used any more. A second call does nothing.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn forget(&self, file: AssignedFile) -> io::Result<()> {
        let AssignedFile(number) = file;
        let mut announced = self.announced();
        if let Some(file) = announced.files.get(&number) {
            self.set(KVM_DEV_VFIO_FILE_DEL, file.as_fd())?;
            announced.files.remove(&number);
        }
        Ok(())
    }

    /// Has KVM forget all files, so that they end with their other owners. For devices that are
    /// not to be used after all, and are not used any more.
    ///
    /// # Errors
    /// The kernel's errno. What was forgotten until then is.
    pub fn forget_all(&self) -> io::Result<()> {
        let mut announced = self.announced();
        while let Some((number, file)) = announced.files.pop_last() {
            if let Err(error) = self.set(KVM_DEV_VFIO_FILE_DEL, file.as_fd()) {
                announced.files.insert(number, file);
                return Err(error);
            }
        }
        Ok(())
    }

    fn announced(&self) -> MutexGuard<'_, Announced> {
        // Each change is one of a single entry.
        self.announced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, what: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let fd = file.as_raw_fd();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: what.into(),
            addr: std::ptr::from_ref(&fd).addr() as u64,
            flags: 0,
        };
        self.device.set_device_attr(&attribute).map_err(io_error)
    }
}
