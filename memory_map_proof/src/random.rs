//! Random scripts, by seed, and cutting one down to what matters.

use std::fmt::Write as _;

use crate::count::Counts;
use crate::script::{Random, Source, Step, Style, Turn, turn};
use crate::world::World;

/// How many turns a script has.
const TURNS: usize = 40;

/// Makes up the script of that seed.
#[must_use]
pub fn script(seed: u64, style: Style) -> Vec<Turn> {
    from_source(&mut Random::new(seed), style)
}

/// Makes up a script from a source of choices.
pub fn from_source(source: &mut dyn Source, style: Style) -> Vec<Turn> {
    let mut turns = Vec::with_capacity(TURNS);
    while turns.len() < TURNS && !source.is_empty() {
        turns.push(turn(source, style));
    }
    turns
}

/// Carries a script out on a new map.
///
/// # Errors
/// What is not as it should be, and after which turn.
pub fn run(turns: &[Turn], style: Style) -> Result<Counts, String> {
    let mut world = World::default();
    world.count_calls = !style.failures;
    for (number, turn) in turns.iter().enumerate() {
        world
            .turn(turn)
            .map_err(|what| format!("turn {number}: {what}"))?;
    }
    world.end()
}

/// Runs scripts from `seed` on until there have been that many operations.
///
/// # Errors
/// The first script that fails, cut down, with its seed.
pub fn run_many(seed: u64, operations: u64, style: Style) -> Result<Counts, String> {
    let mut counts = Counts::default();
    let mut seed = seed;
    while counts.operations() < operations {
        let turns = script(seed, style);
        match run(&turns, style) {
            Ok(more) => counts.merge(&more),
            Err(what) => return Err(explain(seed, &turns, style, &what)),
        }
        seed = seed.wrapping_add(1);
    }
    Ok(counts)
}

/// The same, shared out among threads, each with seeds of its own.
///
/// # Errors
/// As for [`run_many`].
pub fn run_threads(
    seed: u64,
    operations: u64,
    style: Style,
    threads: u64,
) -> Result<Counts, String> {
    let threads = threads.max(1);
    std::thread::scope(|scope| {
        let share = operations.div_ceil(threads);
        let running: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || run_many(seed + (thread << 32), share, style)))
            .collect();
        let mut counts = Counts::default();
        for thread in running {
            let one = thread.join().unwrap_or_else(|_| Err("a panic".into()));
            counts.merge(&one?);
        }
        Ok(counts)
    })
}

fn explain(seed: u64, turns: &[Turn], style: Style, what: &str) -> String {
    let small = cut_down(turns.to_vec(), &|turns| run(turns, style).is_err());
    let mut text = format!("seed {seed}: {what}\ncut down to:\n");
    for turn in &small {
        let _infallible = writeln!(text, "  {turn:?}");
    }
    let why = run(&small, style).err().unwrap_or_default();
    text + &why
}

/// Leaves out what can be left out while the script still fails.
#[must_use]
pub fn cut_down(mut turns: Vec<Turn>, fails: &dyn Fn(&[Turn]) -> bool) -> Vec<Turn> {
    loop {
        let mut smaller = Vec::new();
        for at in 0..turns.len() {
            let mut fewer = turns.clone();
            fewer.remove(at);
            smaller.push(fewer);
            let faults = turns[at].faults.len();
            for fault in 0..faults {
                let mut fewer = turns.clone();
                fewer[at].faults.remove(fault);
                smaller.push(fewer);
            }
            if turns[at].cancel.is_some() {
                let mut fewer = turns.clone();
                fewer[at].cancel = None;
                smaller.push(fewer);
            }
            if let Step::Change(ops, _) = &turns[at].step {
                for op in 0..ops.len() {
                    let mut fewer = turns.clone();
                    if let Step::Change(ops, _) = &mut fewer[at].step {
                        ops.remove(op);
                    }
                    smaller.push(fewer);
                }
            }
        }
        match smaller.into_iter().find(|turns| fails(turns)) {
            Some(fewer) => turns = fewer,
            None => return turns,
        }
    }
}
