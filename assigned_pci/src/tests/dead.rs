//! A function whose BARs nobody answers at.

use std::time::Duration;

use memory_map::DisabledBecause;
use parking_lot::Mutex;

use super::fake::*;
use super::revocation::{AT, Before};

#[test]
fn a_dead_function_is_hidden_and_comes_back_when_the_guest_turns_it_on() {
    type Dies = fn(&FakeHost);
    let deaths: [Dies; 3] = [
        |host| host.config.lock()[4] &= !2,
        |host| host.config.lock()[4..6].fill(0xff),
        |host| host.refuse.lock().config_read = true,
    ];
    for dies in deaths {
        let bench = Before::decoding(false).bench();
        assert_eq!(bench.function.hide_if_dead(), None, "it answers");
        let epochs = bench.epochs();
        dies(&bench.host);
        let outcome = bench.function.hide_if_dead().unwrap();
        assert_eq!((outcome.unmaps(), outcome.reports.len()), (2, 1));
        assert_eq!(bench.mapped(), []);
        bench.disabled(DisabledBecause::DecodingOff);
        assert_ne!(bench.epochs(), epochs);
        assert!(!bench.function.is_decoding());
        assert_eq!(bench.function.hide_if_dead(), None, "it shows nothing");
        let mut command = [0; 2];
        let _ = bench.function.config_read(COMMAND, &mut command);
        let gone = bench.host.command() == 0xffff || bench.host.refuse.lock().config_read;
        assert_eq!(command == [0xff; 2], gone, "{command:x?}");
        bench.host.refuse.lock().config_read = false;
        let _ = bench.command(ON);
        assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
    }
    // A virtual function's register does not tell, and one that was removed shows nothing.
    let bench = Before::decoding(true).bench();
    bench.host.config.lock()[4] = 0;
    assert_eq!(bench.function.hide_if_dead(), None);
    let _ = bench.function.remove();
    assert_eq!(bench.function.hide_if_dead(), None);
}

/// Another processor turns decoding off and on just when a function is judged: it waits until that is
/// over.
#[test]
fn nothing_the_guest_writes_comes_between_judging_a_function_dead_and_hiding_it() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    let (begun, other) = std::sync::mpsc::channel();
    let (written, writes) = std::sync::mpsc::channel();
    let function = bench.function.clone();
    let writer = std::thread::spawn(move || {
        other.recv().unwrap();
        let _ = function.config_write(COMMAND, &OFF.to_le_bytes());
        // Nobody listens any more if it had to wait.
        let _unheard = written.send(());
        let _ = function.config_write(COMMAND, &ON.to_le_bytes());
    });
    let writes = Mutex::new(Some(writes));
    bench.host.on_config_read.set(move || {
        if let Some(writes) = writes.lock().take() {
            begun.send(()).unwrap();
            let first = writes.recv_timeout(Duration::from_millis(100));
            assert!(first.is_err(), "decoding is off while it is judged");
        }
    });
    assert_eq!(bench.function.hide_if_dead(), None);
    writer.join().unwrap();
    assert_eq!(bench.mapped(), [0x8000_0000]);
    assert!(bench.function.bars()[0].enabled);
}
