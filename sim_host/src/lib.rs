//! A simulated host: an IOMMU that enforces, and PCI functions behind it.
