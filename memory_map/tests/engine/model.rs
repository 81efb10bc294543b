//! The map against a model that goes page by page, under random scripts and random failures.

use std::sync::Arc;

use crate::page_table::{Addresses, Fault, PAGE, PageTable, backing, limits};
use memory_map::{
    Access, Backing, BackingId, Change, DisabledBecause, Filter, Gpa, GpaRange, InvalidChange,
    Iova, IovaRange, Label, Priority, Reach, RegionId, RegionKind, RegionManager, RegionSpec,
    SubMapping, TargetHandle, TargetLimits, TargetOptions,
};
use proptest::prelude::*;

const SPACE: u64 = 14;
const BACKINGS: usize = 3;
const BACKING_PAGES: u64 = 6;

#[derive(Debug, Clone)]
enum Op {
    Add {
        at: u64,
        size: u64,
        priority: i32,
        ram: bool,
        read_only: bool,
        labelled: bool,
        backing: usize,
    },
    Remove(usize),
    Enable(usize),
    Disable(usize),
    Move(usize, u64),
    Access(usize, bool),
    Sub(usize, u64, u64, usize, u64),
    Unsub(usize, u64, u64),
    Revoke(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let pick = 0_usize..6;
    prop_oneof![
        3 => (0..SPACE - 4, 1_u64..5, 0..3, any::<bool>(), any::<bool>(), any::<bool>(), 0..BACKINGS)
            .prop_map(|(at, size, priority, ram, read_only, labelled, backing)| Op::Add {
                at, size, priority, ram, read_only, labelled, backing
            }),
        1 => pick.clone().prop_map(Op::Remove),
        6 => pick.clone().prop_map(Op::Enable),
        2 => pick.clone().prop_map(Op::Disable),
        4 => (pick.clone(), 0..SPACE - 4).prop_map(|(r, at)| Op::Move(r, at)),
        1 => (pick.clone(), any::<bool>()).prop_map(|(r, w)| Op::Access(r, w)),
        3 => (pick.clone(), 0_u64..4, 1_u64..4, 0..BACKINGS, 0_u64..4)
            .prop_map(|(r, o, s, b, bo)| Op::Sub(r, o, s, b, bo)),
        2 => (pick, 0_u64..4, 1_u64..4).prop_map(|(r, o, s)| Op::Unsub(r, o, s)),
        1 => (0..BACKINGS).prop_map(Op::Revoke),
    ]
}

#[derive(Debug, Clone)]
struct Step {
    ops: Vec<Op>,
    guest: bool,
    /// Target, call, how.
    fault: Option<(usize, usize, Fault)>,
}

fn step() -> impl Strategy<Value = Step> {
    let fault = prop_oneof![
        3 => Just(Fault::Refused),
        1 => Just(Fault::Revoked),
        1 => Just(Fault::UnknownButDone),
        1 => Just(Fault::UnknownNotDone),
    ];
    let fault = prop_oneof![
        3 => Just(None),
        2 => (0_usize..4, 0_usize..5, fault).prop_map(Some),
    ];
    (prop::collection::vec(op(), 1..5), any::<bool>(), fault).prop_map(|(ops, guest, fault)| Step {
        ops,
        guest,
        fault,
    })
}

#[derive(Debug, Clone)]
struct NaiveRegion {
    id: RegionId,
    at: u64,
    enabled: bool,
    priority: i32,
    ram: bool,
    access: Access,
    labelled: bool,
    pages: Vec<Option<(BackingId, u64)>>,
}

#[derive(Debug, Clone, Default)]
struct Naive(Vec<NaiveRegion>);

impl Naive {
    fn seen(&self, page: u64) -> Option<&NaiveRegion> {
        self.0
            .iter()
            .filter(|r| r.enabled && page >= r.at && page < r.at + r.pages.len() as u64)
            .max_by_key(|r| (r.priority, std::cmp::Reverse(r.id)))
    }
}

struct Watched {
    table: PageTable,
    handle: TargetHandle,
    ram_only: bool,
    labelled_only: bool,
    forbidden: Vec<u64>,
    read_only: bool,
}

impl Watched {
    fn expected(&self, naive: &Naive, page: u64) -> Option<(BackingId, u64, Access)> {
        let region = naive.seen(page)?;
        if !self.admits(region) || self.forbidden.contains(&page) {
            return None;
        }
        let index = usize::try_from(page - region.at).unwrap();
        region.pages[index].map(|(id, page)| (id, page * PAGE, region.access))
    }

