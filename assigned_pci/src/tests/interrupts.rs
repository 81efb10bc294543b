//! MSI and MSI-X: what the guest writes, and what the host and the controller are asked for because
//! of it. Each of them is asked for what changed, and for nothing else.

use std::sync::Arc;

use proptest::prelude::*;

use super::fake::*;
use super::fake_interrupts::{Asked, ENOSPC, FakeController};
use crate::{
    AssignedFunction, BarIndex, BusyRetry, Capability, CapabilityList, MsiKind, MsiMessage,
    Outcome, PowerState, ResetSet, Treatment,
};

const BAR: BarIndex = BarIndex::ALL[0];
/// Where the capabilities lie, and in the BAR the table and the pending bits of MSI-X.
const MSI: u16 = 0x40;
const MSIX: u16 = 0x60;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x2800;
const VECTORS: u16 = 4;
/// MSI-X's message control: enabled, all masked.
const ENABLE: u16 = 0x8000;
const MASK_ALL: u16 = 0x4000;
/// Memory decoding and bus mastering, and INTx held off.
const HELD_ON: [u8; 2] = [6, 4];
const HELD_OFF: [u8; 2] = [0, 4];

/// A function with both kinds: MSI with 64-bit addresses, masks and 8 vectors, MSI-X with 4.
fn host(dynamic: bool) -> FakeHost {
    let mut host = FakeHost::new()
        .capabilities(0x40, &[(MSI, 0x0186_6005), (MSIX, 0x0003_0011)])
        .set_dword(MSIX + 4, 0x2000)
        .set_dword(MSIX + 8, 0x2800)
        .set_dword(0x3c, 0x0100)
        .whole_bar(0, MEMORY_32, 0x4000);
    host.vectors.lend(MsiKind::Msi, 8, false);
    host.vectors.lend(MsiKind::MsiX, VECTORS, dynamic);
    host
}

struct Guest {
    bench: Bench,
    controller: FakeController,
}

impl Guest {
    fn new(dynamic: bool) -> Self {
        Self::of(host(dynamic))
    }

    fn of(host: FakeHost) -> Self {
        let controller = FakeController::default();
        let bench = Bench::with_interrupts(host, Some(Arc::new(controller.clone())));
        let _ = bench.bar(0, 0x1000_0000);
        assert!(bench.command(ON).is_ok());
        bench.events();
        Self { bench, controller }
    }

    fn function(&self) -> &AssignedFunction {
        &self.bench.function
    }

    /// Writes MSI-X's message control.
    fn control(&self, control: u16) -> Outcome {
        let bytes = control.to_le_bytes();
        self.function().config_write(MSIX + 2, &bytes)
    }

    fn write(&self, offset: u64, value: u32) {
        let written = self.function().bar_write(BAR, offset, &value.to_le_bytes());
        assert_eq!(written, None);
    }

    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        assert_eq!(self.function().bar_read(BAR, offset, &mut bytes), None);
        u32::from_le_bytes(bytes)
    }

    /// Writes an entry's message, and then unmasks it.
    fn unmask(&self, vector: u64, message: MsiMessage) {
        let entry = TABLE + vector * 16;
        let [low, high] = [message.address & 0xffff_ffff, message.address >> 32];
        self.write(entry, u32::try_from(low).unwrap());
        self.write(entry + 4, u32::try_from(high).unwrap());
        self.write(entry + 8, message.data);
        self.write(entry + 12, 0);
    }

    fn mask(&self, vector: u64) {
        self.write(TABLE + vector * 16 + 12, 1);
    }

    fn raise(&self, vector: u16) -> bool {
        self.bench.host.vectors.raise(MsiKind::MsiX, vector)
    }
}

fn message(n: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000 + (u64::from(n) << 12),
        data: 0x40 + n,
    }
}

fn connect(first: u16, fds: &[bool]) -> Event {
    Event::Connect(MsiKind::MsiX, first, fds.to_vec())
}

