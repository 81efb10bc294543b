//! The machine that the benchmarks drive: many regions, consumers that only count, and one step
//! of each kind.
//!
//! ```text
//!   slot 0            slot 1            slot 2
//!   |home |    |away| |home |    |away| |home |    |away|      home, away: 64 KiB each
//!                      [ov 1]                                  each over a page less than
//!                      [ov 2]                                  the one below, so that seven
//!                      [ov 3]                                  segments are seen
//! ```
//! Of `regions` regions, one is the BAR that moves; of the others, so many have three overlays
//! that these lie over a tenth of the homes.

#![allow(
    dead_code,
    reason = "compiled once for each benchmark, none of which uses all of it"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory_map::*;

/// A home's size in bytes: a BAR of the usual kind.
pub const HOME: u64 = 0x1_0000;
/// From one home to the next.
pub const SLOT: u64 = 4 * HOME;
const PAGE: u64 = 0x1000;

/// Something that only has a size.
#[derive(Debug)]
struct Pages(u64);

impl BackingObject for Pages {
    fn size(&self) -> u64 {
        self.0
    }
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        Err(Errno::new(19))
    }
}

/// How often the consumers were called.
#[derive(Debug, Default)]
pub struct Calls {
    maps: AtomicU64,
    unmaps: AtomicU64,
}

impl Calls {
    /// Maps and unmaps so far.
    pub fn so_far(&self) -> (u64, u64) {
        (
            self.maps.load(Ordering::Relaxed),
            self.unmaps.load(Ordering::Relaxed),
        )
    }
}

/// A consumer that counts and does nothing.
struct Counter(Arc<Calls>);

impl DmaTarget for Counter {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        let allowed = IovaRange::new(Iova::new(0), 1 << 57).map_err(|_| Errno::new(22))?;
        Ok(TargetLimits {
            page_size: PAGE,
            allowed: vec![allowed],
            entry_limit: None,
            largest_mapping: 1 << 30,
            read_only: true,
            device_memory: true,
            unmap_spans: true,
        })
    }
    fn needs_host_address(&self, _: &Backing) -> bool {
        false
    }
    fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
        self.0.maps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
        self.0.unmaps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Where a slot begins.
const fn slot(index: u64) -> u64 {
    (1 << 32) + index * SLOT
}

fn spec(name: String, start: u64, size: u64, priority: i32) -> RegionSpec {
    RegionSpec {
        name: name.into(),
        range: GpaRange::new(Gpa::new(start), size).unwrap(),
        priority: Priority(priority),
        kind: RegionKind::DeviceMemory,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: vec![SubMapping {
            offset: 0,
            size,
            backing: Backing::new(Pages(size)),
            backing_offset: 0,
        }],
    }
}

/// A map with regions and consumers, and what is needed to go on changing it.
pub struct Machine {
    pub map: RegionManager,
    pub calls: Arc<Calls>,
    targets: Vec<TargetHandle>,
    /// Is told of every change, and looks when the benchmark does.
    subscription: ReachSubscription,
    /// The BAR that moves.
    bar: RegionId,
    /// Which of its places it is at.
    place: u64,
    homes: Vec<RegionId>,
    /// Which of them are away.
    away: Vec<bool>,
    covered: u64,
    /// The state of a small generator of places, the same in every run.
    seed: u64,
}

impl Machine {
    /// A machine with that many active regions and no consumer.
    pub fn new(regions: u64) -> Self {
        let covered = (regions / 13).max(1);
        let homes = regions - 1 - 3 * covered;
        let map = RegionManager::new();
        let mut change = map.change();
        let mut home_ids = Vec::new();
        for index in 0..homes {
            let name = format!("0000:{index:04x} BAR2");
            let id = change.add(spec(name, slot(index), HOME, 0));
            change.enable(id);
            home_ids.push(id);
        }
        // Spread evenly.
        for group in 0..covered {
            for overlay in 1..=3 {
                let inset = overlay * PAGE;
                let start = slot(Self::covered_slot(group, covered, homes)) + inset;
                let name = format!("overlay {group}.{overlay}");
                let priority = 10 + i32::try_from(overlay).unwrap();
                let id = change.add(spec(name, start, HOME - 2 * inset, priority));
                change.enable(id);
            }
        }
        let start = slot(0) + 2 * HOME;
        let bar = change.add(spec("moving BAR0".into(), start, HOME, 1));
        change.enable(bar);
        change.commit().unwrap();
        let subscription = map.subscribe(|| ());
        Self {
            map,
            calls: Arc::default(),
            targets: Vec::new(),
            subscription,
            bar,
            place: 0,
            away: vec![false; home_ids.len()],
            homes: home_ids,
            covered,
            seed: 1,
        }
    }

