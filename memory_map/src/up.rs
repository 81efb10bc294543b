//! The way up: mappings still to be made, and what becomes of them when others take steps between.

use smallvec::SmallVec;

use crate::commit::{Class, Commit};
use crate::plan::{NewMapping, plan, whole_pages};
use crate::state::{Driver, TargetIds};
use crate::{ChangeError, RegionKind, TargetId};

/// Mappings still to be made: the last target first, each one's in order.
#[derive(Default)]
pub(crate) struct Later(SmallVec<[LaterIn; 1]>);

/// Mappings still to be made in one target.
struct LaterIn {
    target: TargetId,
    driver: Driver,
    new: smallvec::IntoIter<[NewMapping; 1]>,
}

impl Later {
    pub(crate) fn push(
        &mut self,
        target: TargetId,
        driver: Driver,
        new: SmallVec<[NewMapping; 1]>,
    ) {
        if !new.is_empty() {
            let new = new.into_iter();
            self.0.push(LaterIn {
                target,
                driver,
                new,
            });
        }
    }

    fn next(&mut self) -> Option<(TargetId, &Driver, NewMapping)> {
        while self.0.last()?.new.len() == 0 {
            drop(self.0.pop());
        }
        let its = self.0.last_mut()?;
        let new = its.new.next()?;
        Some((its.target, &its.driver, new))
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|its| its.new.len() == 0)
    }

    /// Where they were to be made. The mappings themselves hold pages that may have left the map.
    fn into_ranges(mut self, outdated: &mut Vec<NewMapping>) -> Vec<(TargetId, u64, u64)> {
        let mut ranges = Vec::new();
        while let Some((target, _, new)) = self.next() {
            ranges.push((target, new.start, new.last));
            outdated.push(new);
        }
        ranges
    }
}

impl Commit<'_, '_> {
    /// Makes mappings.
    pub(crate) fn map_all(
        &mut self,
        mut later: Later,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<(), ChangeError> {
        let mut interrupted = false;
        while let Some((target, driver, new)) = later.next() {
            self.watched()?;
            self.map(target, driver, new, self.class.may_be_refused())?;
            interrupted = self.was_interrupted();
            if interrupted {
                break;
            }
        }
        if interrupted {
            for (target, start, last) in later.into_ranges(&mut self.leftovers.plans) {
                self.map_remaining(&[target], &[(start, last)])?;
            }
            // Others do not answer for RAM that this commit is still adding, or for a target that
            // is still joining: what they could not map there is this commit's to map, or to fail.
            let mut targets = TargetIds::from_slice(targets);
            self.extend_by_joined(&mut targets);
            while self.map_remaining(&targets, dirty)? {
                self.extend_by_joined(&mut targets);
            }
        }
        Ok(())
    }

    /// Adds the targets that have joined since a change of the layout began. A commit that is about
    /// one target keeps to it.
    fn extend_by_joined(&self, targets: &mut TargetIds) {
        if self.class != Class::Host || self.only_one_target {
            return;
        }
        let state = self.inner.state.lock();
        let mut all = state.targets_in_order();
        all.retain(|id| {
            let joined = state.targets.get(id).is_some_and(|target| !target.joining);
            joined || targets.contains(id)
        });
        *targets = all;
    }

    /// Makes what is still to be mapped of a range that was planned before somebody else's step.
    /// What they changed elsewhere they have mapped themselves, so to look at the rest of the plan
    /// again is enough, and at each piece of it only once: a guest that moves BARs all the time
    /// must not make a long commit plan all of its rest after every step.
    ///
    /// Returns whether somebody took a step while the last piece was made.
    fn map_remaining(
        &mut self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<bool, ChangeError> {
        let mut interrupted = false;
        let mut later = self.remaining(targets, dirty)?;
        while let Some((target, driver, new)) = later.next() {
            self.watched()?;
            self.map(target, driver, new, self.class.may_be_refused())?;
            interrupted = self.was_interrupted();
            if interrupted && !later.is_empty() {
                let anew = self.remaining(targets, dirty)?;
                let outdated = std::mem::replace(&mut later, anew);
                drop(outdated.into_ranges(&mut self.leftovers.plans));
            }
        }
        Ok(interrupted)
    }

    /// Whether somebody else has taken a step since this was last asked.
    pub(crate) fn was_interrupted(&mut self) -> bool {
        if self.class == Class::Guest {
            return false;
        }
        let steps = self.inner.steps();
        let interrupted = steps != self.seen_steps;
        self.seen_steps = steps;
        self.interrupted |= interrupted;
        interrupted
    }

    /// What is still to be mapped: somebody else may have mapped some of it,
    /// or covered it. BARs that were refused already are not tried again.
    ///
    /// # Errors
    /// Where RAM cannot be mapped any more as the map now is, and nobody has told.
    fn remaining(&self, targets: &[TargetId], dirty: &[(u64, u64)]) -> Result<Later, ChangeError> {
        let state = self.inner.landed(targets, dirty);
        let mut later = Later::default();
        for &id in targets {
            let Some(target) = state.targets.get(&id) else {
                continue;
            };
            if target.quarantined.is_some() {
                continue;
            }
            let dirty = whole_pages(dirty, target.limits.page_size);
            let plan = plan(&state.layout, &target.viewer(), &target.ledger, &dirty);
            self.still_mappable(&state, target, &plan)?;
            let refused = |new: &NewMapping| {
                new.kind == RegionKind::DeviceMemory
                    && target.ledger.failure_at(new.start).is_some()
            };
            let up = plan.up.into_iter().filter(|new| !refused(new)).collect();
            later.push(id, target.driver.clone(), up);
        }
        Ok(later)
    }
}
