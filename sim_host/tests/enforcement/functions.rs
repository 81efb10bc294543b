//! The functions: the engine, odd BARs, and what is refused.

use crate::rig::{BAR_AT, BAR0, BAR2, MEMORY_AND_MASTER, RAM_AT, Rig, errno, map, map_bar, range};
use assigned_pci::{BarIndex, HostFunction};
use memory_map::Access;
use sim_host::{BarKind, BarSpec, BusErrorCause, FunctionSpec, SimFunction, SimHost};

#[test]
fn the_engine_does_what_its_registers_say() {
    let rig = Rig::new();
    let set = |offset: u64, value: u64| {
        rig.edu
            .bar_write(BAR0, offset, &value.to_le_bytes())
            .unwrap()
    };
    let run = |from: u64, to: u64, count: u64, command: u64| {
        set(0x80, from);
        set(0x88, to);
        set(0x90, count);
        set(0x98, command);
    };
    let mut id = [0; 4];
    rig.edu.bar_read(BAR0, 0, &mut id).unwrap();
    assert_eq!(u32::from_le_bytes(id), 0x0100_00ed);
    rig.ram.write(0, b"text").unwrap();
    run(RAM_AT, 0x4_0ffc, 4, 1);
    run(0x4_0ffc, BAR_AT + 8, 4, 3);
    assert_eq!(&rig.bar(8), b"text");
    rig.nothing_wrong();
    for (buffer, count) in [
        (0x4_0ffd, 4),
        (0x3_ffff, 4),
        (0, 4),
        (0x4_0000, 0x1001),
        (u64::MAX, 2),
    ] {
        run(buffer, BAR_AT, count, 3);
        let cause = BusErrorCause::BufferOutOfRange { buffer, count };
        assert_eq!(rig.host.take_bus_errors()[0].cause, cause);
    }
    // A fault fills the buffer with ones.
    run(0x9000_0000, 0x4_0000, 4, 1);
    run(0x4_0000, BAR_AT, 4, 3);
    assert_eq!(rig.bar(0), [0xff; 4]);
}

#[test]
fn an_engine_can_start_another_one_and_cannot_start_itself() {
    let rig = Rig::new();
    let spec = FunctionSpec::edu("second").with_command(MEMORY_AND_MASTER);
    let second = rig.host.add_function(spec).unwrap();
    rig.container.attach(second.group()).unwrap();
    let registers = map_bar(&second, BAR0);
    let own = map_bar(&rig.edu, BAR0);
    for (at, va) in [(0x5000_0000, &registers), (0x6000_0000, &own)] {
        map(
            &rig.container,
            range(at, 0x10_0000),
            va.address(),
            Access::ReadWrite,
        )
        .unwrap();
    }
    // What the first engine writes into the second one's registers: copy RAM to its buffer.
    let mut command = Vec::new();
    for word in [RAM_AT, 0x4_0000, 4, 1u64] {
        command.extend(word.to_le_bytes());
    }
    rig.ram.write(0, b"text").unwrap();
    rig.ram.write(0x100, &command).unwrap();
    let set =
        |f: &SimFunction, at: u64, value: u64| f.bar_write(BAR0, at, &value.to_le_bytes()).unwrap();
    let run = |f: &SimFunction, from: u64, to: u64, count: u64, command: u64| {
        for (at, value) in [(0x80, from), (0x88, to), (0x90, count), (0x98, command)] {
            set(f, at, value);
        }
    };
    run(&rig.edu, RAM_AT + 0x100, 0x4_0000, 32, 1);
    run(&rig.edu, 0x4_0000, 0x5000_0080, 32, 3);
    run(&second, 0x4_0000, BAR_AT, 4, 3);
    assert_eq!(&rig.bar(0), b"text");
    // To itself: it is busy, so that its registers do not change.
    run(&rig.edu, 0x4_0000, 0x6000_0080, 32, 3);
    let mut destination = [0; 8];
    rig.edu.bar_read(BAR0, 0x88, &mut destination).unwrap();
    assert_eq!(u64::from_le_bytes(destination), 0x6000_0080);
    drop(rig.container);
    assert_eq!(rig.host.faults(), []);
}

