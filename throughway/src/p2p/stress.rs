//! Everything at once: threads change what is mapped in every way there is, and then the reach has
//! to be true, by data.
//!
//! In a round, all at the same time, every BAR that data were moved into is moved to and fro, its
//! function stops decoding, sleeps and is reset, its bus is reset, and every address space is
//! unregistered and registered again. That makes mappings fail, be refused and be revoked while they
//! are made. When all have stopped, the functions are first left as they are (in every other round
//! put back and then revoked once more), then put back as a guest's driver would, with each BAR at the
//! one of its two places in turn. Both times what the reach calls mapped must be reached, and where it says
//! that there is nothing, nothing may arrive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use assigned_pci::{AssignedFunction, BarInfo};
use memory_map::{Gpa, GpaRange, Reach, RegionManager, TargetHandle};
use serde::Serialize;

use super::assembly::{Assembly, RegisteredSpace};
use super::control::{exercised, send};
use super::exercise::{self, LEN, offset_in};
use super::report::{Control, Exercised, Observed, Pair};
use crate::guest_driver::{GuestDriver, Saved};
use crate::host::Bus;
use crate::pattern::{pattern, read_bar};

/// How many events each function has in a round.
const EVENTS: usize = 6;
/// How often each bus is reset in a round, and each address space registered again.
const TIMES: usize = 2;

/// What was done, and what came of it.
#[derive(Debug, Default, Serialize)]
pub struct Stress {
    pub rounds: u32,
    /// How often a function stopped decoding, slept, was reset by itself or with its bus.
    pub events: u64,
    /// How often a BAR was moved.
    pub moves: u64,
    /// How often an address space was registered again.
    pub registrations: u64,
    /// How often data were moved by a mapping that the reach told of.
    pub reached: u64,
    /// How often they were sent to where it told of none, and did not arrive.
    pub blocked: u64,
}

/// A function that things happen to.
struct Victim {
    member: usize,
    function: Arc<AssignedFunction>,
    saved: Saved,
    bars: Vec<Movable>,
}

/// One of its BARs, and where it is moved to and fro.
struct Movable {
    info: BarInfo,
    places: [Gpa; 2],
}

/// Data that were sent to where the reach says that there is nothing.
struct Sent {
    pair: usize,
    at: Gpa,
    data: Vec<u8>,
}

/// So many rounds with every pair that was exercised. What is not as it should be is noted in the
/// pairs and in the controls.
///
/// Where the kernel revokes mappings, functions are also reset behind the back of those who map
/// them, who are told only afterwards. Elsewhere that would be an access to what does not answer.
pub fn run(
    assembly: &mut Assembly,
    pairs: &mut [Pair],
    rounds: u32,
    kernel_revokes: bool,
) -> Result<(Stress, Vec<Control>)> {
    let buses = buses(assembly, pairs)?;
    let victims = victims(assembly, pairs, &buses)?;
    ensure!(
        !victims.is_empty(),
        "--stress has nothing to do: no DMA engine moves data into a prefetchable BAR of a function \
         that has no such engine itself"
    );
    let mut stress = Stress::default();
    let mut controls = Vec::new();
    let mut seed = 0x5_0000;
    for round in 1..=rounds {
        for member in &mut assembly.members {
            member.rest()?;
        }
        let plot = Plot {
            victims: &victims,
            buses: &buses,
            seed,
            kernel_revokes,
        };
        storm(assembly, plot, &mut stress)?;
        let side = usize::from(!round.is_multiple_of(2));
        if side == 0 {
            put_back(&victims, side);
            for victim in &victims {
                revoke(victim, kernel_revokes);
            }
        }
        for as_left in [true, false] {
            let mut sent = Vec::new();
            if !as_left {
                put_back(&victims, side);
            }
            for place in 0..pairs.len() {
                seed = seed.wrapping_add(0x100);
                let Some(pair) = pairs.get_mut(place) else {
                    continue;
                };
                let Some(movable) = movable(&victims, pair) else {
                    continue;
                };
                let looked = look(assembly, pair, movable, seed)?;
                stress.reached = stress.reached.saturating_add(looked.reached);
                let wrong = looked.wrong.or_else(|| {
                    let gone = !as_left && looked.reached == 0;
                    gone.then(|| "not reached once all was put back".to_owned())
                });
                if let Some(wrong) = wrong {
                    pair.exercised = Some(Exercised::Mismatch);
                    pair.note = Some(format!("in round {round} of --stress: {wrong}"));
                }
                let looked = looked.sent.into_iter();
                sent.extend(looked.map(|(at, data)| Sent {
                    pair: place,
                    at,
                    data,
                }));
            }
            // What does not decode cannot be read; data would still arrive in what does.
            put_back(&victims, side);
            for sent in sent {
                let control = judge(assembly, pairs, &sent)?;
                if control.observed == Observed::Blocked {
                    stress.blocked = stress.blocked.saturating_add(1);
                }
                controls.push(control);
            }
        }
        stress.rounds = round;
    }
    put_back(&victims, 0);
    Ok((stress, controls))
}

