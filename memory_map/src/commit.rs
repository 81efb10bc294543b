//! Commits: from a change of the layout to calls on the targets, and back if need be.
//!
//! Whoever commits has the turn. A host's commit gives it up while a target makes a mapping, and
//! then queues again, so that a long one delays others by one mapping and no more. When it has
//! its turn back and somebody else has committed meanwhile, it plans the rest anew. The state's
//! lock is only taken for short steps: readers see the new layout at once, and the reach as far
//! as it has come.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use smallvec::SmallVec;

use crate::addresses::KeptAddress;
use crate::change::Operation;
use crate::layout::{self, Applied};
use crate::ledger::{Entry, Failure};
use crate::mapping::call_unmap;
use crate::plan::{NewMapping, Unmap};
use crate::planned::Planned;
use crate::state::{Busy, Driver, Inner, Payload, Target, TargetIds};
use crate::subscription::Wakes;
use crate::translation::iova;
use crate::turn::Turn;
use crate::up::Later;
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
    /// May be refused; then the target that would have joined is taken down. Nobody asks what was
    /// done in which order, so no books are kept of it.
    Joining,
    /// Cannot be refused.
    Guest,
}

impl Class {
    pub(crate) fn may_be_refused(self) -> bool {
        self != Self::Guest
    }
}

/// A step that has been done and may have to be undone.
pub(crate) enum Done {
    Mapped(TargetId, u64),
    Unmapped(TargetId, Entries),
}

/// Ledger entries by their first address; mostly one.
pub(crate) type Entries = SmallVec<[(u64, Entry); 1]>;

/// What is to be told to the owner of a quarantined target once all locks are dropped.
pub(crate) struct PendingCutOff {
    pub(crate) cut_off: Arc<dyn CutOff>,
    pub(crate) target: TargetName,
    pub(crate) why: Quarantine,
}

/// Those who are to be told yet. They are told even where a panic ends the commit: a quarantined
/// target has its devices cut off only once.
#[derive(Default)]
pub(crate) struct CutOffs(VecDeque<PendingCutOff>);

impl CutOffs {
    /// Tells the next one, if there is one.
    fn tell_one(&mut self) -> bool {
        let Some(PendingCutOff {
            cut_off,
            target,
            why,
        }) = self.0.pop_front()
        else {
            return false;
        };
        cut_off.cut_off(&target, &why);
        true
    }
}

impl Drop for CutOffs {
    fn drop(&mut self) {
        // One that panics has had its say.
        while catch_unwind(AssertUnwindSafe(|| self.tell_one())).unwrap_or(true) {}
    }
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
    /// Nothing of the layout changes, and one target alone is brought up to date.
    pub(crate) only_one_target: bool,
    pub(crate) watch: &'a mut Watch<'w>,
    pub(crate) progress: Progress,
    pub(crate) journal: SmallVec<[Done; 2]>,
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
    /// The first panic in a target.
    pub(crate) panicked: Option<Payload>,
    pub(crate) leftovers: Leftovers,
    /// Dropped when the turn is over.
    pub(crate) cut_offs: CutOffs,
}

/// What has left the map. It may hold the last of an embedder's objects, so it is dropped when
/// no lock is held and the turn is over.
#[derive(Default)]
pub(crate) struct Leftovers {
    pub(crate) entries: SmallVec<[Entry; 1]>,
    /// Mappings that were to be made, by plans that others' steps have outdated. A long commit drops
    /// them whenever it gives its turn up: their pages may be what somebody waits to have back.
    pub(crate) plans: Vec<NewMapping>,
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
        let seen_steps = inner.step();
        Self {
            inner,
            turn: Some(turn),
            seen_steps,
            interrupted: false,
            class,
            only_one_target: false,
            watch,
            progress: Progress { done: 0, total: 0 },
            journal: SmallVec::new(),
            forgotten: Vec::new(),
            made: Vec::new(),
            failed: Vec::new(),
            taken_back: SmallVec::new(),
            leftovers: Leftovers::default(),
            report: Report::default(),
            panicked: None,
            cut_offs: CutOffs::default(),
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
        let bytes = plans.iter().map(|planned| planned.plan.bytes());
        self.progress.total = bytes.fold(0, u64::saturating_add);
        let steps = plans.iter().map(|planned| planned.plan.steps());
        let steps = steps.fold(0, usize::saturating_add);
        if self.class != Class::Joining {
            self.report.mappings.reserve(steps);
        }
        if self.class == Class::Host {
            self.journal.reserve(steps);
        }
        let mut later = Later::default();
        for Planned {
            target,
            driver,
            plan,
        } in plans
        {
            for unmap in plan.down {
                self.watched()?;
                if !self.unmap(target, &driver, unmap)? {
                    break;
                }
            }
            // The last target comes first: on the way up IOMMUs follow the others, so that no
            // device reaches what the guest does not see yet.
            later.push(target, driver, plan.up);
        }
        self.map_all(later, targets, dirty)
    }

