//! The simulated host enforces: each rule with its negative control, from outside.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

use std::io;
use std::sync::Arc;
use std::thread;

use assigned_pci::{BarIndex, HostFunction};
use iommu::Type1Container;
use memory_map::{Access, BackingObject, HostMapping, HostVa, Iova, IovaRange};
use sim_host::{
    BarKind, BarSpec, BrokenTranslation, BusErrorCause, Call, FaultCause, FunctionSpec, GroupId,
    HostSpec, SimBarArea, SimContainer, SimFunction, SimHost, SimRam, Violation,
};

const MEMORY_AND_MASTER: u16 = 6;
const BAR0: BarIndex = BarIndex::ALL[0];
const BAR2: BarIndex = BarIndex::ALL[2];
const EDU_AT: u64 = 0x20_0000;
const RAM_AT: u64 = 0x10_0000;
const BAR_AT: u64 = 0x100_0000;

fn range(start: u64, size: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), size).unwrap()
}

fn map(c: &SimContainer, iova: IovaRange, va: HostVa, access: Access) -> io::Result<()> {
    #[expect(
        unsafe_code,
        reason = "the simulated host's addresses are only numbers"
    )]
    // SAFETY: no memory lies behind a simulated host's address.
    unsafe {
        c.map_dma(iova, va, access)
    }
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn map_bar(function: &SimFunction, bar: BarIndex) -> Box<dyn HostMapping> {
    let bar = function.bar(bar).unwrap().unwrap();
    let area: &SimBarArea = bar.areas[0].backing.downcast_ref().unwrap();
    area.map_host().unwrap()
}

/// Two functions behind one container, with RAM and a BAR mapped.
struct Rig {
    host: SimHost,
    edu: Arc<SimFunction>,
    peer: Arc<SimFunction>,
    container: SimContainer,
    ram: SimRam,
    ram_va: Box<dyn HostMapping>,
    bar_va: Box<dyn HostMapping>,
}

impl Rig {
    fn new() -> Self {
        let host = SimHost::default();
        let spec = FunctionSpec::edu("edu").with_command(MEMORY_AND_MASTER);
        let edu = host.add_function(spec).unwrap();
        let spec = FunctionSpec::shared_memory("memory", 0x40_0000);
        let peer = host
            .add_function(spec.with_command(MEMORY_AND_MASTER))
            .unwrap();
        let container = host.container(&[&edu, &peer]).unwrap();
        let ram = host.ram(0x1_0000).unwrap();
        let ram_va = ram.map_host().unwrap();
        let bar_va = map_bar(&peer, BAR2);
        map(
            &container,
            range(RAM_AT, 0x1_0000),
            ram_va.address(),
            Access::ReadWrite,
        )
        .unwrap();
        map(
            &container,
            range(BAR_AT, 0x40_0000),
            bar_va.address(),
            Access::ReadWrite,
        )
        .unwrap();
        Self {
            host,
            edu,
            peer,
            container,
            ram,
            ram_va,
            bar_va,
        }
    }

    fn ram(&self, offset: u64) -> [u8; 4] {
        let mut data = [0; 4];
        self.ram.read(offset, &mut data).unwrap();
        data
    }

    fn bar(&self, offset: u64) -> [u8; 4] {
        let mut data = [0; 4];
        self.peer
            .bar_memory(BAR2)
            .unwrap()
            .read(offset, &mut data)
            .unwrap();
        data
    }

    fn dma_read(&self, iova: u64) -> [u8; 4] {
        let mut data = [0; 4];
        self.edu.dma_read(Iova::new(iova), &mut data);
        data
    }

    fn dma_write(&self, iova: u64, data: &[u8]) {
        self.edu.dma_write(Iova::new(iova), data);
    }

    fn nothing_wrong(&self) {
        assert_eq!(self.host.faults(), []);
        assert_eq!(self.host.bus_errors(), []);
        assert_eq!(self.host.violations(), []);
    }
}

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
fn functions_without_a_container_reach_nothing() {
    let rig = Rig::new();
    let spec = FunctionSpec::edu("other").with_command(MEMORY_AND_MASTER);
    let other = rig.host.add_function(spec).unwrap();
    other.dma_write(Iova::new(RAM_AT), b"text");
    assert_eq!(rig.host.take_faults()[0].cause, FaultCause::NoContainer);
    rig.container.attach(other.group()).unwrap();
    other.dma_write(Iova::new(RAM_AT), b"text");
    assert_eq!(&rig.ram(0), b"text");
    rig.nothing_wrong();
    let Rig {
        host,
        container,
        ram_va,
        bar_va,
        edu,
        ..
    } = rig;
    drop(container);
    edu.dma_write(Iova::new(RAM_AT), b"late");
    assert_eq!(host.faults()[0].cause, FaultCause::NoContainer);
    drop((ram_va, bar_va));
    assert_eq!(host.violations(), []);
    assert_eq!(host.mappings(), []);
}