    fn admits(&self, region: &NaiveRegion) -> bool {
        (region.ram || !self.ram_only)
            && (region.ram || region.labelled || !self.labelled_only)
            && (region.access == Access::ReadWrite || self.read_only)
    }
}

struct World {
    map: RegionManager,
    naive: Naive,
    backings: Vec<Backing>,
    targets: Vec<Watched>,
}

fn world() -> World {
    let addresses = Arc::new(Addresses::default());
    let map = RegionManager::new();
    let mut hole: TargetLimits = limits();
    hole.allowed = vec![
        IovaRange::from_inclusive(Iova::new(0), Iova::new(6 * PAGE - 1)).unwrap(),
        IovaRange::from_inclusive(Iova::new(7 * PAGE), Iova::new(10 * PAGE - 1)).unwrap(),
    ];
    let mut small = limits();
    small.largest_mapping = 2 * PAGE;
    small.unmap_spans = true;
    let mut writable = limits();
    writable.read_only = false;
    let shapes = [
        (limits(), Filter::All),
        (small, Filter::RamOnly),
        (hole, Filter::Labelled([Label::from("x")].into())),
        (writable, Filter::All),
    ];
    let targets = shapes
        .into_iter()
        .map(|(limits, filter)| {
            let table = PageTable::new(limits.clone());
            let mut options = TargetOptions::new("table");
            options.filter = filter.clone();
            Watched {
                handle: map.register(table.boxed(), options).unwrap(),
                table,
                ram_only: filter == Filter::RamOnly,
                labelled_only: matches!(filter, Filter::Labelled(_)),
                forbidden: if limits.allowed.len() > 1 {
                    vec![6, 10, 11, 12, 13]
                } else {
                    Vec::new()
                },
                read_only: limits.read_only,
            }
        })
        .collect();
    World {
        map,
        naive: Naive::default(),
        backings: (0..BACKINGS)
            .map(|_| backing(BACKING_PAGES, &addresses))
            .collect(),
        targets,
    }
}

impl World {
    fn quarantined(&self, target: &Watched) -> bool {
        let why = self.map.quarantine_of(target.handle.id()).unwrap();
        why.is_some()
    }

    /// Adds an operation to the change, and does the same to the model.
    fn ask(&self, change: &mut Change<'_>, naive: &mut Naive, op: &Op) {
        let known = naive.0.len();
        let pick = |index: &usize| (known > 0).then(|| index % known);
        match op {
            Op::Add {
                at,
                size,
                priority,
                ram,
                read_only,
                labelled,
                backing,
            } => {
                let backing = &self.backings[*backing];
                let access = if *read_only {
                    Access::ReadOnly
                } else {
                    Access::ReadWrite
                };
                let id = change.add(RegionSpec {
                    name: "region".into(),
                    range: GpaRange::new(Gpa::new(at * PAGE), size * PAGE).unwrap(),
                    priority: Priority(*priority),
                    kind: if *ram {
                        RegionKind::Ram
                    } else {
                        RegionKind::DeviceMemory
                    },
                    access,
                    shareable: false,
                    label: labelled.then(|| "x".into()),
                    sub_mappings: vec![SubMapping {
                        offset: 0,
                        size: size * PAGE,
                        backing: backing.clone(),
                        backing_offset: 0,
                    }],
                });
                naive.0.push(NaiveRegion {
                    id,
                    at: *at,
                    enabled: false,
                    priority: *priority,
                    ram: *ram,
                    access,
                    labelled: *labelled,
                    pages: (0..*size).map(|page| Some((backing.id(), page))).collect(),
                });
            }
            Op::Remove(index) => {
                if let Some(index) = pick(index) {
                    change.remove(naive.0.remove(index).id);
                }
            }
            Op::Enable(index) | Op::Disable(index) => {
                if let Some(index) = pick(index) {
                    let region = &mut naive.0[index];
                    region.enabled = matches!(op, Op::Enable(_));
                    if region.enabled {
                        change.enable(region.id);
                    } else {
                        change.disable(region.id, DisabledBecause::Owner);
                    }
                }
            }
            Op::Move(index, at) => {
                if let Some(index) = pick(index) {
                    naive.0[index].at = *at;
                    change.move_to(naive.0[index].id, Gpa::new(at * PAGE));
                }
            }
            Op::Access(index, writable) => {
                if let Some(index) = pick(index) {
                    let access = if *writable {
                        Access::ReadWrite
                    } else {
                        Access::ReadOnly
                    };
                    naive.0[index].access = access;
                    change.set_access(naive.0[index].id, access);
                }
            }
            Op::Sub(index, offset, size, backing, backing_offset) => {
                let Some(index) = pick(index) else { return };
                let region = &mut naive.0[index];
                let fits = offset + size <= region.pages.len() as u64
                    && backing_offset + size <= BACKING_PAGES;
                if !fits {
                    return;
                }
                let backing = &self.backings[*backing];
                change.set_sub_mapping(
                    region.id,
                    SubMapping {
                        offset: offset * PAGE,
                        size: size * PAGE,
                        backing: backing.clone(),
                        backing_offset: backing_offset * PAGE,
                    },
                );
                for page in 0..*size {
                    let at = usize::try_from(offset + page).unwrap();
                    region.pages[at] = Some((backing.id(), backing_offset + page));
                }
            }
            Op::Unsub(index, offset, size) => {
                let Some(index) = pick(index) else { return };
                let region = &mut naive.0[index];
                if offset + size > region.pages.len() as u64 {
                    return;
                }
                change.remove_sub_mapping(region.id, offset * PAGE, size * PAGE);
                for page in *offset..offset + size {
                    region.pages[usize::try_from(page).unwrap()] = None;
                }
            }
            Op::Revoke(index) => change.revoke(&self.backings[*index]),
        }
    }

