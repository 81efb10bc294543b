//! How consumers come and go, and what happens when their limits change.

use std::ops::ControlFlow;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::commit::{Class, Commit, Watch};
use crate::ledger::Ledger;
use crate::state::{Callee, Inner, Target};
use crate::translation::check_limits;
use crate::{
    ChangeError, DmaTarget, InvalidChange, Report, TargetId, TargetLimits, TargetName,
    TargetOptions,
};

/// The whole address space.
const EVERYTHING: (u64, u64) = (0, u64::MAX);

/// A registered consumer. Dropping it unregisters the consumer and takes all its mappings down.
#[must_use = "dropping the handle unregisters the consumer"]
#[derive(Debug)]
pub struct TargetHandle {
    inner: Arc<Inner>,
    id: TargetId,
}

impl TargetHandle {
    /// Which registration this is.
    #[must_use]
    pub const fn id(&self) -> TargetId {
        self.id
    }

    /// Takes all mappings of the consumer down and forgets it, and tells what was done. What
    /// cannot be taken down is in [`Report::quarantined`]; its pages are kept for ever, because
    /// a device may still reach them.
    #[must_use = "the report tells whether everything could be taken down"]
    pub fn unregister(self) -> Report {
        self.inner.unregister(self.id)
    }
}

impl Drop for TargetHandle {
    fn drop(&mut self) {
        drop(self.inner.unregister(self.id));
    }
}

impl Inner {
    pub(crate) fn register(
        self: &Arc<Self>,
        driver: Box<dyn DmaTarget>,
        options: TargetOptions,
        watch: &mut Watch<'_>,
    ) -> Result<TargetHandle, ChangeError> {
        let limits = limits_of(&*driver, &options.name)?;
        let id = TargetId(self.next_id());
        let target = Target {
            kind: options.kind,
            options,
            limits,
            driver: Callee::driver(driver),
            ledger: Ledger::default(),
            quarantined: None,
            joining: true,
            in_flight: SmallVec::new(),
        };
        let turn = self.turns.take();
        self.state.lock().targets.insert(id, target);
        let mut commit = Commit::new(self, turn, Class::Joining, watch);
        let outcome = match commit.run(&[id], &[EVERYTHING]) {
            Ok(()) => {
                self.with_target(id, |target| target.joining = false);
                Ok(())
            }
            // There is nothing to go back to but an empty target.
            Err(cause) => {
                let mut state = self.state.lock();
                // Others map what they add into it, too.
                self.wait_until_landed(&mut state, id);
                let target = state.targets.remove(&id);
                drop(state);
                Err(match target {
                    Some(target) => commit.undo_joining(cause, id, target),
                    None => cause,
                })
            }
        };
        let wakes = self.state.lock().all_reach_changed();
        drop(commit.end(wakes));
        outcome.map(|()| TargetHandle {
            inner: self.clone(),
            id,
        })
    }

    fn unregister(&self, id: TargetId) -> Report {
        let turn = self.turns.take();
        let target = {
            let mut state = self.state.lock();
            self.wait_until_landed(&mut state, id);
            state.targets.remove(&id)
        };
        let Some(target) = target else {
            return Report::default();
        };
        let mut watch = |_| ControlFlow::Continue(());
        let mut commit = Commit::new(self, turn, Class::Guest, &mut watch);
        commit.tear_down(id, target);
        let wakes = self.state.lock().all_reach_changed();
        commit.end(wakes)
    }

    pub(crate) fn limits_changed(&self, id: TargetId) -> Result<Report, ChangeError> {
        let unknown = || ChangeError::Invalid(InvalidChange::UnknownTarget(id));
        let turn = self.turns.take();
        let (driver, name) = {
            let mut state = self.state.lock();
            self.wait_until_landed(&mut state, id);
            let target = state.targets.get(&id).ok_or_else(unknown)?;
            (target.driver.clone(), target.options.name.clone())
        };
        let limits = limits_of(driver.lock().even_if_stopped(), &name)?;
        let before = self
            .with_target(id, |target| std::mem::replace(&mut target.limits, limits))
            .ok_or_else(unknown)?;
        let mut watch = |_| ControlFlow::Continue(());
        let mut commit = Commit::new(self, turn, Class::Host, &mut watch);
        commit.only_one_target = true;
        let dirty = [EVERYTHING];
        let outcome = commit.run(&[id], &dirty).map_err(|cause| {
            self.with_target(id, |target| target.limits = before);
            commit.undo(cause, &[id], &dirty, &[])
        });
        let wakes = self.state.lock().all_reach_changed();
        let report = commit.end(wakes);
        outcome.map(|()| report)
    }
}

fn limits_of(driver: &dyn DmaTarget, name: &TargetName) -> Result<TargetLimits, ChangeError> {
    let limits = driver.limits().map_err(|errno| ChangeError::Limits {
        target: name.clone(),
        errno,
    })?;
    check_limits(&limits).map_err(|what| ChangeError::ImpossibleLimits {
        target: name.clone(),
        what,
    })?;
    Ok(limits)
}
