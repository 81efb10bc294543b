//! The DMA targets: IOMMU address spaces that follow a memory map.
//!
//! ```text
//! RegionManager ──map, unmap──▶ Type1Target ──▶ Type1Container: vfio_sys::Container,
//!               │                                               or a simulated one
//!               └─map, unmap──▶ IoasTarget ───▶ IoAddressSpace: vfio_sys::Ioas,
//!                                 ▲                             or a simulated one
//!                                 └── RamCopies: RAM that others of one iommufd have mapped
//! ```
//!
//! A [`Type1Target`] turns what the map asks for into calls of a [`Type1Container`], an
//! [`IoasTarget`] into those of an [`IoAddressSpace`], and what those refuse into reasons that a
//! person can act on. They decide nothing: what is mapped where is up to the map.

mod io_address_space;
mod ioas_target;
mod locked_memory;
mod ram_copies;
mod refusal;
mod type1;
mod type1_target;

pub use io_address_space::IoAddressSpace;
pub use ioas_target::IoasTarget;
pub use locked_memory::LockedMemory;
pub use ram_copies::RamCopies;
pub use type1::Type1Container;
pub use type1_target::{InvalidLargestMapping, Type1Target};
