//! The negative control: addresses that are not mapped.
//!
//! Each control first shows that the address works while it is mapped, so that nothing is called
//! blocked that could not have arrived anyway.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context, Result, ensure};
use assigned_pci::BarIndex;
use dma_engine::{DmaEngine, EngineError};
use memory_map::{Gpa, GpaRange, Iova};

use super::assembly::Assembly;
use super::exercise::{LEN, SOURCE, offset_in, two};
use super::report::{Control, Exercised, Observed, Pair};
use super::revocation;
use super::witness::Source;
use crate::pattern::{pattern, read_bar};

const LEN_64: u64 = 4096;

/// For every engine: RAM that has been taken away, each peer's BAR that policy keeps it from, and
/// each that it was exercised on while the peer does not decode.
pub fn in_place(
    assembly: &mut Assembly,
    pairs: &[Pair],
    witness: &mut Source<'_>,
) -> Result<Vec<Control>> {
    let mut controls = Vec::new();
    for from in engines(assembly) {
        controls.push(absent_ram(assembly, from, witness)?);
    }
    for pair in pairs.iter().filter(|pair| pair.filtered) {
        controls.extend(filtered(assembly, pair, witness)?);
    }
    for pair in exercised(assembly, pairs)? {
        controls.extend(revocation::all(assembly, pair, witness)?);
    }
    Ok(controls)
}

/// Moves every BAR that was exercised, and has every engine that reached it try the old address.
pub fn moved(
    assembly: &mut Assembly,
    pairs: &[Pair],
    witness: &mut Source<'_>,
) -> Result<Vec<Control>> {
    let mut controls = Vec::new();
    let mut old: BTreeMap<(usize, BarIndex), Option<GpaRange>> = BTreeMap::new();
    for pair in exercised(assembly, pairs)? {
        let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
        let bar = peer.bar(pair.index).context("a BAR is gone")?;
        let key = (pair.to_member, pair.index);
        if let Entry::Vacant(place) = old.entry(key) {
            let peer = assembly.members.get(pair.to_member);
            let peer = peer.context("a function is gone")?;
            place.insert(assembly.move_bar(peer, &bar)?);
        }
        let Some(old) = old.get(&key).copied().flatten() else {
            continue;
        };
        let offset = offset_in(&bar);
        let at = Gpa::new(old.start().raw().saturating_add(offset));
        let read = |assembly: &Assembly| {
            let peer = assembly.members.get(pair.to_member);
            peer.map(|peer| read_bar(&peer.function, pair.index, offset, LEN))
        };
        let before = read(assembly);
        let mut evidence = witness()?;
        send(assembly, pair.from_member, at, &pattern(0x1003, LEN))?;
        controls.push(Control {
            from: pair.from.clone(),
            iova: at.raw(),
            what: "where a BAR was before it moved",
            observed: seen(&read(assembly), &before),
            failed: None,
            afterwards: None,
            witness: evidence.describe(&pair.from, at),
        });
    }
    Ok(controls)
}

/// Unregisters all IOMMUs, and has every engine try RAM.
///
/// An engine that works by RAM it was lent begins anew for that, and gets no further than the first
/// byte of that RAM.
pub fn unregistered(assembly: &mut Assembly, witness: &mut Source<'_>) -> Result<Vec<Control>> {
    let mut lens = BTreeMap::new();
    for from in engines(assembly) {
        let member = assembly.members.get_mut(from);
        let member = member.context("an engine is gone")?;
        let most = member.engine.as_ref().map(|engine| engine.max_transfer());
        lens.insert(from, most.unwrap_or_default().min(LEN_64));
        member.rest()?;
    }
    for target in std::mem::take(&mut assembly.targets) {
        let report = target.unregister();
        if let Some((_, why)) = report.quarantined.into_iter().next() {
            return Err(why).context("unregistering an IOMMU");
        }
    }
    let mut controls = Vec::new();
    for (from, len) in lens {
        let before = assembly.ram.read(SOURCE, LEN)?;
        let mut evidence = witness()?;
        // What is in its buffer by now is neither of these bytes.
        store(assembly, from, SOURCE, len)?;
        let member = assembly.members.get(from).context("a function is gone")?;
        let (at, what) = match member.lent {
            Some(lent) => (
                lent,
                "the engine's own RAM after the IOMMU was unregistered",
            ),
            None => (SOURCE, "RAM after the IOMMU was unregistered"),
        };
        let from = member.function.name().to_owned();
        controls.push(Control {
            witness: evidence.describe(&from, at),
            from,
            iova: at.raw(),
            what,
            observed: seen(&assembly.ram.read(SOURCE, LEN)?, &before),
            failed: None,
            afterwards: None,
        });
    }
    Ok(controls)
}

fn engines(assembly: &Assembly) -> Vec<usize> {
    let members = assembly.members.iter().enumerate();
    members
        .filter(|(_, member)| member.engine.is_some())
        .map(|(index, _)| index)
        .collect()
}

