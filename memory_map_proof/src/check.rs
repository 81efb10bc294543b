//! What is checked after every step: the map, the tables and the reach, held against the model.

use memory_map::{
    Action, BackingId, ChangeError, GpaRange, MappingChange, Reach, Reason, RegionKind, Report,
    TargetId, TargetLimits,
};
use std::collections::BTreeMap;

use crate::CELL;
use crate::kernel::{CallKind, ERRNO, Fault, Translation};
use crate::model::{CELLS, Due, Model, Region, View, Viewer, address};
use crate::shape::Shape;
use crate::world::{Before, Excuses, Target, World};

/// What a step came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The model as the change would have it.
    pub wanted: Option<Model>,
    /// Whether it was a change of the guest's.
    pub guest: bool,
    /// Whether it made no sense.
    pub nonsense: bool,
    /// Backings that it said were revoked.
    pub revoked: Vec<BackingId>,
    /// Whether the one who watched cancelled.
    pub cancelled: bool,
    /// The target that was to be registered.
    pub newcomer: Option<(usize, Shape)>,
    /// The target that was unregistered.
    pub leaver: Option<usize>,
    /// The target whose limits were to change.
    pub limits: Option<(usize, TargetLimits)>,
    /// The report, if there is one.
    pub report: Option<Report>,
    /// The error.
    pub error: Option<ChangeError>,
}

type Checked = Result<(), String>;

fn ensure(is_so: bool, what: impl FnOnce() -> String) -> Checked {
    if is_so { Ok(()) } else { Err(what()) }
}

impl World {
    /// Holds everything against the model.
    pub(crate) fn check(&mut self, before: &Before, outcome: &Outcome) -> Checked {
        let violation = self.kernel.state().violations.first().cloned();
        ensure(violation.is_none(), || violation.unwrap_or_default())?;
        self.count_outcome(before, outcome);
        self.check_regions()?;
        self.check_error(outcome)?;
        let model = std::mem::take(&mut self.model);
        let view = model.view();
        let checked = self.check_visible(&view).and_then(|()| {
            let mut excuses = Excuses::new();
            for target in &self.targets {
                self.check_target(target, &model, &view, outcome, &mut excuses)?;
            }
            Ok(excuses)
        });
        let checked = checked.and_then(|excuses| {
            self.check_ram(before, outcome, &view, &excuses)?;
            Ok(excuses)
        });
        drop(view);
        self.model = model;
        self.excuses = checked?;
        self.check_report(before, outcome)?;
        self.check_undone(before, outcome)?;
        self.check_ends(outcome)
    }

    fn count_outcome(&mut self, before: &Before, outcome: &Outcome) {
        let state = self.kernel.state();
        let calls = state.maps + state.unmaps;
        let fired = state.fired.len();
        let quarantines = state.tables.iter().enumerate();
        let quarantines = quarantines
            .filter(|(at, table)| table.dead && !before.dead.get(*at).is_some_and(|dead| *dead))
            .count();
        drop(state);
        let counts = &mut self.counts;
        counts.add("outcome: quarantine", quarantines as u64);
        if outcome.cancelled {
            counts.one("failure: cancelled");
        }
        if let Some(report) = &outcome.report {
            counts.add("outcome: split", report.bisected);
        }
        match &outcome.error {
            Some(ChangeError::Invalid(_)) => {}
            Some(error) if calls > 0 => {
                counts.one("outcome: undo");
                if fired > 1 || matches!(error, ChangeError::UndoLostRam { .. }) {
                    counts.one("outcome: undo that failed in part");
                }
            }
            Some(_) => counts.one("outcome: host's change refused before any call"),
            None if outcome.wanted.is_some() && outcome.guest => {
                counts.one("outcome: guest's change done");
            }
            None if outcome.wanted.is_some() => counts.one("outcome: host's change done"),
            None => {}
        }
    }

    fn check_regions(&self) -> Checked {
        let regions = self.map.regions();
        let model = &self.model.regions;
        ensure(regions.len() == model.len(), || "regions".into())?;
        for (info, region) in regions.iter().zip(model) {
            let wraps = region.start.checked_add(region.size - 1).is_none();
            let at = info.range.map(|range| range.start().raw());
            let same = info.id == region.id
                && info.kind == region.kind
                && info.size == region.size
                && info.disabled == region.inactive()
                && at == (!wraps).then_some(region.start);
            ensure(same, || format!("{info:?} is not {region:?}"))?;
        }
        Ok(())
    }

