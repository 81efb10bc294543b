//! An open device.
//!
//! [`Group::open_device`](crate::Group::open_device) makes a [`Device`], or it is made from an fd
//! that was handed in, or [`Cdev::bind`](crate::Cdev::bind) does. Its regions and their mappings
//! share its file. In the kernel, that file holds the group's, and the group the container; or the
//! iommufd that it is bound to. So the order in which they are closed is of no account.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_CAPS, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, vfio_device_info,
};

use crate::attachment::Binding;
use crate::info_chain::{ChainError, InfoBuffer, InfoError, InfoLayout};
use crate::region::{self, Region, RegionIndex, RegionInfo};
use crate::{CdevError, ioctls};

const CAP_OFFSET: usize = std::mem::offset_of!(vfio_device_info, cap_offset);
const LAYOUT: InfoLayout = InfoLayout {
    // Not the struct's size: it got four bytes of padding in Linux 6.6, and before that the chain
    // began where the padding is.
    fixed: CAP_OFFSET + size_of::<u32>(),
    chain_flag: VFIO_DEVICE_FLAGS_CAPS,
    cap_offset: CAP_OFFSET,
};
const REGIONS: usize = std::mem::offset_of!(vfio_device_info, num_regions);
const IRQS: usize = std::mem::offset_of!(vfio_device_info, num_irqs);

/// What the kernel tells of a device (`VFIO_DEVICE_GET_INFO`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// How many regions it has: indices are below this.
    pub regions: u32,
    /// How many kinds of interrupts it has: indices are below this.
    pub irqs: u32,
    /// The ids of its capabilities, none of which concern a mapping.
    pub capabilities: Vec<u16>,
    flags: u32,
}

impl DeviceInfo {
    /// Asks the kernel.
    fn of(device: BorrowedFd<'_>) -> Result<Self, InfoError> {
        let buffer = InfoBuffer::fetch(LAYOUT, None, |info| ioctls::device_get_info(device, info))?;
        Ok(Self::parse(&buffer)?)
    }

    fn parse(buffer: &InfoBuffer) -> Result<Self, ChainError> {
        let capabilities = buffer.capabilities(LAYOUT)?;
        Ok(Self {
            regions: buffer.u32(REGIONS),
            irqs: buffer.u32(IRQS),
            capabilities: capabilities.iter().map(|found| found.id).collect(),
            flags: buffer.flags(),
        })
    }

    /// The flags as the kernel gave them (`VFIO_DEVICE_FLAGS_*`).
    #[must_use]
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// Whether it can be reset.
    #[must_use]
    pub const fn can_reset(&self) -> bool {
        self.flags & VFIO_DEVICE_FLAGS_RESET != 0
    }

    /// Whether it is a PCI device.
    #[must_use]
    pub const fn is_pci(&self) -> bool {
        self.flags & VFIO_DEVICE_FLAGS_PCI != 0
    }
}

/// An open device (Linux 3.6, `linux/vfio.h`). It is given back when this value, its regions and
/// all mappings of them are dropped.
#[derive(Debug)]
pub struct Device {
    /// Goes first: it detaches the device.
    binding: Option<Binding>,
    file: Arc<File>,
    info: DeviceInfo,
}

impl Device {
    /// Takes over a device that someone else opened.
    ///
    /// # Errors
    /// [`InfoError`] where the fd is no device of VFIO's (`ENOTTY`), or not attached to an IOMMU
    /// yet (`EINVAL`).
    pub fn from_fd(fd: OwnedFd) -> Result<Self, InfoError> {
        Ok(Self {
            info: DeviceInfo::of(fd.as_fd())?,
            file: Arc::new(File::from(fd)),
            binding: None,
        })
    }

    /// A device that has just been bound to an iommufd.
    pub(crate) fn bound(file: Arc<File>, binding: Binding) -> Result<Self, CdevError> {
        match DeviceInfo::of(file.as_fd()) {
            Ok(info) => Ok(Self {
                binding: Some(binding),
                file,
                info,
            }),
            Err(source) => Err(CdevError::Info {
                name: binding.name.clone(),
                source,
            }),
        }
    }

    pub(crate) const fn binding(&self) -> Option<&Binding> {
        self.binding.as_ref()
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What the kernel told of it when it was opened.
    #[must_use]
    pub const fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The device's file, shared with its regions and their mappings.
    #[must_use]
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// One of its regions. A BAR or a ROM that the device does not have has size zero.
    ///
    /// # Errors
    /// [`InfoError`]: the kernel's `EINVAL` for an index past the last, and for
    /// [`RegionIndex::VGA`] of what is no VGA device; a malformed answer.
    pub fn region(&self, index: RegionIndex) -> Result<Region, InfoError> {
        let buffer = InfoBuffer::fetch(region::LAYOUT, Some((region::INDEX, index.0)), |info| {
            ioctls::device_get_region_info(self.fd(), info)
        })?;
        let info = RegionInfo::parse(&buffer)?;
        Ok(Region::new(self.file.clone(), info))
    }

    /// Config space, as the kernel presents it.
    ///
    /// # Errors
    /// As for [`region`](Self::region).
    pub fn config(&self) -> Result<Region, InfoError> {
        self.region(RegionIndex::CONFIG)
    }

    /// Resets the device (`VFIO_DEVICE_RESET`), by whatever means the kernel has for it alone.
    /// Its config space is what it was before; whatever else it held is lost, and mappings made
    /// from its BARs are to be taken for dead, even if the reset fails.
    ///
    /// # Errors
    /// `ENOTTY` where the device has no reset of its own; else the kernel's errno.
    pub fn reset(&self) -> io::Result<()> {
        if !self.info.can_reset() {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        ioctls::device_reset(self.fd())
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_device_is_refused() {
        let file = File::open("/dev/null").unwrap();
        let error = Device::from_fd(file.into()).unwrap_err();
        let InfoError::Kernel(error) = error else {
            panic!("{error:?}");
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn the_answer_of_a_usual_device() {
        let mut bytes = Vec::new();
        for word in [20u32, 3, 9, 5, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        let info = DeviceInfo::parse(&InfoBuffer::of_bytes(bytes)).unwrap();
        assert_eq!((info.regions, info.irqs), (9, 5));
        assert!(info.is_pci() && info.can_reset());
        assert!(info.capabilities.is_empty());
    }

    #[test]
    fn a_chain_where_old_and_new_kernels_begin_it() {
        for first in [20u32, 24] {
            let mut bytes = Vec::new();
            for word in [48, 0x83, 9, 5, first, 0, 0, 0, 0, 0, 0, 0] {
                bytes.extend(u32::to_ne_bytes(word));
            }
            bytes[usize::try_from(first).unwrap()] = 5;
            let info = DeviceInfo::parse(&InfoBuffer::of_bytes(bytes)).unwrap();
            assert_eq!(info.capabilities, [5]);
        }
    }
}
