//! Commits: from a change of the layout to calls on the targets, and back if need be.
//!
//! Whoever commits has the turn. A host's commit gives it up while a target makes a mapping, and
//! then queues again, so that a long one delays others by one mapping and no more. When it has
//! its turn back and somebody else has committed meanwhile, it plans the rest anew. The state's
//! lock is only taken for short steps: readers see the new layout at once, and the reach as far
//! as it has come.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::addresses::KeptAddress;
use crate::change::Operation;
use crate::layout::{self, Applied};
use crate::ledger::{Entry, Failure};
use crate::plan::{NewMapping, Plan, Unmap, plan, whole_pages};
use crate::state::{Busy, Inner, Target};
use crate::subscription::Wakes;
use crate::translation::{Unmappable, iova};
use crate::turn::Turn;
use crate::{
    Action, BackingId, ChangeError, CutOff, InvalidChange, IovaRange, MappingChange, Progress,
    Quarantine, Reason, RegionId, RegionKind, Report, TargetId, TargetName, TargetOptions,
};

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
pub(crate) enum Done {
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
    pub(crate) inner: &'a Inner,
    /// None only while a host's commit has given it up.
    pub(crate) turn: Option<Turn<'a>>,
    /// The state's count of steps after this commit's own last one.
    pub(crate) seen_steps: u64,
    /// Whether somebody else has taken a step in between.
    pub(crate) interrupted: bool,
    pub(crate) class: Class,
    pub(crate) watch: &'a mut Watch<'w>,
    pub(crate) progress: Progress,
    pub(crate) journal: Vec<Done>,
    /// Failures of earlier commits in the dirty ranges, which are tried again.
    pub(crate) forgotten: Vec<(TargetId, Vec<(u64, Failure)>)>,
    /// Backings that got a host address.
    pub(crate) made: Vec<BackingId>,
    /// What this commit could not map.
    pub(crate) failed: Vec<(TargetId, u64, u64)>,
    /// The commit's own regions once it is being undone. They are as they were and still busy, and
    /// nobody else answers for them.
    pub(crate) taken_back: SmallVec<[RegionId; 4]>,
    pub(crate) report: Report,
    pub(crate) cut_offs: Vec<PendingCutOff>,
    pub(crate) leftovers: Leftovers,
}

/// What has left the map. It may hold the last of an embedder's objects, so it is dropped when
/// no lock is held and the turn is over.
#[derive(Default)]
pub(crate) struct Leftovers {
    pub(crate) entries: Vec<Entry>,
    pub(crate) addresses: Vec<KeptAddress>,
    pub(crate) layout: Vec<layout::Leftovers>,
    pub(crate) targets: Vec<Target>,
}

