use host_memory::{Ram, page_size};
use proptest::prelude::*;

use super::*;

/// An answer with sparse areas, preceded by a type and followed by MSIX_MAPPABLE and one more.
fn answer(flags: u32, size: u64, areas: &[(u64, u64)]) -> InfoBuffer {
    let mut bytes = Vec::new();
    let put = |bytes: &mut Vec<u8>, words: &[u32]| {
        for word in words {
            bytes.extend(word.to_ne_bytes());
        }
    };
    put(&mut bytes, &[0, flags, 2, 32]);
    bytes.extend(size.to_ne_bytes());
    bytes.extend((2u64 << 40).to_ne_bytes());
    put(&mut bytes, &[2 | 1 << 16, 48, 0x8000_8086, 1]);
    put(&mut bytes, &[3 | 1 << 16, 56]);
    put(&mut bytes, &[77 | 9 << 16, 64]);
    let count = u32::try_from(areas.len()).unwrap();
    put(&mut bytes, &[1 | 1 << 16, 0, count, 0]);
    for (offset, size) in areas {
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(size.to_ne_bytes());
    }
    InfoBuffer::of_bytes(bytes)
}

const ALL: u32 = 15;
const NO_CHAIN: u32 = 7;

fn area(offset: u64, size: u64) -> RegionArea {
    RegionArea { offset, size }
}

#[test]
fn sparse_areas_are_all_that_may_be_mapped() {
    let info = RegionInfo::parse(&answer(ALL, 0x10000, &[(0x8000, 0x8000), (0, 0x4000)])).unwrap();
    assert_eq!(info.index.0, 2);
    assert_eq!(info.file_offset, 2 << 40);
    assert_eq!(info.mappable(), [area(0, 0x4000), area(0x8000, 0x8000)]);
    assert!(info.msix_mappable);
    assert_eq!(
        info.kind,
        Some(RegionType {
            kind: 0x8000_8086,
            subtype: 1
        })
    );
    assert_eq!(info.unknown_capabilities, [77]);
}

#[test]
fn without_sparse_areas_it_is_all_or_nothing() {
    let info = RegionInfo::parse(&answer(NO_CHAIN, 0x10000, &[])).unwrap();
    assert_eq!(info.mappable(), [area(0, 0x10000)]);
    let info = RegionInfo::parse(&answer(3, 0x10000, &[])).unwrap();
    assert_eq!(info.mappable(), []);
    let info = RegionInfo::parse(&answer(NO_CHAIN, 0, &[])).unwrap();
    assert_eq!(info.mappable(), []);
}

#[test]
fn no_sparse_area_at_all_means_nothing_may_be_mapped() {
    for areas in [&[][..], &[(0x1000, 0)]] {
        let info = RegionInfo::parse(&answer(ALL, 0x10000, areas)).unwrap();
        assert_eq!(info.mappable(), []);
    }
}

#[test]
fn an_area_outside_the_region_is_refused() {
    for bad in [(0xf000, 0x2000), (u64::MAX, 2), (0x10000, 1)] {
        assert!(matches!(
            RegionInfo::parse(&answer(ALL, 0x10000, &[bad])),
            Err(ChainError::ImpossibleRange { id: 1, .. })
        ));
    }
}

#[test]
fn areas_that_overlap_are_refused() {
    assert!(matches!(
        RegionInfo::parse(&answer(ALL, 0x10000, &[(0x1000, 0x2000), (0, 0x1001)])),
        Err(ChainError::ImpossibleRange { start: 0x1000, .. })
    ));
}

/// A region of a file that ends `missing` bytes early.
fn region(pages: u64, missing: u64, flags: u32) -> Region {
    let ram = Ram::memfd(c"region", 8 * page_size()).unwrap();
    let file = File::from(ram.file().unwrap().try_clone_to_owned().unwrap());
    let size = pages * page_size();
    let file_offset = 8 * page_size() + missing - size;
    Region::new(
        Arc::new(file),
        RegionInfo::new(RegionIndex(1), flags, size, file_offset),
    )
}

#[test]
fn bytes_written_are_read_and_mapped_at_the_regions_offset() {
    let region = region(2, 0, NO_CHAIN);
    region.write_u32(page_size(), 0x1234_5678).unwrap();
    assert_eq!(region.read_u32(page_size()).unwrap(), 0x1234_5678);
    assert_eq!(region.read_u16(page_size() + 2).unwrap(), 0x1234);
    region.write_u16(page_size(), 0xabcd).unwrap();
    assert_eq!(region.read_u32(page_size()).unwrap(), 0x1234_abcd);
    let mut through_the_file = [0; 4];
    region
        .file()
        .read_exact_at(&mut through_the_file, 7 * page_size())
        .unwrap();
    assert_eq!(u32::from_le_bytes(through_the_file), 0x1234_abcd);
    let mapping = region.map(area(page_size(), page_size())).unwrap();
    assert_eq!(mapping.size(), page_size());
}

#[test]
fn past_the_end_is_einval_and_touches_nothing() {
    let region = region(1, 0, NO_CHAIN);
    let size = region.info().size;
    for (offset, length) in [(size - 1, 2), (size, 1), (u64::MAX, 1)] {
        let mut data = vec![0; length];
        let error = region.read(offset, &mut data).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let error = region.write(offset, &data).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
    region.read(size, &mut []).unwrap();
    assert!(region.map(area(size, page_size())).is_err());
    assert!(region.map(area(u64::MAX, page_size())).is_err());
}

#[test]
fn a_short_read_is_an_error() {
    let region = region(1, 2, NO_CHAIN);
    let size = region.info().size;
    let mut data = [0; 4];
    region.read(size - 8, &mut data).unwrap();
    let error = region.read(size - 4, &mut data).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(error.to_string().contains("ended after 2"), "{error}");
}

#[test]
fn a_region_that_cannot_be_written_is_mapped_for_reading() {
    let region = region(1, 0, 5);
    let mapping = region.map(area(0, page_size())).unwrap();
    assert_eq!(mapping.access(), Access::ReadOnly);
}

#[test]
fn bars_are_numbered() {
    assert_eq!(RegionIndex::bar(0), Some(RegionIndex(0)));
    assert_eq!(RegionIndex::bar(5), Some(RegionIndex(5)));
    assert_eq!(RegionIndex::bar(6), None);
    assert_eq!(RegionIndex::bar(255), None);
}

proptest! {
    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 40..200)) {
        bytes[4] |= 8;
        bytes[12..16].copy_from_slice(&32u32.to_ne_bytes());
        bytes[32] &= 3;
        bytes[33..36].copy_from_slice(&[0, 1, 0]);
        bytes[36..40].copy_from_slice(&0u32.to_ne_bytes());
        if let Ok(info) = RegionInfo::parse(&InfoBuffer::of_bytes(bytes)) {
            let _ = info.mappable();
        }
    }
}