#[test]
fn one_container_does_not_show_another_ones_mappings() {
    let rig = Rig::new();
    let other = rig
        .host
        .add_function(FunctionSpec::edu("other").with_command(6))
        .unwrap();
    let second = rig.host.container(&[&other]).unwrap();
    map(
        &second,
        range(EDU_AT, 0x1000),
        rig.ram_va.address(),
        Access::ReadWrite,
    )
    .unwrap();
    other.dma_write(Iova::new(RAM_AT), b"text");
    assert_eq!(rig.host.take_faults().len(), 1);
    other.dma_write(Iova::new(EDU_AT), b"text");
    assert_eq!(&rig.ram(0), b"text");
    assert_eq!(
        (rig.container.mappings().len(), second.mappings().len()),
        (2, 1)
    );
    assert_eq!(errno(second.attach(rig.edu.group())), Some(libc::EBUSY));
}

#[test]
fn a_container_takes_no_calls_without_an_iommu() {
    let rig = Rig::new();
    let bare = rig.host.open_container();
    let va = rig.ram_va.address();
    assert_eq!(errno(bare.info()), Some(libc::EINVAL));
    assert_eq!(
        errno(map(&bare, range(0, 0x1000), va, Access::ReadWrite)),
        Some(libc::EINVAL)
    );
    assert_eq!(errno(bare.unmap_dma(range(0, 0x1000))), Some(libc::EINVAL));
    assert_eq!(errno(bare.unmap_all()), Some(libc::EINVAL));
    assert_eq!(errno(bare.set_iommu()), Some(libc::EINVAL));
    assert_eq!(errno(bare.attach(GroupId(99))), Some(libc::ENODEV));
    assert_eq!(errno(rig.container.set_iommu()), Some(libc::EINVAL));
}