#[test]
fn bars_can_be_odd() {
    let host = SimHost::default();
    let spec = FunctionSpec::new("odd", 1, 2)
        .with_bar(BAR0, BarSpec::new(BarKind::Memory64, 0x3000))
        .with_bar(
            BAR2,
            BarSpec::new(BarKind::Memory32, 0x4000).with_areas([(0, 0x1000), (0x2000, 0x2000)]),
        )
        .with_bar(BarIndex::ALL[3], BarSpec::new(BarKind::Memory32, 0x80))
        .with_bar(BarIndex::ALL[4], BarSpec::new(BarKind::Io, 0x20));
    let odd = host.add_function(spec).unwrap();
    let areas = |bar| -> Vec<(u64, u64)> {
        let bar = odd.bar(bar).unwrap().unwrap();
        bar.areas
            .iter()
            .map(|area| (area.offset, area.size))
            .collect()
    };
    assert_eq!(areas(BAR0), [(0, 0x3000)]);
    assert!(odd.bar(BarIndex::ALL[1]).unwrap().is_none());
    assert_eq!(areas(BAR2), [(0, 0x1000), (0x2000, 0x2000)]);
    assert_eq!(areas(BarIndex::ALL[3]), []);
    assert_eq!(areas(BarIndex::ALL[4]), []);
    let ids = || odd.bar(BAR2).unwrap().unwrap().areas[1].backing.id();
    assert_eq!(ids(), ids());

    let bad = |bar, kind, size| {
        let spec = FunctionSpec::new("bad", 1, 2).with_bar(bar, BarSpec::new(kind, size));
        errno(host.add_function(spec))
    };
    assert_eq!(
        bad(BarIndex::ALL[5], BarKind::Memory64, 0x1000),
        Some(libc::EINVAL)
    );
    assert_eq!(bad(BAR0, BarKind::Memory32, 0), Some(libc::EINVAL));
    assert_eq!(bad(BAR0, BarKind::Memory32, 1 << 31), Some(libc::ENOSPC));
    assert_eq!(
        errno(host.add_function(FunctionSpec::new("odd", 1, 2))),
        Some(libc::EEXIST)
    );
}

#[test]
fn bar_accesses_are_checked() {
    let rig = Rig::new();
    let read = |bar, offset, len: usize| errno(rig.peer.bar_read(bar, offset, &mut vec![0; len]));
    for (offset, len) in [(0, 1), (2, 2), (4, 4), (8, 8), (0x3f_fff8, 8)] {
        assert_eq!(read(BAR2, offset, len), None);
    }
    for (offset, len) in [
        (0, 0),
        (0, 3),
        (0, 16),
        (1, 2),
        (4, 8),
        (0x40_0000, 1),
        (u64::MAX, 1),
    ] {
        assert_eq!(
            read(BAR2, offset, len),
            Some(libc::EINVAL),
            "{len} at {offset:#x}"
        );
    }
    assert_eq!(read(BarIndex::ALL[1], 0, 4), Some(libc::EINVAL));
    assert_eq!(
        errno(rig.peer.config_read(0xfe, &mut [0; 4])),
        Some(libc::EINVAL)
    );
    assert_eq!(
        errno(rig.peer.config_write(0xfe, &[0; 4])),
        Some(libc::EINVAL)
    );
}

#[test]
fn a_function_that_is_gone_reads_as_all_ones() {
    let rig = Rig::new();
    rig.peer.set_gone(true);
    let mut data = [0; 4];
    rig.peer.config_read(0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    data.fill(0);
    rig.peer.bar_read(BAR2, 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    rig.peer.config_write(4, &[0, 0]).unwrap();
    rig.dma_write(BAR_AT, b"text");
    assert_eq!(rig.host.bus_errors().len(), 1);
    rig.peer.set_gone(false);
    assert!(rig.peer.decodes_memory());
    assert_eq!(rig.host.violations(), []);
}

#[test]
fn reset_is_there_or_not() {
    let rig = Rig::new();
    assert_eq!(errno(rig.peer.reset()), Some(libc::ENOTTY));
    let spec = FunctionSpec::edu("other").with_reset();
    let other = rig.host.add_function(spec).unwrap();
    other.bar_write(BAR0, 0x80, &7u64.to_le_bytes()).unwrap();
    other.reset().unwrap();
    let mut data = [0xee; 8];
    other.bar_read(BAR0, 0x80, &mut data).unwrap();
    assert_eq!(data, [0; 8]);
    assert!(other.decodes_memory());
}
