//! What DMA reaches, what it does not, and what must never happen.

use crate::rig::{BAR_AT, BAR2, RAM_AT, Rig, errno, map, range};
use assigned_pci::HostFunction;
use iommu::Type1Container;
use memory_map::{Access, BackingObject, Iova};
use sim_host::{BrokenTranslation, BusErrorCause, FaultCause, Violation};
use std::sync::Arc;
use std::thread;

#[test]
fn bytes_move_only_where_something_is_mapped() {
    let rig = Rig::new();
    rig.dma_write(RAM_AT + 0xffe, b"text");
    rig.dma_write(BAR_AT + 0x12_3456, b"more");
    assert_eq!(&rig.ram(0xffe), b"text");
    assert_eq!(&rig.bar(0x12_3456), b"more");
    assert_eq!(&rig.dma_read(BAR_AT + 0x12_3456), b"more");
    rig.nothing_wrong();

    rig.dma_write(0x9000_0000, b"lost");
    assert_eq!(rig.dma_read(0x9000_0004), [0xff; 4]);
    let faults = rig.host.take_faults();
    let seen: Vec<_> = faults
        .iter()
        .map(|f| (&*f.function, f.iova.raw(), f.write, f.cause))
        .collect();
    assert_eq!(
        seen,
        [
            ("edu", 0x9000_0000, true, FaultCause::NotMapped),
            ("edu", 0x9000_0004, false, FaultCause::NotMapped)
        ]
    );
    assert_eq!(
        faults[0].to_string(),
        "edu: DMA write at 0x90000000 faults: not mapped"
    );
    assert!(rig.host.faults().is_empty());
}

#[test]
fn an_access_faults_at_the_page_where_the_mapping_ends() {
    let rig = Rig::new();
    rig.dma_write(RAM_AT + 0xfffe, b"text");
    assert_eq!(rig.host.faults()[0].iova.raw(), RAM_AT + 0x1_0000);
    let mut end = [0; 2];
    rig.ram.read(0xfffe, &mut end).unwrap();
    assert_eq!(&end, b"te");
}

#[test]
fn nothing_arrives_after_an_unmap() {
    let rig = Rig::new();
    rig.container.unmap_dma(range(BAR_AT, 0x40_0000)).unwrap();
    rig.dma_write(BAR_AT, b"text");
    assert_eq!(rig.bar(0), [0; 4]);
    assert_eq!(rig.host.faults().len(), 1);
    assert_eq!(rig.container.mappings().len(), 1);
}

#[test]
fn read_only_mappings_take_no_writes() {
    let rig = Rig::new();
    let iova = range(0x5000_0000, 0x1000);
    map(&rig.container, iova, rig.ram_va.address(), Access::ReadOnly).unwrap();
    rig.ram.write(0, b"keep").unwrap();
    rig.dma_write(0x5000_0000, b"text");
    assert_eq!(&rig.dma_read(0x5000_0000), b"keep");
    assert_eq!(rig.host.faults()[0].cause, FaultCause::ReadOnly);
}

#[test]
fn memory_that_goes_away_while_mapped_is_a_violation() {
    let rig = Rig::new();
    let Rig {
        host,
        edu,
        ram,
        ram_va,
        bar_va,
        container,
        ..
    } = &rig;
    rig.nothing_wrong();
    let second = ram.map_host().unwrap();
    map(
        container,
        range(0x5000_0000, 0x1000),
        second.address(),
        Access::ReadWrite,
    )
    .unwrap();
    drop(second);
    let expected = Violation::FreedWhileMapped {
        container: container.id(),
        iova: range(0x5000_0000, 0x1000),
        object: ram.label().into(),
    };
    assert_eq!(host.violations(), [expected]);
    edu.dma_write(Iova::new(0x5000_0000), b"text");
    assert_eq!(rig.ram(0), [0; 4]);
    assert!(matches!(
        host.violations()[1],
        Violation::DmaToFreed { write: true, .. }
    ));
    // Control: unmapped first, it is none.
    let third = ram.map_host().unwrap();
    map(
        container,
        range(0x6000_0000, 0x1000),
        third.address(),
        Access::ReadWrite,
    )
    .unwrap();
    container.unmap_dma(range(0x6000_0000, 0x1000)).unwrap();
    drop(third);
    assert_eq!(host.violations().len(), 2);
    let _ = (ram_va, bar_va);
}

