//! How few calls a step can do with, worked out from the tables before and the model after.
//!
//! For one target, by the promises on the map's front page:
//! - A mapping of which any page changes (another page behind it, another access, nothing any
//!   more, or the same page in a later epoch), or which is no whole pages of the target by now, has
//!   to go: at least one unmap each. Where one unmap may span several, neighbours that go without a
//!   remainder are one call; a mapping with a remainder goes alone, since its remainder is to be
//!   back before anything else is done.
//! - What remains of it, that is, shows the same bytes, is mapped again: one map for each stretch
//!   of one access. A mapping that is larger than any may be by now stays as it is while nothing of
//!   it changes; what remains of it is cut, at multiples of the largest.
//! - Whatever else is due is new: one map for each stretch of one region and of pages that follow
//!   each other, cut at multiples of the largest mapping and where a reserved window begins or ends.
//! - Nothing else needs a call.
//!
//! Steps are without failures here, and no target runs full: what one lacks is tried again by the next
//! change there, in as many calls as it takes to find out.
//!
//! The order between the kinds of consumers is checked along with it.

use memory_map::{IovaRange, RegionId};

use crate::CELL;
use crate::kernel::{Mapping, State, Translation};
use crate::model::{CELLS, Due, LOW, View, address};
use crate::outcome::Outcome;
use crate::world::{Before, Target, World};

/// What was held before, and what the world is now.
#[derive(Debug)]
pub struct Held<'w> {
    /// Before.
    pub before: &'w Before,
    /// Now.
    pub world: &'w World,
}

/// The fewest calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// Maps.
    pub maps: u64,
    /// Unmaps.
    pub unmaps: u64,
    /// Mappings that go only because a part of them has to.
    pub bisected: u64,
}

/// Compares the calls of a step without failures with the lower bound, and tells how many they are.
///
/// # Errors
/// Where they differ.
pub fn check(held: &Held<'_>, outcome: &Outcome) -> Result<Calls, String> {
    let mut least = Calls::default();
    // A refused change makes no calls, but what was revoked is redone all the same.
    if outcome.error.is_none() || !outcome.revoked.is_empty() {
        let view = held.world.model.view();
        for target in &held.world.targets {
            of_target(held, target, &view, &mut least);
        }
        if let Some(leaver) = outcome.leaver {
            let spans = held.world.kernel.state().tables[leaver]
                .limits
                .iter()
                .any(|limits| limits.unmap_spans);
            let mut end = None;
            for (&start, mapping) in &held.before.tables[leaver] {
                least.unmaps += u64::from(!spans || end != Some(start));
                end = mapping.last.checked_add(1);
            }
        }
    }
    let state = held.world.kernel.state();
    let made = Calls {
        maps: state.maps,
        unmaps: state.unmaps,
        // Where the change was refused, nobody reports what a revocation cut.
        bisected: (outcome.report.as_ref()).map_or(least.bisected, |report| report.bisected),
    };
    if made != least {
        return Err(format!("{made:?}, where {least:?} do"));
    }
    if outcome.error.is_none() {
        check_order(&state)?;
    }
    Ok(made)
}

/// On the way down IOMMUs go first, then memory slots, then those that RAM is shared with; on the
/// way up it is the other way round.
fn check_order(state: &State) -> Result<(), String> {
    let kind = |table: usize| state.tables[table].kind;
    let unmaps = || state.order.iter().filter(|(_, is_map, _)| !is_map);
    let down = unmaps().map(|(table, ..)| kind(*table)).is_sorted();
    let first_up = state.order.iter().rposition(|(_, is_map, _)| !is_map);
    let up = state.order.iter().skip(first_up.map_or(0, |at| at + 1));
    // What the last unmap left belongs to the way down.
    let last = unmaps().next_back();
    let remainder = |(table, _, range): &&(usize, bool, IovaRange)| {
        last.is_some_and(|(same, _, all)| same == table && all.covers(range))
    };
    let up = up
        .skip_while(remainder)
        .map(|(table, ..)| std::cmp::Reverse(kind(*table)));
    if down && up.is_sorted() {
        return Ok(());
    }
    Err(format!("out of order: {:?}", state.order))
}

