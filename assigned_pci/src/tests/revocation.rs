//! Every event with which the kernel revokes, in every state of the function: what is mapped leaves
//! the map before the host is asked, comes back after it, and was never thought to have survived.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use memory_map::{DisabledBecause, Reach, Reason, RegionManager};
use parking_lot::Mutex;

use super::fake::*;
use crate::{
    AssignedFunction, BusyRetry, FunctionOptions, HostCall, HostFunction, Outcome, PowerState,
    ResetSet,
};

pub(super) const AT: u64 = 0x8000_0000;
const ELSEWHERE: u64 = 0xa000_0000;

/// A way to have the kernel revoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    DecodingOff,
    Sleep(u8),
    Wake,
    ExpressFlr(Width),
    AdvancedFlr,
    Reset,
    HotReset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Byte,
    Word,
    Dword,
}

const CAUSES: [Cause; 11] = [
    Cause::DecodingOff,
    Cause::Sleep(1),
    Cause::Sleep(2),
    Cause::Sleep(3),
    Cause::Wake,
    Cause::ExpressFlr(Width::Byte),
    Cause::ExpressFlr(Width::Word),
    Cause::ExpressFlr(Width::Dword),
    Cause::AdvancedFlr,
    Cause::Reset,
    Cause::HotReset,
];

impl Cause {
    fn happen(self, bench: &Bench) -> Outcome {
        let write = |offset, data: &[u8]| bench.function.config_write(offset, data);
        match self {
            Self::DecodingOff => bench.command(OFF),
            Self::Sleep(state) => write(PMCSR, &[bench.pmcsr() & !3 | state]),
            Self::Wake => write(PMCSR, &[bench.pmcsr() & !3, 0]),
            Self::ExpressFlr(Width::Byte) => write(DEVICE_CONTROL + 1, &[0x80]),
            Self::ExpressFlr(Width::Word) => write(DEVICE_CONTROL, &[0x10, 0xa8]),
            Self::ExpressFlr(Width::Dword) => write(DEVICE_CONTROL, &[0, 0x80, 0, 0]),
            Self::AdvancedFlr => write(AF_CONTROL, &[1]),
            Self::Reset => bench.function.reset(),
            Self::HotReset => {
                let set = ResetSet::new([bench.function.clone()]).unwrap();
                set.hot_reset(BusyRetry::default(), &mut || bench.host.reset())
            }
        }
    }

    /// What a BAR's reach says meanwhile.
    const fn because(self) -> DisabledBecause {
        match self {
            Self::DecodingOff => DisabledBecause::DecodingOff,
            Self::Sleep(_) | Self::Wake => DisabledBecause::Sleeping,
            _ => DisabledBecause::Resetting,
        }
    }

    const fn is_reset(self) -> bool {
        matches!(self.because(), DisabledBecause::Resetting)
    }
}

/// What the function is like before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    decoding: bool,
    asleep: bool,
    /// While it sleeps, if it does.
    moved: bool,
    no_soft_reset: bool,
    virtual_function: bool,
}

impl Before {
    /// One that decodes, and is awake.
    pub(super) const fn decoding(virtual_function: bool) -> Self {
        Self {
            decoding: true,
            asleep: false,
            moved: false,
            no_soft_reset: true,
            virtual_function,
        }
    }

    fn every() -> impl Iterator<Item = Self> {
        (0..32_u8).map(|bits| Self {
            decoding: bits & 1 != 0,
            asleep: bits & 2 != 0,
            moved: bits & 4 != 0,
            no_soft_reset: bits & 8 != 0,
            virtual_function: bits & 16 != 0,
        })
    }

    pub(super) fn bench(self) -> Bench {
        let mut host = FakeHost::new()
            .with_controls(self.no_soft_reset)
            .whole_bar(0, MEMORY_32, 0x1000)
            .whole_bar(2, MEMORY_64, 0x2000);
        host.is_virtual = self.virtual_function;
        let bench = Bench::new(host);
        place(&bench, AT);
        if self.decoding {
            let _ = bench.command(ON);
            assert_eq!(bench.mapped().len(), 2);
        }
        if self.asleep {
            let _ = Cause::Sleep(3).happen(&bench);
            assert_eq!(bench.mapped(), []);
        }
        if self.moved {
            place(&bench, ELSEWHERE);
        }
        bench.events();
        bench
    }

    fn at(self) -> u64 {
        if self.moved { ELSEWHERE } else { AT }
    }
}