/// The pairs between which whole pages were moved. (Of registers nobody could tell whether a page
/// that was written there had arrived.)
pub fn exercised<'p>(assembly: &Assembly, pairs: &'p [Pair]) -> Result<Vec<&'p Pair>> {
    let mut found = Vec::new();
    for pair in pairs.iter().filter(|pair| !pair.removed) {
        let peer = assembly.members.get(pair.to_member);
        let bar = peer.and_then(|peer| peer.bar(pair.index));
        let bar = bar.context("a BAR is gone")?;
        if bar.is_prefetchable() && pair.exercised == Some(Exercised::Ok) {
            found.push(pair);
        }
    }
    Ok(found)
}

/// Writes to a page of RAM, then to where it was.
fn absent_ram(assembly: &mut Assembly, from: usize, witness: &mut Source<'_>) -> Result<Control> {
    let at = assembly.page.range().start();
    let before = pattern(0x1000, LEN);
    send(assembly, from, at, &before)?;
    let found = assembly.page.read(at, LEN)?;
    ensure!(
        found == before,
        "the control page cannot be reached although it is mapped: the control would prove nothing"
    );
    let region = assembly.page.region();
    let mut change = assembly.map.change();
    change.disable(region, memory_map::DisabledBecause::Owner);
    change.commit()?;
    let mut evidence = witness()?;
    send(assembly, from, at, &pattern(0x1001, LEN))?;
    let observed = seen(&assembly.page.read(at, LEN)?, &before);
    let mut change = assembly.map.change();
    change.enable(region);
    change.commit()?;
    let from = name(assembly, from)?;
    Ok(Control {
        witness: evidence.describe(&from, at),
        from,
        iova: at.raw(),
        what: "RAM that was taken away",
        observed,
        failed: None,
        afterwards: None,
    })
}

/// Writes to a BAR that policy keeps the engine from, if there is an engine and the BAR can be
/// written without harm. (That the engine works is shown by its RAM.)
fn filtered(
    assembly: &mut Assembly,
    pair: &Pair,
    witness: &mut Source<'_>,
) -> Result<Option<Control>> {
    let (from, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
    let bar = peer.bar(pair.index).context("a BAR is gone")?;
    if from.engine.is_none() || !bar.is_prefetchable() || bar.info.size < LEN_64 {
        return Ok(None);
    }
    let offset = offset_in(&bar);
    let at = Gpa::new(bar.range()?.start().raw().saturating_add(offset));
    let before = read_bar(&peer.function, pair.index, offset, LEN);
    let mut evidence = witness()?;
    match send(assembly, pair.from_member, at, &pattern(0x1004, LEN)) {
        Ok(()) => {}
        // The engine cannot be asked for that, whatever the IOMMU says.
        Err(error) if is_of_the_request(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
    let after = read_bar(&peer.function, pair.index, offset, LEN);
    Ok(Some(Control {
        from: pair.from.clone(),
        iova: at.raw(),
        what: "a BAR that policy keeps out",
        observed: seen(&after, &before),
        failed: None,
        afterwards: None,
        witness: evidence.describe(&pair.from, at),
    }))
}

fn is_of_the_request(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<EngineError>();
    error.is_some_and(EngineError::is_of_the_request)
}

/// Has an engine write `data` to `to`, by way of RAM.
pub fn send(assembly: &mut Assembly, from: usize, to: Gpa, data: &[u8]) -> Result<()> {
    assembly.ram.write(SOURCE, data)?;
    let engine = engine(assembly, from)?;
    tried(engine.copy(Iova::new(SOURCE.raw()), Iova::new(to.raw()), LEN_64))
}

/// Has an engine write to `to` the first bytes of what is in its buffer.
fn store(assembly: &mut Assembly, from: usize, to: Gpa, len: u64) -> Result<()> {
    tried(engine(assembly, from)?.store(Iova::new(to.raw()), len))
}

fn engine(assembly: &mut Assembly, member: usize) -> Result<&mut Box<dyn DmaEngine>> {
    let member = assembly.members.get_mut(member);
    let engine = member.and_then(|member| member.engine.as_mut());
    engine.context("an engine is gone")
}

/// An engine that tells that it could not access the bus has moved nothing: whether that is so is
/// seen by the data, as of one that does not tell.
fn tried(transfer: Result<(), EngineError>) -> Result<()> {
    match transfer {
        Err(error) if error.is_of_the_bus() => Ok(()),
        done => Ok(done?),
    }
}

fn name(assembly: &Assembly, member: usize) -> Result<String> {
    let member = assembly.members.get(member).context("a function is gone")?;
    Ok(member.function.name().to_owned())
}

fn seen<T: PartialEq>(after: &T, before: &T) -> Observed {
    if after == before {
        Observed::Blocked
    } else {
        Observed::Arrived
    }
}
