//! Scripts of arbitrary numbers, made of arbitrary bytes: for panics, and for calls that break
//! the contract. What the numbers are to mean, nobody knows, so no model goes along.

use memory_map::{
    Access, ConsumerKind, DisabledBecause, Gpa, GpaRange, Iova, IovaRange, Priority, RegionId,
    RegionKind, RegionManager, RegionSpec, SubMapping, TargetHandle, TargetLimits, TargetOptions,
};
use std::ops::ControlFlow;

use crate::count::Counts;
use crate::kernel::{Fault, Kernel};
use crate::script::{Bytes, Source};
use crate::shape::{Addressing, plain};

/// Numbers at which arithmetic goes wrong, if it does.
const EDGES: [u64; 16] = [
    0,
    1,
    0x7ff,
    0x800,
    0xfff,
    0x1000,
    0x1001,
    0x2000,
    0xffff,
    0x1_0000,
    1 << 32,
    (1 << 63) - 0x1000,
    1 << 63,
    u64::MAX - 0x1000,
    u64::MAX - 0xfff,
    u64::MAX,
];

/// A script under way.
struct Run<'b> {
    bytes: Bytes<'b>,
    map: RegionManager,
    kernel: Kernel,
    regions: Vec<RegionId>,
    targets: Vec<(TargetHandle, usize)>,
    backings: Vec<memory_map::Backing>,
    /// Whether mappings may be longer than can be gone through piece by piece.
    huge: bool,
}

/// Carries a script out, and counts its steps.
///
/// # Errors
/// Where the map broke the contract with a consumer.
pub fn run(bytes: &[u8]) -> Result<Counts, String> {
    let mut counts = Counts::default();
    let mut bytes = Bytes(bytes);
    let kernel = Kernel::default();
    let huge = bytes.once_in(2);
    let mut run = Run {
        bytes,
        map: RegionManager::new(),
        backings: Vec::new(),
        regions: Vec::new(),
        targets: Vec::new(),
        kernel,
        huge,
    };
    for _ in 0..3 {
        let size = run.number();
        run.backings.push(run.kernel.backing(size));
    }
    while !run.bytes.is_empty() {
        run.step();
        counts.one("operation: of arbitrary numbers");
        run.ask_everything();
        if let Some(violation) = run.kernel.state().violations.first() {
            return Err(violation.clone());
        }
    }
    run.kernel.begin(&[]);
    for (handle, table) in std::mem::take(&mut run.targets) {
        let mut state = run.kernel.state();
        state.lenient = true;
        state.tables[table].ending = true;
        drop(state);
        drop(handle);
    }
    Ok(counts)
}

