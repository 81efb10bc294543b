//! A guest that writes nonsense wherever it can, while a transfer that it leaves alone goes on.
//!
//! What is spared: the engine and the first peer, with which the transfers are proved, and their
//! places; the serial port; ports that end the machine or that the kernel needs for itself. What
//! takes a function 100 ms (resets, power states) is done a limited number of times. Now and then
//! everything is put where it belongs, for accesses to what is in the BARs. Bridges are put back
//! afterwards, so that what is behind them can be asked where it is; all else stays as it is then.

mod accesses;
mod victims;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, anyhow};
use serde_json::json;

use self::victims::Victims;
use super::found;
use super::race::run_on;
use crate::pattern::Numbers;
use crate::peer::Cast;
use crate::ports::Ports;
use crate::report::Findings;

/// How many accesses of each kind were made.
#[derive(Debug, Default)]
struct Count {
    config: u64,
    bars: u64,
    ecam: u64,
    ports: u64,
    contents: u64,
    slow: u32,
    decodings: u64,
}

impl Count {
    fn all(&self) -> u64 {
        self.config + self.bars + self.ecam + self.ports + self.contents
    }
}

/// `accesses` of nonsense, on a processor of their own, while the first peer is proved over and
/// over. Another number gives other nonsense.
pub fn nonsense(cast: &mut Cast, accesses: u64) -> anyhow::Result<Findings> {
    let victims = Victims::new(cast)?;
    let target = cast.peers.first().cloned().context("there is no peer")?;
    // From now on neither needs config space: the kernel's own accesses would be confused by those
    // to the same ports that it knows nothing of.
    cast.prove_peer(&target)?;
    let done = AtomicBool::new(false);
    let (proved, written) = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let written = write_nonsense(&victims, accesses);
            done.store(true, Ordering::Relaxed);
            written
        });
        let mut prove = || {
            run_on(0)?;
            let mut rounds = 0_u64;
            // Once more after it has ended, and often enough if it has failed.
            loop {
                let last = done.load(Ordering::Relaxed);
                cast.prove_peer(&target)
                    .with_context(|| format!("after {rounds} rounds that went well"))?;
                rounds += 1;
                if last {
                    return Ok(rounds);
                }
            }
        };
        let proved: anyhow::Result<u64> = prove();
        let ended = thread.join();
        let written = ended.unwrap_or_else(|_| Err(anyhow!("the hostile thread panicked")));
        (proved, written)
    });
    let (count, rounds) = (written?, proved?);
    // What is behind them can then be asked again.
    victims.restore_bridges()?;
    Ok(found([
        ("accesses", json!(count.all())),
        ("config", json!(count.config)),
        ("bars", json!(count.bars)),
        ("ecam", json!(count.ecam)),
        ("ports", json!(count.ports)),
        ("contents", json!(count.contents)),
        ("slow", json!(count.slow)),
        ("decodings", json!(count.decodings)),
        ("rounds", json!(rounds)),
    ]))
}

fn write_nonsense(victims: &Victims, accesses: u64) -> anyhow::Result<Count> {
    run_on(1)?;
    let ports = Ports::open().context("asking for the right to access ports")?;
    let mut numbers = Numbers::new(accesses);
    let mut count = Count::default();
    while count.all() < accesses {
        match numbers.below(4000) {
            // Not in the end: what is left then is to be nonsense.
            0 if count.all() < accesses / 20 * 19 => {
                accesses::contents(victims, &mut numbers, &mut count)?;
                count.contents += accesses::IN_A_ROW;
            }
            0..1800 => {
                let made = accesses::config(victims, &mut numbers, &mut count)?;
                count.config += u64::from(made);
            }
            1800..2000 => {
                count.bars += accesses::bar(victims, &mut numbers, &mut count)?;
            }
            2000..3000 => {
                accesses::by_address(victims, &mut numbers)?;
                count.ecam += 1;
            }
            _ => {
                let made = accesses::by_port(victims, &ports, &mut numbers);
                count.ports += u64::from(made);
            }
        }
    }
    Ok(count)
}
