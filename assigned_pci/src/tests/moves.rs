//! BARs that are written while decoding is on.

use memory_map::{DisabledBecause, Reach, Reason};

use super::fake::*;
use crate::BarIndex;

const HALF_WRITTEN: Reach = Reach::Unavailable(Reason::Disabled(DisabledBecause::HalfWritten));

const SIZING: Reach = Reach::Unavailable(Reason::Disabled(DisabledBecause::Sizing));

/// The 64-bit BAR, visible at 0x1_8000_0000.
fn placed() -> Bench {
    let bench = Bench::with_64_bit_bar();
    let _ = bench.bar(2, 0x8000_0000);
    let _ = bench.bar(3, 1);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x1_8000_0000]);
    bench.events();
    bench
}

#[test]
fn a_32_bit_bar_moves_in_one_commit() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    bench.events();
    let outcome = bench.bar(0, 0x9000_0000);
    assert_eq!(outcome.reports.len(), 1);
    assert_eq!(
        bench.events(),
        [Event::Unmap(0x8000_0000), Event::Map(0x9000_0000)]
    );
    assert_eq!(bench.view(), [(0x9000_0000, 0x1_0000)]);
}

#[test]
fn half_written_64_bit_bar_is_never_mapped() {
    for (first, second) in [((2, 0x4000_0000), (3, 2)), ((3, 2), (2, 0x4000_0000))] {
        let bench = placed();
        let _ = bench.bar(first.0, first.1);
        assert_eq!(bench.events(), [Event::Unmap(0x1_8000_0000)]);
        assert_eq!(bench.view(), []);
        assert_eq!(bench.reach(2), HALF_WRITTEN);
        // The same half once more does not complete it.
        let _ = bench.bar(first.0, first.1);
        assert_eq!(bench.events(), []);
        let _ = bench.bar(second.0, second.1);
        assert_eq!(bench.events(), [Event::Map(0x2_4000_0000)]);
        assert_eq!(bench.reach(2), Reach::Mapped);
    }
}

#[test]
fn the_second_half_completes_even_if_it_stays_the_same() {
    let bench = placed();
    let _ = bench.bar(2, 0x4000_0000);
    let _ = bench.bar(3, 1);
    assert_eq!(bench.mapped(), [0x1_4000_0000]);
}

#[test]
fn rewriting_a_half_with_the_same_value_takes_nothing_down() {
    let bench = placed();
    let outcome = bench.bar(2, 0x8000_000c);
    assert_eq!(outcome.reports, []);
    let outcome = bench.bar(3, 1);
    assert_eq!(outcome.reports, []);
    assert_eq!(bench.events(), []);
    assert_eq!(bench.mapped(), [0x1_8000_0000]);
}

#[test]
fn half_written_comes_up_at_the_next_command_write() {
    let bench = placed();
    let _ = bench.bar(3, 2);
    assert_eq!(bench.mapped(), []);
    // A read does nothing, nor does a write to the status register.
    assert_eq!(bench.read(COMMAND) & 2, 2);
    let _ = bench.function.config_write(COMMAND + 2, &[0, 0]);
    assert_eq!(bench.mapped(), []);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x2_8000_0000]);
}

#[test]
fn half_written_comes_up_at_the_first_cpu_access() {
    let bench = placed();
    let _ = bench.bar(3, 2);
    assert_eq!(bench.cpu_access(0x1_8000_0000), None, "the old address");
    assert_eq!(bench.cpu_access(0x2_8001_0000), None, "one past the end");
    assert_eq!(bench.mapped(), []);
    assert_eq!(
        bench.cpu_access(0x2_8000_0010),
        Some((BarIndex::new(2).unwrap(), 0x10))
    );
    assert_eq!(bench.mapped(), [0x2_8000_0000]);
    // Another vCPU that came second is answered as well, and changes nothing.
    bench.events();
    assert!(bench.cpu_access(0x2_8000_0020).is_some());
    assert_eq!(bench.events(), []);
    let _ = bench.command(OFF);
    assert_eq!(bench.cpu_access(0x2_8000_0020), None, "not decoded");
}

