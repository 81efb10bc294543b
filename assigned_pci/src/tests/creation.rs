//! What a function is made of, and what is refused.

use std::sync::Arc;

use memory_map::{Reach, Reason, RegionKind, RegionManager};

use super::fake::*;
use crate::{AssignedFunction, BarIndex, BarKind, FunctionOptions, HostCall};

#[test]
fn one_region_for_each_memory_bar() {
    let bench = Bench::new(
        FakeHost::new()
            .named("0000:00:06.0")
            .bar(0, MEMORY_32, 0x100, &[])
            .bar(1, IO, 0x20, &[])
            .whole_bar(2, MEMORY_64_PREFETCHABLE, 0x40_0000),
    );
    assert_eq!(bench.function.name(), "0000:00:06.0");
    assert_eq!(bench.function.vendor_device().to_string(), "1234:5678");
    let bars = bench.function.bars();
    let of = |index: usize| bars[index];
    assert_eq!(bars.len(), 3);
    assert_eq!((of(0).index.get(), of(0).size), (0, 0x100));
    assert_eq!((of(1).kind, of(1).region), (BarKind::Io, None));
    let prefetchable_64 = BarKind::Memory {
        is_64_bit: true,
        prefetchable: true,
    };
    assert_eq!((of(2).kind, of(2).enabled), (prefetchable_64, false));
    assert_eq!(of(2).region, bench.function.region_of(BarIndex::ALL[2]));
    assert_eq!(
        bench.function.bar_of(of(2).region.unwrap()),
        Some(BarIndex::ALL[2])
    );
    assert_eq!(bench.function.region_of(BarIndex::ALL[1]), None);
    assert_eq!(bench.function.region_of(BarIndex::ALL[3]), None);
    assert_eq!(bench.view(), []);

    let _ = bench.bar(0, 0x9000_0000);
    let _ = bench.bar(2, 0x8000_0000);
    let _ = bench.command(ON);
    let view = bench.map.view();
    let names: Vec<_> = view.iter().map(|segment| segment.name.as_str()).collect();
    assert_eq!(names, ["0000:00:06.0 BAR2", "0000:00:06.0 BAR0"]);
    assert!(view.iter().all(|s| s.kind == RegionKind::DeviceMemory));
    assert_eq!(
        bench.mapped(),
        [0x8000_0000],
        "BAR 0 is visible, not mapped"
    );
    let small = Reason::SmallerThanPage { page: 0x1000 };
    assert_eq!(bench.reach(0), Reach::Unavailable(small));
}

#[test]
fn a_function_that_decodes_is_quiet_once_it_is_assigned() {
    let host = FakeHost::new().set_dword(0x04, 0x0007).assign();
    let function = host.unwrap();
    let mut word = [0; 2];
    assert_eq!(function.config_read(COMMAND, &mut word), None);
    assert_eq!(word, [0, 0]);

    let host = FakeHost::new().set_dword(0x04, 0x0007);
    host.refuse.lock().config_write = true;
    assert_eq!(host.refusal(), "fake: writing the command register failed");
}

#[test]
fn dropping_and_removing_take_the_regions_out() {
    let bench = Bench::with_64_bit_bar();
    let _ = bench.bar(2, 0x8000_0000);
    let _ = bench.command(ON);
    let Bench {
        function,
        map,
        mapped,
        target,
        switch,
        ..
    } = bench;
    assert_eq!(switch.state(), None);
    let outcome = function.remove();
    assert_eq!(outcome.unmaps(), 1);
    assert!(mapped.lock().is_empty());
    assert_eq!(map.view(), []);
    assert_eq!(map.reach(), []);
    let mut dword = [0; 4];
    assert_eq!(function.config_read(0, &mut dword), None);
    assert_eq!(dword, [0xff; 4], "it is gone");
    assert_eq!(function.config_write(COMMAND, &[6]), Default::default());
    assert_eq!(function.remove(), Default::default());
    assert_eq!(function.reset(), Default::default());
    drop(function);

    let host = Arc::new(FakeHost::new().whole_bar(0, MEMORY_32, 0x1000));
    let options = FunctionOptions::default();
    let function = AssignedFunction::new(host, map.clone(), &options).unwrap();
    let _ = function.config_write(COMMAND, &[6]);
    assert_eq!(map.view().len(), 1);
    drop(function);
    assert_eq!(map.view(), []);
    assert_eq!(map.reach(), []);
    let _ = target.unregister();
}