    pub(crate) fn watched(&mut self) -> Result<(), ChangeError> {
        match (self.watch)(self.progress) {
            ControlFlow::Break(()) if self.class.may_be_refused() => Err(ChangeError::Cancelled),
            _ => Ok(()),
        }
    }

    /// Takes mappings down, and makes again what only had to make way. Returns whether the
    /// target can go on.
    fn unmap(&mut self, id: TargetId, driver: &Driver, unmap: Unmap) -> Result<bool, ChangeError> {
        let range = iova(unmap.start, unmap.last);
        let bisects = unmap.bisects();
        let outcome = match call_unmap(driver, range) {
            Ok(outcome) => outcome,
            Err(no_answer) => {
                return match self.unanswered(id, range, no_answer) {
                    Some(why) => self.quarantine(id, why).map(|()| false),
                    None => Ok(false),
                };
            }
        };
        if let Err(error) = outcome {
            let why = Quarantine::Unmap { range, error };
            return self.quarantine(id, why).map(|()| false);
        }
        let gone: Entries = self
            .inner
            .with_ledger(id, |ledger| {
                let remove = |at| Some((at, ledger.entries.remove(at)?));
                unmap.entries.into_iter().filter_map(remove).collect()
            })
            .unwrap_or_default();
        self.report_unmapped(id, &gone);
        if self.class == Class::Host {
            self.journal.push(Done::Unmapped(id, gone));
        } else {
            let entries = gone.into_iter().map(|(_, entry)| entry);
            self.leftovers.entries.extend(entries);
        }
        if bisects {
            self.report.bisected = self.report.bisected.saturating_add(1);
        }
        // A plan that has not been carried out on the way down would be wrong after somebody
        // else's turn; and this hole is to be closed at once.
        for new in unmap.again {
            self.map(id, driver, new, false)?;
        }
        Ok(true)
    }

    /// Makes a mapping, or records why not. Gives the turn up meanwhile if `yielding`.
    pub(crate) fn map(
        &mut self,
        id: TargetId,
        driver: &Driver,
        new: NewMapping,
        yielding: bool,
    ) -> Result<(), ChangeError> {
        let (start, size, kind, region) = (new.start, new.size(), new.kind, new.region);
        let (range, backing) = (iova(start, new.last), new.backing.id());
        let outcome = self.try_map(id, driver, new, yielding)?;
        self.progress.done = self.progress.done.saturating_add(size);
        let action = match outcome {
            None => {
                if self.class == Class::Host {
                    self.journal.push(Done::Mapped(id, start));
                }
                Action::Mapped
            }
            Some(reason) => {
                let (kind, region) = self.shown(range, (kind, region));
                if kind == RegionKind::Ram && reason != Reason::Quarantined {
                    if self.class.may_be_refused() {
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
        if self.class != Class::Joining {
            self.report.mappings.push(MappingChange {
                target: id,
                iova: range,
                backing,
                action,
            });
        }
        Ok(())
    }

    /// What a piece that could not be mapped shows by now. A mapping stays where another region comes
    /// to show the same bytes, so what remains of one need not be of the region that it was made for;
    /// and if any of it is RAM by now, RAM is missing.
    fn shown(&self, range: IovaRange, made_for: (RegionKind, RegionId)) -> (RegionKind, RegionId) {
        let state = self.inner.state.lock();
        let mut seen = (state.layout).seen(range.start().raw(), range.last().raw());
        seen.find(|(_, region)| region.kind == RegionKind::Ram)
            .map_or(made_for, |(seen, region)| (region.kind, seen.region))
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
            Class::Host | Class::Joining => Err(ChangeError::Quarantined { target: name, why }),
        }
    }

    pub(crate) fn note_quarantine(&mut self, id: TargetId, why: &Quarantine) -> TargetName {
        let mut state = self.inner.state.lock();
        let Some(target) = state.targets.get_mut(&id) else {
            return "a target that left".into();
        };
        let is_new = target.quarantined.is_none();
        target.quarantined = Some(why.clone());
        let options = target.options.clone();
        drop(state);
        if is_new {
            self.cut_off(&options, why);
        }
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
            self.cut_offs.0.push_back(PendingCutOff {
                cut_off,
                target: options.name.clone(),
                why: why.clone(),
            });
        }
    }

    /// Ends the turn, and then tells everybody who is to be told. A target's panic goes on from here.
    pub(crate) fn end(self, wakes: Wakes) -> Report {
        let Self {
            turn,
            report,
            mut cut_offs,
            leftovers,
            journal,
            panicked,
            ..
        } = self;
        drop(turn);
        drop((journal, leftovers));
        while cut_offs.tell_one() {}
        wakes.wake();
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
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
        let mut commit = Commit::new(self, turn, class, watch);
        // A guest's commit keeps its turn, so nobody can come near its regions.
        let busy = (class == Class::Host).then(|| Busy::new(self, &touched));
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
    ) -> Result<(Turn<'_>, Applied, TargetIds), InvalidChange> {
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