impl<'a, 'w> Commit<'a, 'w> {
    /// `turn` is the caller's, who has changed the layout with it.
    pub(crate) fn new(
        inner: &'a Inner,
        turn: Turn<'a>,
        class: Class,
        watch: &'a mut Watch<'w>,
    ) -> Self {
        let seen_steps = inner.state.lock().step();
        Self {
            inner,
            turn: Some(turn),
            seen_steps,
            interrupted: false,
            class,
            watch,
            progress: Progress { done: 0, total: 0 },
            journal: Vec::new(),
            forgotten: Vec::new(),
            made: Vec::new(),
            failed: Vec::new(),
            taken_back: SmallVec::new(),
            leftovers: Leftovers::default(),
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
        let mut later: Vec<(TargetId, NewMapping)> = Vec::new();
        for (target, plan) in plans {
            for unmap in plan.down {
                self.watched()?;
                if !self.unmap(target, unmap)? {
                    break;
                }
            }
            // The last one comes first: on the way up IOMMUs follow the others, so that no
            // device reaches what the guest does not see yet.
            later.extend(plan.up.into_iter().rev().map(|new| (target, new)));
        }
        self.map_all(later, targets, dirty)
    }

    /// Makes mappings, the last one first.
    fn map_all(
        &mut self,
        mut later: Vec<(TargetId, NewMapping)>,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<(), ChangeError> {
        let mut interrupted = false;
        while let Some((target, new)) = later.pop() {
            if interrupted {
                self.map_remaining(&[target], &[(new.start, new.last)])?;
            } else {
                self.watched()?;
                self.map(target, new, self.class == Class::Host)?;
                interrupted = self.was_interrupted();
            }
        }
        if interrupted {
            // Others do not answer for RAM that this commit is still adding, or for a target that
            // is still joining: what they could not map there is this commit's to map, or to fail.
            self.map_remaining(targets, dirty)?;
        }
        Ok(())
    }

    /// Makes what is still to be mapped of a range that was planned before somebody else's step.
    /// What they changed elsewhere they have mapped themselves, so to look at the rest of the plan
    /// again is enough, and at each piece of it only once: a guest that moves BARs all the time
    /// must not make a long commit plan all of its rest after every step.
    fn map_remaining(
        &mut self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<(), ChangeError> {
        let mut later = self.remaining(targets, dirty);
        while let Some((target, new)) = later.pop() {
            self.watched()?;
            self.map(target, new, self.class == Class::Host)?;
            if self.was_interrupted() && !later.is_empty() {
                later = self.remaining(targets, dirty);
            }
        }
        Ok(())
    }

    /// Whether somebody else has taken a step since this was last asked.
    pub(crate) fn was_interrupted(&mut self) -> bool {
        if self.class == Class::Guest {
            return false;
        }
        let steps = self.inner.state.lock().steps;
        let interrupted = steps != self.seen_steps;
        self.seen_steps = steps;
        self.interrupted |= interrupted;
        interrupted
    }

    /// What is still to be mapped, the last one first: somebody else may have mapped some of it,
    /// or covered it. BARs that were refused already are not tried again.
    fn remaining(&self, targets: &[TargetId], dirty: &[(u64, u64)]) -> Vec<(TargetId, NewMapping)> {
        let state = self.inner.landed(dirty);
        let mut later = Vec::new();
        for &id in targets {
            let Some(target) = state.targets.get(&id) else {
                continue;
            };
            if target.quarantined.is_some() {
                continue;
            }
            let dirty = whole_pages(dirty, target.limits.page_size);
            let plan = plan(&state.layout, &target.viewer(), &target.ledger, &dirty);
            let refused = |new: &NewMapping| {
                new.kind == RegionKind::DeviceMemory
                    && target.ledger.failure_at(new.start).is_some()
            };
            let up = plan.up.into_iter().rev().filter(|new| !refused(new));
            later.extend(up.map(|new| (id, new)));
        }
        later
    }

    fn plan(
        &mut self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<Vec<(TargetId, Plan)>, ChangeError> {
        let mut plans = Vec::with_capacity(targets.len());
        let mut state = self.inner.landed(dirty);
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
            for piece in plan.unmappable.iter().filter(|piece| is_missing(piece)) {
                let range = iova(piece.start, piece.last);
                // What was missing before is not for this change to answer for.
                let known = target.ledger.is_known(piece.start, &failure_of(piece));
                if self.class == Class::Host && !known {
                    return Err(ChangeError::Refused {
                        target: target.options.name.clone(),
                        range,
                        region: state.layout.region(piece.region)?.name.clone(),
                        reason: piece.reason.clone(),
                    });
                }
                if !known
                    && !target.joining
                    && !is_awaited(&state.busy, &self.taken_back, piece.region)
                {
                    let missing = (id, range, piece.reason.clone());
                    self.report.ram_missing.push(missing);
                }
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
                    for piece in plan.unmappable.iter().filter(|piece| is_missing(piece)) {
                        let (start, last) = (piece.start, piece.last);
                        target.ledger.fail(start, failure_of(piece));
                        self.failed.push((id, start, last));
                    }
                }
                (id, plan)
            })
            .collect())
    }

    /// Notes that RAM is missing in a target. A target that is still joining, and RAM that is
    /// still being added, are not counted on yet: that commit finds out for itself.
    fn miss_ram(&mut self, id: TargetId, range: IovaRange, region: RegionId, reason: &Reason) {
        let state = self.inner.state.lock();
        let joining = state.targets.get(&id).is_none_or(|target| target.joining);
        if !joining && !is_awaited(&state.busy, &self.taken_back, region) {
            self.report.ram_missing.push((id, range, reason.clone()));
        }
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
        let bisects = unmap.bisects();
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
        self.report_unmapped(id, &gone);
        self.journal.push(Done::Unmapped(id, gone));
        if bisects {
            self.report.bisected = self.report.bisected.saturating_add(1);
        }
        // A plan that has not been carried out on the way down would be wrong after somebody
        // else's turn; and this hole is to be closed at once.
        for new in unmap.again {
            self.map(id, new, false)?;
        }
        Ok(true)
    }

    /// Makes a mapping, or records why not. Gives the turn up meanwhile if `yielding`.
    pub(crate) fn map(
        &mut self,
        id: TargetId,
        new: NewMapping,
        yielding: bool,
    ) -> Result<(), ChangeError> {
        let (start, size, kind, region) = (new.start, new.size(), new.kind, new.region);
        let (range, backing) = (iova(start, new.last), new.backing.id());
        let outcome = self.try_map(id, new, yielding)?;
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
                    self.miss_ram(id, range, region, &reason);
                }
                let last = range.last().raw();
                let failure = Failure {
                    last,
                    region,
                    reason: reason.clone(),
                };
                self.inner
                    .with_ledger(id, |ledger| ledger.fail(start, failure));
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

    fn refused(
        &self,
        id: TargetId,
        range: IovaRange,
        region: RegionId,
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
    pub(crate) fn quarantine(&mut self, id: TargetId, why: Quarantine) -> Result<(), ChangeError> {
        let name = self.note_quarantine(id, &why);
        match self.class {
            Class::Guest => Ok(()),
            Class::Host => Err(ChangeError::Quarantined { target: name, why }),
        }
    }

    pub(crate) fn note_quarantine(&mut self, id: TargetId, why: &Quarantine) -> TargetName {
        let mut state = self.inner.state.lock();
        let Some(target) = state.targets.get_mut(&id) else {
            return "a target that left".into();
        };
        target.quarantined = Some(why.clone());
        let options = target.options.clone();
        drop(state);
        self.cut_off(&options, why);
        self.report.quarantined.push((id, why.clone()));
        options.name
    }

    pub(crate) fn report_unmapped(&mut self, id: TargetId, gone: &[(u64, Entry)]) {
        let changes = gone.iter().map(|(at, entry)| MappingChange {
            target: id,
            iova: iova(*at, entry.last),
            backing: entry.backing.id(),
            action: Action::Unmapped,
        });
        self.report.mappings.extend(changes);
    }

    pub(crate) fn cut_off(&mut self, options: &TargetOptions, why: &Quarantine) {
        if let Some(cut_off) = options.cut_off.clone() {
            self.cut_offs.push(PendingCutOff {
                cut_off,
                target: options.name.clone(),
                why: why.clone(),
            });
        }
    }

    /// Ends the turn, and then tells everybody who is to be told.
    pub(crate) fn end(self, wakes: Wakes) -> Report {
        let Self {
            turn,
            report,
            cut_offs,
            leftovers,
            journal,
            ..
        } = self;
        drop(turn);
        drop((journal, leftovers));
        for pending in cut_offs {
            pending.cut_off.cut_off(&pending.target, &pending.why);
        }
        wakes.wake();
        report
    }
}

impl Inner {
    /// Carries a change out, whole or not at all.
    pub(crate) fn commit(
        &self,
        mut operations: Vec<Operation>,
        class: Class,
        watch: &mut Watch<'_>,
    ) -> Result<Report, ChangeError> {
        let touched: SmallVec<[RegionId; 4]> =
            operations.iter().filter_map(Operation::region).collect();
        let (turn, applied, targets) = self.begin(&mut operations, &touched, class)?;
        let Applied {
            dirty,
            inverses,
            backings,
            revoked,
        } = applied;
        // A guest's commit keeps its turn, so nobody can come near its regions.
        let busy = (class == Class::Host).then(|| Busy::new(self, &touched));
        let mut commit = Commit::new(self, turn, class, watch);
        let outcome = match commit.run(&targets, &dirty) {
            Ok(()) => {
                commit.leftovers.layout.push(inverses.into());
                Ok(())
            }
            Err(cause) => {
                let mut state = self.state.lock();
                let leftovers = state.layout.revert(inverses);
                // Others may have come and gone meanwhile.
                let targets = state.targets_in_order();
                drop(state);
                commit.leftovers.layout.push(leftovers);
                commit.taken_back.clone_from(&touched);
                Err(commit.undo(cause, &targets, &dirty, &revoked))
            }
        };
        let unused = self.unused_addresses(&backings);
        commit.leftovers.addresses.extend(unused);
        let mut state = self.state.lock();
        let mut wakes = state.reach_changed_in(&touched, &dirty);
        if !commit.report.quarantined.is_empty() {
            // The target has lost its reach into every region.
            wakes = wakes.and(state.all_reach_changed());
        }
        drop(state);
        drop(busy);
        let report = commit.end(wakes);
        outcome.map(|()| report)
    }

    /// Takes a turn and changes the layout, once nobody else is at the same regions.
    fn begin(
        &self,
        operations: &mut [Operation],
        touched: &[RegionId],
        class: Class,
    ) -> Result<(Turn<'_>, Applied, Vec<TargetId>), InvalidChange> {
        loop {
            let turn = self.turns.take();
            let mut state = self.state.lock();
            if touched.iter().any(|region| state.busy.contains(region)) {
                // Whoever is at it needs a turn to finish.
                drop(turn);
                self.settled.wait(&mut state);
                continue;
            }
            let applied = match state.layout.apply(operations) {
                Ok(applied) => applied,
                Err((invalid, leftovers)) => {
                    drop(state);
                    drop(turn);
                    drop(leftovers);
                    return Err(invalid);
                }
            };
            // Taken back by whoever holds the guard that the caller makes next.
            if class == Class::Host {
                state.busy.extend(touched);
            }
            let targets = state.targets_in_order();
            return Ok((turn, applied, targets));
        }
    }
}

/// Whether RAM of a region is not counted on yet: an unfinished host's commit is at it, and not
/// on its way back.
fn is_awaited(busy: &HashSet<RegionId>, taken_back: &[RegionId], region: RegionId) -> bool {
    busy.contains(&region) && !taken_back.contains(&region)
}

fn failure_of(piece: &Unmappable) -> Failure {
    Failure {
        last: piece.last,
        region: piece.region,
        reason: piece.reason.clone(),
    }
}

/// Whether a piece that a target cannot map is RAM that it should: not where it cannot or must not
/// see the piece, rather than because something went wrong.
fn is_missing(piece: &Unmappable) -> bool {
    let by_design = matches!(
        piece.reason,
        Reason::SmallerThanPage { .. } | Reason::NotPageAligned { .. } | Reason::Filtered
    );
    piece.kind == RegionKind::Ram && !by_design
}
