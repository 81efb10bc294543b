//! The small world of the [exhaustive](crate::exhaustive) enumeration.
//!
//! Four pages; RAM over all of them and two BARs above it, one of one page and one of two; one
//! target that takes two pages at a time, and one that may come and go and sees only one of the
//! BARs. The model is an array of four pages.

use memory_map::{
    Access, Backing, Change, ChangeError, DisabledBecause, Gpa, GpaRange, Priority, Reach,
    ReachEntry, Reason, RegionId, RegionKind, RegionManager, RegionSpec, SubMapping, TargetHandle,
    TargetOptions,
};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::GRANULE;
use crate::kernel::{CallKind, ERRNO, Fault, Kernel, Translation};
use crate::model::index;
use crate::shape::Shape;

const PAGES: u64 = 4;
/// The same as the size of an array.
const FOUR: usize = 4;
const RAM: usize = 0;
const SMALL: usize = 1;
const LARGE: usize = 2;
const SIZES: [u64; 3] = [PAGES, 1, 2];

/// What a single operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Enable(usize),
    Disable(usize),
    Move(usize, u64),
    Access(Access),
    /// Another backing behind the first page of the large BAR.
    Replace,
    /// No pages behind the first page of the large BAR.
    Uncover,
    /// The two BARs change places.
    Swap,
    Revoke(usize),
    Come,
    Go,
}

/// A deed, and whether it is the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op(Deed, bool);

/// The alphabet: every deed by host and guest, where there is a difference.
pub(crate) const ALPHABET: [Op; 32] = [
    Op(Deed::Enable(RAM), false),
    Op(Deed::Enable(RAM), true),
    Op(Deed::Disable(RAM), false),
    Op(Deed::Disable(RAM), true),
    Op(Deed::Enable(SMALL), false),
    Op(Deed::Enable(SMALL), true),
    Op(Deed::Disable(SMALL), false),
    Op(Deed::Disable(SMALL), true),
    Op(Deed::Enable(LARGE), false),
    Op(Deed::Enable(LARGE), true),
    Op(Deed::Disable(LARGE), true),
    Op(Deed::Move(SMALL, 0), true),
    Op(Deed::Move(SMALL, 2), false),
    Op(Deed::Move(SMALL, 3), true),
    Op(Deed::Move(LARGE, 0), true),
    Op(Deed::Move(LARGE, 1), false),
    Op(Deed::Move(LARGE, 1), true),
    Op(Deed::Move(LARGE, 2), true),
    Op(Deed::Access(Access::ReadOnly), false),
    Op(Deed::Access(Access::ReadOnly), true),
    Op(Deed::Access(Access::ReadWrite), false),
    Op(Deed::Replace, false),
    Op(Deed::Replace, true),
    Op(Deed::Uncover, false),
    Op(Deed::Uncover, true),
    Op(Deed::Swap, false),
    Op(Deed::Swap, true),
    Op(Deed::Revoke(0), true),
    Op(Deed::Revoke(0), false),
    Op(Deed::Revoke(2), true),
    Op(Deed::Come, false),
    Op(Deed::Go, false),
];

/// The model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Model {
    at: [u64; 3],
    enabled: [bool; 3],
    access: Access,
    /// What is behind the first page of the large BAR: which backing, and which page of it.
    first: Option<(usize, u64)>,
}

impl Model {
    const START: Self = Self {
        at: [0, 1, 2],
        enabled: [true, true, false],
        access: Access::ReadWrite,
        first: Some((2, 0)),
    };

    fn seen(&self, page: u64) -> Option<usize> {
        let covers =
            |r: &usize| self.enabled[*r] && page >= self.at[*r] && page < self.at[*r] + SIZES[*r];
        [SMALL, LARGE, RAM].into_iter().find(covers)
    }

    /// Which backing, which page of it, and how.
    fn behind(&self, region: usize, page: u64) -> Option<(usize, u64, Access)> {
        let into = page - self.at[region];
        match region {
            RAM => Some((0, into, self.access)),
            LARGE if into == 0 => self.first.map(|(b, p)| (b, p, Access::ReadWrite)),
            region => Some((region, into, Access::ReadWrite)),
        }
    }

