//! What the guest reads and writes, and what becomes of odd accesses.

use super::fake::*;
use crate::BarIndex;

#[test]
fn bars_are_sized_by_writing_ones() {
    let bench = Bench::new(
        FakeHost::new()
            .bar(0, MEMORY_32, 0x100, &[])
            .bar(1, IO, 0x20, &[])
            .whole_bar(2, MEMORY_64, 0x4000)
            .whole_bar(4, MEMORY_64_PREFETCHABLE, 1 << 33),
    );
    for register in 0..6 {
        let _ = bench.bar(register, u32::MAX);
    }
    let read: Vec<_> = (0..6)
        .map(|register| bench.read(0x10 + register * 4))
        .collect();
    assert_eq!(
        read,
        [
            0xffff_ff00,
            0xffff_ffe1,
            0xffff_c004,
            0xffff_ffff,
            0x0000_000c,
            0xffff_fffe
        ]
    );
    assert_eq!(bench.events(), [], "nothing of it reaches the host");
}

#[test]
fn unimplemented_bars_and_the_rom_read_zero() {
    let bench = Bench::new(FakeHost::new().bar(0, MEMORY_32, 0x100, &[]));
    bench.host.config.lock()[0x30] = 1;
    for offset in [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
        let _ = bench.function.config_write(offset, &[0xff; 4]);
        assert_eq!(bench.read(offset), 0, "{offset:#x}");
    }
    assert_eq!(bench.events(), []);
}

#[test]
fn odd_accesses_read_all_ones_and_write_nothing() {
    let bench = Bench::with_32_bit_bar();
    for (offset, length) in [
        (0x00, 0),
        (0x00, 3),
        (0x01, 2),
        (0x02, 4),
        (0x00, 8),
        (0x13, 4),
        (0xfe, 4),
        (0x100, 4),
        (0xfff, 1),
        (u16::MAX, 1),
    ] {
        let mut data = vec![0; length];
        assert_eq!(bench.function.config_read(offset, &mut data), None);
        assert!(data.iter().all(|byte| *byte == 0xff), "{offset:#x}");
        let outcome = bench.function.config_write(offset, &data);
        assert!(outcome.is_ok());
    }
    assert_eq!(bench.events(), []);
    assert_eq!(bench.read(0x10), 0);
}

#[test]
fn bars_are_read_by_bytes_and_words_too() {
    let bench = Bench::with_64_bit_bar();
    let _ = bench.function.config_write(0x1a, &[0x34, 0x12]);
    let _ = bench.function.config_write(0x1f, &[0x01]);
    let mut word = [0; 2];
    assert_eq!(bench.function.config_read(0x1a, &mut word), None);
    assert_eq!(word, [0x34, 0x12]);
    let mut byte = [0];
    assert_eq!(bench.function.config_read(0x18, &mut byte), None);
    assert_eq!(byte, [0x0c]);
    assert_eq!(bench.read(0x1c), 0x0100_0000);
}

#[test]
fn everything_else_goes_to_the_host() {
    let bench = Bench::with_32_bit_bar();
    assert_eq!(bench.read(0x00), 0x5678_1234);
    let _ = bench.function.config_write(0x3c, &[0x0b]);
    assert_eq!(bench.events(), [Event::ConfigWrite(0x3c, vec![0x0b])]);
    assert_eq!(bench.read(0x3c), 0x0b);
}

#[test]
fn a_host_that_refuses_reads_all_ones() {
    let bench = Bench::with_32_bit_bar();
    bench.host.refuse.lock().config_read = true;
    let mut data = [0; 4];
    let refused = bench.function.config_read(COMMAND, &mut data).unwrap();
    assert_eq!(refused.to_string(), "reading config space at 0x4 failed");
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn trapped_accesses_are_split_and_end_with_the_bar() {
    let bench = Bench::new(FakeHost::new().bar(0, MEMORY_32, 0x100, &[]));
    let bar = BarIndex::ALL[0];
    let mut data = [0; 8];
    assert_eq!(bench.function.bar_read(bar, 0, &mut data), None);
    assert_eq!((data, bench.events()), ([0xff; 8], vec![]), "not decoded");

    let _ = bench.command(ON);
    bench.events();
    assert_eq!(bench.function.bar_read(bar, 0xfa, &mut data), None);
    assert_eq!(data, [0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0xff, 0xff]);
    assert_eq!(bench.function.bar_write(bar, 0x10, &data), None);
    assert_eq!(
        bench.events(),
        [
            Event::BarRead(0xfa, 2),
            Event::BarRead(0xfc, 4),
            Event::BarWrite(0x10, 8)
        ]
    );
    assert_eq!(bench.function.bar_read(bar, u64::MAX, &mut data), None);
    let other = BarIndex::ALL[1];
    assert_eq!(bench.function.bar_write(other, 0, &data), None);
    assert_eq!((data, bench.events()), ([0xff; 8], vec![]));

    bench.host.refuse.lock().bar_access = true;
    let refused = bench.function.bar_read(bar, 0x20, &mut data).unwrap();
    assert_eq!(refused.to_string(), "reading BAR0 at 0x20 failed");
    assert_eq!(data, [0xff; 8]);
    assert!(bench.function.bar_write(bar, 0x20, &data).is_some());
}
