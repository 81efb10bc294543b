//! All processors move BARs while an engine moves data.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use assigned_pci::HostFunction;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Value, json};

use super::found;
use crate::function::{Bar, Function};
use crate::peer::{Cast, WHERE};
use crate::place::free_places;
use crate::report::Findings;

/// What one processor moves, to and fro.
#[derive(Debug)]
struct Mover {
    function: Arc<Function>,
    bar: Bar,
    cpu: usize,
    places: [u64; 2],
}

/// Lets this thread run on one processor only.
pub fn run_on(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("running on processor {cpu}"))
}

/// The BARs that can move without what is proved meanwhile being disturbed: all but the engine's
/// and the first peer's memory, also the first peer's other one. Each processor has some.
fn movers(cast: &Cast) -> anyhow::Result<Vec<Mover>> {
    let cpus = thread::available_parallelism()?.get();
    let first = cast.peers.first().context("there is no peer")?;
    let mut movers = Vec::new();
    let mut spoken_for: Vec<Range<u64>> = Vec::new();
    for function in &cast.functions {
        if function.name() == cast.edu.name()
            || function.is_bridge()?
            || function.driver().is_some()
        {
            continue;
        }
        for bar in function.bars() {
            if function.name() == first.function.name() && bar.index == first.bar.index {
                continue;
            }
            let places = free_places(function, *bar, &cast.functions, &spoken_for)?;
            let [place, other, ..] = places[..] else {
                continue;
            };
            for start in [place, other] {
                spoken_for.push(start..start.saturating_add(bar.size));
            }
            movers.push(Mover {
                function: Arc::clone(function),
                bar: *bar,
                cpu: movers.len() % cpus,
                places: [place, other],
            });
        }
    }
    Ok(movers)
}

impl Mover {
    /// Moves to and fro until told to stop, then back to where it was; gives how long each move
    /// took, in microseconds.
    fn run(&self, stop: &AtomicBool) -> anyhow::Result<Vec<u128>> {
        run_on(self.cpu)?;
        let home = self.function.address(self.bar)?;
        let mut took = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            for place in self.places {
                let start = Instant::now();
                self.function.set_address(self.bar, place)?;
                took.push(start.elapsed().as_micros());
                let now = self.function.address(self.bar)?;
                ensure!(
                    now == place,
                    "{:?}: {place:#x} reads {now:#x}",
                    self.function
                );
            }
        }
        self.function.set_address(self.bar, home)?;
        Ok(took)
    }
}

/// `rounds` proofs with the first peer while all processors move the others' BARs.
pub fn moves_and_transfers(cast: &mut Cast, rounds: u64) -> anyhow::Result<Findings> {
    let movers = movers(cast)?;
    ensure!(
        movers.len() > 1,
        "fewer than two BARs can be moved: {movers:?}"
    );
    for mover in &movers {
        mover.function.enable()?;
    }
    let target = cast.peers.first().cloned().context("there is no peer")?;
    let stop = AtomicBool::new(false);
    let (proved, moved) = thread::scope(|scope| {
        let threads: Vec<_> = movers
            .iter()
            .map(|mover| scope.spawn(|| mover.run(&stop)))
            .collect();
        let mut prove = || {
            for _ in 0..rounds {
                cast.prove_peer(&target)?;
                // Into one that moves: it arrives or does not, and harms nobody.
                if let [_, other, ..] = &cast.peers.clone()[..] {
                    let there = other.address()?.saturating_add(WHERE);
                    cast.send(there)?;
                }
            }
            Ok(())
        };
        let proved: anyhow::Result<()> = prove();
        stop.store(true, Ordering::Relaxed);
        let moved: Vec<anyhow::Result<Vec<u128>>> = threads
            .into_iter()
            .map(|thread| {
                let ended = thread.join();
                ended.unwrap_or_else(|_| Err(anyhow!("a mover's thread panicked")))
            })
            .collect();
        (proved, moved)
    });
    proved?;
    let mut told = Vec::new();
    for (mover, took) in movers.iter().zip(moved) {
        told.push(mover.told(took?)?);
    }
    // All are back, and reached where they are.
    let mut again = Vec::new();
    for peer in cast.peers.clone() {
        again.push(cast.prove_peer(&peer)?);
    }
    let mut nobody = Vec::new();
    for mover in &movers {
        let [place, _] = mover.places;
        if mover.bar.size > WHERE {
            nobody.push(cast.prove_nobody(place.saturating_add(WHERE))?);
        }
    }
    Ok(found([
        ("rounds", json!(rounds)),
        ("movers", json!(told)),
        ("moved", json!(again)),
        ("nobody", json!(nobody)),
    ]))
}

impl Mover {
    fn told(&self, mut took: Vec<u128>) -> anyhow::Result<Value> {
        took.sort_unstable();
        let middle = took.get(took.len() / 2);
        let name = format!("{} {}", self.function.name(), self.bar.index);
        ensure!(took.len() > 2, "{name} was moved {} times only", took.len());
        Ok(json!({
            "bar": name,
            "cpu": self.cpu,
            "places": self.places,
            "moves": took.len(),
            "median microseconds": middle.map(|time| u64::try_from(*time).unwrap_or(u64::MAX)),
            "longest microseconds": took.last().map(|time| u64::try_from(*time).unwrap_or(u64::MAX)),
        }))
    }
}
