//! Function-level resets.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, ensure};
use assigned_pci::HostFunction;
use dma_engine::ControllerMemoryBuffer;
use memory_map::Iova;
use serde_json::{Value, json};

use super::found;
use crate::function::{COMMAND, Function, MASTER, MEMORY};
use crate::peer::{Cast, NVME_CLASS, Peer};
use crate::report::Findings;

/// Each function with a function-level reset is reset by its register and set up anew, as by its
/// driver; an NVMe controller's memory buffer is a peer before and after.
pub fn by_register(cast: &mut Cast) -> anyhow::Result<Findings> {
    each(cast, |function| {
        let header = function.header()?;
        function.initiate_flr()?;
        let command = function.command()?;
        ensure!(
            command & (MEMORY | MASTER) == 0,
            "after its reset {} has {command:#06x} in its command register",
            function.name()
        );
        for at in (0x10..0x28).step_by(4) {
            let from = usize::from(at);
            function.write(at, header.get(from..from + 4).unwrap_or_default())?;
        }
        let command = usize::from(COMMAND);
        function.write(
            COMMAND,
            header.get(command..command + 2).unwrap_or_default(),
        )
    })
}

/// The same by the kernel, which saves and restores what there was.
pub fn by_the_kernel(cast: &mut Cast) -> anyhow::Result<Findings> {
    each(cast, |function| function.reset_by_kernel("flr"))
}

fn each(
    cast: &mut Cast,
    reset: impl Fn(&Function) -> anyhow::Result<()>,
) -> anyhow::Result<Findings> {
    let mut done = Vec::new();
    for function in cast.functions.clone() {
        if function.is_bridge()? || !function.has_flr()? {
            continue;
        }
        function.unbind()?;
        function.enable()?;
        let before = functions_bars(&function)?;
        let buffer = buffer(&function)?;
        let moved = match &buffer {
            Some((peer, at)) => cast.prove_peer_at(peer, *at)?,
            None => Value::Null,
        };
        reset(&function).with_context(|| format!("resetting {}", function.name()))?;
        let after = functions_bars(&function)?;
        ensure!(
            before == after,
            "{}: {before:?}, then {after:?}",
            function.name()
        );
        let again = match &buffer {
            Some(_) => {
                let (peer, at) = self::buffer(&function)?.context("it has no buffer any more")?;
                cast.prove_peer_at(&peer, at)?
            }
            None => Value::Null,
        };
        let methods = fs::read_to_string(function.folder().join("reset_method"));
        done.push(json!({
            "function": function.name(),
            "methods": methods.unwrap_or_default().trim_end(),
            "before": moved,
            "after": again,
        }));
    }
    ensure!(!done.is_empty(), "no function has a function-level reset");
    // Those that were not reset are where they were.
    let mut moved = Vec::new();
    for peer in cast.peers.clone() {
        moved.push(cast.prove_peer(&peer)?);
    }
    Ok(found([("resets", json!(done)), ("moved", json!(moved))]))
}

fn functions_bars(function: &Function) -> anyhow::Result<Vec<(u8, u64)>> {
    let mut bars = Vec::new();
    for bar in function.bars() {
        bars.push((bar.index.get(), function.address(*bar)?));
    }
    Ok(bars)
}

/// An NVMe controller's memory buffer, enabled, as a peer, and where in it transfers can go.
pub fn buffer(function: &Arc<Function>) -> anyhow::Result<Option<(Peer, u64)>> {
    if function.class() != NVME_CLASS {
        return Ok(None);
    }
    let host = Arc::clone(function) as Arc<dyn HostFunction>;
    // Where it is: known only when it is enabled, which wants to know it.
    let found = ControllerMemoryBuffer::enable(&host, Iova::new(0))?;
    let bar = function.bars().iter().find(|bar| bar.index == found.bar);
    let bar = *bar.with_context(|| format!("{} has no {}", function.name(), found.bar))?;
    let start = function.address(bar)?.saturating_add(found.offset);
    ControllerMemoryBuffer::enable(&host, Iova::new(start))?;
    let peer = Peer {
        function: Arc::clone(function),
        bar,
    };
    Ok(Some((peer, found.offset.saturating_add(0x4000))))
}
