//! What each target holds and what the map says of its reach, held against what is due there.

use memory_map::{Reach, Reason, TargetId};

use crate::CELL;
use crate::check::{Checked, ensure};
use crate::kernel::{ERRNO, Fault, Translation};
use crate::model::{CELLS, Due, Model, Region, View, Viewer, address};
use crate::outcome::Outcome;
use crate::world::{Excuses, Target, World};

impl World {
    /// A target holds exactly what is due, less what has an excuse, and its reach says just that.
    pub(crate) fn check_target(
        &self,
        target: &Target,
        model: &Model,
        view: &View<'_>,
        outcome: &Outcome,
        excuses: &mut Excuses,
    ) -> Checked {
        let id = target.handle.id();
        let name = format!("t{}", target.table);
        let quarantine = self.map.quarantine_of(id).map_err(|e| e.to_string())?;
        let state = self.kernel.state();
        let table = &state.tables[target.table];
        ensure(quarantine.is_some() == table.dead, || {
            format!(
                "{name}: quarantine {quarantine:?}, but dead: {}",
                table.dead
            )
        })?;
        ensure(table.cut_offs == usize::from(table.dead), || {
            format!("{name}: cut off {} times", table.cut_offs)
        })?;
        if table.dead {
            drop(state);
            return self.check_dead(id, model);
        }
        let count = self.map.mappings_of(id).unwrap_or(usize::MAX);
        ensure(count == table.mappings.len(), || {
            format!("{name} holds {}, not {count}", table.mappings.len())
        })?;
        let revoked_meanwhile = state
            .fired
            .iter()
            .any(|(_, fault)| *fault == Fault::RevokedMeanwhile);
        for mapping in table.mappings.values() {
            let stale = state.is_stale(mapping.to.backing, mapping.epoch);
            let redone = outcome.revoked.contains(&mapping.to.backing) && !revoked_meanwhile;
            ensure(!stale || !redone, || {
                format!("{name}: revoked: {mapping:?}")
            })?;
        }
        let due = target.viewer().due(view);
        // The state's lock is needed for the tables and must not be held for questions.
        let found: Vec<Option<(Translation, bool)>> = (0..CELLS)
            .map(|cell| {
                let (to, epoch) = table.translate(address(cell))?;
                Some((to, state.is_stale(to.backing, epoch)))
            })
            .collect();
        drop(state);
        for cell in 0..CELLS {
            let held = found[cell].map(|(to, _)| to);
            let expected = match &due[cell] {
                Due::Mapped(to) => Some(*to),
                _ => None,
            };
            ensure(held.is_none() || held == expected, || {
                format!("{name} cell {cell} holds {held:?}, due is {:?}", due[cell])
            })?;
        }
        for region in &model.regions {
            self.check_reach(target, region, view, &due, &found, excuses)?;
        }
        Ok(())
    }

    fn check_dead(&self, id: TargetId, model: &Model) -> Checked {
        for region in &model.regions {
            let reach = self.map.reach_of(id, region.id);
            let quarantined = Ok(Reach::Unavailable(Reason::Quarantined));
            ensure(reach == quarantined, || {
                format!("{reach:?} of a dead target")
            })?;
        }
        Ok(())
    }