#[test]
fn a_vector_is_connected_when_it_is_first_unmasked() {
    let guest = Guest::new(true);
    assert!(guest.control(ENABLE | MASK_ALL).is_ok());
    guest.unmask(2, message(1));
    assert_eq!(
        (guest.bench.events(), guest.controller.asked()),
        (vec![], vec![])
    );
    assert!(guest.control(ENABLE).is_ok());
    assert_eq!(
        guest.controller.asked(),
        [Asked::Made(0), Asked::Routed(0, message(1))]
    );
    assert_eq!(
        guest.bench.events(),
        [connect(0, &[false]), connect(2, &[true])]
    );
    guest.unmask(3, message(2));
    assert_eq!(guest.bench.events(), [connect(3, &[true])]);
    assert!(guest.raise(2) && guest.raise(3));
    assert_eq!(guest.controller.delivered(), [message(1), message(2)]);
    assert!(!guest.raise(0), "nobody unmasked it");
    assert_eq!(
        guest.function().enabled_vectors(),
        Some((MsiKind::MsiX, VECTORS))
    );
}

#[test]
fn route_changes_are_applied_one_by_one() {
    let guest = Guest::new(true);
    let _ = guest.control(ENABLE);
    for vector in 0..3 {
        guest.unmask(vector.into(), message(vector));
    }
    guest.bench.events();
    guest.controller.asked();
    // While it is unmasked, each write is a message; one that changes nothing is none.
    guest.write(TABLE + 16 + 8, 0x77);
    guest.write(TABLE + 16 + 8, 0x77);
    let changed = MsiMessage {
        data: 0x77,
        ..message(1)
    };
    assert_eq!(guest.controller.asked(), [Asked::Routed(1, changed)]);
    // While it is masked, the last one counts.
    guest.mask(1);
    guest.unmask(1, message(9));
    assert_eq!(
        guest.controller.asked(),
        [Asked::Masked(1), Asked::Routed(1, message(9))]
    );
    assert_eq!(guest.bench.events(), [], "the host's side stays as it is");
}

#[test]
fn what_a_masked_vector_keeps_is_pending_and_fires_when_it_is_unmasked() {
    let guest = Guest::new(true);
    let _ = guest.control(ENABLE);
    guest.unmask(1, message(1));
    guest.unmask(2, message(2));
    guest.mask(1);
    assert_eq!(guest.read(PENDING), 0);
    assert!(guest.raise(1) && guest.raise(2));
    assert_eq!(guest.read(PENDING), 0b10, "twice the same");
    assert_eq!(guest.read(PENDING), 0b10);
    guest.write(PENDING, 0);
    assert_eq!(guest.read(PENDING), 0b10, "it is read-only");
    assert_eq!(guest.controller.delivered(), [message(2)]);
    guest.unmask(1, message(5));
    assert_eq!(guest.read(PENDING), 0);
    assert_eq!(guest.controller.delivered(), [message(5)]);
}

#[test]
fn the_function_mask_masks_all_and_gives_all_back() {
    let guest = Guest::new(true);
    let _ = guest.control(ENABLE);
    guest.unmask(0, message(0));
    guest.unmask(3, message(3));
    guest.controller.asked();
    guest.bench.events();
    let _ = guest.control(ENABLE | MASK_ALL);
    assert_eq!(
        guest.controller.asked(),
        [Asked::Masked(0), Asked::Masked(1)]
    );
    guest.raise(3);
    assert_eq!(guest.controller.delivered(), []);
    assert_eq!(guest.read(PENDING), 0b1000);
    let _ = guest.control(ENABLE);
    assert_eq!(guest.controller.delivered(), [message(3)]);
    assert_eq!(guest.bench.events(), []);
}

#[test]
fn disabling_ends_all_and_the_table_stays() {
    let guest = Guest::new(true);
    let _ = guest.control(ENABLE);
    guest.unmask(0, message(0));
    guest.controller.asked();
    guest.bench.events();
    assert!(guest.control(0).is_ok());
    assert_eq!(guest.bench.events(), [Event::Disconnect(MsiKind::MsiX)]);
    assert_eq!(guest.controller.asked(), [Asked::Ended(0)]);
    assert!(!guest.raise(0));
    assert_eq!(guest.read(TABLE + 8), message(0).data);
    assert_eq!(guest.function().enabled_vectors(), None);
    let _ = guest.control(ENABLE);
    assert_eq!(
        guest.bench.events(),
        [connect(0, &[false]), connect(0, &[true])]
    );
    assert!(guest.raise(0));
    assert_eq!(guest.controller.delivered(), [message(0)]);
}

