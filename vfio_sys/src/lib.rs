//! The kernel ABI of VFIO and iommufd as owned handles, on the structs of `vfio-bindings` and
//! `iommufd-bindings`.
//!
//! ```text
//! Sysfs ──diagnoses──▶ Group ──attach──▶ Container ◀── a DMA target maps here
//!                        └──open_device──▶ Device ──▶ Region ──▶ Mapping
//!                                             ▲  │          └──▶ dma-buf
//! Sysfs ──diagnoses──▶ Cdev ────bind──────────┘  └──attach──▶ Ioas ◀── or here
//!                        Iommufd ──alloc──────────────────────┘
//! ```
//!
//! Opening and attaching are separate steps, and every handle can be made from an fd that was
//! handed in. [`Opener`] takes all the steps for those who need no say in them:
//!
//! ```no_run
//! use vfio_sys::{Opener, RegionIndex, Sysfs};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut opener = Opener::new(Sysfs::default());
//! let bdf = "0000:00:05.0".parse()?;
//! let group = opener.group(bdf)?; // here a VMM tells KVM of the group
//! let container = opener.container(bdf)?;
//! let device = opener.device(bdf)?;
//! println!("{:?}", container.info()?.allowed);
//! println!("{:?}", device.region(RegionIndex::CONFIG)?.info());
//! # Ok(())
//! # }
//! ```
//!
//! By iommufd, which groups and containers give way to:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use vfio_sys::{Ioas, Sysfs};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let sysfs = Sysfs::default();
//! let iommufd = Arc::new(sysfs.open_iommufd()?);
//! let cdev = sysfs.open_cdev("0000:00:05.0".parse()?)?; // here a VMM tells KVM of the device
//! let device = cdev.bind(iommufd.clone())?;
//! let ioas = Arc::new(Ioas::alloc(iommufd)?);
//! device.attach(ioas.clone())?;
//! println!("{:?}", ioas.ranges()?.allowed);
//! # Ok(())
//! # }
//! ```
//!
//! Only what maps memory for DMA by its address is `unsafe` to call: [`Container::map_dma`] and
//! [`Ioas::map`]. Everything that the kernel refuses comes back as an error with its errno; nothing
//! is logged.

mod acs;
mod attachment;
mod bdf;
mod cdev;
mod container;
mod device;
mod device_ioctls;
mod dma_buf;
mod event_fd;
mod group;
mod hot_reset;
mod info_chain;
mod ioas;
mod ioctls;
mod iommufd;
mod iommufd_error;
mod iommufd_ioctls;
mod irq;
mod kernel_version;
#[cfg(test)]
mod layout_tests;
mod open_error;
mod opener;
mod region;
mod sysfs;
mod type1_info;

pub use acs::Bypass;
pub use bdf::{Bdf, InvalidBdf};
pub use cdev::Cdev;
pub use container::Container;
pub use device::{Device, DeviceInfo};
pub use dma_buf::DmaBufError;
pub use event_fd::{EventFd, wait_for_any};
pub use group::{Group, GroupStatus};
pub use hot_reset::{HotResetInfo, ResetDependent, ResetOwner};
pub use info_chain::{ChainError, InfoError};
pub use ioas::{Ioas, IoasId, IoasRanges};
pub use iommufd::{Iommufd, IommufdId};
pub use iommufd_error::{CdevError, IommufdError};
pub use irq::{IrqAction, IrqData, IrqIndex, IrqInfo};
pub use kernel_version::KernelVersion;
pub use open_error::{GroupMember, OpenError};
pub use opener::Opener;
pub use region::{Region, RegionArea, RegionIndex, RegionInfo, RegionType};
pub use sysfs::{PciFunction, Sysfs};
pub use type1_info::Type1Info;
