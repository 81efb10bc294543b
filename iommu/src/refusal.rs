//! What the errnos of a type1 container or an IOAS mean, in terms that a person can act on.

use std::io;

use memory_map::{Errno, MapRequest, Reason, RegionKind, TargetError};
use vfio_sys::KernelVersion;

use crate::LockedMemory;

/// The container refused to make a mapping; nothing has changed.
pub(crate) fn of_map(error: &io::Error, request: &MapRequest) -> TargetError {
    let errno = Errno::from(error);
    let device_memory = request.kind == RegionKind::DeviceMemory;
    let hint = match errno.raw() {
        libc::EEXIST => Some(
            "something other than this target has mapped part of the range in the container"
                .to_owned(),
        ),
        libc::EINVAL => Some(
            "the range is misaligned, or lies in a range that the container has reserved since \
             its limits were looked at, as it may when a group joins"
                .to_owned(),
        ),
        libc::ENOSPC => Some(
            "the container has as many mappings as it may: raise the module parameter \
             dma_entry_limit of vfio_iommu_type1 (65535 unless set)"
                .to_owned(),
        ),
        libc::ENOMEM if !device_memory => LockedMemory::of_this_process()
            .ok()
            .map(|memory| memory.hint(request.iova.size())),
        libc::EFAULT if device_memory => Some(
            "the device does not decode memory (the memory bit of its command register is off, \
             it sleeps, or it is being reset), or the container is iommufd's emulation of one \
             (CONFIG_IOMMUFD_VFIO_CONTAINER), which maps no device memory"
                .to_owned(),
        ),
        libc::EFAULT => Some(
            "the host memory cannot be pinned: it may be mapped read-only, or its file be too \
             short"
                .to_owned(),
        ),
        _ => None,
    };
    refused(errno, hint)
}

/// The container refused to take a mapping down; all of it is still there.
pub(crate) fn of_unmap(error: &io::Error) -> TargetError {
    let errno = Errno::from(error);
    let hint = (errno.raw() == libc::EINVAL)
        .then(|| "the range would have cut a mapping in two, or is misaligned".to_owned());
    refused(errno, hint)
}

/// The IOAS refused to make a mapping; nothing has changed.
pub(crate) fn of_ioas_map(error: &io::Error, request: &MapRequest) -> TargetError {
    let errno = Errno::from(error);
    let device_memory = request.kind == RegionKind::DeviceMemory;
    let hint = match errno.raw() {
        libc::ENODEV if device_memory => return TargetError::Revoked,
        libc::EEXIST => Some(
            "something other than this target has mapped part of the range in the address space"
                .to_owned(),
        ),
        libc::EINVAL if device_memory => Some(
            "the range is misaligned, or lies in a range that the address space has reserved \
             since its limits were looked at, as it may when a device is attached"
                .to_owned(),
        ),
        libc::EINVAL => Some(
            "the range is misaligned, or lies in a range that the address space has reserved \
             since its limits were looked at, as it may when a device is attached; or the file \
             behind the memory is too short, or is no memfd and not on tmpfs or hugetlbfs"
                .to_owned(),
        ),
        libc::ENOMEM if !device_memory => LockedMemory::of_this_process()
            .ok()
            .map(|memory| memory.hint_per_user(request.iova.size())),
        libc::EFAULT => Some(
            "the host memory cannot be pinned: it may be mapped read-only, or its file be too \
             short"
                .to_owned(),
        ),
        libc::EOPNOTSUPP if device_memory => Some(
            "the kernel takes no such dma-buf into an address space: it takes those of vfio-pci, \
             from Linux 6.19 on"
                .to_owned(),
        ),
        libc::ENOTTY => Some(match KernelVersion::running() {
            Some(found) => format!(
                "the kernel cannot map files (IOMMU_IOAS_MAP_FILE): it is Linux {found}, needed \
                 is 6.13"
            ),
            None => {
                "the kernel cannot map files (IOMMU_IOAS_MAP_FILE): needed is Linux 6.13".into()
            }
        }),
        _ => None,
    };
    refused(errno, hint)
}

/// The IOAS refused to take one mapping down.
pub(crate) fn of_ioas_unmap(error: &io::Error) -> TargetError {
    let errno = Errno::from(error);
    match errno.raw() {
        // The kernel has something else there than what was made.
        libc::ENOENT => TargetError::Unknown(errno),
        libc::EBUSY => refused(
            errno,
            Some("something other than this target is mapping there, or uses the mapping".into()),
        ),
        _ => refused(errno, None),
    }
}

fn refused(errno: Errno, hint: Option<String>) -> TargetError {
    TargetError::Refused(Reason::Kernel {
        errno,
        hint: hint.map(Into::into),
    })
}