fn place(bench: &Bench, at: u64) {
    let at = u32::try_from(at).unwrap();
    let _ = bench.bar(0, at);
    let _ = bench.bar(2, at + 0x10_0000);
    let _ = bench.bar(3, 0);
}

impl Bench {
    fn pmcsr(&self) -> u8 {
        let [low, ..] = self.read(PMCSR).to_le_bytes();
        low
    }

    pub(super) fn epochs(&self) -> [memory_map::Epoch; 2] {
        [0, 2].map(|bar| self.host.backing(bar).epoch())
    }

    pub(super) fn disabled(&self, because: DisabledBecause) {
        for bar in [0, 2] {
            let reason = Reason::Disabled(because);
            assert_eq!(self.reach(bar), Reach::Unavailable(reason), "BAR {bar}");
        }
    }
}

/// Checks that while the host carries out a call of `cause` nothing is mapped and the reach says
/// why.
fn watch(bench: &Bench, cause: Cause) -> Arc<Mutex<usize>> {
    let seen = Arc::new(Mutex::new(0));
    let (map, target) = (bench.map.clone(), bench.target.id());
    let regions = [0, 2].map(|bar| bench.function.region_of(crate::BarIndex::ALL[bar]).unwrap());
    let (mapped, counted) = (bench.mapped.clone(), seen.clone());
    bench.host.probe.set(move |event| {
        assert!(mapped.lock().is_empty(), "{cause:?}: mapped at {event:?}");
        for region in regions {
            let reason = Reason::Disabled(cause.because());
            let reach = map.reach_of(target, region).unwrap();
            assert_eq!(reach, Reach::Unavailable(reason), "{cause:?}: {event:?}");
        }
        *counted.lock() += 1;
    });
    seen
}

