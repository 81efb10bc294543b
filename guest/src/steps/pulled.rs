//! A peer that the host pulls out while the others go on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use serde_json::{Value, json};

use super::found;
use crate::function::{COMMAND, MASTER, MEMORY};
use crate::peer::{Cast, Peer, WHERE};
use crate::report::{Findings, say};

/// How long the host may take.
const LIMIT: Duration = Duration::from_secs(180);
/// How often data are moved after that.
const AFTERWARDS: u64 = 5;
/// What is written to the peer's memory.
const MARK: u64 = 0x7477_2d70_756c_6c65;

/// Says that the last peer may be pulled out, and moves data to the first one and back until it is
/// and a few times more, while another thread does not stop accessing the one that leaves. What was
/// its BAR answers nobody then, and its config space reads all ones.
pub fn pulled_out(cast: &mut Cast) -> anyhow::Result<Findings> {
    let peers = cast.peers.clone();
    let [first, .., gone] = &peers[..] else {
        return Err(anyhow!(
            "there are fewer than two peers, of which the last one is pulled out"
        ));
    };
    let address = gone.address()?;
    let memory = gone.memory()?;
    // Negative control.
    memory.set_word(WHERE, MARK)?;
    ensure!(
        memory.word(WHERE)? == MARK && !is_gone(gone)?,
        "{} does not answer from the start",
        gone.name()
    );
    say(
        "pulled-wait",
        true,
        found([("peer", json!(gone.name())), ("address", json!(address))]),
    );
    let stop = AtomicBool::new(false);
    let (moved, touched) = thread::scope(|scope| {
        let toucher = scope.spawn(|| touch(gone, &stop));
        let moved = move_until_gone(cast, first, gone);
        stop.store(true, Ordering::Relaxed);
        let touched = toucher.join();
        let touched = touched.unwrap_or_else(|_| Err(anyhow!("the thread panicked")));
        (moved, touched)
    });
    let (moved, touched) = (moved?, touched?);
    ensure!(touched > 0, "nobody accessed {} meanwhile", gone.name());

    let header = gone.function.header()?;
    ensure!(
        header == [0xff; 64],
        "{} still says {header:x?}",
        gone.name()
    );
    let on = (MEMORY | MASTER).to_le_bytes();
    gone.function.write(COMMAND, &on)?;
    ensure!(is_gone(gone)?, "{} is back", gone.name());
    for at in [0, WHERE, gone.bar.size.saturating_sub(8)] {
        memory.set_word(at, MARK)?;
        let word = memory.word(at)?;
        ensure!(word == u64::MAX, "{} reads {word:#x}", gone.name());
    }
    cast.peers.pop();
    for _ in 0..AFTERWARDS {
        cast.prove_peer(first)?;
    }
    let nobody = cast.prove_nobody(address.saturating_add(WHERE))?;
    Ok(found([
        ("peer", json!(gone.name())),
        ("rounds", json!(moved)),
        ("accesses", json!(touched)),
        ("where it was", nobody),
    ]))
}

fn is_gone(peer: &Peer) -> anyhow::Result<bool> {
    let id: [u8; 4] = peer.function.read(0)?;
    Ok(id == [0xff; 4])
}

/// Moves data to the first peer and back until the other one is gone; how often.
fn move_until_gone(cast: &mut Cast, first: &Peer, gone: &Peer) -> anyhow::Result<Value> {
    let begun = Instant::now();
    let mut rounds = 0_u64;
    while !is_gone(gone)? {
        ensure!(
            begun.elapsed() < LIMIT,
            "nobody has pulled {} out for {LIMIT:?}",
            gone.name()
        );
        cast.prove_peer(first)
            .with_context(|| format!("in round {rounds}, while {} leaves", gone.name()))?;
        rounds = rounds.wrapping_add(1);
    }
    Ok(json!(rounds))
}

/// Accesses a peer's memory and config space until told to stop; how often.
fn touch(peer: &Peer, stop: &AtomicBool) -> anyhow::Result<u64> {
    let memory = peer.memory()?;
    let mut accesses = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        memory.set_word(WHERE, MARK)?;
        let word = memory.word(WHERE)?;
        ensure!(
            word == MARK || word == u64::MAX,
            "{} reads {word:#x}",
            peer.name()
        );
        let command = peer.function.command()?;
        if command != u16::MAX {
            peer.function.write(COMMAND, &command.to_le_bytes())?;
        }
        accesses = accesses.wrapping_add(4);
    }
    Ok(accesses)
}
