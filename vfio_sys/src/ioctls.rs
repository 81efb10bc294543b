//! The ioctls of `linux/vfio.h`: one unsafe call and one function each.
//!
//! The functions take the fd borrowed and the struct by reference, so that the kernel finds both
//! alive. Where the kernel fills a struct in, the reference is mutable. A struct that can be
//! followed by more is an [`InfoBuffer`], which knows its own length.
//!
//! Every one of the structs begins with `argsz`, its length in bytes, and the kernel copies no
//! more than that to or from it. A request that reaches a file of another kind (an fd that was
//! handed in and is something else) is refused with `ENOTTY`: no other driver has the type `;`
//! in use for these numbers.
#![expect(unsafe_code, reason = "ioctls")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use memory_map::HostVa;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_irq_info,
};

use crate::info_chain::InfoBuffer;
use crate::irq::IrqSet;

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`. The header uses no other form: the length is in `argsz`.
pub(crate) const fn request(number: u32) -> libc::Ioctl {
    libc::_IO(VFIO_TYPE as u32, VFIO_BASE + number)
}

pub(crate) const GET_API_VERSION: libc::Ioctl = request(0);
pub(crate) const CHECK_EXTENSION: libc::Ioctl = request(1);
pub(crate) const SET_IOMMU: libc::Ioctl = request(2);
pub(crate) const GROUP_GET_STATUS: libc::Ioctl = request(3);
pub(crate) const GROUP_SET_CONTAINER: libc::Ioctl = request(4);
pub(crate) const GROUP_UNSET_CONTAINER: libc::Ioctl = request(5);
pub(crate) const GROUP_GET_DEVICE_FD: libc::Ioctl = request(6);
pub(crate) const DEVICE_GET_INFO: libc::Ioctl = request(7);
pub(crate) const DEVICE_GET_REGION_INFO: libc::Ioctl = request(8);
pub(crate) const DEVICE_GET_IRQ_INFO: libc::Ioctl = request(9);
pub(crate) const DEVICE_SET_IRQS: libc::Ioctl = request(10);
pub(crate) const DEVICE_RESET: libc::Ioctl = request(11);
pub(crate) const IOMMU_GET_INFO: libc::Ioctl = request(12);
pub(crate) const IOMMU_MAP_DMA: libc::Ioctl = request(13);
pub(crate) const IOMMU_UNMAP_DMA: libc::Ioctl = request(14);

/// What an ioctl returned, or its errno.
pub(crate) fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `VFIO_GET_API_VERSION`.
pub(crate) fn get_api_version(container: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: the request has no argument.
    checked(unsafe { libc::ioctl(container.as_raw_fd(), GET_API_VERSION) })
}

/// `VFIO_CHECK_EXTENSION`, which takes the extension by value.
pub(crate) fn check_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    let extension = libc::c_ulong::from(extension);
    // SAFETY: the argument is a number.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), CHECK_EXTENSION, extension) };
    Ok(checked(result)? > 0)
}

/// `VFIO_SET_IOMMU`, which takes the type by value.
pub(crate) fn set_iommu(container: BorrowedFd<'_>, iommu: u32) -> io::Result<()> {
    let iommu = libc::c_ulong::from(iommu);
    // SAFETY: the argument is a number.
    checked(unsafe { libc::ioctl(container.as_raw_fd(), SET_IOMMU, iommu) }).map(drop)
}

/// `VFIO_GROUP_GET_STATUS`.
pub(crate) fn group_get_status(
    group: BorrowedFd<'_>,
    status: &mut vfio_group_status,
) -> io::Result<()> {
    status.argsz = ARGSZ_OF_STATUS;
    // SAFETY: the kernel writes `argsz` bytes, the struct's own size, to a struct that is
    // borrowed mutably.
    let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_STATUS, ptr::from_mut(status)) };
    checked(result).map(drop)
}

/// `VFIO_GROUP_SET_CONTAINER`, which takes a pointer to the container's fd.
pub(crate) fn group_set_container(
    group: BorrowedFd<'_>,
    container: BorrowedFd<'_>,
) -> io::Result<()> {
    let container: libc::c_int = container.as_raw_fd();
    // SAFETY: the kernel reads one int, which lives through the call; it takes its own reference
    // to the file behind that fd, which is open.
    let result = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            GROUP_SET_CONTAINER,
            ptr::from_ref(&container),
        )
    };
    checked(result).map(drop)
}

/// `VFIO_GROUP_UNSET_CONTAINER`.
pub(crate) fn group_unset_container(group: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request has no argument.
    checked(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_UNSET_CONTAINER) }).map(drop)
}

/// `VFIO_GROUP_GET_DEVICE_FD`, which takes the device's name.
pub(crate) fn group_get_device_fd(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the kernel copies a C string, which lives through the call.
    let fd =
        checked(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this fd for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_GET_INFO`.