#[test]
fn what_is_removed_masters_the_bus_no_more_and_goes_on_decoding() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    bench.events();
    assert!(bench.function.remove().is_ok());
    let quiet = Event::ConfigWrite(COMMAND, 0x0002_u16.to_le_bytes().to_vec());
    assert_eq!(bench.events(), [quiet, Event::Unmap(0x8000_0000)]);
    // Nobody turns it on again who is in the middle of something.
    bench.function.host().config_write(COMMAND, &[6]).unwrap();
    assert_eq!(bench.host.command(), 2);
    // Its end asks for nothing more.
    bench.events();
    drop(bench.function);
    assert_eq!(*bench.host.log.lock(), []);
}

#[test]
fn a_removal_whose_host_refuses_says_so_and_is_carried_out() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    bench.host.refuse.lock().config_write = true;
    let outcome = bench.function.remove();
    let calls: Vec<_> = outcome.host_errors.iter().map(|error| error.call).collect();
    assert_eq!(calls, [HostCall::ConfigWrite(COMMAND)]);
    assert_eq!(bench.mapped(), []);
}

#[test]
fn a_region_that_somebody_else_removed_is_an_error_and_no_panic() {
    let bench = Bench::new(
        FakeHost::new()
            .whole_bar(0, MEMORY_32, 0x1000)
            .whole_bar(1, MEMORY_32, 0x1000),
    );
    let _ = bench.bar(0, 0x8000_0000);
    let mut change = bench.map.change();
    change.remove(bench.function.region_of(BarIndex::ALL[0]).unwrap());
    change.commit().unwrap();
    let _ = bench.bar(1, 0x9000_0000);
    let outcome = bench.command(ON);
    assert_eq!(outcome.map_errors.len(), 1);
    // The other one comes, goes and is revoked all the same.
    assert_eq!(bench.mapped(), [0x9000_0000]);
    let epoch = bench.host.backing(1).epoch();
    let outcome = bench.command(OFF);
    assert!(
        outcome.map_errors.is_empty(),
        "nothing was asked of the first"
    );
    assert_eq!(bench.mapped(), []);
    assert_ne!(bench.host.backing(1).epoch(), epoch);
    let epoch = bench.host.backing(1).epoch();
    let outcome = bench.function.reset();
    assert!(!outcome.map_errors.is_empty(), "the first cannot move");
    assert_ne!(bench.host.backing(1).epoch(), epoch);
    // And leaves with the function.
    let _ = bench.function.remove();
    assert_eq!(bench.map.reach(), []);
}

/// A function with a 64 KiB BAR 0 and MSI-X of `vectors` with these pointers.
fn msix(vectors: u32, table: u32, pending: u32) -> FakeHost {
    FakeHost::new()
        .whole_bar(0, MEMORY_64, 0x1_0000)
        .bar(2, IO, 0x20, &[])
        .capabilities(0x40, &[(0x40, ((vectors - 1) << 16) | 0x11)])
        .set_dword(0x44, table)
        .set_dword(0x48, pending)
}

#[test]
fn msix_table_page_is_not_mapped() {
    // A table of 300 vectors, in granules 2 and 3, and pending bits at 0x8800.
    let bench = Bench::new(msix(300, 0x2000, 0x8800));
    let msix = bench.function.msix().unwrap();
    assert_eq!((msix.vectors, msix.offset), (300, 0x40));
    assert_eq!((msix.table.offset, msix.table.size), (0x2000, 4800));
    assert_eq!(
        (msix.pending_bits.offset, msix.pending_bits.size),
        (0x8800, 40)
    );
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    let mapped: Vec<_> = bench.mapped.lock().clone().into_iter().collect();
    assert_eq!(
        mapped,
        [
            (0x8000_0000, 0x2000),
            (0x8000_4000, 0x4000),
            (0x8000_9000, 0x7000)
        ]
    );
    assert_eq!(
        bench.reach(0),
        Reach::Mapped,
        "what is trapped does not count"
    );
}

