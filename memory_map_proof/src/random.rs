//! Random scripts, by seed, and cutting one down to what matters.

use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;

use crate::count::Counts;
use crate::raw;
use crate::script::{Bytes, EVERYTHING, QUIET, Random, Source, Step, Style, Turn, turn};
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

/// What kind of scripts are made up from a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scripts {
    /// Every operation and every failure, against the model.
    Everything,
    /// Without failures; the calls are counted and held to their lower bound.
    Calls,
    /// The same as everything, but made of arbitrary bytes.
    Bytes,
    /// Arbitrary numbers in every place of the interface; there is no model for those.
    Numbers,
}

impl Scripts {
    /// Carries out the script of that seed, and counts.
    ///
    /// # Errors
    /// What is not as it should be, what matters of the script, and how to run it again.
    pub fn run(self, seed: u64) -> Result<Counts, String> {
        let outcome = match self {
            Self::Everything => whole(&script(seed, EVERYTHING), EVERYTHING),
            Self::Calls => whole(&script(seed, QUIET), QUIET),
            Self::Bytes => {
                let bytes = bytes(seed);
                let turns = from_source(&mut Bytes(&bytes), EVERYTHING);
                whole(&turns, EVERYTHING)
            }
            Self::Numbers => caught(|| raw::run(&bytes(seed))),
        };
        outcome.map_err(|what| {
            format!(
                "seed {seed}: {what}\nto run it again: {}",
                self.command(seed)
            )
        })
    }

    fn command(self, seed: u64) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        let name = value.map_or_else(String::new, |value| value.get_name().to_owned());
        format!(
            "cargo run --release -p memory_map_proof -- \
             --scripts {name} --seed {seed} --operations 1 --threads 1"
        )
    }
}

/// Arbitrary bytes.
fn bytes(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let length = 16 + random.below(800);
    let byte = |random: &mut Random| u8::try_from(random.below(256)).unwrap();
    (0..length).map(|_| byte(&mut random)).collect()
}

/// Carries a script out; one that fails is cut down.
fn whole(turns: &[Turn], style: Style) -> Result<Counts, String> {
    let run = |turns: &[Turn]| caught(|| run(turns, style));
    run(turns).map_err(|what| {
        let small = cut_down(turns.to_vec(), &|turns| run(turns).is_err());
        let mut text = format!("{what}\ncut down to:\n");
        for turn in &small {
            let _infallible = writeln!(text, "  {turn:?}");
        }
        let why = run(&small).err().unwrap_or_default();
        text + &why
    })
}

/// A panic is a failure like any other: it has a seed.
fn caught<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

/// Runs scripts from `seed` on until there have been that many operations.
fn run_many(seed: u64, operations: u64, scripts: Scripts) -> Result<Counts, String> {
    let mut counts = Counts::default();
    let mut seed = seed;
    while counts.operations() < operations {
        counts.merge(&scripts.run(seed)?);
        counts.one("scripts");
        seed = seed.wrapping_add(1);
    }
    Ok(counts)
}

/// Runs scripts until there have been that many operations, shared out among threads, each of
/// which goes on from a seed of its own: the same number of threads runs the same scripts.
///
/// # Errors
/// The first script that fails, cut down, with its seed and how to run it again.
pub fn run_threads(
    seed: u64,
    operations: u64,
    scripts: Scripts,
    threads: u64,
) -> Result<Counts, String> {
    let threads = threads.max(1);
    std::thread::scope(|scope| {
        let share = operations.div_ceil(threads);
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                let seed = seed.wrapping_add(thread << 32);
                scope.spawn(move || run_many(seed, share, scripts))
            })
            .collect();
        let mut counts = Counts::default();
        for thread in running {
            counts.merge(&thread.join().unwrap()?);
        }
        Ok(counts)
    })
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
