//! Every script of [`LENGTH`] operations in a small world, and every single failure at every call
//! of every one of them. Four pages; RAM over all of them and two BARs above it; one target that
//! takes two pages at a time, and one that may come and go, maps by file and sees only one of the
//! BARs. The alphabet has 32 operations, the host's and the guest's.
//!
//! Without failures each of the 32^4 scripts is run on a map of its own, and everything is
//! checked after its last operation; what comes before is the last of a shorter script.
//!
//! With failures, what is reached by several ways is gone on from once: two worlds with the same
//! key (model, tables with their mappings, what is missing and why, what is stale, which host
//! addresses there are) have the same future, since nothing else that either of them knows has any
//! influence: not the ids of regions, backings and targets, which differ, but are in the same
//! order; nor the count of an epoch. So the tree of all scripts with all failures is cut down to the states in it,
//! breadth first, and each is left by every operation and, where nothing has failed yet, by every
//! failure of every call of it.
//!
//! That assumption is checked by what is not cut down: each of the scripts without a failure must
//! end in the very state that the states say; and each script of up to [`SHORT`] operations with
//! each failure, every one of which is run on a map of its own, in one of those that they know.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use memory_map::{Filter, Label};

use crate::GRANULE;
use crate::kernel::{CallKind, Fault};
use crate::shape::{Addressing, Shape, plain};
use crate::small::{ALPHABET, Done, Op, World};

/// Operations in a script.
pub const LENGTH: usize = 4;

/// Operations in the scripts that are run with every failure and without short cuts.
pub const SHORT: usize = 3;

type Key = Vec<u64>;

/// Which failure, in which operation of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Injection {
    operation: usize,
    call: u32,
    fault: Fault,
}

/// A way to get somewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Path {
    ops: Vec<usize>,
    injection: Option<Injection>,
}

/// How much was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// Scripts of [`LENGTH`] operations that were run without a failure.
    pub scripts: u64,
    /// States that scripts of any length up to that, with at most one failure, lead to.
    pub states: u64,
    /// Operations that were run on these states.
    pub steps: u64,
    /// Failures that were injected there.
    pub injections: u64,
    /// Scripts with one failure that this stands for.
    pub scripts_with_failure: u64,
    /// Failures in scripts of [`SHORT`] operations and fewer, each run to every end.
    pub short_runs: u64,
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = [
            (self.scripts, "scripts of 4 operations without a failure"),
            (
                self.scripts_with_failure,
                "scripts of 4 operations with one failure, through",
            ),
            (self.states, "states, left by"),
            (self.steps, "operations and"),
            (self.injections, "failures"),
            (
                self.short_runs,
                "scripts of up to 3 operations with one failure, each run by itself",
            ),
        ];
        for (number, what) in lines {
            writeln!(f, "{number:>10}  {what}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ops: Vec<Op> = self.ops.iter().map(|op| ALPHABET[*op]).collect();
        write!(f, "{ops:?}")?;
        match self.injection {
            Some(injection) => write!(f, " with {injection:?}"),
            None => Ok(()),
        }
    }
}

impl Path {
    fn then(&self, op: usize, fault: Option<(u32, Fault)>) -> Self {
        let operation = self.ops.len();
        let injection = fault.map(|(call, fault)| Injection {
            operation,
            call,
            fault,
        });
        let mut ops = self.ops.clone();
        ops.push(op);
        Self {
            ops,
            injection: self.injection.or(injection),
        }
    }

    /// Goes all the way on a new map. Everything is checked at the end, and the calls of the last
    /// operation are told.
    fn run(&self, shapes: &[Shape; 2]) -> Result<(Done, Key), String> {
        let mut world = World::new(shapes);
        let mut done = Done::default();
        for (number, op) in self.ops.iter().enumerate() {
            let here = self.injection.filter(|i| i.operation == number);
            let fault = here.map(|injection| (injection.call, injection.fault));
            let is_last = number + 1 == self.ops.len();
            done = if is_last {
                world.run(ALPHABET[*op], fault, shapes)
            } else {
                world.run_unchecked(ALPHABET[*op], fault, shapes)
            }
            .map_err(|what| format!("{self}: {what}"))?;
        }
        Ok((done, world.key()))
    }
}

const fn faults_of(kind: CallKind) -> &'static [Fault] {
    match kind {
        CallKind::Map => &Fault::ALL,
        CallKind::Unmap => &[
            Fault::Refused,
            Fault::UnknownButDone,
            Fault::UnknownNotDone,
            Fault::RevokedMeanwhile,
        ],
        CallKind::MapHost | CallKind::Limits => &[Fault::Refused],
    }
}

fn shapes() -> [Shape; 2] {
    let mut first = plain();
    first.limits.largest_mapping = 2 * GRANULE;
    let mut second = plain();
    second.limits.unmap_spans = true;
    second.filter = Filter::Labelled([Label::from("small")].into());
    second.addressing = Addressing::File;
    [first, second]
}

/// Shares `work` out among threads.
fn share<W: Sync, R: Send>(
    work: &[W],
    threads: usize,
    act: impl Fn(&W, &mut R) -> Result<(), String> + Sync,
    start: impl Fn() -> R + Sync,
) -> Result<Vec<R>, String> {
    let next = AtomicUsize::new(0);
    let one = || {
        let mut result = start();
        while let Some(item) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            act(item, &mut result)?;
        }
        Ok(result)
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(one)).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// A state, and whether a failure is behind.
type State = (Key, bool);

