//! The negative control: addresses that are not mapped.
//!
//! Each control first shows that the address works while it is mapped, so that nothing is called
//! blocked that could not have arrived anyway.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Context, Result, ensure};
use assigned_pci::BarIndex;
use dma_engine::EngineError;
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
pub fn unregistered(assembly: &mut Assembly, witness: &mut Source<'_>) -> Result<Vec<Control>> {
    for target in std::mem::take(&mut assembly.targets) {
        let report = target.unregister();
        if let Some((_, why)) = report.quarantined.into_iter().next() {
            return Err(why).context("unregistering an IOMMU");
        }
    }
    let mut controls = Vec::new();
    for from in engines(assembly) {
        let at = SOURCE;
        let before = assembly.ram.read(at, LEN)?;
        let mut evidence = witness()?;
        // What is in its buffer by now is neither of these bytes.
        store(assembly, from, at)?;
        let from = name(assembly, from)?;
        controls.push(Control {
            witness: evidence.describe(&from, at),
            from,
            iova: at.raw(),
            what: "RAM after the IOMMU was unregistered",
            observed: seen(&assembly.ram.read(at, LEN)?, &before),
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
        // The engine cannot be given such an address, whatever the IOMMU says.
        Err(error) if out_of_reach(&error) => return Ok(None),
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

fn out_of_reach(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<EngineError>(),
        Some(EngineError::OutOfReach { .. })
    )
}

/// Has an engine write `data` to `to`, by way of RAM.
pub fn send(assembly: &mut Assembly, from: usize, to: Gpa, data: &[u8]) -> Result<()> {
    assembly.ram.write(SOURCE, data)?;
    let member = assembly.members.get_mut(from);
    let engine = member.and_then(|member| member.engine.as_mut());
    let engine = engine.context("an engine is gone")?;
    engine.copy(Iova::new(SOURCE.raw()), Iova::new(to.raw()), LEN_64)?;
    Ok(())
}

/// Has an engine write to `to` what is in its buffer.
fn store(assembly: &mut Assembly, from: usize, to: Gpa) -> Result<()> {
    let member = assembly.members.get_mut(from);
    let engine = member.and_then(|member| member.engine.as_mut());
    let engine = engine.context("an engine is gone")?;
    engine.store(Iova::new(to.raw()), LEN_64)?;
    Ok(())
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