#[test]
fn a_bar_that_stops_being_decoded_answers_nobody() {
    let rig = Rig::new();
    rig.peer.config_write(4, &[4, 0]).unwrap();
    assert!(matches!(
        rig.host.violations()[..],
        [Violation::DecodingOffWhileMapped { .. }]
    ));
    // Type1 does not revoke: the mapping is still there.
    assert_eq!(rig.container.mappings().len(), 2);
    rig.dma_write(BAR_AT, b"text");
    assert_eq!(rig.dma_read(BAR_AT), [0xff; 4]);
    assert_eq!(rig.bar(0), [0; 4]);
    assert_eq!(rig.host.faults(), []);
    let expected = BusErrorCause::PeerNotDecoding {
        peer: "memory".into(),
        bar: BAR2,
    };
    assert_eq!(rig.host.bus_errors()[0].cause, expected);
    let mut data = [0; 4];
    assert_eq!(
        errno(rig.peer.bar_read(BAR2, 0, &mut data)),
        Some(libc::EIO)
    );
    assert_eq!(errno(rig.peer.bar_write(BAR2, 0, &data)), Some(libc::EIO));
    let again = map(
        &rig.container,
        range(0x5000_0000, 0x1000),
        rig.bar_va.address(),
        Access::ReadWrite,
    );
    assert_eq!(errno(again), Some(libc::EFAULT));

    // Control: decoded again, it all works.
    rig.peer.config_write(4, &[6, 0]).unwrap();
    rig.dma_write(BAR_AT, b"text");
    assert_eq!(&rig.bar(0), b"text");
    rig.peer.bar_read(BAR2, 0, &mut data).unwrap();
    assert_eq!(&data, b"text");
}

#[test]
fn unmapping_before_decoding_goes_off_is_no_violation() {
    let rig = Rig::new();
    rig.container.unmap_dma(range(BAR_AT, 0x40_0000)).unwrap();
    rig.peer.config_write(4, &[0, 0]).unwrap();
    rig.nothing_wrong();
}

#[test]
fn dma_needs_bus_mastering() {
    let rig = Rig::new();
    rig.edu.config_write(4, &[2, 0]).unwrap();
    rig.dma_write(RAM_AT, b"text");
    assert_eq!(rig.ram(0), [0; 4]);
    assert_eq!(
        rig.host.bus_errors()[0].cause,
        BusErrorCause::BusMasteringOff
    );
}

#[test]
fn broken_translation_moves_bytes_elsewhere() {
    let rig = Rig::new();
    let check = |how, arrives: bool| {
        rig.ram.write(0, &[0; 4]).unwrap();
        rig.host.break_translation(how);
        rig.dma_write(RAM_AT, b"text");
        assert_eq!(&rig.ram(0) == b"text", arrives, "{how:?}");
    };
    check(None, true);
    check(Some(BrokenTranslation::Drop), false);
    rig.nothing_wrong();
    check(Some(BrokenTranslation::Shift(0x1000)), false);
    assert_eq!(&rig.ram(0x1000), b"text");
    check(Some(BrokenTranslation::Identity), false);
    assert_eq!(rig.host.bus_errors()[0].cause, BusErrorCause::Unclaimed);
    // Past the IOMMU lies the bus: RAM starts at 4 GiB there.
    rig.dma_write(0x1_0000_0000, b"bare");
    assert_eq!(&rig.ram(0), b"bare");
    check(None, true);
}

/// DMA and unmaps from many threads: once an unmap has returned, nothing arrives any more.
#[test]
fn an_unmap_that_has_returned_is_final() {
    let rig = Rig::new();
    let iova = range(0x5000_0000, 0x1000);
    thread::scope(|scope| {
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        for _ in 0..3 {
            let stop = Arc::clone(&stop);
            let edu = &rig.edu;
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    edu.dma_write(Iova::new(0x5000_0000), b"text");
                }
            });
        }
        for _ in 0..200 {
            map(
                &rig.container,
                iova,
                rig.ram_va.address(),
                Access::ReadWrite,
            )
            .unwrap();
            thread::yield_now();
            rig.container.unmap_dma(iova).unwrap();
            rig.ram.write(0, b"none").unwrap();
            thread::yield_now();
            assert_eq!(&rig.ram(0), b"none");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(rig.host.violations(), []);
}