    fn act(&mut self, deed: Deed) {
        match deed {
            Deed::Enable(region) => self.enabled[region] = true,
            Deed::Disable(region) => self.enabled[region] = false,
            Deed::Move(region, to) => self.at[region] = to,
            Deed::Access(access) => self.access = access,
            Deed::Replace => self.first = Some((3, 1)),
            Deed::Uncover => self.first = None,
            Deed::Swap => self.at.swap(SMALL, LARGE),
            Deed::Revoke(_) | Deed::Come | Deed::Go => {}
        }
        // The larger one must not stick out at the end.
        self.at[LARGE] = self.at[LARGE].min(2);
    }
}

/// One target as far as the world knows it.
struct Target {
    handle: TargetHandle,
    table: usize,
    sees_large: bool,
    /// What was missing when it was last looked at, and why.
    missing: [Option<(Translation, Reason)>; FOUR],
}

/// The small world.
pub(crate) struct World {
    map: RegionManager,
    kernel: Kernel,
    backings: [Backing; 4],
    regions: [RegionId; 3],
    model: Model,
    targets: [Option<Target>; 2],
}

impl Drop for World {
    fn drop(&mut self) {
        self.kernel.begin(&[]);
        let mut state = self.kernel.state();
        state.lenient = true;
        state
            .tables
            .iter_mut()
            .for_each(|table| table.ending = true);
    }
}

/// What one operation came to.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// The calls that it made.
    pub(crate) calls: Vec<CallKind>,
}

type Held = Vec<(u64, u64, Translation)>;

impl World {
    pub(crate) fn new(shapes: &[Shape; 2]) -> Self {
        let map = RegionManager::new();
        let kernel = Kernel::default();
        kernel.state().by_cell = true;
        let backings = [4, 1, 2, 2].map(|pages| kernel.backing(pages * GRANULE));
        let model = Model::START;
        let mut change = map.change();
        let regions = [RAM, SMALL, LARGE].map(|number| {
            change.add(RegionSpec {
                name: ["ram", "small", "large"][number].into(),
                range: at(model.at[number], SIZES[number]),
                priority: Priority(i32::from(number != RAM)),
                kind: if number == RAM {
                    RegionKind::Ram
                } else {
                    RegionKind::DeviceMemory
                },
                access: Access::ReadWrite,
                shareable: true,
                label: Some(["ram", "small", "large"][number].into()),
                sub_mappings: vec![SubMapping {
                    offset: 0,
                    size: SIZES[number] * GRANULE,
                    backing: backings[number].clone(),
                    backing_offset: 0,
                }],
            })
        });
        change.enable(regions[RAM]);
        change.enable(regions[SMALL]);
        change.commit().unwrap();
        let mut world = Self {
            map,
            kernel,
            backings,
            regions,
            model,
            targets: [None, None],
        };
        world.come(0, shapes).unwrap();
        world.come(1, shapes).unwrap();
        world
    }

    fn come(&mut self, number: usize, shapes: &[Shape; 2]) -> Result<(), ChangeError> {
        if self.targets[number].is_some() {
            return Ok(());
        }
        let driver = self.kernel.driver(&shapes[number]);
        let table = driver.table;
        let mut options = TargetOptions::new(if number == 0 { "first" } else { "second" });
        options.filter = shapes[number].filter.clone();
        let handle = self.map.register(Box::new(driver), options)?;
        self.kernel.state().tables[table].ending = false;
        self.targets[number] = Some(Target {
            handle,
            table,
            sees_large: number == 0,
            missing: [const { None }; FOUR],
        });
        Ok(())
    }

    fn act(&mut self, op: Op, shapes: &[Shape; 2]) -> Option<ChangeError> {
        let Op(deed, guest) = op;
        let mut model = self.model;
        model.act(deed);
        match deed {
            Deed::Come => return self.come(1, shapes).err(),
            Deed::Go => {
                if let Some(target) = self.targets[1].take() {
                    self.kernel.state().tables[target.table].ending = true;
                    drop(target.handle);
                }
                return None;
            }
            _ => {}
        }
        let mut change = self.map.change();
        self.ask(&mut change, deed, &model);
        let outcome = if guest {
            change.commit_guest().map_err(ChangeError::Invalid)
        } else {
            change.commit()
        };
        if let Deed::Revoke(backing) = deed {
            self.kernel.note_epoch(&self.backings[backing]);
        }
        if outcome.is_ok() {
            self.model = model;
        }
        outcome.err()
    }

