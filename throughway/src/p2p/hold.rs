//! Keeping everything mapped, and giving back what the host asks for.
//!
//! A function that is given back leaves the map, and with it every address space, before the host
//! gets it: nobody can reach a device that is no longer theirs. Its file, mappings and exports are
//! closed with the last handle on it, which is what the host waits for.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use assigned_pci::{AssignedFunction, BarIndex, HostFunction};
use memory_map::Gpa;

use super::assembly::Assembly;
use super::control::{exercised, send};
use super::exercise::{self, LEN, offset_in};
use super::report::{Control, Exercised, Observed, P2pReport, Pair, Removed};
use super::witness::Source;
use crate::host::ensure_left;
use crate::pattern::pattern;

/// What is asked for while everything is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// The host wants the function of this name back.
    GiveBack(String),
    /// It is enough.
    End,
}

/// Who asks, and is told.
pub trait Holding {
    /// Everything is mapped, as the report says, and stays so.
    fn begins(&mut self, so_far: &P2pReport);

    /// Waits for the next thing that is asked for.
    fn next(&mut self) -> Result<Ask>;

    /// A function was given back.
    fn given_back(&mut self, function: &str);
}

/// Holds everything until that is enough, and enters in the report what has changed. With a witness,
/// what was mapped of a function that is given back is tried as a control, and the others move data
/// once more.
pub fn until_end(
    assembly: &mut Assembly,
    report: &mut P2pReport,
    holding: &mut dyn Holding,
    mut witness: Option<&mut Source<'_>>,
) -> Result<()> {
    // It may last, and end by the program being killed: nothing is to be put back by then.
    assembly.rest()?;
    holding.begins(report);
    while !assembly.members.is_empty() {
        let Ask::GiveBack(name) = holding.next()? else {
            break;
        };
        let members = &assembly.members;
        let place = members.iter().position(|it| it.function.name() == name);
        let place = place.context("the host wants a function back that is not ours")?;
        give_back(assembly, report, place, witness.as_deref_mut())?;
        holding.given_back(&name);
        let mut others = None;
        if witness.is_some() {
            exercise::all(assembly, &mut report.pairs)?;
            assembly.rest()?;
            others = exercised_by_now(&report.pairs);
        }
        report.removed.push(Removed {
            function: name,
            others,
        });
    }
    Ok(())
}

/// How moving data has ended between all that are left; none where no data were moved.
fn exercised_by_now(pairs: &[Pair]) -> Option<Exercised> {
    let mut found = None;
    for pair in pairs.iter().filter(|pair| !pair.removed) {
        match pair.exercised {
            Some(Exercised::Mismatch) => return Some(Exercised::Mismatch),
            Some(Exercised::Ok) => found = Some(Exercised::Ok),
            None => {}
        }
    }
    found
}

/// A place in a BAR, and who has written there.
struct Probe {
    from_member: usize,
    from: String,
    bar: BarIndex,
    offset: u64,
    at: Gpa,
}

fn give_back(
    assembly: &mut Assembly,
    report: &mut P2pReport,
    place: usize,
    witness: Option<&mut Source<'_>>,
) -> Result<()> {
    let member = assembly.members.get_mut(place);
    let member = member.context("a function is gone")?;
    member.rest()?;
    let function = Arc::clone(&member.function);
    let probes = match witness {
        Some(_) => probes(assembly, &report.pairs, place)?,
        None => Vec::new(),
    };
    // It leaves every address space with the map.
    ensure_left(function.name(), &function.remove())?;
    if let Some(witness) = witness {
        for probe in probes {
            let control = try_again(assembly, &function, probe, witness)?;
            report.controls.push(control);
        }
    }
    for pair in &mut report.pairs {
        pair.after_removal(place);
    }
    drop(function);
    assembly.take_out(place)
}

/// Where data were moved into the function.
fn probes(assembly: &Assembly, pairs: &[Pair], place: usize) -> Result<Vec<Probe>> {
    let mut probes = Vec::new();
    for pair in exercised(assembly, pairs)? {
        if pair.to_member != place {
            continue;
        }
        let peer = assembly.members.get(place).context("a function is gone")?;
        let bar = peer.bar(pair.index).context("a BAR is gone")?;
        let offset = offset_in(&bar);
        probes.push(Probe {
            from_member: pair.from_member,
            from: pair.from.clone(),
            bar: pair.index,
            offset,
            at: Gpa::new(bar.range()?.start().raw().saturating_add(offset)),
        });
    }
    Ok(probes)
}

/// Writes to where the BAR was. The function still decodes, so what is missing is the mapping.
fn try_again(
    assembly: &mut Assembly,
    function: &AssignedFunction,
    probe: Probe,
    witness: &mut Source<'_>,
) -> Result<Control> {
    let Probe {
        from_member,
        from,
        bar,
        offset,
        at,
    } = probe;
    ensure!(
        assembly.map.lookup(at).is_none(),
        "{} {bar} is still there, though the function has left",
        function.name()
    );
    let before = read_by_host(&**function.host(), bar, offset)?;
    let mut evidence = witness()?;
    send(assembly, from_member, at, &pattern(0x1005, LEN))?;
    let after = read_by_host(&**function.host(), bar, offset)?;
    Ok(Control {
        witness: evidence.describe(&from, at),
        from,
        iova: at.raw(),
        what: "a BAR of a function that the host takes back",
        failed: None,
        observed: if after == before {
            Observed::Blocked
        } else {
            Observed::Arrived
        },
        afterwards: None,
    })
}

/// Reads a piece of a BAR of a function that has left the guest.
fn read_by_host(host: &dyn HostFunction, bar: BarIndex, offset: u64) -> Result<Vec<u8>> {
    let mut data = vec![0; LEN];
    for (at, piece) in (offset..).step_by(8).zip(data.chunks_exact_mut(8)) {
        host.bar_read(bar, at, piece)
            .with_context(|| format!("reading {} {bar}", host.name()))?;
    }
    Ok(data)
}
