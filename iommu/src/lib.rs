//! The DMA targets: IOMMU address spaces that follow a memory map.

mod type1;

pub use type1::Type1Container;