/// Of one cell: what is due, and which stretch it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    to: Translation,
    region: RegionId,
    window: usize,
}

impl Wanted {
    /// What goes on where this ends.
    const fn after(mut self) -> Self {
        self.to.offset += CELL;
        self
    }
}

fn of_target(held: &Held<'_>, target: &Target, view: &View<'_>, least: &mut Calls) {
    let due = target.viewer().due(view);
    let wanted: Vec<Option<Wanted>> = (0..CELLS)
        .map(|cell| {
            let Due::Mapped(to) = due[cell] else {
                return None;
            };
            let seen = view[cell]?;
            let mut windows = target.limits.allowed.iter();
            Some(Wanted {
                to,
                region: seen.region.id,
                window: windows.position(|r| r.last().raw() >= address(cell))?,
            })
        })
        .collect();
    let nothing = std::collections::BTreeMap::new();
    let before = held.before.tables.get(target.table).unwrap_or(&nothing);
    // Cells that need no new mapping.
    let mut settled = vec![false; CELLS];
    // Where the last unmap without a remainder ended, for the next to join it.
    let mut joinable = None;
    for (&start, mapping) in before {
        let cells = (0..CELLS).filter(|c| (start..=mapping.last).contains(&address(*c)));
        let cells: Vec<usize> = cells.collect();
        let page = target.limits.page_size;
        let aligned = start % page == 0 && (mapping.last - start) % page == page - 1;
        let same = |cell: usize| {
            same_bytes(start, mapping, cell, wanted[cell].as_ref()).filter(|_| aligned)
        };
        let stale = held
            .world
            .kernel
            .state()
            .is_stale(mapping.to.backing, mapping.epoch);
        let stays = aligned && !stale && cells.iter().all(|c| same(*c) == Some(mapping.to.access));
        let mut parts: Vec<(u64, u64)> = Vec::new();
        let mut previous = None;
        for &cell in &cells {
            settled[cell] |= stays || same(cell).is_some();
            let (at, now) = (address(cell), same(cell));
            match parts.last_mut() {
                Some(part) if now.is_some() && now == previous => part.1 = at + (CELL - 1),
                _ if now.is_some() => parts.push((at, at + (CELL - 1))),
                _ => {}
            }
            previous = now;
        }
        let remainders: u64 = parts.iter().map(|part| pieces(*part, target)).sum();
        if stays {
            continue;
        }
        let joins = target.limits.unmap_spans && remainders == 0 && joinable == Some(start);
        least.unmaps += u64::from(!joins);
        least.maps += remainders;
        let whole = remainders == 1 && parts == [(start, mapping.last)];
        least.bisected += u64::from(remainders > 0 && !whole);
        joinable = mapping.last.checked_add(1).filter(|_| remainders == 0);
    }
    let mut previous: Option<Wanted> = None;
    for cell in 0..CELLS {
        let new = wanted[cell].filter(|_| !settled[cell]);
        let goes_on = matches!((previous, new), (Some(p), Some(n))
            if cell != LOW && p.after() == n);
        let cut = address(cell).is_multiple_of(target.limits.largest_mapping);
        least.maps += u64::from(new.is_some() && (!goes_on || cut));
        previous = new;
    }
}

/// How many mappings a remainder takes: one, unless it has become larger than any may be.
fn pieces((start, last): (u64, u64), target: &Target) -> u64 {
    let largest = target.limits.largest_mapping;
    if last - start < largest {
        return 1;
    }
    last / largest - start / largest + 1
}

/// With which access the cell is to show the same bytes that the mapping shows there, if so.
fn same_bytes(
    start: u64,
    mapping: &Mapping,
    cell: usize,
    wanted: Option<&Wanted>,
) -> Option<memory_map::Access> {
    let wanted = wanted?;
    let same = wanted.to.backing == mapping.to.backing
        && wanted.to.offset == mapping.to.offset + (address(cell) - start);
    same.then_some(wanted.to.access)
}

const _: () = assert!(CELL < crate::GRANULE, "a cell is smaller than any page");