#[test]
fn msix_pointers_that_lead_nowhere_are_refused() {
    for (host, expected) in [
        (
            msix(1, 0x6, 0),
            "the table of its MSI-X capability names BAR 6",
        ),
        (msix(1, 0x1, 0), "is said to be in BAR1"),
        (
            msix(1, 0, 0x2),
            "is said to be in BAR2, which is no memory BAR",
        ),
        (
            msix(2048, 0x9000, 0),
            "has 0x8000 bytes at 0x9000 of BAR0, which ends at 0x10000",
        ),
        (
            msix(1, 0, 0xffff_fff8),
            "the pending-bit array of its MSI-X capability has 0x8 bytes at 0xfffffff8",
        ),
    ] {
        let text = host.refusal();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn only_whole_granules_of_an_area_are_mapped() {
    let bench = Bench::new(FakeHost::new().bar(
        0,
        MEMORY_32,
        0x1_0000,
        &[
            (0, 0x1800),
            (0x4000, 0x800),
            (0x6800, 0x2000),
            (0xf000, 0x1000),
        ],
    ));
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    let mapped: Vec<_> = bench.mapped.lock().clone().into_iter().collect();
    assert_eq!(mapped, [(0x8000_0000, 0x1000), (0x8000_f000, 0x1000)]);
}

#[test]
fn broken_devices_are_refused_with_what_is_wrong() {
    let device = FakeHost::new;
    for (host, expected) in [
        (
            device().set_dword(0, u32::MAX),
            "fake: config space reads all ones, so the device does not answer",
        ),
        (
            device().set_dword(0x0c, 0x0081_0000),
            "header type 0x1 is not an endpoint's",
        ),
        (
            device().whole_bar(1, MEMORY_32, 0x1800),
            "fake BAR1: its size of 0x1800 bytes is not a power of two",
        ),
        (
            device().bar(0, MEMORY_32, 8, &[]),
            "its size of 0x8 bytes is less than the least there is, 0x10",
        ),
        (
            device().bar(0, MEMORY_32, 1 << 32, &[]),
            "its size of 0x100000000 bytes is more than its register can say",
        ),
        (
            device().whole_bar(5, MEMORY_64, 0x1000),
            "fake BAR5: a 64-bit BAR in the last register has no upper half",
        ),
        (
            device().whole_bar(0, 0b0010, 0x1000),
            "its type bits 0b0010 are reserved",
        ),
        (device().whole_bar(0, 0b0110, 0x1000), "are reserved"),
        (
            device().bar(0, MEMORY_32, 0x1000, &[(0x1000, 0x1000)]),
            "its mappable area of 0x1000 bytes at 0x1000 reaches past its end at 0x1000",
        ),
        (
            device().bar(0, MEMORY_32, 0x2000, &[(0, 0x1000), (0, 0x1000)]),
            "fake: its BARs were not added to the memory map",
        ),
    ] {
        // What is refused changes nothing at the host.
        let log = host.log.clone();
        let host = host.set_dword_if_clear(0x04, 0x0006);
        let text = host.refusal();
        assert!(text.contains(expected), "{text}");
        if !text.contains("memory map") {
            assert!(log.lock().is_empty(), "{text}");
        }
    }
    let host = FakeHost::new();
    host.refuse.lock().config_read = true;
    assert_eq!(host.refusal(), "fake: reading config space at 0x0 failed");
    let host = FakeHost::new();
    host.config.lock().resize(512, 0);
    assert!(host.refusal().contains("config space has 512 bytes"));
}

#[test]
fn a_function_is_shared_between_threads() {
    fn shared<T: Send + Sync + std::fmt::Debug>(_: &T) {}
    let map = RegionManager::new();
    let host = Arc::new(FakeHost::new());
    let function = AssignedFunction::new(host, map, &FunctionOptions::default()).unwrap();
    shared(&function);
    assert!(format!("{function:?}").contains("fake"));
}