    /// The reach says how many bytes a device can really get at, and of each other cell why not.
    fn check_reach(
        &self,
        target: &Target,
        region: &Region,
        view: &View<'_>,
        due: &[Due],
        found: &[Option<(Translation, bool)>],
        excuses: &mut Excuses,
    ) -> Checked {
        let id = target.handle.id();
        let reach = self
            .map
            .reach_of(id, region.id)
            .map_err(|e| e.to_string())?;
        let whole = whole_reason(&target.viewer(), region);
        if let Some(reason) = whole {
            let expected = Reach::Unavailable(reason);
            return ensure(reach == expected, || {
                format!("t{}: {region:?}: {reach:?}, not {expected:?}", target.table)
            });
        }
        let told = |cell: usize| match &reach {
            Reach::Mapped => None,
            Reach::Unavailable(reason) => Some(reason.clone()),
            Reach::Partly { missing, .. } => missing
                .iter()
                .find(|m| m.range.contains(memory_map::Gpa::new(address(cell))))
                .map(|m| m.reason.clone()),
        };
        let (mut mapped, mut missing, mut first) = (0, 0, true);
        for cell in 0..CELLS {
            let inside = address(cell) >= region.start
                && address(cell) - region.start < region.size
                && region.page_at(address(cell)).is_some();
            if !inside {
                continue;
            }
            let reason = match (&view[cell], &due[cell], &found[cell]) {
                (Some(seen), ..) if seen.region.id != region.id => Some(Reason::Covered {
                    by: format!("r{}", seen.region.number).into(),
                }),
                (_, Due::Mapped(to), Some((held, stale))) if held == to => {
                    stale.then_some(Reason::Pending)
                }
                (_, Due::Mapped(to), _) => {
                    let mut reasons = self.excuses_for(target, cell, to);
                    // Of a region of which nothing is there, only the first reason is told.
                    if first || !matches!(reach, Reach::Unavailable(_)) {
                        reasons.retain(|reason| Some(reason) == told(cell).as_ref());
                    }
                    let Some(reason) = reasons.first().cloned() else {
                        return Err(format!(
                            "t{} cell {cell} lacks {to:?} without excuse: {reach:?}",
                            target.table
                        ));
                    };
                    excuses.insert((target.table, cell), (*to, reasons));
                    Some(reason)
                }
                (_, Due::Unmappable(reason), _) => Some(reason.clone()),
                (_, Due::Nothing, _) => None,
            };
            match &reason {
                None => mapped += CELL,
                Some(_) => missing += CELL,
            }
            // Where there is only one reason for all, it is the first.
            let compared = !matches!(reach, Reach::Unavailable(_)) || (first && reason.is_some());
            first &= reason.is_none();
            if compared {
                let told = told(cell);
                ensure(is_alike(told.as_ref(), reason.as_ref()), || {
                    format!("t{} cell {cell}: {told:?}, not {reason:?}", target.table)
                })?;
            }
        }
        let right = match &reach {
            Reach::Mapped => missing == 0,
            Reach::Partly { mapped: bytes, .. } => *bytes == mapped && mapped > 0 && missing > 0,
            Reach::Unavailable(_) => mapped == 0 && missing > 0,
        };
        ensure(right, || {
            let table = target.table;
            format!("t{table} {region:?}: {reach:?}, but {mapped:#x} mapped, {missing:#x} not")
        })
    }

    /// Why a mapping may rightly be missing.
    fn excuses_for(&self, target: &Target, cell: usize, to: &Translation) -> Vec<Reason> {
        let state = self.kernel.state();
        let table = &state.tables[target.table];
        let mut reasons = Vec::new();
        if let Some((what, reason)) = table.refused.get(&address(cell))
            && what == to
        {
            reasons.push(reason.clone());
        }
        if let Some((what, known)) = self.excuses.get(&(target.table, cell))
            && what == to
        {
            reasons.extend_from_slice(known);
        }
        if let Some(limit) = target.limits.entry_limit.filter(|_| table.was_full) {
            reasons.push(Reason::EntryLimit { limit });
        }
        if state.host_failed(to.backing) {
            reasons.push(Reason::NoHostAddress(ERRNO));
        }
        reasons
    }
}

/// Why a target has no part at all in a region, if so.
fn whole_reason(viewer: &Viewer<'_>, region: &Region) -> Option<Reason> {
    if let Some(reason) = viewer.refusal(region) {
        return Some(reason);
    }
    let page = viewer.limits.page_size;
    if region.pages.iter().all(Option::is_none) {
        return Some(if region.size < page {
            Reason::SmallerThanPage { page }
        } else {
            Reason::Trapped
        });
    }
    region.inactive().map(Reason::Disabled)
}

/// Whether two reasons are the same. Of an address that may not be mapped the model only says
/// that; windows and apertures have tests of their own.
fn is_alike(told: Option<&Reason>, expected: Option<&Reason>) -> bool {
    match (told, expected) {
        (
            Some(Reason::ReservedWindow { .. } | Reason::OutsideAperture { .. }),
            Some(Reason::OutsideAperture { .. }),
        ) => true,
        _ => told == expected,
    }
}