impl Run<'_> {
    fn number(&mut self) -> u64 {
        let edge = EDGES[self.bytes.below(EDGES.len())];
        let small = (self.bytes.below(256) as u64) << 11;
        match self.bytes.below(4) {
            0 => edge,
            1 => small,
            2 => small & !0xfff,
            _ => edge.wrapping_add(small),
        }
    }

    /// The size of something that is mapped.
    fn extent(&mut self) -> u64 {
        let number = self.number();
        if self.huge { number } else { number % 0x4_1000 }
    }

    fn range(&mut self) -> GpaRange {
        let (start, size) = (self.number(), self.number());
        let whole = GpaRange::new(Gpa::new(start), size);
        whole.unwrap_or_else(|_| GpaRange::new(Gpa::new(0), 0x3000).unwrap())
    }

    /// A region, or one that never was or is no longer.
    fn region(&mut self) -> RegionId {
        let count = self.regions.len();
        if count == 0 || self.bytes.once_in(32) {
            let other = RegionManager::new();
            return other.change().add(self.spec());
        }
        self.regions[self.bytes.below(count)]
    }

    fn sub_mapping(&mut self) -> SubMapping {
        SubMapping {
            offset: self.number(),
            size: self.extent(),
            backing: self.backings[self.bytes.below(3)].clone(),
            backing_offset: self.number(),
        }
    }

    fn spec(&mut self) -> RegionSpec {
        let range = self.range();
        let mut sub_mappings = Vec::new();
        if self.bytes.once_in(2) {
            let backing = self.backings.first().cloned();
            let backing = backing.unwrap_or_else(|| self.kernel.backing(1 << 63));
            let most = backing.size().min(range.size());
            let most = if self.huge { most } else { most % 0x4_1000 };
            sub_mappings.push(SubMapping {
                offset: 0,
                size: most & !0xfff,
                backing,
                backing_offset: 0,
            });
            sub_mappings.retain(|sub| sub.size > 0);
        } else if self.bytes.once_in(4) && self.backings.len() == 3 {
            sub_mappings.push(self.sub_mapping());
            sub_mappings.push(self.sub_mapping());
        }
        RegionSpec {
            name: "raw".into(),
            range,
            priority: Priority([i32::MIN, -1, 0, 1, i32::MAX][self.bytes.below(5)]),
            kind: [RegionKind::Ram, RegionKind::DeviceMemory][self.bytes.below(2)],
            access: [Access::ReadOnly, Access::ReadWrite][self.bytes.below(2)],
            shareable: self.bytes.once_in(2),
            label: None,
            sub_mappings,
        }
    }

    fn limits(&mut self) -> TargetLimits {
        let mut limits = plain().limits;
        let mut power = |most: usize| 1_u64 << self.bytes.below(most);
        limits.page_size = power(21);
        limits.largest_mapping = if self.huge { 1 << 62 } else { power(63) };
        limits.page_size = limits.page_size.max(0x1000);
        limits.largest_mapping = limits.largest_mapping.max(0x1000);
        limits.entry_limit = Some(self.bytes.below(8) as u64);
        limits.read_only = !self.bytes.once_in(4);
        limits.device_memory = !self.bytes.once_in(4);
        limits.unmap_spans = self.bytes.once_in(2);
        limits.allowed.clear();
        let mut numbers: Vec<u64> = (0..self.bytes.below(7)).map(|_| self.number()).collect();
        if !self.bytes.once_in(8) {
            numbers.sort_unstable();
        }
        for pair in numbers.chunks(2) {
            let [start, last] = pair else { continue };
            let range = IovaRange::from_inclusive(Iova::new(*start), Iova::new(*last));
            limits.allowed.extend(range);
        }
        limits
    }

    fn step(&mut self) {
        let mut faults = Vec::new();
        while faults.len() < 3 && self.bytes.once_in(4) {
            let at = u32::try_from(self.bytes.below(8)).unwrap();
            faults.push((at, Fault::ALL[self.bytes.below(5)]));
        }
        self.kernel.begin(&faults);
        match self.bytes.below(10) {
            0 => self.register(),
            1 if !self.targets.is_empty() => {
                let at = self.bytes.below(self.targets.len());
                let (handle, table) = self.targets.remove(at);
                self.kernel.state().tables[table].ending = true;
                drop(handle);
            }
            2 if !self.targets.is_empty() => {
                self.limits_changed();
            }
            3 => {
                let at = self.bytes.below(3);
                self.backings[at].advance_epoch();
            }
            4 => {
                let size = self.number();
                let at = self.bytes.below(3);
                self.backings[at] = self.kernel.backing(size);
            }
            _ => self.change(),
        }
    }

    /// Other limits for a target, or none: those of a sharing consumer are the map's own.
    fn limits_changed(&mut self) {
        let limits = self.limits();
        let at = self.bytes.below(self.targets.len());
        let (handle, table) = &self.targets[at];
        let mut state = self.kernel.state();
        let table = &mut state.tables[*table];
        let limits = if table.kind == ConsumerKind::Sharing {
            table.limits[0].clone()
        } else {
            limits
        };
        table.limits.push(limits);
        drop(state);
        let outcome = self.map.limits_changed(handle.id());
        let mut state = self.kernel.state();
        let told = &mut state.tables[self.targets[at].1].limits;
        if outcome.is_ok() {
            told.remove(0);
        } else {
            // The embedder undoes what changed them.
            told.pop();
        }
    }

    fn register(&mut self) {
        let mut shape = plain();
        let sharing = self.bytes.once_in(6);
        shape.limits = self.limits();
        if sharing {
            shape.kind = ConsumerKind::Sharing;
            shape.limits = crate::shape::shape(7).limits;
            shape.addressing = Addressing::File;
        }
        let driver = self.kernel.driver(&shape);
        let table = driver.table;
        let options = TargetOptions::new("raw");
        let handle = if sharing {
            self.map.register_sharing(Box::new(driver), options)
        } else {
            self.map.register(Box::new(driver), options)
        };
        if let Ok(handle) = handle {
            self.kernel.state().tables[table].ending = false;
            self.targets.push((handle, table));
        }
    }

    fn change(&mut self) {
        let map = self.map.clone();
        let mut change = map.change();
        for _ in 0..1 + self.bytes.below(5) {
            match self.bytes.below(12) {
                0..3 => {
                    let spec = self.spec();
                    let id = change.add(spec);
                    if !self.bytes.once_in(4) {
                        change.enable(id);
                    }
                    self.regions.push(id);
                }
                3 => change.remove(self.region()),
                4 | 5 => change.enable(self.region()),
                6 => change.disable(self.region(), DisabledBecause::HalfWritten),
                7 | 8 => {
                    let to = Gpa::new(self.number());
                    change.move_to(self.region(), to);
                }
                9 => change.set_access(self.region(), Access::ReadOnly),
                10 => {
                    let sub = self.sub_mapping();
                    change.set_sub_mapping(self.region(), sub);
                }
                _ => {
                    let (offset, size) = (self.number(), self.number());
                    change.remove_sub_mapping(self.region(), offset, size);
                    change.revoke(&self.backings[self.bytes.below(3)]);
                }
            }
        }
        if self.bytes.once_in(2) {
            let _either = change.commit_guest();
        } else {
            let cancel = self.bytes.once_in(8);
            let _either = change.commit_watched(&mut |_| {
                if cancel {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            });
        }
    }

    fn ask_everything(&mut self) {
        let number = self.number();
        let mut size = self.map.view().len() + self.map.regions().len();
        size += self
            .map
            .lookup(Gpa::new(number))
            .map_or(0, |s| s.name.as_str().len());
        for entry in self.map.reach() {
            size += entry.reach.to_string().len();
            size += usize::from(self.map.reach_of(entry.target, entry.region).is_ok());
        }
        std::hint::black_box(size);
    }
}