    /// The same with consumers.
    pub fn with_targets(regions: u64, targets: u64) -> Self {
        let mut machine = Self::new(regions);
        for _ in 0..targets {
            let target = machine.register();
            machine.targets.push(target);
        }
        machine
    }

    /// Registers one more consumer.
    pub fn register(&self) -> TargetHandle {
        let target = Box::new(Counter(self.calls.clone()));
        let options = TargetOptions::new("container");
        self.map.register(target, options).unwrap()
    }

    const fn covered_slot(group: u64, covered: u64, homes: u64) -> u64 {
        group * homes / covered
    }

    fn any(&mut self, below: u64) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % below
    }

    fn homes(&self) -> u64 {
        self.homes.len() as u64
    }

    fn move_region(&self, region: RegionId, to: u64) {
        let mut change = self.map.change();
        change.disable(region, DisabledBecause::DecodingOff);
        change.move_to(region, Gpa::new(to));
        change.enable(region);
        change.commit_guest().unwrap();
    }

    /// One of the first `places`, but not where the BAR is.
    fn other_place(&mut self, places: u64) -> u64 {
        self.place = (self.place + 1 + self.any(places - 1)) % places;
        self.place
    }

    /// The BAR moves to another of 64 free places (fewer in a small map), which are spread over
    /// the whole map.
    pub fn bar_move(&mut self) {
        let places = self.homes().min(64);
        let place = self.other_place(places) * self.homes() / places;
        self.move_region(self.bar, slot(place) + 2 * HOME);
    }

    /// The same, and the subscriber looks at what has changed.
    pub fn bar_move_seen(&mut self) {
        self.bar_move();
        let changes = self.subscription.take();
        assert!(!changes.reach.is_empty(), "the subscriber is told");
    }

    /// Another BAR each time moves, out of its slot or back: what is touched is in no cache.
    pub fn bar_move_any(&mut self) {
        let index = self.any(self.homes());
        let at = usize::try_from(index).unwrap();
        self.away[at] = !self.away[at];
        let to = slot(index) + if self.away[at] { HOME } else { 0 };
        self.move_region(self.homes[at], to);
    }

    /// The BAR moves from one place under three overlays, where it covers another BAR, to the
    /// next. Takes a map of at least 26 regions.
    pub fn bar_move_covered(&mut self) {
        let place = self.other_place(self.covered.min(64));
        let place = Self::covered_slot(place, self.covered, self.homes());
        self.move_region(self.bar, slot(place));
    }
}

/// A machine with one region of many sub-mappings.
pub struct Window {
    map: RegionManager,
    pub calls: Arc<Calls>,
    _target: TargetHandle,
    _subscription: ReachSubscription,
    window: RegionId,
    backing: Backing,
    others: u64,
    seed: u64,
    /// What was added last, to be removed next.
    added: Option<u64>,
}

impl Window {
    /// Every other page of the region, `others` in all, has a sub-mapping.
    pub fn new(others: u64) -> Self {
        let machine = Machine::new(10);
        let size = 2 * PAGE * others;
        let backing = Backing::new(Pages(size));
        let mut window = spec("window".into(), 1 << 40, size, 0);
        window.sub_mappings = (0..others)
            .map(|index| SubMapping {
                offset: 2 * PAGE * index,
                size: PAGE,
                backing: backing.clone(),
                backing_offset: 2 * PAGE * index,
            })
            .collect();
        let mut change = machine.map.change();
        let window = change.add(window);
        change.enable(window);
        change.commit().unwrap();
        let target = machine.register();
        Self {
            map: machine.map,
            calls: machine.calls,
            _target: target,
            _subscription: machine.subscription,
            window,
            backing,
            others,
            seed: 1,
            added: None,
        }
    }

    /// Adds a sub-mapping between two others, or removes the one that was added last.
    pub fn step(&mut self) {
        let mut change = self.map.change();
        if let Some(offset) = self.added.take() {
            change.remove_sub_mapping(self.window, offset, PAGE);
        } else {
            self.seed = self
                .seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let place = (self.seed >> 33) % 64 * self.others / 64;
            let offset = 2 * PAGE * place + PAGE;
            change.set_sub_mapping(
                self.window,
                SubMapping {
                    offset,
                    size: PAGE,
                    backing: self.backing.clone(),
                    // Not those that lie between the others' pages: it is to stay by itself.
                    backing_offset: 0,
                },
            );
            self.added = Some(offset);
        }
        change.commit().unwrap();
    }
}
