//! The VFIO kernel ABI as owned handles, on the structs of `vfio-bindings`.
//!
//! ```text
//! Sysfs ──diagnoses──▶ Group ──attach──▶ Container ◀── a DMA target maps here
//!                        └──open_device──▶ Device ──▶ Region ──▶ Mapping
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
//! Only what maps memory for DMA is `unsafe` to call: [`Container::map_dma`]. Everything that the
//! kernel refuses comes back as an error with its errno; nothing is logged.

mod bdf;
mod container;
mod device;
mod group;
mod info_chain;
mod ioctls;
mod irq;
#[cfg(test)]
mod layout_tests;
mod open_error;
mod opener;
mod region;
mod sysfs;
mod type1_info;

pub use bdf::{Bdf, InvalidBdf};
pub use container::Container;
pub use device::{Device, DeviceInfo};
pub use group::{Group, GroupStatus};
pub use info_chain::{ChainError, InfoError};
pub use irq::{IrqAction, IrqData, IrqIndex, IrqInfo};
pub use open_error::{GroupMember, OpenError};
pub use opener::Opener;
pub use region::{Region, RegionArea, RegionIndex, RegionInfo, RegionType};
pub use sysfs::{PciFunction, Sysfs};
pub use type1_info::Type1Info;