/// The buses that can be reset of the functions that data were moved into, each with its functions.
/// None of them is an engine.
fn buses(assembly: &Assembly, pairs: &[Pair]) -> Result<Vec<(Bus, Vec<Arc<AssignedFunction>>)>> {
    let mut found = Vec::new();
    let peers: Vec<usize> = exercised(assembly, pairs)?
        .into_iter()
        .map(|pair| pair.to_member)
        .collect();
    for bus in &assembly.buses {
        let members = bus.members.iter();
        let members: Option<Vec<_>> = members.map(|it| assembly.members.get(*it)).collect();
        let members = members.context("a function is gone")?;
        let engine = members.iter().any(|member| member.engine.is_some());
        if !engine && bus.members.iter().any(|member| peers.contains(member)) {
            let functions = members.iter().map(|member| Arc::clone(&member.function));
            found.push((bus.clone(), functions.collect()));
        }
    }
    Ok(found)
}

fn victims(
    assembly: &Assembly,
    pairs: &[Pair],
    buses: &[(Bus, Vec<Arc<AssignedFunction>>)],
) -> Result<Vec<Victim>> {
    let mut victims: Vec<Victim> = Vec::new();
    let mut add = |member: usize| -> Result<usize> {
        if let Some(place) = victims.iter().position(|known| known.member == member) {
            return Ok(place);
        }
        let found = assembly.members.get(member).context("a function is gone")?;
        victims.push(Victim {
            member,
            function: Arc::clone(&found.function),
            saved: GuestDriver(&found.function).save(),
            bars: Vec::new(),
        });
        Ok(victims.len().saturating_sub(1))
    };
    for (bus, _) in buses {
        for member in &bus.members {
            add(*member)?;
        }
    }
    let mut places = Vec::new();
    for pair in exercised(assembly, pairs)? {
        let peer = assembly.members.get(pair.to_member);
        let peer = peer.context("a function is gone")?;
        if peer.engine.is_none() {
            places.push((add(pair.to_member)?, pair.to_member, pair.index));
        }
    }
    places.sort_unstable();
    places.dedup();
    let mut taken: Vec<GpaRange> = Vec::new();
    for (place, member, index) in places {
        let peer = assembly.members.get(member).context("a function is gone")?;
        let bar = peer.bar(index).context("a BAR is gone")?;
        // One that has no other place stays where it is.
        let other = assembly.place_for(&bar, &taken)?.unwrap_or(bar.range()?);
        taken.push(other);
        if let Some(victim) = victims.get_mut(place) {
            victim.bars.push(Movable {
                info: bar.info,
                places: [bar.range()?.start(), other.start()],
            });
        }
    }
    Ok(victims)
}

/// What a pair's BAR is among the victims', if data were moved into it.
fn movable<'v>(victims: &'v [Victim], pair: &Pair) -> Option<&'v Movable> {
    let tried = pair.exercised == Some(Exercised::Ok) && !pair.removed;
    let victim = victims.iter().find(|it| it.member == pair.to_member)?;
    let found = victim.bars.iter().find(|it| it.info.index == pair.index)?;
    tried.then_some(found)
}