#[test]
fn every_event_in_every_state() {
    let mut cases = 0;
    for before in Before::every() {
        for cause in CAUSES {
            for fails in [false, true] {
                every_event_one(before, cause, fails);
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 32 * 11 * 2);
}

fn every_event_one(before: Before, cause: Cause, fails: bool) {
    let what = format!("{before:?} {cause:?} fails: {fails}");
    let bench = before.bench();
    let was_mapped = bench.mapped().len();
    assert_eq!(
        was_mapped,
        if before.decoding && !before.asleep {
            2
        } else {
            0
        }
    );
    let epochs = bench.epochs();
    // Waking one that is awake asks for nothing.
    let idle = cause == Cause::Wake && !before.asleep;
    let seen = (!idle).then(|| watch(&bench, cause));
    if fails {
        let mut refuse = bench.host.refuse.lock();
        refuse.config_write = true;
        refuse.reset = true;
    }
    let outcome = cause.happen(&bench);
    assert_eq!(outcome.is_ok(), !fails, "{what}");
    bench.host.probe.set(|_| {});

    // Down before the host was asked, up after it.
    let events = bench.events();
    let asked = |event: &Event| matches!(event, Event::ConfigWrite(..) | Event::Reset);
    let first = events.iter().position(asked).unwrap();
    let last = events.iter().rposition(asked).unwrap();
    for (place, event) in events.iter().enumerate() {
        match event {
            Event::Unmap(_) => assert!(place < first, "{what}: {events:?}"),
            Event::Map(_) => assert!(place > last, "{what}: {events:?}"),
            _ => {}
        }
    }
    if idle {
        assert_eq!((outcome.unmaps(), bench.epochs()), (0, epochs), "{what}");
        return;
    }
    assert!(*seen.unwrap().lock() > 0, "{what}");
    assert_eq!(outcome.unmaps(), was_mapped, "{what}");
    for (now, then) in bench.epochs().iter().zip(&epochs) {
        assert!(now > then, "{what}");
    }
    assert!(
        outcome.reports.len() <= 2,
        "{what}: one commit down, one up"
    );

    // What the registers are to say.
    let asleep = match cause {
        Cause::Sleep(_) if !fails => true,
        Cause::Wake if !fails => false,
        // A reset wakes, and has the host restore the command register from before the sleep.
        _ if cause.is_reset() && !fails => false,
        _ => before.asleep,
    };
    let soft_reset = cause == Cause::Wake && !fails && !before.no_soft_reset;
    let reset = cause.is_reset() || soft_reset;
    let decoding = before.decoding && !reset && cause != Cause::DecodingOff;
    let power = match (asleep, cause) {
        (false, _) => PowerState::D0,
        (true, Cause::Sleep(1)) if !fails && !before.asleep => PowerState::D1,
        (true, Cause::Sleep(2)) if !fails && !before.asleep => PowerState::D2,
        (true, _) => PowerState::D3Hot,
    };
    assert_eq!(bench.function.power_state(), power, "{what}");
    assert_eq!(bench.read(COMMAND) & 2 != 0, decoding, "{what}");
    assert_eq!(bench.function.is_decoding(), decoding && !asleep, "{what}");
    let at = if reset { 0 } else { before.at() };
    assert_eq!(u64::from(bench.read(0x10)), at, "{what}");
    if reset && !fails {
        assert_eq!(bench.host.command(), 0, "{what}: as the guest sees it");
    }

    // What is mapped again.
    if decoding && !asleep {
        assert_eq!(bench.mapped(), [at, at + 0x10_0000], "{what}");
        assert_eq!(bench.reach(0), Reach::Mapped, "{what}");
    } else {
        assert_eq!(bench.mapped(), [], "{what}");
        bench.disabled(match asleep {
            true => DisabledBecause::Sleeping,
            false => DisabledBecause::DecodingOff,
        });
    }

    // And the guest gets it all back.
    bench.host.refuse.lock().config_write = false;
    let _ = Cause::Wake.happen(&bench);
    place(&bench, AT);
    let _ = bench.command(ON);
    assert_eq!(bench.mapped(), [AT, AT + 0x10_0000], "{what}");
    assert_eq!(bench.reach(2), Reach::Mapped, "{what}");
}

#[test]
fn a_command_write_to_a_virtual_function_counts_as_revoking() {
    for virtual_function in [false, true] {
        let bench = Before::decoding(virtual_function).bench();
        let epochs = bench.epochs();
        let write = Event::ConfigWrite(COMMAND, (ON | 0x0400).to_le_bytes().to_vec());
        let outcome = bench.command(ON | 0x0400);
        let events = bench.events();
        if virtual_function {
            assert!(bench.epochs() != epochs);
            assert_eq!((outcome.unmaps(), outcome.maps()), (2, 2));
            assert_eq!(events[2], write);
        } else {
            assert_eq!((bench.epochs(), events), (epochs, vec![write]));
        }
        assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
    }
}

#[test]
fn a_power_state_that_the_kernel_does_not_take_costs_nothing_but_a_new_mapping() {
    let before = Before {
        decoding: true,
        asleep: false,
        moved: false,
        no_soft_reset: false,
        virtual_function: false,
    };
    let bench = before.bench();
    bench.host.refuse.lock().power = true;
    let outcome = Cause::Sleep(3).happen(&bench);
    assert!(outcome.is_ok());
    assert_eq!((outcome.unmaps(), outcome.maps()), (2, 2));
    assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
    assert_eq!(bench.function.power_state(), PowerState::D0);
}

#[test]
fn a_power_state_that_cannot_be_read_back_is_sleep() {
    let before = Before {
        decoding: true,
        asleep: false,
        moved: false,
        no_soft_reset: true,
        virtual_function: false,
    };
    let bench = before.bench();
    bench.host.refuse.lock().config_read = true;
    let outcome = bench.function.config_write(PMCSR, &[1]);
    assert_eq!(outcome.host_errors[0].call, HostCall::ConfigRead(PMCSR));
    assert_eq!(bench.mapped(), []);
    bench.disabled(DisabledBecause::Sleeping);
    bench.host.refuse.lock().config_read = false;
    let _ = bench.function.config_write(PMCSR, &[0]);
    assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
}

#[test]
fn a_sleeping_function_answers_nobody_and_takes_registers() {
    let before = Before {
        decoding: true,
        asleep: true,
        moved: false,
        no_soft_reset: true,
        virtual_function: false,
    };
    let bench = before.bench();
    assert_eq!(bench.cpu_access(AT), None);
    let mut data = [0; 4];
    let bar = crate::BarIndex::ALL[0];
    assert_eq!(bench.function.bar_read(bar, 0, &mut data), None);
    assert_eq!((data, bench.events()), ([0xff; 4], vec![]));
    // Decoding off and on again, a move in halves, and sizing: it all counts once it is awake.
    let _ = bench.command(OFF);
    let _ = bench.command(ON);
    let _ = bench.bar(3, 1);
    let _ = bench.bar(0, u32::MAX);
    assert_eq!(bench.mapped(), []);
    bench.disabled(DisabledBecause::Sleeping);
    let _ = Cause::Wake.happen(&bench);
    assert_eq!(bench.mapped(), [0x1_0000_0000 + AT + 0x10_0000]);
    let sizing = Reason::Disabled(DisabledBecause::Sizing);
    assert_eq!(bench.reach(0), Reach::Unavailable(sizing));
}

#[test]
fn half_written_stays_half_written_through_a_refused_sleep() {
    let before = Before {
        decoding: true,
        asleep: false,
        moved: false,
        no_soft_reset: true,
        virtual_function: false,
    };
    let bench = before.bench();
    let _ = bench.bar(3, 1);
    bench.host.refuse.lock().power = true;
    let _ = Cause::Sleep(3).happen(&bench);
    assert_eq!(bench.mapped(), [AT]);
    let half = Reason::Disabled(DisabledBecause::HalfWritten);
    assert_eq!(bench.reach(2), Reach::Unavailable(half));
}

#[test]
fn what_the_host_restores_after_a_wake_is_turned_off() {
    let before = Before {
        decoding: true,
        asleep: true,
        moved: false,
        no_soft_reset: false,
        virtual_function: false,
    };
    let bench = before.bench();
    assert_eq!(bench.host.command(), ON, "as before it slept");
    let _ = Cause::Wake.happen(&bench);
    assert_eq!(bench.host.command(), 0);
    assert_eq!(bench.read(0x10), 0);
    assert_eq!(bench.mapped(), []);
}

#[test]
fn bits_that_initiate_nothing_pass() {
    // Without the capability bits, and bits beside them.
    let host = FakeHost::new()
        .with_controls(true)
        .set_dword(0x54, 0)
        .set_dword(0x90, 0x0106_0013)
        .whole_bar(0, MEMORY_32, 0x1000);
    let bench = Bench::new(host);
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    let epoch = bench.host.backing(0).epoch();
    bench.events();
    for (offset, data) in [
        (DEVICE_CONTROL, &[0, 0x80][..]),
        (AF_CONTROL, &[1]),
        (PMCSR + 1, &[3]),
        (PMCSR, &[8]),
    ] {
        let outcome = bench.function.config_write(offset, data);
        assert_eq!(outcome, Outcome::default());
    }
    assert_eq!(bench.events().len(), 4);
    assert_eq!(bench.host.backing(0).epoch(), epoch);
    assert_eq!(bench.mapped(), [0x8000_0000]);
}

#[test]
fn mappings_that_may_be_dead_are_made_again_and_registers_follow_the_hardware() {
    let before = Before {
        decoding: true,
        asleep: false,
        moved: false,
        no_soft_reset: true,
        virtual_function: false,
    };
    let bench = before.bench();
    let outcome = bench.function.mappings_may_be_revoked();
    assert_eq!((outcome.unmaps(), outcome.maps()), (2, 2));
    assert_eq!(outcome.reports.len(), 1, "one commit");
    assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
    // Somebody has turned it off behind the guest's back.
    bench.host.config.lock()[4] = 0;
    let _ = bench.function.mappings_may_be_revoked();
    assert_eq!(bench.mapped(), []);
    assert_eq!(bench.read(COMMAND) & 2, 0);
    // Or to sleep.
    let _ = bench.command(ON);
    bench.host.config.lock()[usize::from(PMCSR)] |= 3;
    let _ = bench.function.mappings_may_be_revoked();
    bench.disabled(DisabledBecause::Sleeping);
}

#[test]
fn the_memory_bit_of_a_virtual_function_says_nothing() {
    let before = Before {
        decoding: true,
        asleep: false,
        moved: false,
        no_soft_reset: true,
        virtual_function: true,
    };
    let bench = before.bench();
    bench.host.config.lock()[4] &= !2;
    let _ = bench.function.mappings_may_be_revoked();
    assert_eq!(bench.mapped(), [AT, AT + 0x10_0000]);
}

/// Two more functions in the bench's map, one BAR each; both decode.
fn siblings(bench: &Bench) -> Vec<Arc<AssignedFunction>> {
    ["0000:01:00.1", "0000:01:00.0"]
        .into_iter()
        .zip([0x9000_0000_u32, 0x9100_0000])
        .map(|(name, at)| {
            let host = FakeHost::new().named(name).whole_bar(0, MEMORY_32, 0x1000);
            let options = FunctionOptions::default();
            let function = AssignedFunction::new(Arc::new(host), bench.map.clone(), &options);
            let function = Arc::new(function.unwrap());
            let _ = function.config_write(0x10, &at.to_le_bytes());
            let _ = function.config_write(COMMAND, &ON.to_le_bytes());
            function
        })
        .collect()
}

fn impatient(attempts: u32) -> BusyRetry {
    BusyRetry {
        attempts: NonZeroU32::new(attempts).unwrap(),
        pause: Duration::ZERO,
    }
}

#[test]
fn a_hot_reset_takes_all_functions_down_in_one_commit() {
    const EBUSY: i32 = 16;
    for (busy, attempts, succeeds) in [(0, 1, true), (2, 3, true), (3, 3, false), (9, 1, false)] {
        let bench = Bench::with_32_bit_bar();
        let _ = bench.bar(0, 0x8000_0000);
        let _ = bench.command(ON);
        let mut functions = siblings(&bench);
        functions.push(bench.function.clone());
        functions.push(bench.function.clone());
        let set = ResetSet::new(functions).unwrap();
        let names: Vec<_> = set.functions().iter().map(|f| f.name()).collect();
        assert_eq!(names, ["0000:01:00.0", "0000:01:00.1", "fake"]);
        assert_eq!(bench.mapped().len(), 3);
        let epoch = bench.host.backing(0).epoch();
        let mut tries = 0;
        let outcome = set.hot_reset(impatient(attempts), &mut || {
            assert_eq!(bench.mapped(), [], "unmapped before");
            assert_eq!(bench.host.command(), 0, "quiet before");
            tries += 1;
            match tries > busy {
                true => Ok(()),
                false => Err(std::io::Error::from_raw_os_error(EBUSY)),
            }
        });
        assert_eq!(tries, attempts.min(busy + 1));
        assert_eq!(outcome.host_errors.is_empty(), succeeds);
        let unmapped: Vec<_> = outcome.reports.iter().map(|r| r.unmaps()).collect();
        assert_eq!(unmapped, [3], "one commit");
        assert_ne!(bench.host.backing(0).epoch(), epoch);
        for function in set.functions() {
            assert!(!function.is_decoding());
            assert_eq!(function.bars()[0].address, 0);
            let _ = function.config_write(0x10, &0x8800_0000_u32.to_le_bytes());
            let _ = function.config_write(COMMAND, &ON.to_le_bytes());
        }
        assert_eq!(bench.mapped(), [0x8800_0000]);
    }
}

#[test]
fn what_a_sibling_revoked_is_made_again_for_all_of_them() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    let mut functions = siblings(&bench);
    functions.push(bench.function.clone());
    let gone = functions[0].clone();
    let _ = gone.remove();
    let set = ResetSet::new(functions).unwrap();
    let outcome = set.mappings_may_be_revoked();
    assert_eq!((outcome.unmaps(), outcome.maps()), (2, 2));
    assert_eq!(outcome.reports.len(), 1);
    assert_eq!(bench.mapped(), [0x8000_0000, 0x9100_0000]);
    // What has been removed is left alone.
    gone.host().config_write(COMMAND, &[2]).unwrap();
    let _ = set.hot_reset(impatient(1), &mut || Ok(()));
    let mut command = [0; 2];
    gone.host().config_read(COMMAND, &mut command).unwrap();
    assert_eq!(command, [2, 0]);
}

#[test]
fn no_lock_of_the_map_is_held_while_the_host_is_asked() {
    for cause in CAUSES {
        let before = Before {
            decoding: true,
            asleep: cause == Cause::Wake,
            moved: false,
            no_soft_reset: false,
            virtual_function: true,
        };
        let bench = before.bench();
        let neighbour = Arc::new(
            FakeHost::new()
                .named("other")
                .whole_bar(0, MEMORY_32, 0x1000),
        );
        let options = FunctionOptions::default();
        let other = AssignedFunction::new(neighbour, bench.map.clone(), &options).unwrap();
        let moves = Arc::new(Mutex::new(0_u32));
        let counted = moves.clone();
        // A change of the map in the middle of the host's call: with a lock of the map held this
        // would never end.
        bench.host.probe.set(move |_| {
            let mut moves = counted.lock();
            *moves += 1;
            let at = 0x9000_0000 + *moves * 0x1000;
            let outcome = other.config_write(0x10, &at.to_le_bytes());
            assert!(outcome.is_ok() && outcome.map_errors.is_empty());
        });
        let _ = cause.happen(&bench);
        assert!(*moves.lock() > 0, "{cause:?}");
        bench.host.probe.set(|_| {});
    }
}

#[test]
fn functions_of_two_maps_are_no_set() {
    let bench = Bench::with_32_bit_bar();
    let host = Arc::new(FakeHost::new().named("other"));
    let options = FunctionOptions::default();
    let other = AssignedFunction::new(host, RegionManager::new(), &options).unwrap();
    let refused = ResetSet::new([bench.function.clone(), Arc::new(other)]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "fake and other are in different memory maps and cannot be reset together"
    );
}
