//! Refusals: whether there was a reason, whether the error names it, and whether everything is
//! as it was.

use std::collections::BTreeMap;

use memory_map::{ChangeError, Reason, RegionKind, TargetId};

use crate::check::{Checked, cells_in, ensure};
use crate::kernel::{CallKind, Fault, Mapping, State, Translation};
use crate::model::{Due, Viewer, address};
use crate::outcome::Outcome;
use crate::world::{Before, World};

/// The mappings of one table, by their first address.
type Mappings = BTreeMap<u64, Mapping>;

impl World {
    /// A change that was refused leaves everything exactly as it was, however many calls failed,
    /// unless the error itself says that the undo fell short.
    pub(crate) fn check_undone(&self, before: &Before, outcome: &Outcome) -> Checked {
        let Some(error) = &outcome.error else {
            return Ok(());
        };
        let state = self.kernel.state();
        let meanwhile = (state.fired.iter()).any(|(_, fault)| *fault == Fault::RevokedMeanwhile);
        if outcome.undo_fell_short() || meanwhile || !outcome.revoked.is_empty() {
            return Ok(());
        }
        let mut dead = self.targets.iter().map(|target| target.table);
        let told = matches!(error, ChangeError::Quarantined { .. });
        let untold = dead.find(|at| state.tables[*at].dead && before.dead.get(*at) == Some(&false));
        ensure(told || untold.is_none(), || {
            format!("a quarantine is not told by {error}")
        })?;
        let excused = |at: usize| state.tables[at].dead;
        for (at, held) in before.tables.iter().enumerate() {
            let table = &state.tables[at];
            let largest = table.limits.last().map_or(u64::MAX, |l| l.largest_mapping);
            let same = is_put_back(held, &table.mappings, largest);
            ensure(same || excused(at), || {
                format!("t{at} differs after {error}")
            })?;
        }
        let excused: Vec<TargetId> = (self.targets.iter())
            .filter(|target| excused(target.table))
            .map(|target| target.handle.id())
            .collect();
        drop(state);
        let compared = |reach: &&memory_map::ReachEntry| !excused.contains(&reach.target);
        let (old, new) = (before.reach.iter(), self.map.reach());
        // What was mapped in a revoked epoch may be mapped in the current one now.
        let same = before.stale || old.filter(compared).eq(new.iter().filter(compared));
        ensure(same, || format!("the reach differs after {error}"))
    }

    /// Whether there was a reason to refuse, and the error names it.
    pub(crate) fn check_error(&self, before: &Before, outcome: &Outcome) -> Checked {
        let Some(error) = &outcome.error else {
            let made_sense = !outcome.nonsense && (outcome.guest || !outcome.cancelled);
            return ensure(made_sense, || "accepted".into());
        };
        let state = self.kernel.state();
        let fired = |kind| state.fired.iter().any(|(k, _)| *k == kind);
        for (name, range) in outcome.not_put_back() {
            // One that was about to join may not have come in.
            let Some(at) =
                (0..state.tables.len()).find(|at| name == format!("t{at}").as_str().into())
            else {
                return Err(format!("{error} names no target"));
            };
            // Without a failure it can only be RAM that was tried again and is missing as before.
            let known = self.excuses.keys().any(|(table, cell)| {
                *table == at && range.contains(memory_map::Iova::new(address(*cell)))
            });
            let no_room = self.has_no_room_for_pieces(before, &state, at);
            ensure(known || no_room || !state.fired.is_empty(), || {
                "lost in an undo without cause".into()
            })?;
        }
        let cause = outcome.cause().unwrap_or(error);
        let justified = match cause {
            ChangeError::Invalid(_) => outcome.nonsense && state.calls == 0,
            ChangeError::Cancelled => outcome.cancelled,
            ChangeError::Quarantined { .. } => state.tables.iter().any(|table| table.dead),
            ChangeError::Limits { .. } => fired(CallKind::Limits),
            ChangeError::ImpossibleLimits { .. } => outcome.limits.is_some(),
            ChangeError::Refused {
                target,
                range,
                reason,
                ..
            } => {
                let mut tables = state.tables.iter().enumerate();
                let table = tables.find(|(at, _)| *target == format!("t{at}").as_str().into());
                let Some((at, table)) = table else {
                    return Err(format!("{error} names no target"));
                };
                match reason {
                    Reason::Kernel { .. } | Reason::Revoked => fired(CallKind::Map),
                    Reason::NoHostAddress(_) => fired(CallKind::MapHost),
                    Reason::EntryLimit { .. } => table.was_full,
                    _ => self.cannot_hold(at, *range, outcome),
                }
            }
            _ => false,
        };
        let allowed = !outcome.guest || outcome.nonsense;
        ensure(justified && allowed, || {
            format!("refused without cause: {error:?}")
        })
    }

    /// Whether a target held a mapping that is larger than any may be by now, and so can only be put
    /// back in pieces, for which it has no room.
    fn has_no_room_for_pieces(&self, before: &Before, state: &State, at: usize) -> bool {
        let mut targets = self.targets.iter();
        targets
            .find(|target| target.table == at)
            .is_some_and(|target| {
                let largest = target.limits.largest_mapping;
                let held = before.tables.get(at).into_iter().flatten();
                let mut sizes = held.map(|(start, mapping)| mapping.last - start);
                state.tables[at].was_full && sizes.any(|size| size >= largest)
            })
    }

    /// Whether the model, too, finds RAM in `range` that the target cannot hold.
    fn cannot_hold(&self, at: usize, range: memory_map::IovaRange, outcome: &Outcome) -> bool {
        let known = self.targets.iter().find(|target| target.table == at);
        let newcomer = outcome
            .newcomer
            .as_ref()
            .filter(|(number, _)| *number == at);
        let Some(shape) = known.map(|t| &t.shape).or(newcomer.map(|(_, shape)| shape)) else {
            return false;
        };
        let now = known.map_or(&shape.limits, |target| &target.limits);
        let wanted = outcome.limits.as_ref().filter(|(number, _)| *number == at);
        let limits = wanted.map_or(now, |(_, limits)| limits);
        let view = outcome.wanted.as_ref().unwrap_or(&self.model).view();
        let viewer = Viewer { limits, shape };
        let due = viewer.due(&view);
        let ram = |cell: usize| view[cell].is_some_and(|s| s.region.kind == RegionKind::Ram);
        cells_in(range.to_gpa()).all(|cell| ram(cell) && matches!(due[cell], Due::Unmappable(_)))
    }
}

/// Whether the mappings are those from before. One that is larger than any may be by now can only
/// be put back in pieces.
fn is_put_back(before: &Mappings, now: &Mappings, largest: u64) -> bool {
    let mut left: BTreeMap<u64, (u64, Translation)> =
        now.iter().map(|(&at, m)| (at, (m.last, m.to))).collect();
    for (&start, mapping) in before {
        let mut next = Some(start);
        while let Some(at) = next.filter(|at| *at <= mapping.last) {
            let whole = left.get(&at).is_some_and(|(last, _)| *last == mapping.last);
            let last = if whole {
                mapping.last
            } else {
                mapping.last.min(at | (largest - 1))
            };
            let offset = mapping.to.offset + (at - start);
            let to = Translation {
                offset,
                ..mapping.to
            };
            if left.remove(&at) != Some((last, to)) {
                return false;
            }
            next = last.checked_add(1);
        }
    }
    left.is_empty()
}