/// What happens in one round.
#[derive(Clone, Copy)]
struct Plot<'p> {
    victims: &'p [Victim],
    buses: &'p [(Bus, Vec<Arc<AssignedFunction>>)],
    seed: u64,
    kernel_revokes: bool,
}

/// All threads of one round.
fn storm(assembly: &mut Assembly, plot: Plot<'_>, stress: &mut Stress) -> Result<()> {
    let Plot {
        victims,
        buses,
        seed,
        kernel_revokes,
    } = plot;
    let over = AtomicBool::new(false);
    let targets = std::mem::take(&mut assembly.targets);
    let (map, spaces) = (&assembly.map, &assembly.spaces);
    let (targets, events, moves) = thread::scope(|scope| {
        let movers: Vec<_> = victims
            .iter()
            .map(|victim| scope.spawn(|| Ok(move_about(victim, &over))))
            .collect();
        let mut others: Vec<ScopedJoinHandle<'_, Result<u64>>> = Vec::new();
        for (seed, victim) in (seed..).zip(victims) {
            let over = &over;
            others.push(scope.spawn(move || {
                let events = upset(victim, seed, kernel_revokes);
                // What the others still do is not made good by a move.
                over.store(true, Ordering::Relaxed);
                Ok(events)
            }));
        }
        for (bus, functions) in buses {
            others.push(scope.spawn(|| hot_reset(bus, functions)));
        }
        let targets = scope.spawn(|| register_again(map, spaces, targets));
        let events: Vec<Result<u64>> = others.into_iter().map(joined).collect();
        let targets = joined(targets);
        over.store(true, Ordering::Relaxed);
        let moves = movers.into_iter().map(joined);
        (targets, events, moves.collect::<Vec<Result<u64>>>())
    });
    assembly.targets = targets?;
    let registered = assembly.targets.len().saturating_mul(TIMES);
    stress.registrations = stress
        .registrations
        .saturating_add(u64::try_from(registered)?);
    for events in events {
        stress.events = stress.events.saturating_add(events?);
    }
    for moves in moves {
        stress.moves = stress.moves.saturating_add(moves?);
    }
    Ok(())
}

/// Moves the BARs to and fro until the first of the others is done. How often.
fn move_about(victim: &Victim, over: &AtomicBool) -> u64 {
    let mut moves = 0_u64;
    while !over.load(Ordering::Relaxed) && !victim.bars.is_empty() {
        for side in [1, 0] {
            for bar in &victim.bars {
                if let Some(to) = bar.places.get(side) {
                    GuestDriver(&victim.function).write_bar(&bar.info, *to);
                    moves = moves.saturating_add(1);
                }
            }
            thread::yield_now();
        }
    }
    moves
}

/// One event after the other, as the seed says; mostly the function is then put back. How many.
fn upset(victim: &Victim, seed: u64, kernel_revokes: bool) -> u64 {
    let driver = GuestDriver(&victim.function);
    let mut events = 0_u64;
    for byte in pattern(seed, EVENTS) {
        // What the host refuses counts as having happened, and what came of it is in the map.
        match byte % 5 {
            0 => {
                driver.set_decoding(false);
                driver.set_decoding(true);
            }
            1 => {
                driver.set_asleep(true);
                driver.set_asleep(false);
            }
            2 => driver.reset(),
            3 => {
                let _in_the_map = victim.function.reset();
            }
            _ => revoke(victim, kernel_revokes),
        }
        events = events.saturating_add(1);
        if byte >= 0x40 {
            driver.restore(&victim.saved);
        }
    }
    events
}

/// As when somebody else resets a sibling of it, or the host recovers it from an error.
fn revoke(victim: &Victim, kernel_revokes: bool) {
    let _refused = kernel_revokes.then(|| victim.function.host().reset());
    let _in_the_map = victim.function.mappings_may_be_revoked();
}

fn hot_reset(bus: &Bus, functions: &[Arc<AssignedFunction>]) -> Result<u64> {
    let mut events = 0_u64;
    for _ in 0..TIMES {
        // That it is refused is no matter: it counts.
        bus.reset(functions.to_vec())?;
        events = events.saturating_add(1);
    }
    Ok(events)
}

