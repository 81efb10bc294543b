//! Any sequence of writes, of any width and in any order, against a model that knows nothing but
//! bytes and power states: which BAR is visible where.

use std::collections::BTreeSet;

use memory_map::{
    Access, Backing, BackingObject, Errno, Gpa, GpaRange, HostMapping, Priority, RegionId,
    RegionKind, RegionSpec, SubMapping,
};
use proptest::prelude::*;

use super::fake::*;
use crate::BarIndex;

/// What the guest does.
#[derive(Debug, Clone)]
enum Act {
    /// Writes config space, at an offset in bytes.
    Write(u16, Vec<u8>),
    /// Touches a BAR's address, as its registers stand, and what comes after it.
    Touch(usize, u64),
    /// The embedder resets the function.
    Reset,
    /// The embedder says that mappings may be dead.
    Again,
}

/// A function: its BARs, and what decides whether they are seen.
#[derive(Debug)]
struct Whole {
    bars: Vec<Model>,
    /// The memory bit of the command register.
    memory: bool,
    /// As PMCSR says it.
    power: u8,
    no_soft_reset: bool,
}

impl Whole {
    fn decodes(&self) -> bool {
        self.memory && self.power == 0
    }

    fn reset(&mut self) {
        self.memory = false;
        self.power = 0;
        for bar in &mut self.bars {
            bar.bytes.fill(0);
            bar.down = None;
        }
    }

    /// After something that may have changed whether it decodes, from `before`.
    fn decoding_changed(&mut self, before: bool) {
        let now = self.decodes();
        for bar in &mut self.bars {
            if now && !before {
                bar.settle();
            } else if !now {
                bar.down = None;
            }
        }
    }

    fn set_power(&mut self, wanted: u8) {
        let (before, decoded) = (self.power, self.decodes());
        if wanted == 0 || wanted > before {
            self.power = wanted;
        }
        if before == 3 && self.power == 0 && !self.no_soft_reset {
            self.reset();
        }
        self.decoding_changed(decoded);
    }
}

/// A memory BAR: its bytes, and what was written of them.
#[derive(Debug)]
struct Model {
    index: u8,
    size: u64,
    /// Byte values, 4 or 8.
    bytes: Vec<u8>,
    /// None: visible, if the function decodes. Else the bytes written since it went down.
    down: Option<BTreeSet<usize>>,
}

impl Model {
    fn address_of(&self, bytes: &[u8]) -> u64 {
        let mut number = 0_u64;
        for byte in bytes.iter().rev() {
            number = number * 256 + u64::from(*byte);
        }
        number / self.size * self.size
    }

    fn address(&self) -> u64 {
        self.address_of(&self.bytes)
    }

    /// The halves that hold all ones, by their first byte. Type bits do not count.
    fn sized(bytes: &[u8]) -> Vec<usize> {
        (0..bytes.len())
            .step_by(4)
            .filter(|half| {
                (*half..half + 4).all(|byte| {
                    let ignored = if byte == 0 { 0x0f } else { 0 };
                    bytes[byte] | ignored == 0xff
                })
            })
            .collect()
    }

    /// The bytes in which there are address bits.
    fn needed(&self) -> BTreeSet<usize> {
        let ones = self.address_of(&vec![0xff; self.bytes.len()]);
        (0..self.bytes.len())
            .filter(|byte| ones >> (byte * 8) & 0xff != 0)
            .collect()
    }

    fn write(&mut self, first: usize, data: &[u8], decoding: bool) {
        let before = self.bytes.clone();
        for (byte, value) in data.iter().enumerate() {
            self.bytes[first + byte] = *value;
        }
        if !decoding {
            self.down = None;
            return;
        }
        let sized = Self::sized(&self.bytes);
        let same = self.address() == self.address_of(&before) && sized == Self::sized(&before);
        if self.down.is_none() && same {
            return;
        }
        let mut written = self.down.take().unwrap_or_default();
        written.extend(first..first + data.len());
        for half in sized {
            written.retain(|byte| byte / 4 * 4 != half);
        }
        if !written.is_superset(&self.needed()) {
            self.down = Some(written);
        }
    }

    /// What has been written is meant.
    fn settle(&mut self) {
        let sized = Self::sized(&self.bytes);
        self.down = (!sized.is_empty()).then(|| {
            (0..self.bytes.len())
                .filter(|byte| !sized.contains(&(byte / 4 * 4)))
                .collect()
        });
    }
}