pub(crate) fn device_get_info(device: BorrowedFd<'_>, info: &mut InfoBuffer) -> io::Result<()> {
    // SAFETY: the kernel writes at most `argsz` bytes, which `as_mut_ptr` sets to the buffer's
    // length.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_INFO, info.as_mut_ptr()) })
        .map(drop)
}

/// `VFIO_DEVICE_GET_REGION_INFO`, for the index that the buffer holds.
pub(crate) fn device_get_region_info(
    device: BorrowedFd<'_>,
    info: &mut InfoBuffer,
) -> io::Result<()> {
    // SAFETY: the kernel writes at most `argsz` bytes, which `as_mut_ptr` sets to the buffer's
    // length.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            DEVICE_GET_REGION_INFO,
            info.as_mut_ptr(),
        )
    };
    checked(result).map(drop)
}

/// `VFIO_DEVICE_GET_IRQ_INFO`, for the index that the struct holds.
pub(crate) fn device_get_irq_info(
    device: BorrowedFd<'_>,
    info: &mut vfio_irq_info,
) -> io::Result<()> {
    info.argsz = ARGSZ_OF_IRQ_INFO;
    // SAFETY: the kernel writes `argsz` bytes, the struct's own size, to a struct that is
    // borrowed mutably.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_IRQ_INFO, ptr::from_mut(info)) };
    checked(result).map(drop)
}

/// `VFIO_DEVICE_SET_IRQS`. Returns what the ioctl did: where it is no zero, so many vectors could
/// have been had, and none is enabled.
pub(crate) fn device_set_irqs(device: BorrowedFd<'_>, set: &IrqSet<'_>) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `argsz` bytes, which is the length of the bytes that `set` holds,
    // and takes its own references to the eventfds, which `set` keeps borrowed.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_SET_IRQS, set.as_ptr()) })
}

/// `VFIO_DEVICE_RESET`.
pub(crate) fn device_reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request has no argument.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_RESET) }).map(drop)
}

/// `VFIO_IOMMU_GET_INFO`.
pub(crate) fn iommu_get_info(container: BorrowedFd<'_>, info: &mut InfoBuffer) -> io::Result<()> {
    // SAFETY: the kernel writes at most `argsz` bytes, which `as_mut_ptr` sets to the buffer's
    // length.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_GET_INFO, info.as_mut_ptr()) };
    checked(result).map(drop)
}

/// `VFIO_IOMMU_MAP_DMA` of `size` bytes at `iova`.
///
/// # Safety
/// As for [`Container::map_dma`](crate::Container::map_dma).
pub(crate) unsafe fn iommu_map_dma(
    container: BorrowedFd<'_>,
    flags: u32,
    vaddr: HostVa,
    iova: u64,
    size: u64,
) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map {
        argsz: ARGSZ_OF_MAP,
        flags,
        vaddr: vaddr.raw(),
        iova,
        size,
    };
    // SAFETY: the kernel reads `argsz` bytes of a struct of that size. What the mapping itself
    // does to the memory at `vaddr`, the caller vouches for.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_MAP_DMA, ptr::from_ref(&map)) };
    checked(result).map(drop)
}

/// `VFIO_IOMMU_UNMAP_DMA`; returns how many bytes had been mapped.
pub(crate) fn iommu_unmap_dma(
    container: BorrowedFd<'_>,
    flags: u32,
    iova: u64,
    size: u64,
) -> io::Result<u64> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: ARGSZ_OF_UNMAP,
        flags,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `argsz` bytes of a struct of that size, which is ours;
    // without the dirty-bitmap flag nothing follows it.
    let result = unsafe {
        libc::ioctl(
            container.as_raw_fd(),
            IOMMU_UNMAP_DMA,
            ptr::from_mut(&mut unmap),
        )
    };
    checked(result)?;
    Ok(unmap.size)
}

/// The size of a struct for its `argsz`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "there is no fallible conversion in a constant; the assertion stands in for it"
)]
pub(crate) const fn argsz<T>() -> u32 {
    assert!(size_of::<T>() <= u32::MAX as usize);
    size_of::<T>() as u32
}

const ARGSZ_OF_STATUS: u32 = argsz::<vfio_group_status>();
const ARGSZ_OF_IRQ_INFO: u32 = argsz::<vfio_irq_info>();
const ARGSZ_OF_MAP: u32 = argsz::<vfio_iommu_type1_dma_map>();
const ARGSZ_OF_UNMAP: u32 = argsz::<vfio_iommu_type1_dma_unmap>();
