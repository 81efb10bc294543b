//! A container: one IOMMU address space that several groups share.
//!
//! ```text
//! Container ──holds──▶ Group (one or more) ──opens──▶ Device ──▶ Region ──▶ Mapping
//!     │
//!     └─ type1 v2 IOMMU: there from the first group on, empty when the last is closed
//! ```
//!
//! The embedder makes it and shares it: a DMA target maps through it while the embedder may still
//! attach groups. The kernel's container ends, with all its mappings, when the container's file
//! and all its groups' files are closed; a [`Container`] holds both.
#![expect(
    unsafe_code,
    reason = "mapping memory for DMA is unsafe by nature; see Container::map_dma"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use memory_map::{Access, HostVa, IovaRange};
use parking_lot::Mutex;
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_TYPE1v2_IOMMU,
};

use crate::info_chain::{InfoBuffer, InfoError};
use crate::{Group, OpenError, Type1Info, ioctls, type1_info};

/// A type1 v2 container (Linux 3.15, `linux/vfio.h`).
#[derive(Debug)]
pub struct Container {
    state: Mutex<State>,
    file: File,
}

#[derive(Debug)]
struct State {
    /// Whether the container has its IOMMU, which comes with the first group.
    iommu_set: bool,
    groups: Vec<Arc<Group>>,
}

