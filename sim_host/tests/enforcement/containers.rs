//! Containers, groups, limits, and calls that are told to fail.

use crate::rig::{BAR2, EDU_AT, MEMORY_AND_MASTER, RAM_AT, Rig, errno, map, range};
use assigned_pci::HostFunction;
use iommu::Type1Container;
use memory_map::{Access, BackingObject, Iova};
use sim_host::{Call, FaultCause, FunctionSpec, GroupId, HostSpec, SimHost};

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