    fn ask(&self, change: &mut Change<'_>, deed: Deed, model: &Model) {
        match deed {
            Deed::Enable(region) => change.enable(self.regions[region]),
            Deed::Disable(region) => {
                change.disable(self.regions[region], DisabledBecause::Owner);
            }
            Deed::Access(access) => change.set_access(self.regions[RAM], access),
            Deed::Replace => change.set_sub_mapping(
                self.regions[LARGE],
                SubMapping {
                    offset: 0,
                    size: GRANULE,
                    backing: self.backings[3].clone(),
                    backing_offset: GRANULE,
                },
            ),
            Deed::Uncover => change.remove_sub_mapping(self.regions[LARGE], 0, GRANULE),
            Deed::Revoke(backing) => change.revoke(&self.backings[backing]),
            Deed::Move(..) | Deed::Swap => {
                for region in [SMALL, LARGE] {
                    if model.at[region] != self.model.at[region] {
                        let to = Gpa::new(model.at[region] * GRANULE);
                        change.move_to(self.regions[region], to);
                    }
                }
            }
            Deed::Come | Deed::Go => {}
        }
    }

    /// Everything that a target holds, and what the map says of the reach.
    fn state(&self) -> (BTreeMap<usize, Held>, Vec<ReachEntry>) {
        let reach = self.map.reach();
        let state = self.kernel.state();
        let targets = self.targets.iter().flatten();
        let held = targets.map(|target| {
            let mappings = state.tables[target.table].mappings.iter();
            let held = mappings.map(|(&start, m)| (start, m.last, m.to)).collect();
            (target.table, held)
        });
        (held.collect(), reach)
    }

    /// Carries an operation out that a shorter script has checked.
    pub(crate) fn run_unchecked(
        &mut self,
        op: Op,
        fault: Option<(u32, Fault)>,
        shapes: &[Shape; 2],
    ) -> Result<Done, String> {
        self.kernel.begin(fault.as_slice());
        let _checked_before = self.act(op, shapes);
        self.note_missing();
        Ok(Done::default())
    }

    /// Carries an operation out and holds everything against the model.
    pub(crate) fn run(
        &mut self,
        op: Op,
        fault: Option<(u32, Fault)>,
        shapes: &[Shape; 2],
    ) -> Result<Done, String> {
        let before = fault.map(|_| self.state());
        self.kernel.begin(fault.as_slice());
        let error = self.act(op, shapes);
        let calls = self.kernel.state().log.clone();
        let state = self.kernel.state();
        let violation = state.violations.first().cloned();
        if let Some(violation) = violation.or_else(|| state.left_revoked()) {
            return Err(violation);
        }
        drop(state);
        let dead = (self.targets.iter().flatten())
            .any(|target| self.kernel.state().tables[target.table].dead);
        if let (Some(error), Some(before)) = (&error, before) {
            // A revocation is not undone, and a dead target has other tests.
            if !dead && !matches!(op.0, Deed::Revoke(_)) {
                let stale = matches!(fault, Some((_, Fault::RevokedMeanwhile)));
                if !stale && before != self.state() {
                    return Err(format!("not as before after {error}"));
                }
            }
        } else if error.is_some() {
            return Err(format!("refused without a failure: {error:?}"));
        }
        self.check()?;
        Ok(Done { calls })
    }

    /// Takes note of what an operation in the middle of a script left missing.
    fn note_missing(&mut self) {
        let _checked_before = self.check();
    }