#[test]
fn a_host_that_cannot_add_vectors_enables_all_at_once() {
    let guest = Guest::new(false);
    let _ = guest.control(ENABLE);
    guest.unmask(1, message(1));
    guest.unmask(3, message(3));
    assert_eq!(
        guest.bench.events(),
        [
            connect(0, &[false, true, false, false]),
            connect(3, &[true])
        ]
    );
    assert!(guest.raise(1) && guest.raise(3));
    assert_eq!(guest.controller.delivered(), [message(1), message(3)]);
}

#[test]
fn a_host_with_few_vectors_left_enables_again_and_loses_no_interrupt() {
    let guest = Guest::new(false);
    guest.bench.host.vectors.limit(Some(2));
    let _ = guest.control(ENABLE);
    guest.unmask(0, message(0));
    assert_eq!(
        guest.bench.events(),
        [
            connect(0, &[true, false, false, false]),
            connect(0, &[true])
        ]
    );
    guest.unmask(1, message(1));
    assert_eq!(
        guest.bench.events(),
        [
            Event::Disconnect(MsiKind::MsiX),
            connect(0, &[true, true, false, false]),
            connect(0, &[true, true])
        ]
    );
    // What may have been lost in between.
    assert_eq!(guest.controller.delivered(), [message(0)]);
    // One that the host does not have: those that it had are as before.
    let entry = TABLE + 2 * 16 + 12;
    let refused = guest.function().bar_write(BAR, entry, &[0; 4]).unwrap();
    assert_eq!(refused.to_string(), "connecting MSI-X vector 2 failed");
    assert_eq!(refused.errno.raw(), ENOSPC);
    assert_eq!(guest.bench.host.vectors.connected(), [0, 1]);
    assert_eq!(guest.controller.delivered(), [message(0), message(1)]);
    // It is tried again when the guest next writes there.
    guest.bench.host.vectors.limit(None);
    guest.write(entry, 0);
    assert_eq!(guest.bench.host.vectors.connected(), [0, 1, 2]);
}

#[test]
fn a_controller_that_refuses_is_told_and_tried_again() {
    let guest = Guest::new(true);
    let _ = guest.control(ENABLE);
    guest.controller.refuse(true);
    let entry = TABLE + 12;
    let refused = guest.function().bar_write(BAR, entry, &[0; 4]).unwrap();
    assert_eq!(refused.to_string(), "routing MSI-X vector 0 failed");
    let outcome = guest.control(ENABLE);
    assert_eq!(outcome.host_errors.len(), 1);
    assert_eq!(guest.bench.events(), [], "nowhere to go, so not connected");
    guest.controller.refuse(false);
    assert!(guest.control(ENABLE).is_ok());
    assert!(guest.raise(0));
    // A mask that fails leaves it delivered.
    guest.controller.refuse(true);
    assert!(
        guest
            .function()
            .bar_write(BAR, entry, &[1, 0, 0, 0])
            .is_some()
    );
    assert_eq!(guest.controller.delivered().len(), 1);
    guest.raise(0);
    assert_eq!(guest.controller.delivered().len(), 1);
}

#[test]
fn msi_has_its_registers_at_every_layout() {
    // Control's low byte: width and masks are bits 7 and 8; 2^2 vectors.
    for (control, data, mask) in [
        (0x0004_u32, 8, None),
        (0x0084, 12, None),
        (0x0104, 8, Some(12)),
        (0x0184, 12, Some(16)),
    ] {
        let mut host = FakeHost::new().capabilities(0x40, &[(MSI, control << 16 | 5)]);
        host.vectors.lend(MsiKind::Msi, 4, false);
        let guest = Guest::of(host);
        let bench = &guest.bench;
        assert_eq!(bench.read(MSI), control << 16 | 5);
        for offset in [4, data, data + 4, data + 8] {
            let _ = bench.function.config_write(MSI + offset, &[0xff; 4]);
        }
        if data == 12 {
            let _ = bench.function.config_write(MSI + 8, &[1, 0, 0, 0]);
            assert_eq!(bench.read(MSI + 8), 1);
        }
        assert_eq!(bench.read(MSI + 4), 0xffff_fffc);
        assert_eq!(bench.read(MSI + data), 0xffff);
        if let Some(mask) = mask {
            assert_eq!(bench.read(MSI + mask), 0xf, "as many as there are vectors");
            assert_eq!(bench.read(MSI + mask + 4), 0);
        }
        // More than there are.
        let _ = bench.function.config_write(MSI + 2, &[0x70, 0]);
        assert_eq!(bench.read(MSI) >> 16, control | 0x20);
        let host = bench.host.config.lock()[usize::from(MSI) + 2..][..6].to_vec();
        assert_eq!(
            host[1..],
            [u8::from(control > 0xff), 0, 0, 0, 0],
            "nothing of it reaches the host"
        );
    }
}