impl Container {
    /// Opens a fresh container, by the path of VFIO's file: `/dev/vfio/vfio`.
    ///
    /// # Errors
    /// [`OpenError`]: the file is missing or must not be opened; the kernel has another API, or
    /// no type1 v2.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| OpenError::of_container_file(path, source))?;
        Self::from_fd(file.into())
    }

    /// Takes over a container that someone else opened. If groups have been attached to it, it
    /// must be of type1 v2, and they should be handed in too: see [`adopt`](Self::adopt).
    ///
    /// # Errors
    /// [`OpenError`]: the file is no container; the kernel has another API, or no type1 v2.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        let kernel = |step| move |source| OpenError::Kernel { step, source };
        let version = ioctls::get_api_version(fd.as_fd())
            .map_err(kernel("asking for the version of VFIO's API"))?;
        if i64::from(version) != i64::from(VFIO_API_VERSION) {
            return Err(OpenError::ApiVersion { version });
        }
        let type1_v2 = ioctls::check_extension(fd.as_fd(), VFIO_TYPE1v2_IOMMU)
            .map_err(kernel("asking for type1 v2"))?;
        if !type1_v2 {
            return Err(OpenError::NoType1);
        }
        let container = Self {
            state: Mutex::new(State {
                iommu_set: false,
                groups: Vec::new(),
            }),
            file: fd.into(),
        };
        // Without an IOMMU it has nothing to tell.
        container.state.lock().iommu_set = container.info().is_ok();
        Ok(container)
    }

    /// Attaches a group and keeps it. The first one brings the IOMMU; of later ones, the IOMMU
    /// must be compatible. The allowed ranges may shrink: ask for [`info`](Self::info) again.
    ///
    /// # Errors
    /// [`OpenError::Incompatible`] where the group needs a container of its own;
    /// [`OpenError::NoInterruptRemapping`]; [`OpenError::AlreadyAttached`];
    /// [`OpenError::NotViable`], here without the names of the devices that are in the way;
    /// [`OpenError::Kernel`]. The group is not attached then.
    pub fn attach(&self, group: Arc<Group>) -> Result<(), OpenError> {
        let mut state = self.state.lock();
        let status = group
            .status()
            .map_err(|source| OpenError::of_group_status(&group, source))?;
        if status.attached() {
            return Err(OpenError::AlreadyAttached {
                group: group.name().to_owned(),
            });
        }
        if !status.viable() {
            return Err(OpenError::NotViable {
                group: group.name().to_owned(),
                members: Vec::new(),
            });
        }
        group
            .set_container(self.as_fd())
            .map_err(|source| OpenError::of_attach(&group, state.iommu_set, source))?;
        if !state.iommu_set {
            if let Err(source) = ioctls::set_iommu(self.as_fd(), VFIO_TYPE1v2_IOMMU) {
                // As it was. If this fails too, the group leaves the container when it is
                // closed; it is not kept here.
                let _ = group.unset_container();
                return Err(OpenError::of_set_iommu(&group, source));
            }
            state.iommu_set = true;
        }
        state.groups.push(group);
        Ok(())
    }

    /// Keeps a group that was attached to this container before both were handed in.
    ///
    /// # Errors
    /// [`OpenError::NotAttached`] where the group is not attached to any container.
    pub fn adopt(&self, group: Arc<Group>) -> Result<(), OpenError> {
        let mut state = self.state.lock();
        let status = group
            .status()
            .map_err(|source| OpenError::of_group_status(&group, source))?;
        if !status.attached() {
            return Err(OpenError::NotAttached {
                group: group.name().to_owned(),
            });
        }
        state.iommu_set = true;
        state.groups.push(group);
        Ok(())
    }

    /// The groups it holds, in the order they came.
    #[must_use]
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.state.lock().groups.clone()
    }

    /// Page sizes, allowed ranges and entries left (`VFIO_IOMMU_GET_INFO`).
    ///
    /// # Errors
    /// [`InfoError`]: `EINVAL` before the first group is attached; a malformed answer.
    pub fn info(&self) -> Result<Type1Info, InfoError> {
        let buffer = InfoBuffer::fetch(type1_info::LAYOUT, None, |info| {
            ioctls::iommu_get_info(self.as_fd(), info)
        })?;
        Ok(Type1Info::parse(&buffer)?)
    }

    /// Maps the memory at `vaddr` for DMA at `iova`, as many bytes as `iova` has
    /// (`VFIO_IOMMU_MAP_DMA`). RAM is pinned and counts towards `RLIMIT_MEMLOCK`; of a device's
    /// mapping the kernel takes the page frames as they are, and does not see it when they go.
    ///
    /// # Errors
    /// `EEXIST` where part of the range is mapped; `EINVAL` for a misaligned or reserved range,
    /// and before the first group; `ENOSPC` past the entry limit; `ENOMEM` past
    /// `RLIMIT_MEMLOCK`; `EFAULT` for an address with nothing behind it. Nothing is mapped then.
    ///
    /// # Safety
    /// Why this is unsafe: a device writes to the memory, at any moment, behind the compiler's
    /// back. The bytes from `vaddr` on must be a mapping of this process that stays in place
    /// until the IOMMU mapping is taken down, and whose contents may change (and for read-only
    /// access, be read) at any moment without breaking what the compiler assumes: never memory
    /// that Rust references point into.
    pub unsafe fn map_dma(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        let flags = match access {
            Access::ReadOnly => VFIO_DMA_MAP_FLAG_READ,
            Access::ReadWrite => VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        };
        // SAFETY: the caller vouches for the memory, in the same words.
        unsafe {
            ioctls::iommu_map_dma(self.as_fd(), flags, vaddr, iova.start().raw(), iova.size())
        }
    }

    /// Takes down all mappings in `iova` and tells how many bytes they had
    /// (`VFIO_IOMMU_UNMAP_DMA`). The range may cover several mappings and the gaps between them.
    ///
    /// # Errors
    /// `EINVAL` where the range would bisect a mapping, or is misaligned. Nothing is unmapped
    /// then.
    pub fn unmap_dma(&self, iova: IovaRange) -> io::Result<u64> {
        ioctls::iommu_unmap_dma(self.as_fd(), 0, iova.start().raw(), iova.size())
    }

    /// Takes down all mappings there are and tells how many bytes they had
    /// (`VFIO_DMA_UNMAP_FLAG_ALL`, Linux 5.12).
    ///
    /// # Errors
    /// The kernel's errno; `EINVAL` before Linux 5.12.
    pub fn unmap_all(&self) -> io::Result<u64> {
        ioctls::iommu_unmap_dma(self.as_fd(), VFIO_DMA_UNMAP_FLAG_ALL, 0, 0)
    }
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_container_is_refused() {
        let error = Container::open(Path::new("/dev/null")).unwrap_err();
        let OpenError::Kernel { source, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!(source.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_missing_file_says_which_module_to_load() {
        let error = Container::open(Path::new("/nowhere/vfio")).unwrap_err();
        assert!(matches!(error, OpenError::VfioNotLoaded { .. }));
        let text = error.to_string();
        assert!(text.contains("modprobe vfio-pci"), "{text}");
        assert!(text.contains("/nowhere/vfio"), "{text}");
    }
}