#[test]
fn half_written_and_then_decoding_off_and_on() {
    let bench = placed();
    let _ = bench.bar(2, 0x4000_0000);
    let _ = bench.command(OFF);
    assert_eq!(
        bench.reach(2),
        Reach::Unavailable(Reason::Disabled(DisabledBecause::DecodingOff))
    );
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x1_4000_0000]);
}

#[test]
fn sizing_with_decoding_on_maps_nothing() {
    let bench = placed();
    let _ = bench.bar(2, u32::MAX);
    assert_eq!(bench.read(0x18), 0xffff_000c);
    assert_eq!(bench.events(), [Event::Unmap(0x1_8000_0000)]);
    assert_eq!(bench.reach(2), SIZING);
    // What brings a half-written BAR up does not bring up one that is being sized.
    let _ = bench.command(ON);
    assert_eq!(bench.cpu_access(0x1_ffff_0000), None);
    let _ = bench.bar(3, u32::MAX);
    assert_eq!(bench.read(0x1c), u32::MAX);
    let _ = bench.command(ON);
    let _ = bench.bar(3, 1);
    assert_eq!(bench.mapped(), []);
    assert_eq!(bench.reach(2), SIZING, "the lower half still is");
    let _ = bench.bar(2, 0x8000_0000);
    assert_eq!(bench.mapped(), [0x1_8000_0000]);
    let mapped = |event: &Event| matches!(event, Event::Map(_));
    assert_eq!(bench.events().into_iter().filter(mapped).count(), 1);
}

#[test]
fn sizing_a_32_bit_bar_with_decoding_on_maps_nothing() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    bench.events();
    let _ = bench.bar(0, u32::MAX);
    assert_eq!(bench.read(0x10), 0xffff_0000);
    assert_eq!(bench.mapped(), []);
    let _ = bench.bar(0, 0x8000_0000);
    assert_eq!(
        bench.events(),
        [Event::Unmap(0x8000_0000), Event::Map(0x8000_0000)]
    );
}

#[test]
fn sizing_with_decoding_off_and_turning_it_on_maps_nothing() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, u32::MAX);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), []);
    let _ = bench.bar(0, 0x8000_0000);
    assert_eq!(bench.mapped(), [0x8000_0000]);
}

#[test]
fn bar_swap_keeps_both() {
    let bench = Bench::new(
        FakeHost::new()
            .whole_bar(0, MEMORY_32, 0x1000)
            .whole_bar(1, MEMORY_32, 0x1000),
    );
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.bar(1, 0x9000_0000);
    let _ = bench.command(ON);
    // For a moment both are at the same place, one over the other.
    let _ = bench.bar(0, 0x9000_0000);
    assert_eq!(bench.mapped(), [0x9000_0000]);
    let _ = bench.bar(1, 0x8000_0000);
    assert_eq!(bench.mapped(), [0x8000_0000, 0x9000_0000]);
    let regions: Vec<_> = bench.map.view().iter().map(|s| s.region).collect();
    let of = |bar| bench.function.region_of(BarIndex::ALL[bar]).unwrap();
    assert_eq!(regions, [of(1), of(0)]);
    assert_eq!(bench.reach(0), Reach::Mapped);
    assert_eq!(bench.reach(1), Reach::Mapped);
}

#[test]
fn bar_swap_with_decoding_off_keeps_both() {
    let bench = Bench::new(
        FakeHost::new()
            .whole_bar(0, MEMORY_64, 0x1000)
            .whole_bar(2, MEMORY_64, 0x1000),
    );
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.bar(2, 0x9000_0000);
    let _ = bench.command(ON);
    let _ = bench.command(OFF);
    let _ = bench.bar(0, 0x9000_0000);
    let _ = bench.bar(2, 0x8000_0000);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x8000_0000, 0x9000_0000]);
    assert_eq!(bench.reach(0), Reach::Mapped);
    assert_eq!(bench.reach(2), Reach::Mapped);
}
