//! The DMA targets: IOMMU address spaces that follow a memory map.
//!
//! ```text
//! RegionManager ──map, unmap──▶ Type1Target ──▶ Type1Container: vfio_sys::Container,
//!                                                               or a simulated one
//! ```
//!
//! A [`Type1Target`] turns what the map asks for into calls of a [`Type1Container`], and what
//! that refuses into reasons that a person can act on. It decides nothing: what is mapped where
//! is up to the map.

mod locked_memory;
mod refusal;
mod type1;
mod type1_target;

pub use locked_memory::LockedMemory;
pub use type1::Type1Container;
pub use type1_target::{InvalidLargestMapping, Type1Target};