fn register_again(
    map: &RegionManager,
    spaces: &[RegisteredSpace],
    targets: Vec<TargetHandle>,
) -> Result<Vec<TargetHandle>> {
    let mut targets = targets;
    for _ in 0..TIMES {
        let mut anew = Vec::new();
        for (target, space) in targets.into_iter().zip(spaces) {
            let report = target.unregister();
            if let Some((_, why)) = report.quarantined.into_iter().next() {
                return Err(why).context("unregistering an IOMMU");
            }
            anew.push(space.register(map)?);
        }
        targets = anew;
    }
    Ok(targets)
}

fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    let ended = thread.join();
    ended.unwrap_or_else(|_| Err(anyhow!("a thread has panicked")))
}

/// Has all functions decode again, whatever state they are in, with their BARs on this side.
fn put_back(victims: &[Victim], side: usize) {
    for victim in victims {
        let driver = GuestDriver(&victim.function);
        driver.set_asleep(false);
        // So that what is half written of a BAR is settled when it goes on.
        driver.set_decoding(false);
        driver.restore(&victim.saved);
        for bar in &victim.bars {
            if let Some(to) = bar.places.get(side) {
                driver.write_bar(&bar.info, *to);
            }
        }
    }
}

/// What was seen of one pair.
#[derive(Default)]
struct Looked {
    reached: u64,
    wrong: Option<String>,
    /// What was sent to where nothing should be mapped.
    sent: Vec<(Gpa, Vec<u8>)>,
}

/// Tries every place that the BAR may be at.
fn look(assembly: &mut Assembly, pair: &Pair, movable: &Movable, seed: u64) -> Result<Looked> {
    let peer = assembly.members.get(pair.to_member);
    let bar = peer.and_then(|peer| peer.bar(pair.index));
    let bar = bar.context("a BAR is gone")?;
    let reach = assembly.reach(pair.from_member, bar.region)?;
    let offset = offset_in(&bar);
    let at = |start: u64| Gpa::new(start.saturating_add(offset));
    let mut looked = Looked::default();
    let visible = |assembly: &Assembly, at: Gpa| assembly.map.lookup(at).map(|seen| seen.region);
    // A guest that writes a BAR while it is reset may place it anywhere.
    let shown = visible(assembly, at(bar.info.address)) == Some(bar.region);
    if shown && reach == Reach::Mapped {
        match exercise::again(assembly, pair)? {
            Exercised::Ok => looked.reached = 1,
            Exercised::Mismatch => {
                looked.wrong = Some("what is told to be mapped is not reached".to_owned());
            }
        }
    } else if reach == Reach::Mapped {
        looked.wrong = Some("a BAR is told to be mapped that is nowhere".to_owned());
    }
    for (seed, place) in (seed..).zip(movable.places) {
        let at = at(place.raw());
        let empty = match visible(assembly, at) {
            None => true,
            Some(region) => region == bar.region && matches!(reach, Reach::Unavailable(_)),
        };
        if empty {
            let data = pattern(seed, LEN);
            send(assembly, pair.from_member, at, &data)?;
            looked.sent.push((at, data));
        }
    }
    Ok(looked)
}

/// Whether it has arrived. The function decodes again.
fn judge(assembly: &Assembly, pairs: &[Pair], sent: &Sent) -> Result<Control> {
    let pair = pairs.get(sent.pair).context("a pair is gone")?;
    let peer = assembly.members.get(pair.to_member);
    let peer = peer.context("a function is gone")?;
    let bar = peer.bar(pair.index).context("a BAR is gone")?;
    let found = read_bar(&peer.function, pair.index, offset_in(&bar), LEN);
    Ok(Control {
        from: pair.from.clone(),
        iova: sent.at.raw(),
        what: "where no BAR is told to be after everything at once",
        failed: None,
        observed: if found == sent.data {
            Observed::Arrived
        } else {
            Observed::Blocked
        },
        afterwards: None,
        witness: "by comparing the data".to_owned(),
    })
}
