//! One map, the simulated kernel behind it and the model beside it: carries scripts out.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use memory_map::{
    Access, Backing, Change, ChangeError, ConsumerKind, DisabledBecause, Gpa, GpaRange, Priority,
    Progress, Reason, RegionManager, RegionSpec, SubMapping, TargetHandle, TargetId, TargetLimits,
    TargetOptions,
};

use crate::bound::{self, Held};
use crate::count::{Counts, failure};
use crate::kernel::{Cutter, Kernel, Mapping, Translation};
use crate::model::{Model, Page, Region, Viewer, address};
use crate::notice::Notices;
use crate::outcome::Outcome;
use crate::script::{BACKING_PAGES, Op, SLOTS, Step, Turn};
use crate::shape::{self, Shape};
use crate::{CELL, GRANULE};

/// At most so many targets at a time.
const TARGETS: usize = 4;
/// At most so many regions.
const REGIONS: usize = 8;

/// A registered target.
#[derive(Debug)]
pub struct Target {
    /// Its registration.
    pub handle: TargetHandle,
    /// What it is like.
    pub shape: Shape,
    /// Its limits now.
    pub limits: TargetLimits,
    /// The number of its table.
    pub table: usize,
}

impl Target {
    /// The same for the model.
    #[must_use]
    pub const fn viewer(&self) -> Viewer<'_> {
        Viewer {
            limits: &self.limits,
            shape: &self.shape,
        }
    }
}

/// For each cell of a table that lacks what is due there: what that is, and why it is missing, or
/// may be where the map does not say.
pub type Excuses = BTreeMap<(usize, usize), (Translation, Vec<Reason>)>;

/// How things stood before a step.
#[derive(Debug)]
pub struct Before {
    /// The tables, by number.
    pub tables: Vec<BTreeMap<u64, Mapping>>,
    /// Which of them were dead.
    pub dead: Vec<bool>,
    /// Whether they held mappings of a revoked epoch.
    pub stale: bool,
    /// The model.
    pub model: Model,
    /// What the map said of the reach.
    pub reach: Vec<memory_map::ReachEntry>,
}

/// One map and all that belongs to it.
#[derive(Debug)]
pub struct World {
    /// The map that is put to the test.
    pub map: RegionManager,
    /// What it calls.
    pub kernel: Kernel,
    /// What it should be.
    pub model: Model,
    /// The registered targets.
    pub targets: Vec<Target>,
    /// What is missing, rightly.
    pub excuses: Excuses,
    /// What has been exercised.
    pub counts: Counts,
    /// Whether the number of calls is held to its lower bound. For scripts without failures.
    pub count_calls: bool,
    pub(crate) notices: Notices,
    slots: Vec<Backing>,
    next_region: usize,
}

impl Default for World {
    fn default() -> Self {
        let kernel = Kernel::default();
        kernel.state().by_cell = true;
        let backing = || kernel.backing(BACKING_PAGES * GRANULE);
        let slots = (0..SLOTS).map(|_| backing()).collect();
        let map = RegionManager::new();
        Self {
            notices: Notices::new(&map),
            map,
            kernel,
            model: Model::default(),
            targets: Vec::new(),
            excuses: Excuses::new(),
            counts: Counts::default(),
            count_calls: false,
            slots,
            next_region: 0,
        }
    }
}

/// A change as far as it has been put together.
struct Asked<'m> {
    change: Change<'m>,
    model: Model,
    revoked: Vec<Backing>,
    nonsense: bool,
}