#[test]
fn msi_vectors_share_a_message_and_have_masks_of_their_own() {
    let guest = Guest::new(true);
    let function = guest.function();
    let _ = function.config_write(MSI + 4, &0xfee0_1000_u32.to_le_bytes());
    let _ = function.config_write(MSI + 12, &[0x41, 0]);
    let _ = function.config_write(MSI + 16, &[0b10, 0, 0, 0]);
    assert_eq!(guest.bench.events(), []);
    // Four of the eight vectors, enabled.
    let _ = function.config_write(MSI + 2, &[0x21, 0]);
    let at = |data| MsiMessage {
        address: 0xfee0_1000,
        data,
    };
    assert_eq!(
        guest.controller.asked(),
        [
            Asked::Made(0),
            Asked::Routed(0, at(0x40)),
            Asked::Made(1),
            Asked::Routed(1, at(0x42)),
            Asked::Made(2),
            Asked::Routed(2, at(0x43)),
        ]
    );
    let msi = |first, fds: &[bool]| Event::Connect(MsiKind::Msi, first, fds.to_vec());
    assert_eq!(
        guest.bench.events(),
        [
            msi(0, &[true, false, false, false]),
            msi(2, &[true]),
            msi(3, &[true])
        ]
    );
    let raise = |vector| guest.bench.host.vectors.raise(MsiKind::Msi, vector);
    assert!(raise(3) && !raise(1));
    assert_eq!(guest.controller.delivered(), [at(0x43)]);
    let _ = function.config_write(MSI + 16, &[0b1010, 0, 0, 0]);
    assert!(raise(3));
    assert_eq!(guest.controller.delivered(), []);
    assert_eq!(guest.bench.read(MSI + 20), 0b1000);
    let _ = function.config_write(MSI + 16, &[0, 0, 0, 0]);
    assert_eq!(guest.controller.delivered(), [at(0x43)]);
    assert_eq!(guest.bench.host.vectors.connected(), [0, 1, 2, 3]);
    assert_eq!(function.enabled_vectors(), Some((MsiKind::Msi, 4)));
}

#[test]
fn one_kind_at_a_time() {
    let guest = Guest::new(true);
    guest.unmask(0, message(0));
    let _ = guest.function().config_write(MSI + 2, &[1, 0]);
    guest.bench.events();
    assert!(guest.control(ENABLE).is_ok());
    let msi = Event::Disconnect(MsiKind::Msi);
    let msix = [connect(0, &[false]), connect(0, &[true])];
    assert_eq!(guest.bench.events(), [&[msi][..], &msix].concat());
    assert!(guest.control(0).is_ok());
    assert_eq!(guest.function().enabled_vectors(), Some((MsiKind::Msi, 1)));
}

type End = fn(&Bench) -> Outcome;

/// Everything that ends interrupts.
fn ends() -> Vec<(&'static str, End)> {
    vec![
        ("reset", |bench| bench.function.reset()),
        ("quiet", |bench| bench.function.quiesce()),
        ("hot reset", |bench| {
            let set = ResetSet::new([bench.function.clone()]).unwrap();
            set.hot_reset(BusyRetry::default(), &mut || Ok(()))
        }),
        ("function-level reset", |bench| {
            bench.function.config_write(DEVICE_CONTROL, &[0, 0x80])
        }),
        ("sleep that forgets", |bench| {
            let mut outcome = bench.function.config_write(PMCSR, &[3]);
            outcome.append(bench.function.config_write(PMCSR, &[0]));
            outcome
        }),
        ("cut-off", |bench| {
            bench.function.cut_off().unwrap();
            bench.function.cut_off_outcome().unwrap()
        }),
        ("removal", |bench| bench.function.remove()),
    ]
}

