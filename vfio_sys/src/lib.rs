//! The VFIO kernel ABI as owned handles.

use memory_map::IovaRange;

/// What `VFIO_IOMMU_GET_INFO` and its capability chain tell of a type1 container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Type1Info {
    /// The page sizes that the IOMMU supports: bit n set for pages of 2^n bytes.
    pub page_sizes: u64,
    /// The ranges that may be mapped, sorted and disjoint
    /// (`VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`, Linux 5.4). Empty where the kernel does not tell.
    pub allowed: Vec<IovaRange>,
    /// How many more mappings it takes (`VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`, Linux 5.10), if told.
    pub entries_left: Option<u32>,
}
