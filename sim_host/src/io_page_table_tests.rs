use super::*;
use crate::physical::Storage;
use crate::sparse::SparseMemory;

fn range(start: u64, size: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), size).unwrap()
}

fn limits() -> Limits {
    Limits {
        alignment: PAGE,
        allowed: vec![range(0, 0x10_0000), range(0x20_0000, 0x10_0000)],
    }
}

fn pages(writable: bool) -> Arc<Pages> {
    let object = PhysicalObject {
        label: "ram".into(),
        base: 0,
        storage: Storage::Memory(SparseMemory::new(0x10_0000)),
        owner: None,
    };
    Arc::new(Pages {
        source: Source::File,
        object: Some(Arc::new(object)),
        offset: 0,
        writable,
    })
}

fn map(table: &mut IoPageTable, iova: IovaRange, start: u64) -> Result<(), i32> {
    let pages = pages(true);
    let parts = [(Arc::clone(&pages), start)];
    table
        .check(&limits(), iova, Access::ReadWrite, &parts)
        .map_err(Errno::raw)?;
    table.insert(vec![Area {
        iova,
        access: Access::ReadWrite,
        pages,
        start,
    }]);
    Ok(())
}

#[test]
fn checks_come_in_the_kernels_order() {
    let mut table = IoPageTable::default();
    map(&mut table, range(0xf_f000, 0x1000), 0).unwrap();
    // Misaligned and reserved and mapped.
    assert_eq!(map(&mut table, range(0xf_f001, 0x1000), 0), Err(EINVAL));
    assert_eq!(map(&mut table, range(0xf_f000, 0x801), 0), Err(EINVAL));
    // Reserved and mapped.
    assert_eq!(map(&mut table, range(0xf_f000, 0x2000), 0), Err(EINVAL));
    // Mapped and an offset that is misaligned.
    assert_eq!(map(&mut table, range(0xf_f000, 0x1000), 8), Err(EEXIST));
    assert_eq!(map(&mut table, range(0, 0x1000), 8), Err(EINVAL));
}

#[test]
fn an_unmap_that_bisects_has_taken_down_what_lies_before() {
    let mut table = IoPageTable::default();
    for at in [0, 0x1000, 0x4000] {
        map(&mut table, range(at, 0x1000), 0).unwrap();
    }
    map(&mut table, range(0x8000, 0x2000), 0).unwrap();
    assert_eq!(table.unmap(range(0, 0x9000)), Err(Errno::new(ENOENT)));
    assert_eq!(table.areas().count(), 1);
    assert_eq!(table.unmap(range(0x9000, 0x4000)), Err(Errno::new(ENOENT)));
    assert_eq!(table.unmap(range(0x7000, 0x4000)), Ok(0x2000));
    assert_eq!(table.unmap(range(0x7000, 0x4000)), Ok(0));
}

#[test]
fn pages_are_found_across_areas_and_gaps_are_not() {
    let mut table = IoPageTable::default();
    map(&mut table, range(0, 0x2000), 0x3000).unwrap();
    map(&mut table, range(0x2000, 0x1000), 0).unwrap();
    let found: Vec<_> = table
        .pages(range(0x1000, 0x2000))
        .unwrap()
        .into_iter()
        .map(|(_, start, bytes)| (start, bytes))
        .collect();
    assert_eq!(found, [(0x4000, 0x1000), (0, 0x1000)]);
    assert!(table.pages(range(0x1000, 0x3000)).is_err());
    assert!(table.pages(range(0x3000, 0x1000)).is_err());
}

#[test]
fn what_is_mapped_or_promised_keeps_devices_out() {
    let mut table = IoPageTable::default();
    map(&mut table, range(0x4000, 0x1000), 0).unwrap();
    table.promise(&[range(0x8000, 0x1000)], &limits()).unwrap();
    let attach = |reserved| table.check_device(&[reserved], PAGE).map_err(Errno::raw);
    assert_eq!(attach(range(0x4000, 0x1000)), Err(EADDRINUSE));
    assert_eq!(attach(range(0x7000, 0x1800)), Err(EADDRINUSE));
    assert_eq!(attach(range(0x9000, 0x1000)), Ok(()));
    assert_eq!(table.check_device(&[], 0x2000), Err(Errno::new(EADDRINUSE)));
}

#[test]
fn promises_are_replaced_whole_or_not_at_all() {
    let mut table = IoPageTable::default();
    table.promise(&[range(0, 0x1000)], &limits()).unwrap();
    let refused = |table: &mut IoPageTable, ranges: &[IovaRange]| {
        table.promise(ranges, &limits()).map_err(Errno::raw)
    };
    let overlapping = [range(0x1000, 0x2000), range(0x2000, 0x1000)];
    assert_eq!(refused(&mut table, &overlapping), Err(EINVAL));
    assert_eq!(refused(&mut table, &[range(0x1000, 1)]), Err(EINVAL));
    let reserved = [range(0x10_0000, 0x1000)];
    assert_eq!(refused(&mut table, &reserved), Err(EADDRINUSE));
    assert!(table.check_device(&[range(0, 0x10)], PAGE).is_err());
    table.promise(&[range(0x2000, 0x1000)], &limits()).unwrap();
    assert!(table.check_device(&[range(0, 0x10)], PAGE).is_ok());
}

#[test]
fn small_pages_cannot_be_asked_for_late() {
    let mut table = IoPageTable::default();
    table.set_large_pages(false, true).unwrap();
    assert!(!table.large_pages());
    table.set_large_pages(true, true).unwrap();
    map(&mut table, range(0, 0x1000), 0).unwrap();
    assert_eq!(table.set_large_pages(false, true), Err(Errno::new(EINVAL)));
    table.set_large_pages(false, false).unwrap();
    assert_eq!(table.alignment(), PAGE);
}
