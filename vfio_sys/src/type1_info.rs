//! What a type1 container says of itself.

use memory_map::{Iova, IovaRange};
use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, vfio_iommu_type1_info, vfio_iommu_type1_info_cap_iova_range,
    vfio_iommu_type1_info_dma_avail,
};

use crate::info_chain::{ChainError, InfoBuffer, InfoLayout};

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

pub(crate) const LAYOUT: InfoLayout = InfoLayout {
    fixed: size_of::<vfio_iommu_type1_info>(),
    chain_flag: VFIO_IOMMU_INFO_CAPS,
    cap_offset: std::mem::offset_of!(vfio_iommu_type1_info, cap_offset),
};

const PAGE_SIZES: usize = std::mem::offset_of!(vfio_iommu_type1_info, iova_pgsizes);
const RANGES: usize = std::mem::offset_of!(vfio_iommu_type1_info_cap_iova_range, iova_ranges);
const RANGE_COUNT: usize = std::mem::offset_of!(vfio_iommu_type1_info_cap_iova_range, nr_iovas);
const AVAILABLE: usize = std::mem::offset_of!(vfio_iommu_type1_info_dma_avail, avail);

impl Type1Info {
    /// Reads the kernel's answer.
    pub(crate) fn parse(buffer: &InfoBuffer) -> Result<Self, ChainError> {
        let mut info = Self {
            page_sizes: 0,
            allowed: Vec::new(),
            entries_left: None,
        };
        if buffer.flags() & VFIO_IOMMU_INFO_PGSIZES != 0 {
            info.page_sizes = buffer.u64(PAGE_SIZES);
        }
        for capability in buffer.capabilities(LAYOUT)? {
            match u32::from(capability.id) {
                VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                    capability.check_version()?;
                    let count = capability.u32(RANGE_COUNT)?;
                    for (start, last) in capability.pairs(RANGES, count)? {
                        info.allowed
                            .push(allowed_range(capability.id, start, last)?);
                    }
                }
                VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                    capability.check_version()?;
                    info.entries_left = Some(capability.u32(AVAILABLE)?);
                }
                // What else there is (migration) does not concern a mapping.
                _ => {}
            }
        }
        info.allowed.sort_unstable();
        let overlap = info
            .allowed
            .array_windows()
            .find(|[lower, upper]| lower.overlaps(upper));
        if let Some([_, range]) = overlap {
            return Err(ChainError::ImpossibleRange {
                id: RANGE_ID,
                start: range.start().raw(),
                end_or_size: range.last().raw(),
            });
        }
        Ok(info)
    }
}

const RANGE_ID: u16 = {
    assert!(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE == 1);
    1
};

fn allowed_range(id: u16, start: u64, last: u64) -> Result<IovaRange, ChainError> {
    // The whole 64-bit space does not fit a range; the last byte of it is never mapped alone.
    let reachable = if start == 0 && last == u64::MAX {
        u64::MAX - 1
    } else {
        last
    };
    IovaRange::from_inclusive(Iova::new(start), Iova::new(reachable)).map_err(|_| {
        ChainError::ImpossibleRange {
            id,
            start,
            end_or_size: last,
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(bytes: &mut Vec<u8>, words: &[u32]) {
        for word in words {
            bytes.extend(word.to_ne_bytes());
        }
    }

    fn put_range(bytes: &mut Vec<u8>, start: u64, last: u64) {
        bytes.extend(start.to_ne_bytes());
        bytes.extend(last.to_ne_bytes());
    }

    /// As Linux 6.12 answers in the lab: migration, entries left, ranges.
    fn answer(ranges: &[(u64, u64)]) -> InfoBuffer {
        let mut bytes = Vec::new();
        put(&mut bytes, &[0, 3]);
        bytes.extend(0x4020_1000u64.to_ne_bytes());
        put(&mut bytes, &[24, 0]);
        put(&mut bytes, &[2 | 1 << 16, 56, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes.len(), 56);
        put(&mut bytes, &[3 | 1 << 16, 72, 65535, 0]);
        assert_eq!(bytes.len(), 72);
        let count = u32::try_from(ranges.len()).unwrap();
        put(&mut bytes, &[1 | 1 << 16, 0, count, 0]);
        for (start, last) in ranges {
            put_range(&mut bytes, *start, *last);
        }
        InfoBuffer::of_bytes(bytes)
    }

    #[test]
    fn a_usual_answer() {
        let info = Type1Info::parse(&answer(&[
            (0xfef0_0000, 0xffff_ffff_ffff),
            (0, 0xfedf_ffff),
        ]))
        .unwrap();
        assert_eq!(info.page_sizes, 0x4020_1000);
        assert_eq!(info.entries_left, Some(65535));
        let texts: Vec<String> = info.allowed.iter().map(IovaRange::to_string).collect();
        assert_eq!(texts, ["0x0-0xfedfffff", "0xfef00000-0xffffffffffff"]);
    }

    #[test]
    fn an_old_kernel_tells_page_sizes_only() {
        let mut bytes = vec![0; LAYOUT.fixed];
        bytes[4] = 1;
        bytes[9] = 0x10;
        let info = Type1Info::parse(&InfoBuffer::of_bytes(bytes)).unwrap();
        assert_eq!(
            info,
            Type1Info {
                page_sizes: 0x1000,
                allowed: vec![],
                entries_left: None
            }
        );
    }

    #[test]
    fn impossible_ranges_are_refused() {
        for ranges in [&[(2, 1)][..], &[(0, 0xfff), (0xfff, 0x1fff)]] {
            assert!(matches!(
                Type1Info::parse(&answer(ranges)),
                Err(ChainError::ImpossibleRange { id: 1, .. })
            ));
        }
        let whole = Type1Info::parse(&answer(&[(0, u64::MAX)])).unwrap();
        assert_eq!(whole.allowed[0].last().raw(), u64::MAX - 1);
    }

    #[test]
    fn more_ranges_than_bytes_are_refused() {
        let buffer = answer(&[(0, 0xfff)]);
        let mut bytes: Vec<u8> = (0..104).map(|_| 0).collect();
        bytes[..4].copy_from_slice(&0u32.to_ne_bytes());
        bytes[4] = 2;
        bytes[16] = 24;
        bytes[24] = 1;
        bytes[26] = 1;
        bytes[32] = 0xff;
        assert!(matches!(
            Type1Info::parse(&InfoBuffer::of_bytes(bytes)),
            Err(ChainError::Truncated { .. })
        ));
        assert!(Type1Info::parse(&buffer).is_ok());
    }

    #[test]
    fn a_version_from_the_future_is_refused() {
        let mut bytes = vec![0; 48];
        bytes[4] = 2;
        bytes[16] = 24;
        bytes[24] = 1;
        bytes[26] = 2;
        assert_eq!(
            Type1Info::parse(&InfoBuffer::of_bytes(bytes)),
            Err(ChainError::UnknownVersion { id: 1, version: 2 })
        );
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 32..200)) {
            bytes[4] |= 2;
            bytes[16..20].copy_from_slice(&24u32.to_ne_bytes());
            bytes[24] &= 3;
            bytes[25..28].copy_from_slice(&[0, 1, 0]);
            bytes[28..32].copy_from_slice(&0u32.to_ne_bytes());
            let _ = Type1Info::parse(&InfoBuffer::of_bytes(bytes));
        }
    }
}
