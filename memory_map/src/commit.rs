//! Commits: from a change of the layout to calls on the targets, and back if need be.
//!
//! Whoever commits has the turn. A host's commit gives it up while a target makes a mapping, and
//! then queues again, so that a long one delays others by one mapping and no more. When it has
//! its turn back and somebody else has committed meanwhile, it plans the rest anew. The state's
//! lock is only taken for short steps: readers see the new layout at once, and the reach as far
//! as it has come.

use std::ops::ControlFlow;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::addresses::KeptAddress;
use crate::change::Operation;
use crate::layout::{self, Applied};
use crate::ledger::{Entry, Failure};
use crate::plan::{NewMapping, Plan, Unmap, plan, whole_pages};
use crate::state::{Driver, Inner, State, Target};
use crate::subscription::Wakes;
use crate::sync::MutexGuard;
use crate::translation::{Unmappable, iova};
use crate::turn::Turn;
use crate::{
    Action, Backing, BackingId, ChangeError, CutOff, InvalidChange, IovaRange, MapRequest,
    MappingChange, Progress, Quarantine, Reason, RegionId, RegionKind, Report, TargetError,
    TargetId, TargetName, TargetOptions,
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

/// How a call to map ended.
enum Called {
    /// Made in one epoch of its backing.
    Mapped(MapRequest, crate::Epoch),
    /// Not there.
    Refused(Reason),
    /// May be there.
    Unknown(MapRequest, Quarantine),
}

/// Regions that belong to an unfinished host's commit, until this is dropped.
struct Busy<'a> {
    inner: &'a Inner,
    regions: &'a [RegionId],
}

impl<'a> Busy<'a> {
    /// A guest's commit keeps its turn, so nobody can come near its regions.
    fn new(inner: &'a Inner, class: Class, regions: &'a [RegionId]) -> Option<Self> {
        (class == Class::Host).then_some(Self { inner, regions })
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.state.lock();
        for region in self.regions {
            state.busy.remove(region);
        }
        drop(state);
        self.inner.settled.notify_all();
    }
}

/// A mapping is being made without a turn, until this is dropped.
struct InFlight<'a> {
    inner: &'a Inner,
    target: TargetId,
    range: (u64, u64),
}

impl<'a> InFlight<'a> {
    /// Takes off, and tells the count of steps.
    fn new(inner: &'a Inner, target: TargetId, range: (u64, u64)) -> (Self, u64) {
        let mut state = inner.state.lock();
        let steps = state.step();
        if let Some(target) = state.targets.get_mut(&target) {
            target.in_flight.push(range);
        }
        drop(state);
        let in_flight = Self {
            inner,
            target,
            range,
        };
        (in_flight, steps)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.inner.with_target(self.target, |target| {
            target.in_flight.retain(|range| *range != self.range);
        });
        self.inner.settled.notify_all();
    }
}

/// Has a target make a mapping. Needs no lock of the map's.
fn call_map(driver: &Driver, request: MapRequest) -> Called {
    let range = request.iova;
    for _ in 0..REVOKED_TRIES {
        let epoch = request.backing.epoch();
        let outcome = driver.lock().map(&request);
        match outcome {
            Ok(()) if request.backing.epoch() == epoch => return Called::Mapped(request, epoch),
            // Revoked meanwhile: whatever is there now is dead, or may be.
            Ok(()) => {
                if let Err(error) = driver.lock().unmap(range) {
                    return Called::Unknown(request, Quarantine::Unmap { range, error });
                }
            }
            Err(TargetError::Refused(reason)) => return Called::Refused(reason),
            // Trying again helps only if the revocation is known to be over.
            Err(TargetError::Revoked) if request.backing.epoch() == epoch => break,
            Err(TargetError::Revoked) => {}
            Err(error @ TargetError::Unknown(errno)) => {
                // If it can be taken down, it was there and now is not.
                if driver.lock().unmap(range).is_err() {
                    return Called::Unknown(request, Quarantine::Map { range, error });
                }
                return Called::Refused(Reason::Kernel { errno, hint: None });
            }
        }
    }
    Called::Refused(Reason::Revoked)
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
    /// None only while a host's commit has given it up.
    pub(crate) turn: Option<Turn<'a>>,
    /// The state's count of steps after this commit's own last one.
    seen_steps: u64,
    /// Whether somebody else has taken a step in between.
    interrupted: bool,
    class: Class,
    watch: &'a mut Watch<'w>,
    progress: Progress,
    journal: Vec<Done>,
    /// Failures of earlier commits in the dirty ranges, which are tried again.
    forgotten: Vec<(TargetId, Vec<(u64, Failure)>)>,
    /// Backings that got a host address.
    made: Vec<BackingId>,
    /// What this commit could not map.
    failed: Vec<(TargetId, u64, u64)>,
    pub(crate) report: Report,
    pub(crate) cut_offs: Vec<PendingCutOff>,
    pub(crate) leftovers: Leftovers,
}

