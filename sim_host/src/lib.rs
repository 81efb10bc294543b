//! A simulated host: an IOMMU that enforces, and PCI functions behind it.
//!
//! It needs no privileges and no hardware, and of the operating system only memfds, for iommufd. [`SimHost`] makes
//! everything else: [`SimRam`], which stands for the guest's memory; [`SimFunction`], a PCI
//! function that implements [`HostFunction`](assigned_pci::HostFunction); [`SimContainer`], a VFIO
//! container that implements [`Type1Container`](iommu::Type1Container); [`SimIoas`], an address
//! space of an iommufd that implements [`IoAddressSpace`](iommu::IoAddressSpace).
//!
//! ```text
//!   SimFunction --- DMA at an IOVA ---> its group's SimContainer --- page by page ---> SimRam,
//!    (edu, NVMe)                         or SimIoas, or a Fault                        or a BAR,
//!                                                                                      or a BusError
//! ```
//!
//! Host addresses are plain numbers that stand for memory only in here; files are real memfds, made
//! when they are asked for and never written, that stand for RAM or a BAR. What the code under test
//! must never do, such as giving back memory that a device can still reach, is recorded as a
//! [`Violation`]; every test that uses the simulated host should find
//! [`SimHost::violations`] empty at its end.
//!
//! ```
//! use assigned_pci::HostFunction;
//! use iommu::Type1Container;
//! use memory_map::Backing;
//! use sim_host::{FunctionSpec, SimHost};
//!
//! let host = SimHost::default();
//! let edu = host.add_function(FunctionSpec::edu("0000:00:05.0"))?;
//! let peer = host.add_function(FunctionSpec::shared_memory("0000:00:06.0", 4 << 20))?;
//! let container = host.container(&[&edu, &peer])?;
//! let ram = Backing::new(host.ram(16 << 20)?);
//!
//! assert_eq!(container.info()?.entries_left, Some(65_535));
//! assert!(host.mappings().is_empty() && host.violations().is_empty());
//! # let _ = ram;
//! # std::io::Result::Ok(())
//! ```

mod address_space;
mod bar;
mod call;
mod config_space;
mod container;
mod dma_buf;
mod domain;
mod edu;
mod file;
mod function;
mod function_spec;
mod gate;
mod host;
mod io_page_table;
mod ioas_state;
mod iommufd;
mod log;
mod nvme;
mod nvme_spec;
mod page;
mod physical;
mod ram;
mod reset;
mod revocations;
mod sparse;
mod translation;
mod vectors;

pub use bar::{SimBar, SimBarArea};
pub use call::{Call, CallPoint, CallRecord};
pub use container::{ContainerId, GroupId, SimContainer};
pub use function::SimFunction;
pub use function_spec::{BarKind, BarSpec, FunctionSpec, PowerManagement};
pub use host::{HostSpec, SimHost, SimMapping};
pub use iommufd::{SimIoas, SimIoasMapping, SimIommufd};
pub use log::{BusError, BusErrorCause, Fault, FaultCause, Violation};
pub use nvme_spec::{NvmeFlaw, SimDisk};
pub use ram::SimRam;
pub use reset::SimBus;
pub use revocations::{Revocation, RevocationCause};
pub use sparse::OutOfBounds;
pub use translation::BrokenTranslation;