    fn check_visible(&self, view: &View<'_>) -> Checked {
        let mut seen = vec![None; CELLS];
        for segment in self.map.view() {
            for (cell, seen) in cells_in(segment.range).zip(std::iter::repeat(&segment)) {
                let expected = view[cell].map(|s| (s.region.id, address(cell) - s.region.start));
                let into = address(cell) - seen.range.start().raw();
                let actual = Some((seen.region, seen.offset + into));
                ensure(expected == actual, || format!("cell {cell}: {segment:?}"))?;
            }
            for cell in cells_in(segment.range) {
                seen[cell] = Some(segment.region);
            }
        }
        for cell in 0..CELLS {
            let expected = view[cell].map(|s| s.region.id);
            ensure(seen[cell] == expected, || format!("cell {cell} is hidden"))?;
            if cell % 16 == 5 {
                let found = self.map.lookup(memory_map::Gpa::new(address(cell) + 7));
                ensure(found.map(|f| f.region) == expected, || {
                    format!("the look-up of cell {cell} differs from the view")
                })?;
            }
        }
        Ok(())
    }

    fn check_target(
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

    /// RAM that goes missing is never silent: the host's change is refused, the guest's says so.
    fn check_ram(
        &self,
        before: &Before,
        outcome: &Outcome,
        view: &View<'_>,
        excuses: &Excuses,
    ) -> Checked {
        if outcome.leaver.is_some() || (outcome.report.is_none() && outcome.error.is_none()) {
            return Ok(());
        }
        let is_told = |id: TargetId, at| {
            let report = outcome.report.as_ref().filter(|_| outcome.guest);
            let told = report.is_some_and(|report| {
                let mut missing = report.ram_missing.iter();
                missing.any(|(target, range, _)| *target == id && range.contains(at))
            });
            told || matches!(outcome.error, Some(ChangeError::UndoLostRam { .. }))
        };
        let old_view = before.model.view();
        for target in &self.targets {
            let table = target.table;
            if self.kernel.state().tables[table].dead {
                continue;
            }
            let due = target.viewer().due(view);
            let old_due = target.viewer().due(&old_view);
            for cell in 0..CELLS {
                let Some(seen) = view[cell].filter(|s| s.region.kind == RegionKind::Ram) else {
                    continue;
                };
                let lacks = |excuses: &Excuses| excuses.get(&(table, cell)).map(|(to, _)| *to);
                let failed = lacks(excuses).is_some() && lacks(excuses) != lacks(&self.excuses);
                let was = old_view[cell].map(|s| s.region.id) == Some(seen.region.id)
                    && old_due[cell] == due[cell];
                let unmappable = !was
                    && outcome.error.is_none()
                    && matches!(
                        &due[cell],
                        Due::Unmappable(
                            Reason::OutsideAperture { .. } | Reason::ReadOnlyUnsupported
                        )
                    );
                let at = memory_map::Iova::new(address(cell));
                let silent = (failed || unmappable) && !is_told(target.handle.id(), at);
                ensure(!silent, || {
                    format!("t{table} cell {cell}: RAM lost silently")
                })?;
            }
        }
        Ok(())
    }

    /// The report is a true account: from the mappings before, it leads to those after.
    fn check_report(&self, before: &Before, outcome: &Outcome) -> Checked {
        let Some(report) = &outcome.report else {
            return Ok(());
        };
        let state = self.kernel.state();
        for target in &self.targets {
            let table = &state.tables[target.table];
            if table.dead {
                continue;
            }
            let mut held = spans(before.tables.get(target.table));
            for MappingChange {
                target: id,
                iova,
                action,
                ..
            } in &report.mappings
            {
                let (start, last) = (iova.start().raw(), iova.last().raw());
                let true_so_far = *id != target.handle.id()
                    || match action {
                        Action::Mapped => held.insert(start, last).is_none(),
                        Action::Unmapped => held.remove(&start) == Some(last),
                        Action::Unavailable(_) => true,
                    };
                ensure(true_so_far, || format!("{iova} {action:?} is reported"))?;
            }
            let actual = spans(Some(&table.mappings));
            ensure(held == actual, || {
                format!("t{}: reported {held:?}, held {actual:?}", target.table)
            })?;
        }
        Ok(())
    }

    /// A change that was refused leaves everything exactly as it was. (Where more than the one
    /// call failed, the undo itself may have; the model has been asked about that already.)
    fn check_undone(&self, before: &Before, outcome: &Outcome) -> Checked {
        let Some(error) = &outcome.error else {
            return Ok(());
        };
        let state = self.kernel.state();
        let one = match error {
            ChangeError::Cancelled => state.fired.is_empty(),
            ChangeError::UndoLostRam { .. } => false,
            ChangeError::Refused { reason, .. } if !is_from_a_call(reason) => {
                state.fired.is_empty()
            }
            _ => state.fired.len() <= 1,
        };
        let meanwhile = (state.fired.iter()).any(|(_, fault)| *fault == Fault::RevokedMeanwhile);
        if !one || meanwhile || !outcome.revoked.is_empty() {
            return Ok(());
        }
        for (at, held) in before.tables.iter().enumerate() {
            let table = &state.tables[at];
            let same = spans(Some(held)) == spans(Some(&table.mappings))
                && held
                    .values()
                    .map(|m| m.to)
                    .eq(table.mappings.values().map(|m| m.to));
            ensure(same || table.dead, || {
                format!("t{at} differs after {error}")
            })?;
        }
        let dead: Vec<TargetId> = (self.targets.iter())
            .filter(|target| state.tables[target.table].dead)
            .map(|target| target.handle.id())
            .collect();
        drop(state);
        let alive = |reach: &&memory_map::ReachEntry| !dead.contains(&reach.target);
        let (old, new) = (before.reach.iter(), self.map.reach());
        // What was mapped in a revoked epoch may be mapped in the current one now.
        let same = before.stale || old.filter(alive).eq(new.iter().filter(alive));
        ensure(same, || format!("the reach differs after {error}"))
    }

    /// Whether there was a reason to refuse, and the error names it.
    fn check_error(&self, outcome: &Outcome) -> Checked {
        let Some(error) = &outcome.error else {
            let made_sense = !outcome.nonsense && (outcome.guest || !outcome.cancelled);
            return ensure(made_sense, || "accepted".into());
        };
        let state = self.kernel.state();
        let fired = |kind| state.fired.iter().any(|(k, _)| *k == kind);
        let mut cause = error;
        while let ChangeError::UndoLostRam {
            cause: inner,
            target,
            range,
            ..
        } = cause
        {
            // Without a failure it can only be RAM that was tried again and is missing as before.
            let missing = |(table, cell): &(usize, usize)| {
                *target == format!("t{table}").as_str().into()
                    && range.contains(memory_map::Iova::new(address(*cell)))
            };
            let known = self.excuses.keys().any(missing);
            ensure(known || !state.fired.is_empty(), || {
                "lost RAM in an undo".into()
            })?;
            cause = inner;
        }
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
            ChangeError::UndoLostRam { .. } => false,
        };
        let allowed = !outcome.guest || outcome.nonsense;
        ensure(justified && allowed, || {
            format!("refused without cause: {error:?}")
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

    /// A target that has left, or was refused, holds nothing, unless it would not let go.
    fn check_ends(&self, outcome: &Outcome) -> Checked {
        let refused = outcome.newcomer.as_ref().map(|(table, _)| *table);
        let gone = refused
            .filter(|_| outcome.error.is_some())
            .or(outcome.leaver);
        let Some(at) = gone else { return Ok(()) };
        let state = self.kernel.state();
        let table = &state.tables[at];
        ensure(table.dead || table.mappings.is_empty(), || {
            format!("t{at} left with mappings")
        })?;
        ensure(table.cut_offs == usize::from(table.dead), || {
            format!("t{at} was cut off {} times", table.cut_offs)
        })
    }
}

fn spans(held: Option<&BTreeMap<u64, crate::kernel::Mapping>>) -> BTreeMap<u64, u64> {
    let held = held.into_iter().flatten();
    held.map(|(&start, mapping)| (start, mapping.last))
        .collect()
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

const fn is_from_a_call(reason: &Reason) -> bool {
    matches!(
        reason,
        Reason::Kernel { .. } | Reason::Revoked | Reason::NoHostAddress(_)
    )
}

/// The cells that start in a range.
fn cells_in(range: GpaRange) -> impl Iterator<Item = usize> {
    (0..CELLS).filter(move |cell| range.contains(memory_map::Gpa::new(address(*cell))))
}
