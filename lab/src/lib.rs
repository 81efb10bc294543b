//! The nested machine: QEMU, a real kernel, a real IOMMU driver.
