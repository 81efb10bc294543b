//! Commits: from a change of the layout to calls on the targets, and back if need be.
//!
//! One commit runs at a time. It takes the state's lock only for short steps and never while a
//! target, a backing or a watcher is called, so whoever reads the map does not wait for the
//! kernel. In between, readers see the new layout with the reach as far as it has come.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::ledger::{Entry, Failure};
use crate::manager::{Inner, Target};
use crate::plan::{NewMapping, Plan, Unmap, plan, whole_pages};
use crate::translation::iova;
use crate::{
    Action, Backing, ChangeError, CutOff, MapRequest, MappingChange, Progress, Quarantine, Reason,
    RegionKind, Report, TargetError, TargetId, TargetName,
};

/// How often a mapping is tried that is revoked while it is being made.
const REVOKED_TRIES: usize = 3;

/// Called before every call to a target.
pub(crate) type Watch<'w> = dyn FnMut(Progress) -> ControlFlow<()> + 'w;

/// Whose change is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// May be refused, and is then undone.
    Host,
    /// Cannot be refused.
    Guest,
}

/// A step that has been done and may have to be undone.
enum Done {
    Mapped(TargetId, u64),
    Unmapped(TargetId, Vec<(u64, Entry)>),
}

/// What is to be told to the owner of a quarantined target once all locks are dropped.
pub(crate) struct PendingCutOff {
    pub(crate) cut_off: Arc<dyn CutOff>,
    pub(crate) target: TargetName,
    pub(crate) why: Quarantine,
}

/// One commit under way.
pub(crate) struct Commit<'a, 'w> {
    inner: &'a Inner,
    class: Class,
    watch: &'a mut Watch<'w>,
    progress: Progress,
    journal: Vec<Done>,
    /// Failures of earlier commits in the dirty ranges, which are tried again.
    forgotten: Vec<(TargetId, Vec<(u64, Failure)>)>,
    /// What this commit could not map.
    failed: Vec<(TargetId, u64, u64)>,
    pub(crate) report: Report,
    pub(crate) cut_offs: Vec<PendingCutOff>,
}

impl<'a, 'w> Commit<'a, 'w> {
    pub(crate) fn new(inner: &'a Inner, class: Class, watch: &'a mut Watch<'w>) -> Self {
        Self {
            inner,
            class,
            watch,
            progress: Progress { done: 0, total: 0 },
            journal: Vec::new(),
            forgotten: Vec::new(),
            failed: Vec::new(),
            report: Report::default(),
            cut_offs: Vec::new(),
        }
    }