/// MSI-X behind the controls of a function with those.
fn host_with_controls() -> FakeHost {
    let mut host = FakeHost::new()
        .with_controls(false)
        .set_dword(0x90, 0x0306_a013)
        .set_dword(0xa0, 0x0003_0011)
        .set_dword(0xa4, 0x2000)
        .set_dword(0xa8, 0x2800)
        .whole_bar(0, MEMORY_32, 0x4000);
    host.vectors.lend(MsiKind::MsiX, VECTORS, true);
    host
}

#[test]
fn every_end_disconnects_all_and_clears_the_registers() {
    for (name, end) in ends() {
        let guest = Guest::of(host_with_controls());
        let function = guest.function();
        let _ = function.config_write(0xa2, &ENABLE.to_le_bytes());
        guest.unmask(1, message(1));
        assert!(guest.raise(1), "{name}: a control that could not fail");
        guest.bench.events();
        assert!(end(&guest.bench).is_ok(), "{name}");
        let events = guest.bench.events();
        let off = events
            .iter()
            .position(|event| *event == Event::Disconnect(MsiKind::MsiX));
        let reset = events.iter().position(|event| *event == Event::Reset);
        assert!(off.is_some(), "{name}: {events:?}");
        assert!(
            reset.is_none_or(|reset| off < Some(reset)),
            "{name}: {events:?}"
        );
        assert_eq!(guest.controller.live(), 0, "{name}");
        assert!(!guest.raise(1), "{name}");
        if name != "removal" {
            assert_eq!(guest.bench.read(0xa0) >> 16, 3, "{name}");
            let _ = guest.bench.bar(0, 0x1000_0000);
            let _ = guest.bench.command(ON);
            assert_eq!(guest.read(TABLE + 16 + 8), 0, "{name}");
            assert_eq!(guest.read(TABLE + 16 + 12), 1, "{name}");
        }
        // Nothing that comes too late connects anything.
        let _ = function.bar_write(BAR, TABLE + 12, &[0; 4]);
        assert_eq!(guest.bench.host.vectors.connected(), [], "{name}");
    }
}

#[test]
fn a_machine_that_is_reset_finds_its_functions_as_at_power_on() {
    for refuses in [false, true] {
        let guest = Guest::of(host_with_controls());
        let bench = &guest.bench;
        let _ = bench.function.config_write(0xa2, &ENABLE.to_le_bytes());
        guest.unmask(1, message(1));
        let quiet = bench.function.quiesce();
        assert!(quiet.is_ok());
        assert_eq!(bench.host.command(), u16::from_le_bytes(HELD_OFF));
        assert_eq!((bench.mapped(), bench.read(0x10)), (vec![], 0));
        assert!(!bench.events().contains(&Event::Reset));

        let _ = bench.command(ON);
        let _ = bench.function.config_write(PMCSR, &[3]);
        bench.events();
        bench.host.refuse.lock().reset = refuses;
        let outcome = bench.function.reset();
        assert_eq!(outcome.is_ok(), !refuses);
        let events = bench.events();
        let quiet = Event::ConfigWrite(COMMAND, HELD_OFF.to_vec());
        let order = |wanted: &Event| events.iter().position(|event| event == wanted).unwrap();
        assert!(order(&quiet) < order(&Event::Reset), "{events:?}");
        assert_eq!(bench.function.power_state(), PowerState::D0, "{refuses}");
        assert_eq!(bench.host.command(), u16::from_le_bytes(HELD_OFF));
        assert_eq!(bench.read(COMMAND) & 0xffff, 0);
        assert_eq!((bench.mapped(), bench.read(0x10)), (vec![], 0));
    }
}