    fn check(&self, exact: bool) -> Result<(), TestCaseError> {
        for page in 0..SPACE {
            let seen = self.map.lookup(Gpa::new(page * PAGE)).map(|s| s.region);
            prop_assert_eq!(seen, self.naive.seen(page).map(|r| r.id), "page {}", page);
        }
        for (number, target) in self.targets.iter().enumerate() {
            if self.quarantined(target) {
                continue;
            }
            for page in 0..SPACE {
                let expected = target.expected(&self.naive, page);
                let actual = target.table.translate(page * PAGE);
                if exact || actual.is_some() {
                    prop_assert_eq!(actual, expected, "target {} page {}", number, page);
                }
            }
            for region in &self.naive.0 {
                self.check_reach(target, region)?;
            }
        }
        Ok(())
    }

    /// The reach says how many pages a device can really get at: asked of the table, not of the
    /// map's own books.
    fn check_reach(&self, target: &Watched, region: &NaiveRegion) -> Result<(), TestCaseError> {
        let reach = self.map.reach_of(target.handle.id(), region.id).unwrap();
        let (mut with_pages, mut mapped) = (0_u64, 0_u64);
        for (index, pages) in region.pages.iter().enumerate() {
            let page = region.at + index as u64;
            with_pages += u64::from(pages.is_some());
            let visible = self
                .naive
                .seen(page)
                .is_some_and(|seen| seen.id == region.id);
            let there = target.table.translate(page * PAGE);
            mapped += u64::from(visible && there.is_some());
        }
        let admitted = target.admits(region) && region.enabled && with_pages > 0;
        match reach {
            Reach::Mapped => prop_assert!(admitted && mapped == with_pages, "{mapped}"),
            Reach::Partly { mapped: bytes, .. } => {
                prop_assert!(admitted && mapped < with_pages);
                prop_assert_eq!(bytes, mapped * PAGE);
            }
            Reach::Unavailable(_) => prop_assert!(!admitted || mapped == 0),
        }
        Ok(())
    }
}

/// Whether anything has ever failed, so that a piece may be missing.
fn run(steps: &[Step]) -> Result<(), TestCaseError> {
    let mut world = world();
    let mut exact = true;
    for step in steps {
        let mut naive = world.naive.clone();
        let mut change = world.map.change();
        for op in &step.ops {
            world.ask(&mut change, &mut naive, op);
        }
        if let Some((target, call, fault)) = &step.fault {
            world.targets[*target].table.fail_in(*call, fault.clone());
        }
        let before: Vec<_> = (world.targets.iter())
            .map(|t| {
                (0..SPACE)
                    .map(|p| t.table.translate(p * PAGE))
                    .collect::<Vec<_>>()
            })
            .collect();
        let revokes = step.ops.iter().any(|op| matches!(op, Op::Revoke(_)));
        if step.guest {
            let report = change.commit_guest();
            prop_assert!(report.is_ok());
            // A guest's change takes place whatever happens.
            world.naive = naive;
            let missing = report.unwrap();
            exact &= missing
                .mappings
                .iter()
                .all(|m| !matches!(m.action, memory_map::Action::Unavailable(_)));
        } else {
            match change.commit() {
                Ok(report) => {
                    world.naive = naive;
                    exact &= report
                        .mappings
                        .iter()
                        .all(|m| !matches!(m.action, memory_map::Action::Unavailable(_)));
                }
                Err(memory_map::ChangeError::Invalid(InvalidChange::UnknownRegion(_))) => {
                    return Err(TestCaseError::fail("a known region is unknown"));
                }
                Err(error) => {
                    // Undone whole: the same translations as before, in every target.
                    for (target, before) in world.targets.iter().zip(before) {
                        if world.quarantined(target) || revokes {
                            continue;
                        }
                        for (page, before) in (0..SPACE).zip(before) {
                            let after = target.table.translate(page * PAGE);
                            prop_assert_eq!(after, before, "after {}", &error);
                        }
                    }
                    exact &= !revokes;
                }
            }
        }
        for target in &world.targets {
            target.table.0.lock().fail_in = None;
        }
        world.check(exact)?;
    }
    for target in world.targets {
        let quarantined = world.map.quarantine_of(target.handle.id()).unwrap();
        drop(target.handle);
        if quarantined.is_none() {
            prop_assert_eq!(target.table.len(), 0);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]
    #[test]
    fn every_target_holds_what_the_model_says(steps in prop::collection::vec(step(), 1..14)) {
        run(&steps)?;
    }
}