#[test]
fn a_joining_group_shrinks_the_allowed_ranges() {
    let rig = Rig::new();
    let reserving = |name, range| FunctionSpec::edu(name).with_reserved(range);
    let fits = rig
        .host
        .add_function(reserving("fits", range(0x8000_0000, 0x1_0000)))
        .unwrap();
    let clashes = rig
        .host
        .add_function(reserving("clashes", range(RAM_AT, 0x1000)))
        .unwrap();
    let before = rig.container.info().unwrap().allowed;
    assert_eq!(
        errno(rig.container.attach(clashes.group())),
        Some(libc::EINVAL)
    );
    assert_eq!(rig.container.info().unwrap().allowed, before);
    rig.container.attach(fits.group()).unwrap();
    assert_eq!(
        rig.container.info().unwrap().allowed.len(),
        before.len() + 1
    );
    let result = map(
        &rig.container,
        range(0x8000_0000, 0x1000),
        rig.ram_va.address(),
        Access::ReadWrite,
    );
    assert_eq!(errno(result), Some(libc::EINVAL));
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

#[test]
fn any_call_can_be_told_to_fail() {
    let rig = Rig::new();
    let Rig {
        host,
        container,
        peer,
        ram,
        ram_va,
        ..
    } = &rig;
    let iova = range(0x5000_0000, 0x1000);
    let va = ram_va.address();
    let before = host.count(Call::MapDma);
    host.fail(Call::MapDma, 2, libc::ENOMEM);
    map(container, iova, va, Access::ReadWrite).unwrap();
    let next = range(0x5000_1000, 0x1000);
    assert_eq!(
        errno(map(container, next, va, Access::ReadWrite)),
        Some(libc::ENOMEM)
    );
    map(container, next, va, Access::ReadWrite).unwrap();
    assert_eq!(host.count(Call::MapDma), before + 3);

    host.fail(Call::UnmapDma, 1, libc::EIO);
    assert_eq!(errno(container.unmap_dma(iova)), Some(libc::EIO));
    assert_eq!(container.mappings().len(), 4);
    host.fail_though_done(Call::UnmapDma, 1, libc::EIO);
    assert_eq!(errno(container.unmap_dma(iova)), Some(libc::EIO));
    assert_eq!(container.mappings().len(), 3);
    host.fail_though_done(Call::MapDma, 1, libc::EIO);
    assert_eq!(
        errno(map(container, iova, va, Access::ReadWrite)),
        Some(libc::EIO)
    );
    assert_eq!(container.mappings().len(), 4);

    for call in [
        Call::Info,
        Call::UnmapAll,
        Call::ConfigRead,
        Call::ConfigWrite,
        Call::Bar,
        Call::BarRead,
        Call::BarWrite,
        Call::Reset,
        Call::MapHost,
    ] {
        host.fail_from_now(call, libc::EPERM);
    }
    let mut data = [0; 4];
    assert_eq!(errno(container.info()), Some(libc::EPERM));
    assert_eq!(errno(container.unmap_all()), Some(libc::EPERM));
    assert_eq!(errno(peer.config_read(0, &mut data)), Some(libc::EPERM));
    assert_eq!(errno(peer.config_write(4, &data)), Some(libc::EPERM));
    assert_eq!(errno(peer.bar(BAR2)), Some(libc::EPERM));
    assert_eq!(errno(peer.bar_read(BAR2, 0, &mut data)), Some(libc::EPERM));
    assert_eq!(errno(peer.bar_write(BAR2, 0, &data)), Some(libc::EPERM));
    assert_eq!(errno(peer.reset()), Some(libc::EPERM));
    assert_eq!(ram.map_host().unwrap_err().raw(), libc::EPERM);
    assert_eq!(host.count(Call::Reset), 1);
    let last = host.calls().pop().unwrap();
    assert_eq!(
        (last.call, last.result.map_err(memory_map::Errno::raw)),
        (Call::MapHost, Err(libc::EPERM))
    );
    host.stop_failing();
    assert_eq!(
        container.unmap_all().unwrap(),
        0x1_0000 + 0x40_0000 + 0x2000
    );
    assert_eq!(host.violations(), []);
}

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

#[test]
fn two_functions_of_a_group_share_its_container() {
    let host = SimHost::default();
    let plug = |name| {
        host.add_function(FunctionSpec::edu(name).with_command(6).in_group(GroupId(7)))
            .unwrap()
    };
    let (one, two) = (plug("one"), plug("two"));
    assert_eq!(one.group(), two.group());
    let container = host.container(&[&one, &two]).unwrap();
    let second = host.open_container();
    assert_eq!(errno(second.attach(two.group())), Some(libc::EBUSY));
    drop(container);
    second.attach(two.group()).unwrap();
}

#[test]
fn limits_come_from_the_spec() {
    let host = SimHost::new(HostSpec {
        aperture_last: Iova::new(0x7f_ffff_ffff),
        reserved: vec![range(0xfee0_0000, 0x10_0000), range(0x1_0000_0000, 0x1000)],
        entry_limit: 1,
        locked_limit: Some(0x1000),
        page_sizes: 0x1000,
    });
    let edu = host.add_function(FunctionSpec::edu("edu")).unwrap();
    let container = host.container(&[&edu]).unwrap();
    let info = container.info().unwrap();
    assert_eq!(
        (info.page_sizes, info.entries_left, info.allowed.len()),
        (0x1000, Some(1), 3)
    );
    assert_eq!(
        info.allowed.last().unwrap().last(),
        Iova::new(0x7f_ffff_ffff)
    );
    let ram = host.ram(0x2000).unwrap();
    let va = ram.map_host().unwrap();
    let try_map = |iova, size| {
        errno(map(
            &container,
            range(iova, size),
            va.address(),
            Access::ReadWrite,
        ))
    };
    assert_eq!(try_map(0, 0x2000), Some(libc::ENOMEM));
    assert_eq!(try_map(0, 0x1000), None);
    assert_eq!(host.locked_bytes(), 0x1000);
    host.set_locked_limit(None);
    assert_eq!(try_map(0x1000, 0x1000), Some(libc::ENOSPC));
    assert_eq!(errno(host.ram(0)), Some(libc::EINVAL));
    assert_eq!(errno(host.ram(0x1001)), Some(libc::EINVAL));
    drop(container);
}

#[test]
fn host_mappings_are_counted_and_never_share_an_address() {
    let rig = Rig::new();
    assert_eq!(rig.host.host_mappings(), 2);
    let first = rig.ram.map_host().unwrap();
    let address = first.address();
    drop(first);
    assert_ne!(rig.ram.map_host().unwrap().address(), address);
    assert_eq!(rig.host.host_mappings(), 2);
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
