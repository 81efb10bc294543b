//! Dma-bufs: how a part of a BAR is made known to iommufd.
//!
//! A dma-buf is a file. Whoever exports one owns it; while it is open, or mapped, the kernel
//! keeps the device registered. It is **revoked** whenever the device stops decoding memory,
//! sleeps or is reset: what was mapped of it is then dead for good, and nobody is told. When the
//! device decodes again, the same dma-buf can be mapped anew.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use vfio_bindings::bindings::vfio::vfio_region_dma_range;

use crate::kernel_version::missing;
use crate::{Device, KernelVersion, Region, RegionArea, RegionIndex, device_ioctls};

/// The first kernel whose vfio-pci exports dma-bufs.
const NEEDED: KernelVersion = KernelVersion::new(6, 19);

/// Why a part of a BAR is not to be had as a dma-buf. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaBufError {
    /// The kernel does not export device memory.
    #[error("{}", missing(
        "export of device memory as dma-bufs (VFIO_DEVICE_FEATURE_DMA_BUF)",
        *found,
        NEEDED,
        "CONFIG_VFIO_PCI_DMABUF (which needs CONFIG_PCI_P2PDMA and DMA_SHARED_BUFFER)"
    ))]
    Unsupported {
        /// The running kernel, if that can be told.
        found: Option<KernelVersion>,
    },
    /// The driver that has the device does not export its memory.
    #[error("the driver that has the device exports no dma-bufs: plain vfio-pci does")]
    Driver {
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The kernel has no peer-to-peer provider for the BAR, or the range cannot be exported.
    #[error(
        "the kernel can make no peer-to-peer memory of {length:#x} bytes at {offset:#x} of region \
         {region}: it has no P2PDMA provider for this device (CONFIG_PCI_P2PDMA), or the range is \
         not made of whole pages of a memory BAR"
    )]
    NoProvider {
        /// Which region.
        region: u32,
        /// Where in it, in bytes.
        offset: u64,
        /// How much of it, in bytes.
        length: u64,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The region is no memory BAR, or the kernel could not claim it for the device.
    #[error(
        "region {region} is no memory BAR that the kernel has claimed for the device: `dmesg` may \
         say with whom it conflicts"
    )]
    NotABar {
        /// Which region.
        region: u32,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("exporting region {region} as a dma-buf failed: {source}")]
    Kernel {
        /// Which region.
        region: u32,
        /// Its errno.
        source: io::Error,
    },
}

impl DmaBufError {
    fn new(region: RegionIndex, area: RegionArea, source: io::Error) -> Self {
        let region = region.0;
        match source.raw_os_error() {
            Some(libc::ENOTTY) => Self::Unsupported {
                found: KernelVersion::running(),
            },
            Some(libc::EOPNOTSUPP) => Self::Driver { source },
            Some(libc::EINVAL) => Self::NoProvider {
                region,
                offset: area.offset,
                length: area.size,
                source,
            },
            Some(libc::ENODEV) => Self::NotABar { region, source },
            _ => Self::Kernel { region, source },
        }
    }
}

impl Region {
    /// Exports a part of it, in whole pages, as a dma-buf of that size
    /// (`VFIO_DEVICE_FEATURE_DMA_BUF`, Linux 6.19). Each call makes another one.
    ///
    /// # Errors
    /// [`DmaBufError`].
    pub fn export_dma_buf(&self, area: RegionArea) -> Result<OwnedFd, DmaBufError> {
        let index = self.info().index;
        let range = vfio_region_dma_range {
            offset: area.offset,
            length: area.size,
        };
        device_ioctls::get_dma_buf(self.file().as_fd(), index.0, range)
            .map_err(|source| DmaBufError::new(index, area, source))
    }
}

impl Device {
    /// Whether the kernel and the device's driver export dma-bufs at all. A certain BAR may still
    /// have none.
    ///
    /// # Errors
    /// The kernel's errno, other than the ones that mean no.
    pub fn exports_dma_bufs(&self) -> io::Result<bool> {
        match device_ioctls::probe_dma_buf(self.as_fd()) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::*;
    use crate::RegionInfo;

    const AREA: RegionArea = RegionArea {
        offset: 0x1000,
        size: 0x2000,
    };

    fn error(raw: i32) -> DmaBufError {
        DmaBufError::new(RegionIndex(2), AREA, io::Error::from_raw_os_error(raw))
    }

    #[test]
    fn each_errno_says_what_to_do() {
        let text = DmaBufError::Unsupported {
            found: Some(KernelVersion::new(6, 12)),
        }
        .to_string();
        assert!(text.contains("6.12") && text.contains("6.19"), "{text}");
        let text = DmaBufError::Unsupported {
            found: Some(KernelVersion::new(7, 3)),
        }
        .to_string();
        assert!(text.contains("CONFIG_VFIO_PCI_DMABUF"), "{text}");
        assert!(matches!(
            error(libc::ENOTTY),
            DmaBufError::Unsupported { .. }
        ));
        let text = error(libc::EINVAL).to_string();
        assert!(text.contains("P2PDMA") && text.contains("0x2000"), "{text}");
        assert!(error(libc::ENODEV).to_string().contains("region 2"));
        assert!(error(libc::EOPNOTSUPP).to_string().contains("vfio-pci"));
        let text = error(libc::EMFILE).to_string();
        assert!(text.contains("open files"), "{text}");
    }

    #[test]
    fn a_file_that_is_no_device_exports_nothing() {
        let file = Arc::new(File::open("/dev/null").unwrap());
        let info = RegionInfo::new(RegionIndex(2), 7, 0x10_0000, 0);
        let error = Region::new(file, info).export_dma_buf(AREA).unwrap_err();
        assert!(matches!(error, DmaBufError::Unsupported { .. }), "{error}");
    }
}
