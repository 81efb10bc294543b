//! Taking steps back: the undo of a host's change, and the end of a target.

use std::collections::BTreeMap;

use crate::commit::{Class, Commit, Done};
use crate::ledger::{Entry, Failure};
use crate::mapping::call_unmap;
use crate::plan::NewMapping;
use crate::state::Target;
use crate::translation::iova;
use crate::{
    Action, Backing, ChangeError, IovaRange, Quarantine, Reason, Report, TargetId, TargetName,
};

impl Commit<'_, '_> {
    /// Undoes what was done to the targets, and wraps `cause` if something was lost on the way.
    /// The caller has reverted the layout. A revocation cannot be undone: what was mapped from
    /// `revoked` is redone.
    ///
    /// If nobody else has committed in between, the steps are undone one by one, the last one
    /// first, so that the targets hold the very same mappings as before; otherwise they are
    /// brought to what the map now says.
    pub(crate) fn undo(
        &mut self,
        cause: ChangeError,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
        revoked: &[Backing],
    ) -> ChangeError {
        self.was_interrupted();
        // The layout or the limits are others than a moment ago: who has planned by those plans anew.
        self.seen_steps = self.inner.step();
        // From here on nothing can be refused: there is nothing to go back to.
        self.class = Class::Guest;
        let quarantined = std::mem::take(&mut self.report).quarantined;
        let missing_before = Missing::of(&self.forgotten);
        let journal = std::mem::take(&mut self.journal);
        let failed = std::mem::take(&mut self.failed);
        for (id, start, last) in &failed {
            self.inner
                .with_ledger(*id, |ledger| drop(ledger.forget_failures(*start, *last)));
        }
        if self.interrupted {
            // What remained of a mapping that was cut may have failed, outside of what changed.
            let mut dirty = dirty.to_vec();
            dirty.extend(failed.iter().map(|(_, start, last)| (*start, *last)));
            // In this class it records what fails and does not end.
            let _recorded = self.run(targets, &dirty);
        } else {
            self.undo_steps(journal.into_iter());
        }
        if !revoked.is_empty() {
            let mut dirty = Vec::new();
            let state = self.inner.state.lock();
            for backing in revoked {
                state.layout.mark_users(backing.id(), &mut dirty);
            }
            drop(state);
            let _recorded = self.run(targets, &dirty);
        }
        let unmapped = self.inner.unmapped_addresses(&self.made);
        self.leftovers.addresses.extend(unmapped);
        let was_missing = |id, range| missing_before.covers(id, range);
        self.report
            .ram_missing
            .retain(|(id, range, _)| !was_missing(*id, *range));
        let lost = first_lost(&self.report, &quarantined, was_missing);
        let of_undo = std::mem::take(&mut self.report);
        self.report.quarantined = quarantined;
        let quarantines = of_undo.quarantined.iter().cloned();
        self.report.quarantined.extend(quarantines);
        let name = |id| self.inner.target_name(id);
        incomplete(cause, of_undo, lost, name)
    }

    /// The end of a target that could not join, for `cause`.
    pub(crate) fn undo_joining(
        &mut self,
        cause: ChangeError,
        id: TargetId,
        target: Target,
    ) -> ChangeError {
        let name = target.options.name.clone();
        let quarantined = std::mem::take(&mut self.report).quarantined;
        self.tear_down(id, target);
        let lost = first_lost(&self.report, &quarantined, |_, _| false);
        let of_undo = std::mem::take(&mut self.report);
        self.report.quarantined = quarantined;
        let quarantines = of_undo.quarantined.iter().cloned();
        self.report.quarantined.extend(quarantines);
        incomplete(cause, of_undo, lost, |_| name.clone())
    }

    fn undo_steps(&mut self, journal: impl DoubleEndedIterator<Item = Done>) {
        for (id, failures) in std::mem::take(&mut self.forgotten) {
            self.inner.with_ledger(id, |ledger| {
                for (at, failure) in failures {
                    ledger.fail(at, failure);
                }
            });
        }
        let mut steps = journal.rev().peekable();
        while let Some(done) = steps.next() {
            match done {
                Done::Mapped(id, last_at) => {
                    let mut run = vec![last_at];
                    while let Some(Done::Mapped(_, at)) = steps.next_if(|before| {
                        matches!(before, Done::Mapped(same, at) if *same == id
                            && run.last().is_some_and(|after| self.joins(id, *at, *after)))
                    }) {
                        run.push(at);
                    }
                    run.reverse();
                    self.undo_maps(id, run);
                }
                Done::Unmapped(id, entries) => {
                    for (at, entry) in entries {
                        self.undo_unmap(id, at, entry);
                    }
                }
            }
        }
    }

    /// Whether one unmap may take down the mappings at `at` and at `after`, which follows it.
    fn joins(&self, id: TargetId, at: u64, after: u64) -> bool {
        let joins = self.inner.with_target(id, |target| {
            let entry = target.ledger.entries.get(at);
            target.limits.unmap_spans
                && entry.is_some_and(|entry| entry.last.checked_add(1) == Some(after))
        });
        joins == Some(true)
    }

    /// Takes down mappings that were made, which lie side by side.
    fn undo_maps(&mut self, id: TargetId, run: Vec<u64>) {
        let range = self.inner.with_ledger(id, |ledger| {
            let (first, last) = (run.first()?, run.last()?);
            Some((*first, ledger.entries.get(*last)?.last))
        });
        let Some((start, last)) = range.flatten() else {
            return;
        };
        let Some(driver) = self.inner.driver(id) else {
            return;
        };
        let range = iova(start, last);
        match call_unmap(&driver, range) {
            Err(no_answer) => {
                if let Some(why) = self.unanswered(id, range, no_answer) {
                    self.note_quarantine(id, &why);
                }
            }
            Ok(Ok(())) => {
                let gone = self.inner.with_ledger(id, |ledger| {
                    let remove = |at| ledger.entries.remove(at);
                    run.into_iter().filter_map(remove).collect::<Vec<_>>()
                });
                self.leftovers.entries.extend(gone.unwrap_or_default());
            }
            Ok(Err(error)) => {
                self.note_quarantine(id, &Quarantine::Unmap { range, error });
            }
        }
    }

