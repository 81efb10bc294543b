//! A function that is to write to nobody any more, and to be written to still.

use super::fake::*;
use super::revocation::{AT, Before};
use crate::HostCall;

#[test]
fn a_function_that_stops_mastering_keeps_its_mappings() {
    for virtual_function in [false, true] {
        let bench = Before::decoding(virtual_function).bench();
        let epochs = bench.epochs();
        assert!(bench.function.stop_mastering().is_ok());
        let stopped = Event::ConfigWrite(COMMAND, vec![2, 0]);
        assert_eq!(bench.events(), [stopped]);
        assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
        assert_eq!(bench.epochs(), epochs);
        // It has stopped already, and may begin again.
        assert!(bench.function.stop_mastering().is_ok());
        assert_eq!(bench.events(), []);
        let _ = bench.command(ON);
        assert_eq!(bench.host.command(), ON);
    }
}

#[test]
fn one_that_does_not_say_whether_it_masters_the_bus_is_not_written_to() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.command(ON);
    bench.events();
    bench.host.refuse.lock().config_read = true;
    let outcome = bench.function.stop_mastering();
    assert_eq!(outcome.host_errors[0].call, HostCall::ConfigRead(COMMAND));
    bench.host.refuse.lock().config_read = false;
    bench.host.config.lock()[4..6].fill(0xff);
    assert!(bench.function.stop_mastering().is_ok());
    assert_eq!(bench.events(), []);
    // And a refused write is told.
    bench.host.config.lock()[4..6].copy_from_slice(&ON.to_le_bytes());
    bench.host.refuse.lock().config_write = true;
    let outcome = bench.function.stop_mastering();
    assert_eq!(outcome.host_errors[0].call, HostCall::ConfigWrite(COMMAND));
}
