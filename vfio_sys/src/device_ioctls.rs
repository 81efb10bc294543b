//! The ioctls of `linux/vfio.h` on a device that have to do with iommufd, dma-bufs and resets: one
//! unsafe call and one function each. What [`ioctls`](crate::ioctls) says of its own holds here.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_BUF, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_PROBE,
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt,
    vfio_device_feature, vfio_device_feature_dma_buf, vfio_region_dma_range,
};

use crate::ioctls::{argsz, checked, request};

pub(crate) const GET_PCI_HOT_RESET_INFO: libc::Ioctl = request(12);
pub(crate) const PCI_HOT_RESET: libc::Ioctl = request(13);
pub(crate) const FEATURE: libc::Ioctl = request(17);
pub(crate) const BIND_IOMMUFD: libc::Ioctl = request(18);
pub(crate) const ATTACH_IOMMUFD_PT: libc::Ioctl = request(19);
pub(crate) const DETACH_IOMMUFD_PT: libc::Ioctl = request(20);

/// `VFIO_DEVICE_BIND_IOMMUFD`; returns the device's id in the iommufd.
pub(crate) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    /// Up to where the struct ended when it was new (Linux 6.6): a kernel that does not know the
    /// token would refuse it, and none is given.
    const SIZE: usize = std::mem::offset_of!(vfio_device_bind_iommufd, token_uuid_ptr);
    let mut bind = vfio_device_bind_iommufd {
        argsz: const {
            assert!(SIZE == 16);
            16
        },
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `argsz` bytes of a struct that is longer and ours, and
    // takes its own reference to the iommufd, which is open.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), BIND_IOMMUFD, ptr::from_mut(&mut bind)) })?;
    Ok(bind.out_devid)
}

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`; returns the id of the page table that it really got.
pub(crate) fn attach_iommufd_pt(device: BorrowedFd<'_>, page_table: u32) -> io::Result<u32> {
    /// Without the PASID, which came in Linux 6.15 and is not used.
    const SIZE: usize = std::mem::offset_of!(vfio_device_attach_iommufd_pt, pasid);
    let mut attach = vfio_device_attach_iommufd_pt {
        argsz: const {
            assert!(SIZE == 12);
            12
        },
        pt_id: page_table,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `argsz` bytes of a struct that is longer and ours.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            ATTACH_IOMMUFD_PT,
            ptr::from_mut(&mut attach),
        )
    };
    checked(result)?;
    Ok(attach.pt_id)
}

/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
pub(crate) fn detach_iommufd_pt(device: BorrowedFd<'_>) -> io::Result<()> {
    /// Without the PASID, as above.
    const SIZE: usize = std::mem::offset_of!(vfio_device_detach_iommufd_pt, pasid);
    let detach = vfio_device_detach_iommufd_pt {
        argsz: const {
            assert!(SIZE == 8);
            8
        },
        ..Default::default()
    };
    // SAFETY: the kernel reads `argsz` bytes of a struct that is longer.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            DETACH_IOMMUFD_PT,
            ptr::from_ref(&detach),
        )
    };
    checked(result).map(drop)
}

/// The feature with its argument: one range of one region.
#[repr(C)]
#[derive(Default)]
pub(crate) struct DmaBufFeature {
    pub feature: vfio_device_feature,
    pub dma_buf: vfio_device_feature_dma_buf,
    pub range: vfio_region_dma_range,
}

/// `VFIO_DEVICE_FEATURE`, get of `VFIO_DEVICE_FEATURE_DMA_BUF`, for one range of a region.
pub(crate) fn get_dma_buf(
    device: BorrowedFd<'_>,
    region: u32,
    range: vfio_region_dma_range,
) -> io::Result<OwnedFd> {
    let mut feature = DmaBufFeature {
        range,
        ..Default::default()
    };
    feature.feature.argsz = const { argsz::<DmaBufFeature>() };
    feature.feature.flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF;
    feature.dma_buf.region_index = region;
    feature.dma_buf.open_flags = const {
        let flags = libc::O_CLOEXEC | libc::O_RDWR;
        assert!(flags > 0);
        flags.unsigned_abs()
    };
    feature.dma_buf.nr_ranges = 1;
    // SAFETY: the kernel reads and writes `argsz` bytes of a struct of that size, which is ours
    // and holds as many ranges as it says.
    let fd =
        checked(unsafe { libc::ioctl(device.as_raw_fd(), FEATURE, ptr::from_mut(&mut feature)) })?;
    // SAFETY: the kernel has just made this fd for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_FEATURE`, which only asks whether dma-bufs can be had.
pub(crate) fn probe_dma_buf(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut feature = vfio_device_feature {
        argsz: const { argsz::<vfio_device_feature>() },
        flags: VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_BUF,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes `argsz` bytes of a struct of that size, which is ours.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), FEATURE, ptr::from_mut(&mut feature)) };
    checked(result).map(drop)
}

/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO` into a buffer of 32-bit words: the struct, then what
/// follows it. The first word is set to the buffer's length.
pub(crate) fn get_pci_hot_reset_info(device: BorrowedFd<'_>, words: &mut [u32]) -> io::Result<()> {
    set_length(words);
    // SAFETY: the kernel writes at most as many bytes as the first word says, which is the
    // buffer's length, to a buffer that is borrowed mutably.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            GET_PCI_HOT_RESET_INFO,
            words.as_mut_ptr(),
        )
    };
    checked(result).map(drop)
}

/// `VFIO_DEVICE_PCI_HOT_RESET` with the fds of `groups`: none of them for a device that was
/// opened by its character device.
pub(crate) fn pci_hot_reset(device: BorrowedFd<'_>, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count =
        u32::try_from(groups.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let mut words = vec![0, 0, count];
    words.extend(groups.iter().map(|fd| fd.as_raw_fd().cast_unsigned()));
    set_length(&mut words);
    // SAFETY: the kernel reads as many bytes as the first word says, which is the buffer's
    // length, and as many fds as the third one says, which are as many as follow and open.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), PCI_HOT_RESET, words.as_ptr()) }).map(drop)
}

/// Sets the first word to the length of all, in bytes.
fn set_length(words: &mut [u32]) {
    // If it did not fit, the kernel would be told of a shorter buffer, which is safe.
    let length = u32::try_from(size_of_val(words)).unwrap_or(u32::MAX);
    if let Some(first) = words.first_mut() {
        *first = length;
    }
}