    fn undo_unmap(&mut self, id: TargetId, at: u64, entry: Entry) {
        let new = NewMapping {
            start: at,
            last: entry.last,
            region: entry.region,
            kind: entry.kind,
            access: entry.access,
            backing: entry.backing.clone(),
            offset: entry.offset,
        };
        let largest = self
            .inner
            .with_target(id, |target| target.limits.largest_mapping);
        let (Some(driver), Some(largest)) = (self.inner.driver(id), largest) else {
            return;
        };
        // It was made when the target could take more at a time, if it is cut.
        for new in new.cut_if_larger(largest) {
            // In this class a map records its failure and does not end the commit.
            let _recorded = self.map(id, &driver, new, false);
        }
    }

    /// Takes everything down that a target holds, and ends it. A quarantined one is tried once
    /// more; what cannot be taken down stays alive for ever.
    pub(crate) fn tear_down(&mut self, id: TargetId, mut target: Target) {
        let spans = target.limits.unmap_spans && target.quarantined.is_none();
        // From the top, because a ledger gives up its last entry more easily than its first.
        let mut highest = Some(u64::MAX);
        while let Some(from) = highest {
            let entries = &target.ledger.entries;
            let Some((top, entry)) = entries.at_or_below(from) else {
                break;
            };
            let (mut start, last) = (top, entry.last);
            let mut run = vec![top];
            while let Some((at, below)) = entries.below(start).filter(|_| spans)
                && below.last.checked_add(1) == Some(start)
            {
                run.push(at);
                start = at;
            }
            let range = iova(start, last);
            highest = start.checked_sub(1);
            // What is still in the ledger is never dropped, whatever happens in this call.
            let outcome = target.driver.lock().even_if_stopped().unmap(range);
            match outcome {
                Ok(()) => {
                    let remove = |at| Some((at, target.ledger.entries.remove(at)?));
                    let gone: Vec<_> = run.into_iter().filter_map(remove).collect();
                    self.report_unmapped(id, &gone);
                    let entries = gone.into_iter().map(|(_, entry)| entry);
                    self.leftovers.entries.extend(entries);
                }
                Err(error) => {
                    let why = Quarantine::Unmap { range, error };
                    if target.quarantined.is_none() {
                        self.cut_off(&target.options, &why);
                        target.quarantined = Some(why.clone());
                    }
                    self.report.quarantined.push((id, why));
                }
            }
        }
        self.leftovers.targets.push(target);
        let unneeded = self.inner.unneeded_addresses();
        self.leftovers.addresses.extend(unneeded);
    }
}

/// What targets lacked before a change: the last address of each piece, by target and first address.
struct Missing(BTreeMap<(TargetId, u64), u64>);

impl Missing {
    fn of(forgotten: &[(TargetId, Vec<(u64, Failure)>)]) -> Self {
        let pieces = forgotten.iter().flat_map(|(id, failures)| {
            let pieces = failures.iter();
            pieces.map(|(at, failure)| ((*id, *at), failure.last))
        });
        Self(pieces.collect())
    }

    fn covers(&self, id: TargetId, range: IovaRange) -> bool {
        let mut next = Some(range.start().raw());
        while let Some(at) = next.filter(|&at| at <= range.last().raw()) {
            let piece = self.0.range((id, 0)..=(id, at)).next_back();
            let Some((_, &last)) = piece.filter(|(_, last)| **last >= at) else {
                return false;
            };
            next = last.checked_add(1);
        }
        true
    }
}

/// What is to be said of a change that was undone.
fn incomplete(
    cause: ChangeError,
    report: Report,
    lost: Option<(TargetId, IovaRange, Reason)>,
    name: impl Fn(TargetId) -> TargetName,
) -> ChangeError {
    match lost {
        Some((id, range, reason)) => ChangeError::UndoIncomplete {
            cause: Box::new(cause),
            target: name(id),
            range,
            reason,
            report: Box::new(report),
        },
        None => cause,
    }
}

/// What an undo could not put back, RAM first, except for what `was_missing` before and for what
/// is in targets that were `quarantined` before.
fn first_lost(
    report: &Report,
    quarantined: &[(TargetId, Quarantine)],
    was_missing: impl Fn(TargetId, IovaRange) -> bool,
) -> Option<(TargetId, IovaRange, Reason)> {
    let ram = report.ram_missing.first().cloned();
    let newly_quarantined = || {
        let is_new = |id| quarantined.iter().all(|(before, _)| *before != id);
        let (id, why) = report.quarantined.iter().find(|(id, _)| is_new(*id))?;
        let (Quarantine::Unmap { range, .. } | Quarantine::Map { range, .. }) = why;
        Some((*id, *range, Reason::Quarantined))
    };
    let mut unavailable = report
        .mappings
        .iter()
        .filter_map(|change| match &change.action {
            // The quarantine itself has been told.
            Action::Unavailable(Reason::Quarantined) => None,
            Action::Unavailable(reason) => Some((change.target, change.iova, reason.clone())),
            Action::Mapped | Action::Unmapped => None,
        });
    ram.or_else(newly_quarantined)
        .or_else(|| unavailable.find(|(id, range, _)| !was_missing(*id, *range)))
}