#[derive(Debug)]
struct Pages;

const RAM: u64 = 0x10_0000;

impl BackingObject for Pages {
    fn size(&self) -> u64 {
        RAM
    }
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        Err(Errno::new(EIO))
    }
}

/// A function with BARs of three kinds, above RAM at 0.
fn bench(no_soft_reset: bool) -> (Bench, Whole, RegionId) {
    let bench = Bench::new(
        FakeHost::new()
            .with_controls(no_soft_reset)
            .whole_bar(0, MEMORY_32, 0x1_0000)
            .bar(1, IO, 0x20, &[])
            .whole_bar(2, MEMORY_64_PREFETCHABLE, 0x1000)
            .whole_bar(4, MEMORY_64, 0x2_0000),
    );
    let mut change = bench.map.change();
    let ram = change.add(RegionSpec {
        name: "ram".into(),
        range: GpaRange::new(Gpa::new(0), RAM).unwrap(),
        priority: Priority(1),
        kind: RegionKind::Ram,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: vec![SubMapping {
            offset: 0,
            size: RAM,
            backing: Backing::new(Pages),
            backing_offset: 0,
        }],
    });
    change.enable(ram);
    change.commit().unwrap();
    let model = |index, size, width| Model {
        index,
        size,
        bytes: vec![0; width],
        down: None,
    };
    let bars = vec![
        model(0, 0x1_0000, 4),
        model(2, 0x1000, 8),
        model(4, 0x2_0000, 8),
    ];
    let whole = Whole {
        bars,
        memory: false,
        power: 0,
        no_soft_reset,
    };
    (bench, whole, ram)
}

/// Values that meet each other, and sizing.
fn dword() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(u32::MAX),
        2 => Just(0),
        3 => 1_u32..4,
        5 => (0x8000_u32..0x8006).prop_map(|page| page << 16),
        2 => any::<u32>(),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let register = (4_u16..10, dword()).prop_map(|(register, value)| (register * 4, value));
    let command = prop_oneof![Just((4_u16, 0x6_u32)), Just((4, 0x4)), Just((4, 0x102))];
    let dwords = prop_oneof![8 => register, 2 => command];
    let write = (
        dwords,
        0_u16..4,
        prop_oneof![4 => Just(4_usize), 1 => Just(2), 1 => Just(1)],
    )
        .prop_map(|((offset, value), byte, width)| {
            let byte = usize::from(byte) / width * width;
            let data = value.to_le_bytes()[byte..byte + width].to_vec();
            Act::Write(offset + u16::try_from(byte).unwrap(), data)
        });
    let power = (
        prop_oneof![4 => Just(3_u8), 3 => Just(0), 1 => 1_u8..3],
        1_usize..3,
        any::<bool>(),
    )
        .prop_map(|(state, width, other)| {
            // Bits beside the state ask for nothing.
            let low = if other { 0xf0 | state } else { state };
            Act::Write(PMCSR, vec![low, 0][..width].to_vec())
        });
    let flr = prop_oneof![
        Just(Act::Write(DEVICE_CONTROL, vec![0, 0x80])),
        Just(Act::Write(DEVICE_CONTROL + 1, vec![0x80])),
        Just(Act::Write(DEVICE_CONTROL, vec![0xff, 0x7f])),
        Just(Act::Write(AF_CONTROL, vec![1])),
        Just(Act::Write(AF_CONTROL, vec![0xfe, 0xff])),
    ];
    prop_oneof![
        30 => write,
        4 => power,
        1 => flr,
        1 => Just(Act::Again),
        2 => (0_usize..3, 0_u64..0x2_0000).prop_map(|(bar, offset)| Act::Touch(bar, offset)),
        1 => Just(Act::Reset),
    ]
}