impl World {
    /// Carries out one turn and checks everything.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn turn(&mut self, turn: &Turn) -> Result<(), String> {
        let before = self.before();
        self.kernel.begin(&turn.faults);
        let outcome = match &turn.step {
            Step::Change(ops, guest) => self.change(ops, *guest, turn.cancel),
            Step::Register(number) => self.register(shape::shape(*number), turn.cancel),
            Step::Unregister(number) => self.unregister(*number),
            Step::Limits(target, number) => self.limits(*target, *number),
            Step::Advance(slot) => {
                self.counts.one("operation: epoch advanced");
                self.slots[*slot].advance_epoch();
                self.kernel.note_epoch(&self.slots[*slot]);
                Outcome::default()
            }
            Step::Renew(slot) => {
                self.counts.one("operation: backing renewed");
                self.slots[*slot] = self.kernel.backing(BACKING_PAGES * GRANULE);
                Outcome::default()
            }
        };
        for (kind, fault) in &self.kernel.state().fired {
            self.counts.one(failure(*kind, *fault));
        }
        let advanced = matches!(turn.step, Step::Advance(_));
        let checked = self.check(&before, &outcome);
        let checked = checked.and_then(|()| self.check_told(&before, advanced));
        checked.map_err(|what| {
            let state = self.kernel.state();
            let (calls, fired, error) = (&state.order, &state.fired, &outcome.error);
            format!("{what}\n  calls {calls:?}\n  failed {fired:?}\n  error {error:?}")
        })?;
        if self.count_calls {
            let held = Held {
                before: &before,
                world: self,
            };
            let calls = bound::check(&held, &outcome)?;
            self.counts.add("call: map", calls.maps);
            self.counts.add("call: unmap", calls.unmaps);
        }
        Ok(())
    }

    /// Ends everything, and checks that nothing is left.
    ///
    /// # Errors
    /// What is left.
    pub fn end(mut self) -> Result<Counts, String> {
        self.kernel.begin(&[]);
        while !self.targets.is_empty() {
            let _outcome = self.unregister(0);
        }
        self.counts.add("operation: unregister", 0);
        drop((self.map, self.notices));
        self.slots.clear();
        let state = self.kernel.state();
        let clean = state.tables.iter().all(|table| !table.dead);
        if clean && state.tables.iter().any(|table| !table.mappings.is_empty()) {
            return Err("a mapping is left at the end".into());
        }
        if clean && !state.hosts.is_empty() {
            return Err(format!(
                "host addresses are left at the end: {:?}",
                state.hosts
            ));
        }
        match state.violations.first() {
            Some(violation) => Err(violation.clone()),
            None => Ok(self.counts),
        }
    }

    fn before(&self) -> Before {
        let reach = self.map.reach();
        let state = self.kernel.state();
        Before {
            tables: state.tables.iter().map(|t| t.mappings.clone()).collect(),
            dead: state.tables.iter().map(|t| t.dead).collect(),
            stale: (state.tables.iter())
                .flat_map(|table| table.mappings.values())
                .any(|mapping| state.is_stale(mapping.to.backing, mapping.epoch)),
            model: self.model.clone(),
            reach,
        }
    }

    fn change(&mut self, ops: &[Op], guest: bool, cancel: Option<u32>) -> Outcome {
        let map = self.map.clone();
        let mut asked = Asked {
            change: map.change(),
            model: self.model.clone(),
            revoked: Vec::new(),
            nonsense: false,
        };
        for op in ops {
            self.ask(&mut asked, op);
        }
        let Asked {
            change,
            model,
            revoked,
            nonsense,
        } = asked;
        let mut outcome = Outcome {
            wanted: Some(model.clone()),
            guest,
            nonsense,
            ..Outcome::default()
        };
        let result = if guest {
            change.commit_guest().map_err(ChangeError::Invalid)
        } else {
            change.commit_watched(&mut watch(cancel, &mut outcome.cancelled))
        };
        for backing in &revoked {
            self.kernel.note_epoch(backing);
        }
        if !nonsense {
            outcome.revoked = revoked.iter().map(Backing::id).collect();
        }
        if result.is_ok() {
            self.model = model;
        }
        outcome.take(result.map(Some));
        outcome
    }

    /// Adds an operation to the change, and does the same to the model.
    fn ask(&mut self, asked: &mut Asked<'_>, op: &Op) {
        let known = asked.model.regions.len();
        let pick = |place: &usize| (known > 0).then(|| *place % known.max(1));
        match op {
            Op::Add { .. } => self.add(asked, op),
            Op::Remove(place) => {
                let Some(at) = pick(place) else { return };
                self.counts.one("operation: remove");
                asked.change.remove(asked.model.regions.remove(at).id);
            }
            Op::Enable(place) | Op::Disable(place) => {
                let Some(at) = pick(place) else { return };
                let region = &mut asked.model.regions[at];
                if matches!(op, Op::Enable(_)) {
                    self.counts.one("operation: enable");
                    region.disabled = None;
                    asked.change.enable(region.id);
                } else {
                    self.counts.one("operation: disable");
                    let because = [DisabledBecause::DecodingOff, DisabledBecause::Sleeping];
                    let because = because[place % 2];
                    region.disabled = Some(because);
                    asked.change.disable(region.id, because);
                }
            }
            Op::Move(place, cell) => {
                let Some(at) = pick(place) else { return };
                let region = &mut asked.model.regions[at];
                region.start = address(*cell);
                asked.nonsense |= region.is_misplaced();
                self.counts.one("operation: move");
                if region.start.checked_add(region.size - 1).is_none() {
                    self.counts.one("operation: move that wraps");
                }
                asked.change.move_to(region.id, Gpa::new(region.start));
            }
            Op::SetAccess(place, access) => {
                let Some(at) = pick(place) else { return };
                self.counts.one("operation: set access");
                asked.model.regions[at].access = *access;
                asked.change.set_access(asked.model.regions[at].id, *access);
            }
            Op::SetSub(place, offset, size, slot, from) => {
                let Some(at) = pick(place) else { return };
                self.set_sub(asked, at, (*offset, *size), Some((*slot, *from)));
            }
            Op::RemoveSub(place, offset, size) => {
                let Some(at) = pick(place) else { return };
                self.set_sub(asked, at, (*offset, *size), None);
            }
            Op::Revoke(slot) => {
                self.counts.one("operation: revoke");
                asked.revoked.push(self.slots[*slot].clone());
                asked.change.revoke(&self.slots[*slot]);
            }
            Op::Nonsense(kind) => self.nonsense(asked, *kind),
        }
    }

    fn nonsense(&mut self, asked: &mut Asked<'_>, kind: usize) {
        self.counts.one("operation: nonsense");
        asked.nonsense = true;
        let gone = self.map.change().add(spec(one_page(), 0));
        let Some(region) = asked.model.regions.first().filter(|_| kind > 0) else {
            return asked.change.enable(gone);
        };
        match kind {
            1 => {
                let end = region.size / GRANULE * GRANULE;
                asked.change.remove_sub_mapping(region.id, end, GRANULE);
            }
            2 => asked.change.remove_sub_mapping(region.id, 0, 1),
            _ => asked.change.set_sub_mapping(
                region.id,
                SubMapping {
                    offset: 0,
                    size: GRANULE,
                    backing: self.slots[0].clone(),
                    backing_offset: BACKING_PAGES * GRANULE,
                },
            ),
        }
    }

    fn add(&mut self, asked: &mut Asked<'_>, op: &Op) {
        let Op::Add {
            at,
            cells,
            priority,
            kind,
            access,
            shareable,
            label,
            parts,
            hole,
            slot,
            backing_page,
            enable,
        } = op
        else {
            return;
        };
        let (start, size) = (address(*at), cells * CELL);
        let Ok(range) = GpaRange::new(Gpa::new(start), size) else {
            return;
        };
        if asked.model.regions.len() >= REGIONS {
            return;
        }
        self.counts.one("operation: add");
        self.next_region += 1;
        let mut spec = spec(range, self.next_region);
        spec.priority = Priority(*priority);
        spec.kind = *kind;
        spec.access = *access;
        spec.shareable = *shareable;
        spec.label = label.map(Into::into);
        let backing = &self.slots[slot % SLOTS];
        let granules = size / GRANULE;
        let mut pages = vec![None; crate::model::index(granules)];
        let (each, last) = (granules.div_ceil(*parts), parts - u64::from(*hole));
        for part in 0..last {
            let (from, to) = (part * each, granules.min((part + 1) * each));
            if from >= to {
                break;
            }
            spec.sub_mappings.push(SubMapping {
                offset: from * GRANULE,
                size: (to - from) * GRANULE,
                backing: backing.clone(),
                backing_offset: (backing_page + from) * GRANULE,
            });
            for page in from..to {
                pages[crate::model::index(page)] = Some(Page {
                    backing: backing.id(),
                    offset: (backing_page + page) * GRANULE,
                });
            }
        }
        let id = asked.change.add(spec);
        if *enable {
            asked.change.enable(id);
        }
        let region = Region {
            id,
            number: self.next_region,
            start,
            size,
            disabled: (!enable).then_some(DisabledBecause::New),
            priority: *priority,
            kind: *kind,
            access: *access,
            shareable: *shareable,
            label: *label,
            pages,
        };
        asked.nonsense |= region.is_misplaced();
        asked.model.regions.push(region);
    }

    fn set_sub(
        &mut self,
        asked: &mut Asked<'_>,
        at: usize,
        (offset, size): (u64, u64),
        new: Option<(usize, u64)>,
    ) {
        let region = &mut asked.model.regions[at];
        if offset + size > region.size / GRANULE {
            return;
        }
        if let Some((slot, from)) = new {
            self.counts.one("operation: set sub-mapping");
            asked.change.set_sub_mapping(
                region.id,
                SubMapping {
                    offset: offset * GRANULE,
                    size: size * GRANULE,
                    backing: self.slots[slot].clone(),
                    backing_offset: from * GRANULE,
                },
            );
        } else {
            self.counts.one("operation: remove sub-mapping");
            let (offset, size) = (offset * GRANULE, size * GRANULE);
            asked.change.remove_sub_mapping(region.id, offset, size);
        }
        for page in 0..size {
            region.pages[crate::model::index(offset + page)] = new.map(|(slot, from)| Page {
                backing: self.slots[slot].id(),
                offset: (from + page) * GRANULE,
            });
        }
    }

    /// Registers a target.
    pub fn register(&mut self, shape: Shape, cancel: Option<u32>) -> Outcome {
        let mut outcome = Outcome::default();
        if self.targets.len() >= TARGETS {
            return outcome;
        }
        let driver = self.kernel.driver(&shape);
        let table = driver.table;
        let mut options = TargetOptions::new(format!("t{table}"));
        options.filter = shape.filter.clone();
        options.kind = shape.kind;
        let kernel = self.kernel.clone();
        options.cut_off = Some(std::sync::Arc::new(Cutter { kernel, table }));
        let mut cancelled = false;
        let result = if shape.kind == ConsumerKind::Sharing {
            self.counts.one("operation: register sharing");
            self.map.register_sharing(Box::new(driver), options)
        } else {
            self.counts.one(if shape.kind == ConsumerKind::Iommu {
                "operation: register"
            } else {
                "operation: register memory slots"
            });
            let mut watch = watch(cancel, &mut cancelled);
            self.map
                .register_watched(Box::new(driver), options, &mut watch)
        };
        outcome.cancelled = cancelled;
        outcome.newcomer = Some((table, shape.clone()));
        let result = result.map(|handle| {
            let limits = shape.limits.clone();
            self.kernel.state().tables[table].ending = false;
            self.targets.push(Target {
                handle,
                shape,
                limits,
                table,
            });
        });
        outcome.take(result.map(|()| None));
        outcome
    }

    /// Unregisters one of the targets.
    pub fn unregister(&mut self, place: usize) -> Outcome {
        let mut outcome = Outcome::default();
        if self.targets.is_empty() {
            return outcome;
        }
        self.counts.one("operation: unregister");
        let target = self.targets.remove(place % self.targets.len());
        self.kernel.state().tables[target.table].ending = true;
        outcome.leaver = Some(target.table);
        outcome.take(Ok(Some(target.handle.unregister())));
        outcome
    }

    fn limits(&mut self, place: usize, number: usize) -> Outcome {
        let outcome = Outcome::default();
        let count = self.targets.len();
        let Some(target) = self.targets.get(place % count.max(1)) else {
            return outcome;
        };
        if target.shape.kind == ConsumerKind::Sharing {
            return outcome;
        }
        let limits = shape::changed(&target.limits, number);
        self.limits_to(target.handle.id(), limits)
    }

    /// Gives a target other limits.
    pub fn limits_to(&mut self, id: TargetId, limits: TargetLimits) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(target) = self.targets.iter_mut().find(|t| t.handle.id() == id) else {
            return outcome;
        };
        self.counts.one("operation: limits changed");
        let told = &self.kernel;
        told.state().tables[target.table]
            .limits
            .push(limits.clone());
        outcome.limits = Some((target.table, limits.clone()));
        let result = self.map.limits_changed(id);
        let mut state = told.state();
        let table = &mut state.tables[target.table];
        if result.is_ok() {
            table.limits.remove(0);
            target.limits = limits;
        } else {
            // The embedder undoes what changed them.
            table.limits.pop();
        }
        drop(state);
        outcome.take(result.map(Some));
        outcome
    }
}

/// Cancels at the call of that number, and says so.
fn watch(
    cancel: Option<u32>,
    cancelled: &mut bool,
) -> impl FnMut(Progress) -> ControlFlow<()> + '_ {
    let mut calls = 0;
    move |_| {
        calls += 1;
        if cancel.is_some_and(|cancel| calls > cancel) {
            *cancelled = true;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

fn spec(range: GpaRange, number: usize) -> RegionSpec {
    RegionSpec {
        name: format!("r{number}").into(),
        range,
        priority: Priority(0),
        kind: memory_map::RegionKind::Ram,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: Vec::new(),
    }
}

fn one_page() -> GpaRange {
    GpaRange::new(Gpa::new(0), GRANULE).unwrap()
}
