//! An open iommufd: what devices are bound to and address spaces are made in.
//!
//! The embedder opens one and shares it. Whatever is made of it ([`Ioas`](crate::Ioas), a bound
//! [`Device`](crate::Device)) holds it, so it is closed last. The kernel, too, keeps its context
//! until the last bound device's file is closed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use iommufd_bindings::iommufd::{
    iommufd_option_IOMMU_OPTION_RLIMIT_MODE, iommufd_option_ops_IOMMU_OPTION_OP_GET,
};

use parking_lot::Mutex;

use crate::attachment::GroupAttachment;
use crate::{IommufdError, KernelVersion, iommufd_ioctls};

/// Names an open iommufd in this process. Never used again.
///
/// Two of them may stand for one kernel object, if the same file was handed in twice: then
/// nothing is shared between them that could be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IommufdId(u64);

impl IommufdId {
    /// A fresh one, for whoever plays an iommufd.
    #[must_use]
    pub fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An open `/dev/iommu` (Linux 6.2, `linux/iommufd.h`).
#[derive(Debug)]
pub struct Iommufd {
    file: File,
    id: IommufdId,
    /// What the devices of each IOMMU group are attached to, as long as one of them is bound.
    groups: Mutex<BTreeMap<u32, Weak<GroupAttachment>>>,
}

pub(crate) const OP_GET: u16 = {
    assert!(iommufd_option_ops_IOMMU_OPTION_OP_GET == 1);
    1
};

impl Iommufd {
    /// Opens a fresh one by the path of iommufd's file: `/dev/iommu`.
    ///
    /// # Errors
    /// [`IommufdError`]: the file is missing, must not be opened, or is something else.
    pub fn open(path: &Path) -> Result<Self, IommufdError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| IommufdError::of_file(path, source))?;
        Self::from_fd(file.into())
    }

    /// Takes over one that someone else opened.
    ///
    /// # Errors
    /// [`IommufdError::NotIommufd`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, IommufdError> {
        // Any of its requests that changes nothing would do.
        let option = iommufd_option_IOMMU_OPTION_RLIMIT_MODE;
        iommufd_ioctls::option(fd.as_fd(), option, OP_GET, 0, 0)
            .map_err(|source| IommufdError::NotIommufd { source })?;
        Ok(Self {
            file: fd.into(),
            id: IommufdId::fresh(),
            groups: Mutex::default(),
        })
    }

    /// What the devices of an IOMMU group share; of one whose number is not known, what nobody
    /// else has.
    pub(crate) fn group(&self, number: Option<u32>) -> Arc<GroupAttachment> {
        let Some(number) = number else {
            return GroupAttachment::of_one();
        };
        let mut groups = self.groups.lock();
        groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = groups.get(&number).and_then(Weak::upgrade) {
            return group;
        }
        let group = GroupAttachment::of_all();
        groups.insert(number, Arc::downgrade(&group));
        group
    }

    /// Its name in this process.
    #[must_use]
    pub const fn id(&self) -> IommufdId {
        self.id
    }

    /// Insists that files can be mapped (`IOMMU_IOAS_MAP_FILE`, Linux 6.13).
    ///
    /// # Errors
    /// [`IommufdError::TooOld`]; [`IommufdError::Kernel`] where that cannot be told.
    pub fn check_map_file(&self) -> Result<(), IommufdError> {
        match iommufd_ioctls::has_ioas_map_file(self.as_fd()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(IommufdError::TooOld {
                feature: "mapping files for DMA (IOMMU_IOAS_MAP_FILE)",
                found: KernelVersion::running(),
                needed: KernelVersion::new(6, 13),
            }),
            Err(source) => Err(IommufdError::Kernel {
                step: "asking for IOMMU_IOAS_MAP_FILE",
                source,
            }),
        }
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_iommufd_is_refused() {
        let error = Iommufd::open(Path::new("/dev/null")).unwrap_err();
        let IommufdError::NotIommufd { source } = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn devices_of_one_group_share_what_they_are_attached_to() {
        let iommufd = Iommufd {
            file: File::open("/dev/null").unwrap(),
            id: IommufdId::fresh(),
            groups: Mutex::default(),
        };
        let (one, two) = (iommufd.group(Some(7)), iommufd.group(Some(7)));
        assert!(Arc::ptr_eq(&one, &two));
        assert!(!Arc::ptr_eq(&one, &iommufd.group(Some(8))));
        assert!(!Arc::ptr_eq(&iommufd.group(None), &iommufd.group(None)));
        drop((one, two));
        assert_eq!(iommufd.group(Some(9)).members(), [""; 0]);
        assert_eq!(iommufd.groups.lock().len(), 1, "only the last one is kept");
    }

    #[test]
    fn a_missing_file_says_so() {
        let error = Iommufd::open(Path::new("/nowhere/iommu")).unwrap_err();
        assert!(matches!(error, IommufdError::Missing { .. }), "{error:?}");
        assert!(error.to_string().contains("/nowhere/iommu"), "{error}");
    }
}
