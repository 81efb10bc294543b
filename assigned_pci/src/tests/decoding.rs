//! The command register: what happens in which order.

use memory_map::{DisabledBecause, Reach, Reason};

use super::fake::*;
use crate::{HostCall, HostError};

fn write(command: u16) -> Event {
    Event::ConfigWrite(COMMAND, command.to_le_bytes().to_vec())
}

/// Two BARs, both placed, decoding off.
fn two_bars() -> Bench {
    let bench = Bench::new(
        FakeHost::new()
            .whole_bar(0, MEMORY_32, 0x1000)
            .whole_bar(2, MEMORY_64, 0x2000),
    );
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.bar(2, 0x9000_0000);
    assert_eq!(bench.events(), []);
    bench
}

#[test]
fn enable_writes_the_register_before_it_maps() {
    let bench = two_bars();
    let outcome = bench.command(ON);
    assert_eq!(
        bench.events(),
        [write(ON), Event::Map(0x8000_0000), Event::Map(0x9000_0000)]
    );
    assert_eq!((outcome.maps(), outcome.unmaps()), (2, 0));
    assert_eq!(outcome.reports.len(), 1, "one commit for all BARs");
    assert_eq!(bench.reach(0), Reach::Mapped);
    assert_eq!(bench.reach(2), Reach::Mapped);
}

#[test]
fn decoding_off_unmaps_before_the_physical_write() {
    let bench = two_bars();
    let _ = bench.command(ON);
    bench.events();
    let epoch = bench.host.backing(2).epoch();
    let outcome = bench.command(OFF);
    let mut events = bench.events();
    assert_eq!(events.pop(), Some(write(OFF)));
    events.sort_by_key(|event| format!("{event:?}"));
    assert_eq!(
        events,
        [Event::Unmap(0x8000_0000), Event::Unmap(0x9000_0000)]
    );
    assert_eq!((outcome.maps(), outcome.unmaps()), (0, 2));
    assert_eq!(outcome.reports.len(), 1, "one commit for all BARs");
    assert_ne!(bench.host.backing(2).epoch(), epoch, "the kernel revokes");
    assert_eq!(
        bench.reach(2),
        Reach::Unavailable(Reason::Disabled(DisabledBecause::DecodingOff))
    );
    // And again: the revocation costs no useless mapping.
    let outcome = bench.command(ON);
    assert_eq!((outcome.maps(), outcome.unmaps()), (2, 0));
}

#[test]
fn failed_enable_maps_nothing() {
    let bench = two_bars();
    bench.host.refuse.lock().config_write = true;
    let outcome = bench.command(ON);
    assert_eq!(
        outcome.host_errors,
        [HostError {
            call: HostCall::ConfigWrite(COMMAND),
            errno: memory_map::Errno::new(EIO),
        }]
    );
    assert_eq!(bench.events(), [write(ON)]);
    assert_eq!(bench.view(), []);
    assert_eq!(bench.read(COMMAND) & 2, 0, "the guest sees it off");

    bench.host.refuse.lock().config_write = false;
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x8000_0000, 0x9000_0000]);
}

#[test]
fn failed_disable_leaves_the_bars_down() {
    let bench = two_bars();
    let _ = bench.command(ON);
    bench.host.refuse.lock().config_write = true;
    let outcome = bench.command(OFF);
    assert_eq!(outcome.host_errors.len(), 1);
    assert_eq!(bench.mapped(), []);
    assert_eq!(bench.host.command() & 2, 2, "the hardware still decodes");
    assert_eq!(bench.read(COMMAND) & 2, 0, "the guest does not see that");
}

#[test]
fn other_bits_of_the_command_register_go_to_the_host() {
    let bench = two_bars();
    let _ = bench.command(ON);
    bench.events();
    let outcome = bench.command(ON | 0x0540);
    assert_eq!(bench.events(), [write(ON | 0x0540)]);
    assert_eq!(outcome.reports, []);
    let _ = bench.command(0x0002);
    assert_eq!(bench.host.command(), 0x0002, "bus mastering off");
    assert_eq!(bench.mapped().len(), 2);
}

#[test]
fn byte_writes_to_the_command_register() {
    let bench = two_bars();
    let _ = bench.function.config_write(COMMAND, &[0x06]);
    assert_eq!(bench.mapped().len(), 2);
    // The upper byte does not hold the bit.
    let _ = bench.function.config_write(COMMAND + 1, &[0x01]);
    let _ = bench.function.config_write(COMMAND + 1, &[0x00]);
    assert_eq!(bench.mapped().len(), 2);
    let _ = bench.function.config_write(COMMAND, &[0x04]);
    assert_eq!(bench.mapped(), []);
    assert_eq!(bench.host.command(), 0x0004);
}

#[test]
fn the_status_register_is_cleared_by_ones_and_only_by_those_meant_for_it() {
    let bench = two_bars();
    bench.host.config.lock()[7] = 0xf0;
    // A word to the command register does not touch it.
    let _ = bench.command(ON);
    assert_eq!(bench.read(COMMAND), 0xf000_0006);
    // A dword to both clears what it says, in one write.
    bench.events();
    let both = 0x3000_0006_u32.to_le_bytes();
    let _ = bench.function.config_write(COMMAND, &both);
    assert_eq!(bench.events(), [Event::ConfigWrite(COMMAND, both.to_vec())]);
    assert_eq!(bench.read(COMMAND), 0xc000_0006);
    assert_eq!(bench.mapped().len(), 2);
    // A dword that turns decoding off does both as well.
    let both = 0xc000_0004_u32.to_le_bytes();
    let _ = bench.function.config_write(COMMAND, &both);
    assert_eq!(bench.read(COMMAND), 0x0000_0004);
    assert_eq!(bench.mapped(), []);
    // A write to the status register alone is no command write.
    bench.host.config.lock()[7] = 0x10;
    let _ = bench.function.config_write(COMMAND + 2, &[0, 0x10]);
    assert_eq!(bench.read(COMMAND), 0x0000_0004);
}

#[test]
fn reset_leaves_nothing_mapped_and_revokes_even_if_the_host_refuses() {
    for refuse in [false, true] {
        let bench = two_bars();
        let _ = bench.command(ON);
        bench.events();
        bench.host.refuse.lock().reset = refuse;
        let epoch = bench.host.backing(0).epoch();
        let outcome = bench.function.reset();
        let events = bench.events();
        assert_eq!(events[2..], [write(0), Event::Reset], "unmapped before");
        assert_eq!(outcome.host_errors.len(), usize::from(refuse));
        assert_eq!((outcome.maps(), outcome.unmaps()), (0, 2));
        assert_ne!(bench.host.backing(0).epoch(), epoch);
        assert_eq!(bench.read(0x10), 0);
        assert_eq!(bench.read(0x18), 0b0100);
        assert_eq!(bench.read(COMMAND) & 7, 0);
        assert_eq!(bench.view(), []);
        // It comes up again at 0, as hardware would.
        let _ = bench.command(ON);
        assert_eq!(bench.view(), [(0, 0x1000), (0x1000, 0x1000)]);
    }
}

#[test]
fn decoding_off_before_the_bar_is_placed_and_on_again() {
    let bench = Bench::with_64_bit_bar();
    let _ = bench.bar(2, 0x8000_0000);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x8000_0000]);
    let _ = bench.command(OFF);
    let moved = bench.bar(3, 1);
    assert_eq!(moved.reports, []);
    let moved = bench.bar(2, 0x4000_0000);
    assert_eq!(moved.reports, []);
    assert_eq!(bench.view(), []);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [0x1_4000_0000]);
}