/// The states after as many operations, each with one way to get there and the number of ways.
type Level = BTreeMap<State, (Path, u64)>;

/// Of several ways to a state the first by order is kept, so that every run takes the same ones.
fn enter(level: &mut Level, state: State, path: Path, ways: u64) {
    match level.entry(state) {
        Entry::Vacant(free) => {
            free.insert((path, ways));
        }
        Entry::Occupied(mut known) => {
            let (first, sum) = known.get_mut();
            *sum += ways;
            if path < *first {
                *first = path;
            }
        }
    }
}

/// What one thread finds on one level.
#[derive(Default)]
struct Found {
    next: Level,
    /// Where an operation without a failure leads.
    leads: HashMap<(Key, usize), Key>,
    steps: u64,
    injections: u64,
}

impl Found {
    /// Leaves a state by every operation, and every failure of it.
    fn leave(
        &mut self,
        from: &Key,
        path: &Path,
        ways: u64,
        shapes: &[Shape; 2],
    ) -> Result<(), String> {
        for op in 0..ALPHABET.len() {
            let path_on = path.then(op, None);
            let (done, to) = path_on.run(shapes)?;
            self.steps += 1;
            if path.injection.is_none() {
                self.leads.insert((from.clone(), op), to.clone());
                for (call, kind) in (0..).zip(&done.calls) {
                    for &fault in faults_of(*kind) {
                        let failing = path.then(op, Some((call, fault)));
                        let (_, to) = failing.run(shapes)?;
                        self.injections += 1;
                        self.note(to, failing, ways);
                    }
                }
            }
            self.note(to, path_on, ways);
        }
        Ok(())
    }

    fn note(&mut self, to: Key, path: Path, ways: u64) {
        let state = (to, path.injection.is_some());
        enter(&mut self.next, state, path, ways);
    }
}

/// Runs everything.
///
/// # Errors
/// The first script that fails, with the failure that was injected.
pub fn run(threads: usize) -> Result<Sums, String> {
    let shapes = shapes();
    let mut sums = Sums::default();
    let start = (World::new(&shapes).key(), false);
    let mut level = Level::from([(start, (Path::default(), 1))]);
    let mut known = Vec::new();
    let mut leads = HashMap::new();
    for _ in 0..LENGTH {
        let states: Vec<_> = level.into_iter().collect();
        let found = share(
            &states,
            threads,
            |((key, _), (path, ways)), found: &mut Found| found.leave(key, path, *ways, &shapes),
            Found::default,
        )?;
        level = Level::new();
        for found in found {
            sums.steps += found.steps;
            sums.injections += found.injections;
            leads.extend(found.leads);
            for (state, (path, ways)) in found.next {
                enter(&mut level, state, path, ways);
            }
        }
        sums.states += level.len() as u64;
        known.push(level.keys().cloned().collect());
    }
    let failed = level.iter().filter(|((_, failed), _)| *failed);
    sums.scripts_with_failure = failed.map(|(_, (_, ways))| ways).sum();
    let firsts: Vec<usize> = (0..ALPHABET.len()).collect();
    let scripts = share(
        &firsts,
        threads,
        |op, scripts: &mut u64| {
            let path = Path::default().then(*op, None);
            let from = World::new(&shapes).key();
            every_script(&path, &from, &leads, &shapes, scripts)
        },
        || 0,
    )?;
    sums.scripts = scripts.iter().sum();
    let short = share(
        &firsts,
        threads,
        |op, runs: &mut u64| {
            let path = Path::default().then(*op, None);
            every_failure(&path, &known, &shapes, runs)
        },
        || 0,
    )?;
    sums.short_runs = short.iter().sum();
    Ok(sums)
}

/// Every script that begins with `path`, without failures and without short cuts.
fn every_script(
    path: &Path,
    from: &Key,
    leads: &HashMap<(Key, usize), Key>,
    shapes: &[Shape; 2],
    scripts: &mut u64,
) -> Result<(), String> {
    let (_, to) = path.run(shapes)?;
    let last = path.ops.last().copied().unwrap_or(0);
    if leads.get(&(from.clone(), last)) != Some(&to) {
        return Err(format!("{path} leads elsewhere than its state says"));
    }
    if path.ops.len() == LENGTH {
        *scripts += 1;
        return Ok(());
    }
    for op in 0..ALPHABET.len() {
        every_script(&path.then(op, None), &to, leads, shapes, scripts)?;
    }
    Ok(())
}

/// Every script of [`SHORT`] operations that begins with `path`, with every failure. `known` are the
/// states after one operation, after two, and so on.
fn every_failure(
    path: &Path,
    known: &[BTreeSet<State>],
    shapes: &[Shape; 2],
    runs: &mut u64,
) -> Result<(), String> {
    let (done, to) = path.run(shapes)?;
    let states = known.get(path.ops.len() - 1);
    if !states.is_some_and(|states| states.contains(&(to, path.injection.is_some()))) {
        return Err(format!("{path} leads to none of the states"));
    }
    *runs += u64::from(path.injection.is_some());
    if path.injection.is_none() {
        for (call, kind) in (0..).zip(&done.calls) {
            for &fault in faults_of(*kind) {
                let mut failing = path.clone();
                failing.injection = Some(Injection {
                    operation: path.ops.len() - 1,
                    call,
                    fault,
                });
                every_failure(&failing, known, shapes, runs)?;
            }
        }
    }
    if path.ops.len() < SHORT {
        for op in 0..ALPHABET.len() {
            every_failure(&path.then(op, None), known, shapes, runs)?;
        }
    }
    Ok(())
}