    /// Brings targets up to date over the dirty ranges: first everything that has to go, in all
    /// of them, then what is to come.
    ///
    /// # Errors
    /// Only for a host's change; then [`undo`](Self::undo) is due.
    pub(crate) fn run(
        &mut self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<(), ChangeError> {
        let plans = self.plan(targets, dirty)?;
        let bytes = plans.iter().map(|(_, plan)| plan.bytes());
        self.progress.total = bytes.fold(0, u64::saturating_add);
        let mut later = Vec::with_capacity(plans.len());
        for (target, plan) in plans {
            for unmap in plan.down {
                self.watched()?;
                if !self.unmap(target, unmap)? {
                    break;
                }
            }
            later.push((target, plan.up));
        }
        for (target, up) in later {
            for new in up {
                self.watched()?;
                self.map(target, new)?;
            }
        }
        Ok(())
    }

    fn plan(
        &mut self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<Vec<(TargetId, Plan)>, ChangeError> {
        let mut plans = Vec::with_capacity(targets.len());
        let mut state = self.inner.state.lock();
        let state = &mut *state;
        for &id in targets {
            let Some(target) = state.targets.get_mut(&id) else {
                continue;
            };
            if target.quarantined.is_some() {
                continue;
            }
            let dirty = whole_pages(dirty, target.limits.page_size);
            let plan = plan(&state.layout, &target.viewer(), &target.ledger, &dirty);
            for piece in &plan.unmappable {
                if piece.kind != RegionKind::Ram || is_by_design(&piece.reason) {
                    continue;
                }
                let range = iova(piece.start, piece.last);
                if self.class == Class::Host {
                    return Err(ChangeError::Refused {
                        target: target.options.name.clone(),
                        range,
                        region: state.layout.region(piece.region)?.name.clone(),
                        reason: piece.reason.clone(),
                    });
                }
                let missing = (id, range, piece.reason.clone());
                self.report.ram_missing.push(missing);
            }
            plans.push((id, plan, dirty));
        }
        Ok(plans
            .into_iter()
            .map(|(id, plan, dirty)| {
                if let Some(target) = state.targets.get_mut(&id) {
                    for (start, last) in dirty {
                        let forgotten = target.ledger.forget_failures(start, last);
                        if !forgotten.is_empty() {
                            self.forgotten.push((id, forgotten));
                        }
                    }
                }
                (id, plan)
            })
            .collect())
    }

    fn watched(&mut self) -> Result<(), ChangeError> {
        match (self.watch)(self.progress) {
            ControlFlow::Break(()) if self.class == Class::Host => Err(ChangeError::Cancelled),
            _ => Ok(()),
        }
    }

    /// Takes mappings down, and makes again what only had to make way. Returns whether the
    /// target can go on.
    fn unmap(&mut self, id: TargetId, unmap: Unmap) -> Result<bool, ChangeError> {
        let range = iova(unmap.start, unmap.last);
        let Some(driver) = self.inner.driver(id) else {
            return Ok(false);
        };
        let outcome = driver.lock().unmap(range);
        if let Err(error) = outcome {
            let why = Quarantine::Unmap { range, error };
            return self.quarantine(id, why).map(|()| false);
        }
        let gone: Vec<(u64, Entry)> = self
            .inner
            .with_ledger(id, |ledger| {
                let remove = |at| Some((at, ledger.entries.remove(&at)?));
                unmap.entries.into_iter().filter_map(remove).collect()
            })
            .unwrap_or_default();
        for (at, entry) in &gone {
            self.report.mappings.push(MappingChange {
                target: id,
                iova: iova(*at, entry.last),
                backing: entry.backing.id(),
                action: Action::Unmapped,
            });
        }
        self.journal.push(Done::Unmapped(id, gone));
        if !unmap.again.is_empty() {
            self.report.bisected = self.report.bisected.saturating_add(1);
        }
        for new in unmap.again {
            self.map(id, new)?;
        }
        Ok(true)
    }

    /// Makes a mapping, or records why not.
    fn map(&mut self, id: TargetId, new: NewMapping) -> Result<(), ChangeError> {
        let (start, size, kind, region) = (new.start, new.size(), new.kind, new.region);
        let (range, backing) = (iova(start, new.last), new.backing.id());
        let outcome = self.try_map(id, new)?;
        self.progress.done = self.progress.done.saturating_add(size);
        let action = match outcome {
            None => {
                self.journal.push(Done::Mapped(id, start));
                Action::Mapped
            }
            Some(reason) => {
                if kind == RegionKind::Ram && reason != Reason::Quarantined {
                    if self.class == Class::Host {
                        return Err(self.refused(id, range, region, reason));
                    }
                    let missing = (id, range, reason.clone());
                    self.report.ram_missing.push(missing);
                }
                let last = range.last().raw();
                self.inner
                    .with_ledger(id, |ledger| ledger.fail(start, last, reason.clone()));
                self.failed.push((id, start, last));
                Action::Unavailable(reason)
            }
        };
        self.report.mappings.push(MappingChange {
            target: id,
            iova: range,
            backing,
            action,
        });
        Ok(())
    }

    /// Makes a mapping and enters it in the ledger. `Ok(Some(_))` says why it is not there.
    fn try_map(&mut self, id: TargetId, new: NewMapping) -> Result<Option<Reason>, ChangeError> {
        let Some(driver) = self.inner.driver(id) else {
            return Ok(Some(Reason::Quarantined));
        };
        if let Some(reason) = self.inner.full(id) {
            return Ok(Some(reason));
        }
        let needs_host = driver.lock().needs_host_address(&new.backing);
        let host = if needs_host {
            match self.inner.host_address(&new.backing) {
                Ok(host) => Some(host),
                Err(errno) => return Ok(Some(Reason::NoHostAddress(errno))),
            }
        } else {
            None
        };
        let range = iova(new.start, new.last);
        let request = MapRequest {
            iova: range,
            access: new.access,
            kind: new.kind,
            backing: new.backing,
            offset: new.offset,
            host,
        };
        for _ in 0..REVOKED_TRIES {
            let epoch = request.backing.epoch();
            let outcome = driver.lock().map(&request);
            match outcome {
                Ok(()) => {}
                Err(TargetError::Refused(reason)) => return Ok(Some(reason)),
                Err(TargetError::Revoked) => continue,
                Err(error @ TargetError::Unknown(errno)) => {
                    // If it can be taken down, it was there and now is not.
                    if driver.lock().unmap(range).is_err() {
                        self.quarantine(id, Quarantine::Map { range, error })?;
                        return Ok(Some(Reason::Quarantined));
                    }
                    return Ok(Some(Reason::Kernel { errno, hint: None }));
                }
            }
            if request.backing.epoch() == epoch {
                let entry = Entry {
                    last: new.last,
                    region: new.region,
                    kind: new.kind,
                    access: new.access,
                    backing: request.backing,
                    offset: new.offset,
                    epoch,
                    _host: request.host,
                };
                self.inner
                    .with_ledger(id, |ledger| ledger.entries.insert(new.start, entry));
                return Ok(None);
            }
            // Revoked meanwhile: whatever is there now is dead, or may be.
            if let Err(error) = driver.lock().unmap(range) {
                self.quarantine(id, Quarantine::Unmap { range, error })?;
                return Ok(Some(Reason::Quarantined));
            }
        }
        Ok(Some(Reason::Revoked))
    }

    fn refused(
        &self,
        id: TargetId,
        range: crate::IovaRange,
        region: crate::RegionId,
        reason: Reason,
    ) -> ChangeError {
        let state = self.inner.state.lock();
        let target = state.targets.get(&id).map(|t| t.options.name.clone());
        let region = state.layout.regions.get(&region).map(|r| r.name.clone());
        ChangeError::Refused {
            target: target.unwrap_or_else(|| "a target that left".into()),
            range,
            region: region.unwrap_or_else(|| "a region that left".into()),
            reason,
        }
    }

    /// Gives a target no more calls; its ledger keeps everything alive that it may still reach.
    /// For a host's change that is also the end of the change.
    fn quarantine(&mut self, id: TargetId, why: Quarantine) -> Result<(), ChangeError> {
        let name = self.note_quarantine(id, &why);
        match self.class {
            Class::Guest => Ok(()),
            Class::Host => Err(ChangeError::Quarantined { target: name, why }),
        }
    }

    fn note_quarantine(&mut self, id: TargetId, why: &Quarantine) -> TargetName {
        let mut state = self.inner.state.lock();
        let Some(target) = state.targets.get_mut(&id) else {
            return "a target that left".into();
        };
        target.quarantined = Some(why.clone());
        let name = target.options.name.clone();
        if let Some(cut_off) = target.options.cut_off.clone() {
            self.cut_offs.push(PendingCutOff {
                cut_off,
                target: name.clone(),
                why: why.clone(),
            });
        }
        self.report.quarantined.push((id, why.clone()));
        name
    }

    /// Undoes what was done to the targets, the last step first, and wraps `cause` if RAM was
    /// lost on the way. The caller has reverted the layout. A revocation cannot be undone: what
    /// was mapped from `revoked` is redone in `targets`.
    pub(crate) fn undo(
        &mut self,
        cause: ChangeError,
        targets: &[TargetId],
        revoked: &[Backing],
    ) -> ChangeError {
        // From here on nothing can be refused: there is nothing to go back to.
        self.class = Class::Guest;
        self.report = Report::default();
        let journal = std::mem::take(&mut self.journal);
        for (id, start, last) in std::mem::take(&mut self.failed) {
            self.inner
                .with_ledger(id, |ledger| drop(ledger.forget_failures(start, last)));
        }
        for (id, failures) in std::mem::take(&mut self.forgotten) {
            self.inner.with_ledger(id, |ledger| {
                for (at, failure) in failures {
                    ledger.fail(at, failure.last, failure.reason);
                }
            });
        }
        for done in journal.into_iter().rev() {
            match done {
                Done::Mapped(id, at) => self.undo_map(id, at),
                Done::Unmapped(id, entries) => {
                    for (at, entry) in entries {
                        self.undo_unmap(id, at, entry);
                    }
                }
            }
        }
        if !revoked.is_empty() {
            let mut dirty = Vec::new();
            let state = self.inner.state.lock();
            for backing in revoked {
                state.layout.mark_users(backing.id(), &mut dirty);
            }
            drop(state);
            // In this class it records what fails and does not end.
            let _recorded = self.run(targets, &dirty);
        }
        match self.report.ram_missing.first().cloned() {
            Some((id, range, reason)) => ChangeError::UndoLostRam {
                cause: Box::new(cause),
                target: self.inner.target_name(id),
                range,
                reason,
            },
            None => cause,
        }
    }

    fn undo_map(&mut self, id: TargetId, at: u64) {
        let last = self
            .inner
            .with_ledger(id, |ledger| ledger.entries.get(&at).map(|entry| entry.last));
        let Some(last) = last.flatten() else { return };
        let Some(driver) = self.inner.driver(id) else {
            return;
        };
        let range = iova(at, last);
        let outcome = driver.lock().unmap(range);
        match outcome {
            Ok(()) => drop(
                self.inner
                    .with_ledger(id, |ledger| ledger.entries.remove(&at)),
            ),
            Err(error) => {
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
        // In this class a map records its failure and does not end the commit.
        let _recorded = self.map(id, new);
    }

    /// Takes everything down that a target holds. A quarantined one is tried once more; what
    /// cannot be taken down stays alive for ever.
    pub(crate) fn tear_down(&mut self, id: TargetId, target: &mut Target) {
        let spans = target.limits.unmap_spans && target.quarantined.is_none();
        let mut left = std::mem::take(&mut target.ledger.entries)
            .into_iter()
            .peekable();
        let mut stuck: Vec<Entry> = Vec::new();
        while let Some((at, entry)) = left.next() {
            let mut run = vec![(at, entry)];
            let mut last = run.first().map_or(at, |(_, entry)| entry.last);
            while let Some(next) =
                left.next_if(|(next, _)| spans && last.checked_add(1) == Some(*next))
            {
                last = next.1.last;
                run.push(next);
            }
            let range = iova(at, last);
            let outcome = target.driver.lock().unmap(range);
            match outcome {
                Ok(()) => {
                    for (at, entry) in run {
                        self.report.mappings.push(MappingChange {
                            target: id,
                            iova: iova(at, entry.last),
                            backing: entry.backing.id(),
                            action: Action::Unmapped,
                        });
                    }
                }
                Err(error) => {
                    stuck.extend(run.into_iter().map(|(_, entry)| entry));
                    let why = Quarantine::Unmap { range, error };
                    if target.quarantined.is_none() {
                        if let Some(cut_off) = target.options.cut_off.clone() {
                            self.cut_offs.push(PendingCutOff {
                                cut_off,
                                target: target.options.name.clone(),
                                why: why.clone(),
                            });
                        }
                        target.quarantined = Some(why.clone());
                    }
                    self.report.quarantined.push((id, why));
                }
            }
        }
        // A device may still reach these: their memory must never be used for anything else.
        stuck.into_iter().for_each(std::mem::forget);
    }
}

/// Whether a piece of RAM is left out of a target because the target cannot or must not see it,
/// rather than because something went wrong.
fn is_by_design(reason: &Reason) -> bool {
    matches!(
        reason,
        Reason::SmallerThanPage { .. } | Reason::NotPageAligned { .. } | Reason::Filtered
    )
}
