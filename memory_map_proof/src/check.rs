//! What is checked after every step: the map, the tables and the report, held against the model.
//! The [reach](crate::reach) and [refusals](crate::refusal) have files of their own.

use std::collections::BTreeMap;

use memory_map::{Action, ChangeError, GpaRange, MappingChange, Reason, RegionKind};

use crate::kernel::Mapping;
use crate::model::{CELLS, Due, View, address};
use crate::outcome::Outcome;
use crate::world::{Before, Excuses, World};

/// Whether all is well, or what is not.
pub(crate) type Checked = Result<(), String>;

/// Says what is not as it should be.
pub(crate) fn ensure(is_so: bool, what: impl FnOnce() -> String) -> Checked {
    if is_so { Ok(()) } else { Err(what()) }
}

impl World {
    /// Holds everything against the model.
    pub(crate) fn check(&mut self, before: &Before, outcome: &Outcome) -> Checked {
        let state = self.kernel.state();
        let violation = state.violations.first().cloned();
        let violation = violation.or_else(|| state.left_revoked());
        drop(state);
        ensure(violation.is_none(), || violation.unwrap_or_default())?;
        self.count_outcome(before, outcome);
        self.check_regions()?;
        self.check_error(before, outcome)?;
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
            Some(_) if calls > 0 => {
                counts.one("outcome: undo");
                if fired > 1 || outcome.undo_fell_short() {
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
                let silent =
                    (failed || unmappable) && !outcome.tells_missing_ram(target.handle.id(), at);
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

/// Where the mappings of a table start and end.
pub(crate) fn spans(held: Option<&BTreeMap<u64, Mapping>>) -> BTreeMap<u64, u64> {
    let held = held.into_iter().flatten();
    held.map(|(&start, mapping)| (start, mapping.last))
        .collect()
}

/// The cells that start in a range.
pub(crate) fn cells_in(range: GpaRange) -> impl Iterator<Item = usize> {
    (0..CELLS).filter(move |cell| range.contains(memory_map::Gpa::new(address(*cell))))
}