/// Carries out `act` in the model.
fn apply(whole: &mut Whole, act: &Act) {
    match act {
        Act::Write(offset @ 4..6, data) => {
            if *offset == 4 {
                whole.memory = data[0] & 2 != 0;
            }
            let decodes = whole.decodes();
            for model in &mut whole.bars {
                if decodes {
                    model.settle();
                } else {
                    model.down = None;
                }
            }
        }
        Act::Write(PMCSR, data) => whole.set_power(data[0] & 3),
        Act::Write(DEVICE_CONTROL, data) if data[1] & 0x80 != 0 => whole.reset(),
        Act::Write(AF_CONTROL, data) if data[0] & 1 != 0 => whole.reset(),
        Act::Write(offset, _) if *offset == DEVICE_CONTROL + 1 => whole.reset(),
        Act::Write(offset, data) => {
            let decodes = whole.decodes();
            for model in &mut whole.bars {
                let first = 0x10 + u16::from(model.index) * 4;
                if let Some(byte) = offset.checked_sub(first).map(usize::from)
                    && byte < model.bytes.len()
                {
                    model.write(byte, data, decodes);
                }
            }
        }
        Act::Touch(bar, offset) => {
            let gpa = whole.bars[*bar].address().wrapping_add(*offset);
            if whole.decodes()
                && let Some(model) = whole.bars.iter_mut().find(|model| {
                    (model.address()..=model.address() + (model.size - 1)).contains(&gpa)
                        && Model::sized(&model.bytes).is_empty()
                })
            {
                model.settle();
            }
        }
        Act::Reset => whole.reset(),
        Act::Again => {}
    }
}

/// Who is seen at `gpa`, as the model has it.
fn owner(models: &[Model], decoding: bool, gpa: u64) -> Option<u8> {
    models
        .iter()
        .filter(|model| decoding && model.down.is_none())
        .find(|model| (model.address()..=model.address() + (model.size - 1)).contains(&gpa))
        .map(|model| model.index)
}

fn check(bench: &Bench, whole: &Whole, ram: RegionId) {
    let (models, decoding) = (&whole.bars, whole.decodes());
    assert_eq!(bench.read(COMMAND) & 2 != 0, whole.memory);
    assert_eq!(bench.host.command() & 2 != 0, whole.memory);
    assert_eq!(bench.function.is_decoding(), decoding);
    let mapped = bench.mapped.lock().clone();
    for model in models {
        let start = model.address();
        let last = start + (model.size - 1);
        let around = [start.wrapping_sub(1), start, last, last.wrapping_add(1)];
        for gpa in around {
            let seen = bench.map.lookup(Gpa::new(gpa));
            if gpa < RAM {
                assert_eq!(seen.unwrap().region, ram, "{gpa:#x}");
                continue;
            }
            let expected = owner(models, decoding, gpa);
            let seen = seen.map(|s| bench.function.bar_of(s.region).unwrap());
            assert_eq!(seen.map(BarIndex::get), expected, "{gpa:#x}");
            let reached = mapped
                .range(..=gpa)
                .next_back()
                .is_some_and(|(start, size)| gpa - start < *size);
            assert_eq!(reached, expected.is_some() && gpa >> 52 == 0, "{gpa:#x}");
        }
        // The registers read back what they hold.
        let register = 0x10 + u16::from(model.index) * 4;
        let low = u64::from(bench.read(register) & !0xf);
        let high = match model.bytes.len() {
            8 => u64::from(bench.read(register + 4)) << 32,
            _ => 0,
        };
        assert_eq!(low | high, start);
    }
    // Nothing else is visible.
    for segment in bench.map.view() {
        if segment.region != ram {
            let start = segment.range.start().raw();
            let bar = bench.function.bar_of(segment.region).map(BarIndex::get);
            assert_eq!(bar, owner(models, decoding, start));
            let model = models
                .iter()
                .find(|model| Some(model.index) == bar)
                .unwrap();
            assert_eq!(segment.offset, start - model.address());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_order_of_writes_shows_what_the_bytes_say(
        no_soft_reset in any::<bool>(),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let (bench, mut whole, ram) = bench(no_soft_reset);
        for act in acts {
            let outcome = match &act {
                Act::Write(offset, data) => bench.function.config_write(*offset, data),
                Act::Touch(bar, offset) => {
                    let gpa = Gpa::new(whole.bars[*bar].address().wrapping_add(*offset));
                    bench.function.cpu_access(gpa).map(|a| a.outcome).unwrap_or_default()
                }
                Act::Reset => bench.function.reset(),
                Act::Again => bench.function.mappings_may_be_revoked(),
            };
            assert!(outcome.is_ok());
            apply(&mut whole, &act);
            check(&bench, &whole, ram);
        }
    }
}