    /// All that the future can depend on: equal keys, equal futures.
    pub(crate) fn key(&self) -> Vec<u64> {
        let mut hasher = DefaultHasher::new();
        let mut key: Vec<u64> = self.model.at.to_vec();
        key.extend(self.model.enabled.map(u64::from));
        key.push(u64::from(self.model.access == Access::ReadOnly));
        key.push(
            self.model
                .first
                .map_or(u64::MAX, |(b, page)| b as u64 * 8 + page),
        );
        for target in self.targets.iter().flatten() {
            for region in self.regions {
                match self.map.reach_of(target.handle.id(), region) {
                    Ok(Reach::Mapped) => 0.hash(&mut hasher),
                    reach => reach.map(|reach| reach.to_string()).ok().hash(&mut hasher),
                }
            }
        }
        key.push(hasher.finish());
        let ids = [0, 1, 2, 3].map(|backing: usize| self.backings[backing].id());
        let state = self.kernel.state();
        for target in &self.targets {
            let Some(target) = target else {
                key.push(1);
                continue;
            };
            let table = &state.tables[target.table];
            if table.dead {
                key.push(2);
                continue;
            }
            key.push(3 + table.mappings.len() as u64);
            for (&start, mapping) in &table.mappings {
                let backing = ids.iter().position(|id| *id == mapping.to.backing);
                let stale = state.is_stale(mapping.to.backing, mapping.epoch);
                let read_only = mapping.to.access == Access::ReadOnly;
                key.extend([start, mapping.last, mapping.to.offset]);
                key.push(
                    backing.unwrap_or(4) as u64 * 4 + u64::from(stale) * 2 + u64::from(read_only),
                );
            }
            let mut reasons = DefaultHasher::new();
            for missing in &target.missing {
                let what = missing.as_ref().map(|(to, reason)| {
                    let read_only = to.access == Access::ReadOnly;
                    (to.offset, read_only, reason.to_string())
                });
                what.hash(&mut reasons);
            }
            key.push(reasons.finish());
        }
        key.extend(
            state
                .hosts
                .values()
                .copied()
                .collect::<std::collections::BTreeSet<_>>(),
        );
        key
    }

    fn check(&mut self) -> Result<(), String> {
        let model = self.model;
        for page in 0..PAGES {
            let seen = self.map.lookup(Gpa::new(page * GRANULE)).map(|s| s.region);
            let expected = model.seen(page).map(|region| self.regions[region]);
            if seen != expected {
                return Err(format!("page {page} shows {seen:?}"));
            }
        }
        let ids = [0, 1, 2, 3].map(|backing: usize| self.backings[backing].id());
        for target in self.targets.iter_mut().flatten() {
            let state = self.kernel.state();
            let table = &state.tables[target.table];
            let mut mapped = [0; 3];
            for page in 0..PAGES {
                let region = model
                    .seen(page)
                    .filter(|r| *r != LARGE || target.sees_large);
                let behind = region.and_then(|r| model.behind(r, page));
                let due = behind.map(|(backing, page, access)| Translation {
                    backing: ids[backing],
                    offset: page * GRANULE,
                    access,
                });
                let found = table.translate(page * GRANULE);
                let held = found.map(|(to, _)| to);
                if table.dead {
                    continue;
                }
                let missing = &mut target.missing[index(page)];
                let refused = table.refused.get(&(page * GRANULE)).cloned();
                let excuse = due.filter(|_| held.is_none()).and_then(|due| {
                    let no_host = state.host_failed(due.backing);
                    let no_host = no_host.then_some((due, Reason::NoHostAddress(ERRNO)));
                    let why = |excuse: &(Translation, Reason)| excuse.0 == due;
                    (refused.filter(why).or(no_host)).or_else(|| missing.take().filter(why))
                });
                if held != due && excuse.is_none() {
                    return Err(format!("page {page} holds {held:?}, due is {due:?}"));
                }
                *missing = excuse;
                let stale = found.is_some_and(|(to, epoch)| state.is_stale(to.backing, epoch));
                if let Some(region) = region.filter(|_| held.is_some() && !stale) {
                    mapped[region] += 1;
                }
            }
            let dead = table.dead;
            drop(state);
            for region in [RAM, SMALL, LARGE] {
                let reach = self.map.reach_of(target.handle.id(), self.regions[region]);
                let pages = (0..SIZES[region]).map(|page| model.at[region] + page);
                let pages = pages.filter(|p| model.behind(region, *p).is_some()).count() as u64;
                let right = match reach {
                    Ok(Reach::Mapped) => !dead && mapped[region] == pages,
                    Ok(Reach::Partly { mapped: bytes, .. }) => {
                        !dead && bytes == mapped[region] * GRANULE && mapped[region] < pages
                    }
                    Ok(Reach::Unavailable(Reason::Quarantined)) => dead,
                    Ok(Reach::Unavailable(_)) => mapped[region] == 0,
                    Err(_) => false,
                };
                if !right {
                    return Err(format!(
                        "{reach:?}, but {} of {pages} mapped",
                        mapped[region]
                    ));
                }
            }
        }
        Ok(())
    }
}

fn at(page: u64, pages: u64) -> GpaRange {
    GpaRange::new(Gpa::new(page * GRANULE), pages * GRANULE).unwrap()
}
