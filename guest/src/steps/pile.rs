//! BARs that lie over one another.

use std::sync::Arc;

use anyhow::{Context, ensure};
use assigned_pci::HostFunction;
use serde_json::json;

use super::found;
use crate::function::{Bar, Function, MASTER, MEMORY};
use crate::peer::Cast;
use crate::place::free_places;
use crate::report::Findings;

/// Lays every other BAR over the largest one, one behind the other, and the rest where nobody is;
/// then all of them decode. The engine and the first peer stay where they are.
pub fn lay_over_one_another(cast: &mut Cast) -> anyhow::Result<Findings> {
    let first = cast.peers.first().context("there is no peer")?;
    let spared = [&cast.edu, &first.function];
    let mut bars: Vec<(&Arc<Function>, Bar)> = Vec::new();
    for function in &cast.functions {
        if spared.iter().all(|other| other.name() != function.name()) {
            bars.extend(function.bars().iter().map(|bar| (function, *bar)));
        }
    }
    bars.sort_by_key(|(_, bar)| bar.size);
    let largest = bars.pop().context("there is no BAR to be moved")?;
    ensure!(
        bars.len() > 1,
        "there is one BAR only to lay over {largest:?}"
    );
    // The root bus has the most room, and a bridge's windows are registers and nothing more.
    let place = |bar, taken: &[_]| {
        let places = free_places(&cast.edu, bar, &spared, taken)?;
        let low = places.into_iter().find(|place| *place < 1 << 32);
        low.context("no window below 4 GiB has a free place")
    };
    let start = place(largest.1, &[])?;
    let under = start..start.saturating_add(largest.1.size);
    let mut taken: Vec<_> = std::iter::once(under).collect();
    let mut placed = vec![(largest, start)];
    let mut next = start;
    for (number, (function, bar)) in bars.into_iter().enumerate() {
        let at = if number % 2 == 0 {
            next.next_multiple_of(bar.size)
        } else {
            place(bar, &taken)?
        };
        let end = at.saturating_add(bar.size);
        if number % 2 == 0 {
            next = end;
        } else {
            taken.push(at..end);
        }
        placed.push(((function, bar), at));
    }
    let mut told = Vec::new();
    for ((function, bar), at) in &placed {
        function.wake()?;
        function.set_command(0, MEMORY | MASTER)?;
        function.set_address(*bar, *at)?;
        let now = function.address(*bar)?;
        ensure!(
            now == *at,
            "{function:?} was written {at:#x} and reads {now:#x}"
        );
        told.push(json!({
            "bar": format!("{} {}", function.name(), bar.index),
            "at": at,
            "size": bar.size,
        }));
    }
    for ((function, _), _) in &placed {
        function.enable()?;
    }
    Ok(found([("bars", json!(told))]))
}