#[test]
fn intx_is_held_off_and_the_guest_reads_its_own_bit() {
    let guest = Guest::new(true);
    let bench = &guest.bench;
    assert_eq!(bench.host.command(), u16::from_le_bytes(HELD_ON));
    assert_eq!(bench.read(COMMAND) & 0xffff, 0x0006);
    assert_eq!(bench.read(0x3c), 0, "no pin");
    let _ = bench.function.config_write(0x3c, &[0x0b, 0xff]);
    assert_eq!(bench.read(0x3c), 0x0b, "the line is a scratch register");
    let _ = bench.function.config_write(COMMAND + 1, &[0x04]);
    assert_eq!(bench.read(COMMAND) & 0xffff, 0x0406);
    let mut upper = [0];
    assert_eq!(bench.function.config_read(COMMAND + 1, &mut upper), None);
    assert_eq!(upper, [4]);
    let _ = bench.function.config_write(COMMAND + 1, &[0]);
    assert_eq!(bench.read(COMMAND) & 0xffff, 0x0006);
    assert_eq!(bench.host.command(), u16::from_le_bytes(HELD_ON));
    bench.events();
    let _ = bench.function.reset();
    let off = Event::ConfigWrite(COMMAND, HELD_OFF.to_vec());
    assert!(bench.events().contains(&off));
    assert_eq!(bench.host.command(), u16::from_le_bytes(HELD_OFF));
}