/// What has left the map. It may hold the last of an embedder's objects, so it is dropped when
/// no lock is held and the turn is over.
#[derive(Default)]
pub(crate) struct Leftovers {
    entries: Vec<Entry>,
    addresses: Vec<KeptAddress>,
    layout: Vec<layout::Leftovers>,
    targets: Vec<Target>,
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
    fn was_interrupted(&mut self) -> bool {
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
                let known = target
                    .ledger
                    .failure_at(piece.start)
                    .is_some_and(|(last, reason)| last >= piece.last && *reason == piece.reason);
                if self.class == Class::Host && !known {
                    return Err(ChangeError::Refused {
                        target: target.options.name.clone(),
                        range,
                        region: state.layout.region(piece.region)?.name.clone(),
                        reason: piece.reason.clone(),
                    });
                }
                if !known && !target.joining && !state.busy.contains(&piece.region) {
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
                        target.ledger.fail(start, last, piece.reason.clone());
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
        if !joining && !state.busy.contains(&region) {
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
    fn map(&mut self, id: TargetId, new: NewMapping, yielding: bool) -> Result<(), ChangeError> {
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
    fn try_map(
        &mut self,
        id: TargetId,
        new: NewMapping,
        yielding: bool,
    ) -> Result<Option<Reason>, ChangeError> {
        let driver = match self.inner.driver_to_map(id) {
            Ok(driver) => driver,
            Err(reason) => return Ok(Some(reason)),
        };
        let needs_host = driver.lock().needs_host_address(&new.backing);
        let host = if needs_host {
            match self.inner.host_address(&new.backing) {
                Ok((host, made)) => {
                    if made {
                        self.made.push(new.backing.id());
                    }
                    Some(host)
                }
                Err(errno) => return Ok(Some(Reason::NoHostAddress(errno))),
            }
        } else {
            None
        };
        let request = MapRequest {
            iova: iova(new.start, new.last),
            access: new.access,
            kind: new.kind,
            backing: new.backing,
            offset: new.offset,
            host,
        };
        let in_flight = yielding.then(|| {
            let (in_flight, steps) = InFlight::new(self.inner, id, (new.start, new.last));
            self.seen_steps = steps;
            self.turn = None;
            in_flight
        });
        let called = call_map(&driver, request);
        let (reason, why) = self.enter(id, new.start, new.region, called);
        drop(in_flight);
        if self.turn.is_none() {
            self.turn = Some(self.inner.turns.take());
        }
        match why {
            Some(why) => self.quarantine(id, why).map(|()| reason),
            None => Ok(reason),
        }
    }

    /// Enters in the ledger what is there, or may be. The ledger is exact before anybody can plan
    /// with it again. Returns why the mapping is not there, and why the target is to be
    /// quarantined.
    fn enter(
        &self,
        id: TargetId,
        start: u64,
        region: RegionId,
        called: Called,
    ) -> (Option<Reason>, Option<Quarantine>) {
        let (request, epoch, why) = match called {
            Called::Refused(reason) => return (Some(reason), None),
            Called::Mapped(request, epoch) => (request, epoch, None),
            // Its pages stay, and the end of the target tries once more to take it down.
            Called::Unknown(request, why) => {
                let epoch = request.backing.epoch();
                (request, epoch, Some(why))
            }
        };
        let entry = Entry {
            last: request.iova.last().raw(),
            region,
            kind: request.kind,
            access: request.access,
            backing: request.backing,
            offset: request.offset,
            epoch,
            _host: request.host,
        };
        let mut entry = Some(entry);
        self.inner.with_target(id, |target| {
            // Quarantined at once, so that nobody takes it for a mapping like any other.
            if target.quarantined.is_none() {
                target.quarantined.clone_from(&why);
            }
            if let Some(entry) = entry.take() {
                target.ledger.entries.insert(start, entry);
            }
        });
        // Nobody unregisters a target while something is in flight to it; if it were gone all
        // the same, the pages would have to stay.
        entry.into_iter().for_each(std::mem::forget);
        (why.as_ref().map(|_| Reason::Quarantined), why)
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
        let options = target.options.clone();
        drop(state);
        self.cut_off(&options, why);
        self.report.quarantined.push((id, why.clone()));
        options.name
    }

    /// Undoes what was done to the targets, and wraps `cause` if RAM was lost on the way. The
    /// caller has reverted the layout. A revocation cannot be undone: what was mapped from
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
        // From here on nothing can be refused: there is nothing to go back to.
        self.class = Class::Guest;
        self.report.mappings.clear();
        self.report.ram_missing.clear();
        let journal = std::mem::take(&mut self.journal);
        for (id, start, last) in std::mem::take(&mut self.failed) {
            self.inner
                .with_ledger(id, |ledger| drop(ledger.forget_failures(start, last)));
        }
        if self.interrupted {
            // In this class it records what fails and does not end.
            let _recorded = self.run(targets, dirty);
        } else {
            self.undo_steps(journal);
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

    fn undo_steps(&mut self, journal: Vec<Done>) {
        for (id, failures) in std::mem::take(&mut self.forgotten) {
            self.inner.with_ledger(id, |ledger| {
                for (at, failure) in failures {
                    ledger.fail(at, failure.last, failure.reason);
                }
            });
        }
        let mut steps = journal.into_iter().rev().peekable();
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
            let entry = target.ledger.entries.get(&at);
            target.limits.unmap_spans
                && entry.is_some_and(|entry| entry.last.checked_add(1) == Some(after))
        });
        joins == Some(true)
    }

    /// Takes down mappings that were made, which lie side by side.
    fn undo_maps(&mut self, id: TargetId, run: Vec<u64>) {
        let range = self.inner.with_ledger(id, |ledger| {
            let (first, last) = (run.first()?, run.last()?);
            Some((*first, ledger.entries.get(last)?.last))
        });
        let Some((start, last)) = range.flatten() else {
            return;
        };
        let Some(driver) = self.inner.driver(id) else {
            return;
        };
        let range = iova(start, last);
        let outcome = driver.lock().unmap(range);
        match outcome {
            Ok(()) => {
                let gone = self.inner.with_ledger(id, |ledger| {
                    let remove = |at| ledger.entries.remove(&at);
                    run.into_iter().filter_map(remove).collect::<Vec<_>>()
                });
                self.leftovers.entries.extend(gone.unwrap_or_default());
            }
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
        let _recorded = self.map(id, new, false);
    }

    /// Takes everything down that a target holds, and ends it. A quarantined one is tried once
    /// more; what cannot be taken down stays alive for ever.
    pub(crate) fn tear_down(&mut self, id: TargetId, mut target: Target) {
        let spans = target.limits.unmap_spans && target.quarantined.is_none();
        let mut next = Some(0);
        while let Some(from) = next {
            let mut run: Vec<u64> = Vec::new();
            let mut end = None;
            for (&at, entry) in target.ledger.entries.range(from..) {
                let goes_on = spans && end == Some(at);
                if !(run.is_empty() || goes_on) {
                    break;
                }
                run.push(at);
                end = entry.last.checked_add(1);
            }
            let Some(&start) = run.first() else { break };
            let range = iova(start, end.map_or(u64::MAX, |end| end.wrapping_sub(1)));
            next = end;
            // What is still in the ledger is never dropped, whatever happens in this call.
            let outcome = target.driver.lock().unmap(range);
            match outcome {
                Ok(()) => {
                    let remove = |at| Some((at, target.ledger.entries.remove(&at)?));
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

    fn report_unmapped(&mut self, id: TargetId, gone: &[(u64, Entry)]) {
        let changes = gone.iter().map(|(at, entry)| MappingChange {
            target: id,
            iova: iova(*at, entry.last),
            backing: entry.backing.id(),
            action: Action::Unmapped,
        });
        self.report.mappings.extend(changes);
    }

    fn cut_off(&mut self, options: &TargetOptions, why: &Quarantine) {
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
        let busy = Busy::new(self, class, &touched);
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
                Err(commit.undo(cause, &targets, &dirty, &revoked))
            }
        };
        let unused = self.unused_addresses(&backings);
        commit.leftovers.addresses.extend(unused);
        let wakes = self.state.lock().reach_changed_in(&touched, &dirty);
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

    /// Locks the state once nothing is in flight in the dirty ranges, so that the ledgers are exact
    /// there. What is in flight lands without a turn; nobody else takes off, for the caller has it.
    fn landed(&self, dirty: &[(u64, u64)]) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        while state.is_in_flight(dirty) {
            self.settled.wait(&mut state);
        }
        state
    }

    /// Waits until nothing is in flight to a target.
    pub(crate) fn wait_until_landed(&self, state: &mut MutexGuard<'_, State>, id: TargetId) {
        while state
            .targets
            .get(&id)
            .is_some_and(|target| !target.in_flight.is_empty())
        {
            self.settled.wait(state);
        }
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
