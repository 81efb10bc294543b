//! BARs that move.

use anyhow::{Context, ensure};
use assigned_pci::HostFunction;
use serde_json::{Value, json};

use super::found;
use crate::function::{MEMORY, rescan};
use crate::peer::{Cast, Peer, WHERE};
use crate::place::free_places;
use crate::report::Findings;

/// Nobody is at the free places of the bus, nor behind the end of RAM.
pub fn nobody(cast: &mut Cast) -> anyhow::Result<Findings> {
    let mut nobody = Vec::new();
    for peer in cast.peers.clone() {
        for place in free_places(&peer.function, peer.bar, &cast.functions, &[])? {
            nobody.push(cast.prove_nobody(place)?);
        }
    }
    ensure!(!nobody.is_empty(), "no window has a free place");
    Ok(found([("nobody", json!(nobody))]))
}

/// Each peer's memory is moved by its registers, with decoding off and with decoding on, to all
/// places that are free, `times` over, and is reached where it is, not where it was.
pub fn moved_by_hand(cast: &mut Cast, times: u64) -> anyhow::Result<Findings> {
    let mut moves = Vec::new();
    for _ in 0..times {
        for peer in cast.peers.clone() {
            for (number, place) in free_places(&peer.function, peer.bar, &cast.functions, &[])?
                .into_iter()
                .enumerate()
            {
                let decoding = number % 2 == 1;
                moves.push(move_one(cast, &peer, place, decoding)?);
            }
        }
    }
    ensure!(
        !moves.is_empty(),
        "no window has a free place for a peer's memory"
    );
    Ok(found([("moves", json!(moves))]))
}

fn move_one(cast: &mut Cast, peer: &Peer, to: u64, decoding: bool) -> anyhow::Result<Value> {
    let from = peer.address()?;
    if !decoding {
        peer.function.set_command(0, MEMORY)?;
    }
    peer.function.set_address(peer.bar, to)?;
    peer.function.set_command(MEMORY, 0)?;
    let now = peer.address_in_registers()?;
    ensure!(
        now == to,
        "{} was written {to:#x} and reads {now:#x}",
        peer.name()
    );
    cast.prove_peer(peer)
        .with_context(|| format!("after a move from {from:#x}, decoding: {decoding}"))?;
    let nobody = cast.prove_nobody(from.saturating_add(WHERE))?;
    Ok(json!({
        "peer": peer.name(),
        "from": from,
        "to": to,
        "decoding": decoding,
        "where it was": nobody,
    }))
}

/// Each peer is moved by hand, then removed and found again, so that the kernel places it.
pub fn removed_and_found(cast: &mut Cast) -> anyhow::Result<Findings> {
    let mut moves = Vec::new();
    for number in 0..cast.peers.len() {
        let Some(peer) = cast.peers.get(number).cloned() else {
            continue;
        };
        // The kernel tends to put it where it was: so that was somewhere else.
        let places = free_places(&peer.function, peer.bar, &cast.functions, &[])?;
        if let Some(place) = places.last() {
            peer.function.set_address(peer.bar, *place)?;
        }
        let from = peer.address()?;
        let name = peer.function.name();
        peer.function.remove()?;
        drop(peer);
        rescan()?;
        cast.reopen()?;
        let peer = cast.peers.get(number).cloned();
        let peer = peer.with_context(|| format!("{name} is not there any more"))?;
        let to = peer.address()?;
        let moved = cast.prove_peer(&peer)?;
        let nobody = if from == to {
            Value::Null
        } else {
            cast.prove_nobody(from.saturating_add(WHERE))?
        };
        moves.push(json!({
            "peer": peer.name(),
            "from": from,
            "to": to,
            "moved": moved,
            "where it was": nobody,
        }));
    }
    let moved = moves.iter().any(|entry| entry["from"] != entry["to"]);
    ensure!(moved, "the kernel left everything where it was: {moves:?}");
    Ok(found([("moves", json!(moves))]))
}