#[test]
fn registers_beside_the_table_are_the_devices() {
    let guest = Guest::new(true);
    assert_eq!(guest.read(TABLE + 64), 0x5a5a_5a5a, "past the table");
    assert_eq!(guest.read(PENDING + 8), 0x5a5a_5a5a);
    guest.bench.events();
    let mut both = [0; 16];
    let read = guest.function().bar_read(BAR, TABLE + 56, &mut both);
    assert_eq!(read, None);
    assert_eq!(both[..8], [0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(both[8..], [0x5a; 8]);
    assert_eq!(guest.bench.events(), [Event::BarRead(TABLE + 64, 8)]);
    assert_eq!(guest.function().bar_write(BAR, TABLE + 56, &both), None);
    assert_eq!(guest.bench.events(), [Event::BarWrite(TABLE + 64, 8)]);
}

#[test]
fn the_table_takes_dwords_and_qwords_only() {
    let guest = Guest::new(true);
    let write = |offset, data: &[u8]| guest.function().bar_write(BAR, offset, data);
    assert_eq!(write(TABLE, &[0xff; 8]), None);
    assert_eq!(guest.read(TABLE), 0xffff_fffc);
    assert_eq!(guest.read(TABLE + 4), 0xffff_ffff);
    for (offset, data) in [(0, &[1, 2][..]), (12, &[0]), (14, &[0xff, 0xff])] {
        assert_eq!(write(TABLE + offset, data), None);
    }
    assert_eq!(guest.read(TABLE), 0xffff_fffc);
    assert_eq!(write(TABLE + 12, &[0xfe, 0xff, 0xff, 0xff]), None);
    assert_eq!(guest.read(TABLE + 12), 0, "reserved bits");
    assert_eq!(write(TABLE + 8, &[7, 0, 0, 0, 1, 0, 0, 0]), None);
    assert_eq!((guest.read(TABLE + 8), guest.read(TABLE + 12)), (7, 1));
    assert_eq!(guest.bench.events(), [], "none of it is the host's");
}

#[test]
fn without_a_controller_both_are_hidden_and_the_table_is_the_hosts() {
    let bench = Bench::new(host(true));
    let _ = bench.bar(0, 0x1000_0000);
    let _ = bench.command(ON);
    assert_eq!(bench.read(0x34), 0);
    assert_eq!((bench.read(MSI), bench.read(MSIX + 4)), (0, 0));
    let _ = bench.function.config_write(MSIX + 2, &ENABLE.to_le_bytes());
    let _ = bench.function.config_write(MSI, &[0xff; 4]);
    bench.events();
    let mut entry = [0; 8];
    assert_eq!(bench.function.bar_read(BAR, TABLE, &mut entry), None);
    assert_eq!(bench.events(), [Event::BarRead(TABLE, 8)]);
    for capability in bench.function.capabilities() {
        assert_eq!(bench.function.treatment(capability), Treatment::Hidden);
    }
}

#[test]
fn a_kind_of_which_the_host_lends_nothing_is_hidden() {
    let mut host = host(true);
    host.vectors.lend(MsiKind::MsiX, 0, true);
    let guest = Guest::of(host);
    let msi = Capability {
        list: CapabilityList::Standard,
        id: Capability::MSI,
        offset: MSI,
    };
    assert_eq!(guest.function().treatment(&msi), Treatment::Emulated);
    assert_eq!(guest.bench.read(MSI) & 0xff00, 0, "the last of the list");
    assert_eq!(guest.bench.read(MSIX), 0);
}

/// Something that a guest does to its interrupts.
#[derive(Debug, Clone)]
enum Action {
    Config(u16, Vec<u8>),
    Bar(u64, Vec<u8>),
    Read(u64, usize),
    Raise(MsiKind, u16),
    Refuse(bool),
    Limit(Option<u16>),
    Reset,
}

fn action() -> impl Strategy<Value = Action> {
    let value = || prop_oneof![any::<u8>(), Just(0), Just(1), Just(0x80), Just(0xc0)];
    let data = |most| prop::collection::vec(value(), 0..most);
    let capability = MSI - 4..MSIX + 16;
    let structure = || TABLE - 8..PENDING + 16;
    prop_oneof![
        4 => (capability, data(6)).prop_map(|(at, data)| Action::Config(at, data)),
        4 => (structure(), data(20)).prop_map(|(at, data)| Action::Bar(at, data)),
        6 => (0..VECTORS + 1, 0_u64..4, any::<bool>()).prop_map(|(vector, register, low)| {
            let at = TABLE + u64::from(vector) * 16 + register * 4;
            Action::Bar(at, vec![u8::from(low), 0, 0, 0])
        }),
        4 => prop_oneof![Just(0), Just(0x40), Just(0x80), Just(0xc0)]
            .prop_map(|high| Action::Config(MSIX + 2, vec![0, high])),
        2 => (any::<u64>(), data(9)).prop_map(|(at, data)| Action::Bar(at, data)),
        2 => (structure(), 0_usize..20).prop_map(|(at, bytes)| Action::Read(at, bytes)),
        3 => (any::<bool>(), 0..VECTORS).prop_map(|(msi, vector)| {
            Action::Raise(if msi { MsiKind::Msi } else { MsiKind::MsiX }, vector)
        }),
        1 => any::<bool>().prop_map(Action::Refuse),
        1 => prop::option::of(0_u16..6).prop_map(Action::Limit),
        1 => Just(Action::Reset),
    ]
}

proptest! {
    /// Whatever a guest writes while the host and the controller refuse what they like: nobody
    /// panics, what is connected is what the registers say once nobody refuses any more, and it is
    /// nothing after a reset. The fake controller complains of what is asked for in vain.
    #[test]
    fn hostile_writes_end_in_what_the_registers_say(
        dynamic: bool,
        actions in prop::collection::vec(action(), 1..120),
    ) {
        let guest = Guest::new(dynamic);
        let vectors = &guest.bench.host.vectors;
        for action in actions {
            match action {
                Action::Config(at, data) => drop(guest.function().config_write(at, &data)),
                Action::Bar(at, data) => drop(guest.function().bar_write(BAR, at, &data)),
                Action::Read(at, bytes) => {
                    let _ = guest.function().bar_read(BAR, at, &mut vec![0; bytes]);
                }
                Action::Raise(kind, vector) => drop(vectors.raise(kind, vector)),
                Action::Refuse(refuses) => guest.controller.refuse(refuses),
                Action::Limit(limit) => vectors.limit(limit),
                Action::Reset => drop(guest.function().reset()),
            }
            let _ = guest.bench.command(ON);
        }
        guest.controller.refuse(false);
        vectors.limit(None);
        guest.controller.delivered();
        let control = u16::try_from(guest.bench.read(MSIX) >> 16).unwrap();
        let settled = guest.control(control);
        prop_assert!(settled.is_ok(), "{settled:?}");
        if control & ENABLE != 0 {
            guest.controller.delivered();
            for vector in 0..VECTORS {
                let entry = TABLE + u64::from(vector) * 16;
                let masked = control & MASK_ALL != 0 || guest.read(entry + 12) & 1 != 0;
                let connected = guest.raise(vector);
                let now = guest.controller.delivered();
                if masked {
                    prop_assert_eq!(now, []);
                    let pending = guest.read(PENDING) >> vector & 1;
                    prop_assert_eq!(pending, u32::from(connected));
                } else {
                    let address = u64::from(guest.read(entry)) | u64::from(guest.read(entry + 4)) << 32;
                    let data = guest.read(entry + 8);
                    prop_assert_eq!(now, [MsiMessage { address, data }]);
                }
            }
        }
        drop(guest.function().reset());
        prop_assert_eq!(guest.controller.live(), 0);
        prop_assert_eq!(vectors.connected(), []);
    }
}
