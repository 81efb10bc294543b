//! What a commit plans for its targets, and what it makes of RAM that they cannot hold.

use smallvec::SmallVec;

use crate::commit::Commit;
use crate::layout::{IdSet, Layout};
use crate::ledger::Failure;
use crate::plan::{Plan, plan, whole_pages};
use crate::state::{Driver, State, Target};
use crate::translation::{Unmappable, iova};
use crate::{ChangeError, IovaRange, Reason, RegionId, RegionKind, TargetId};

/// The calls that bring one target up to date, and how to call it.
pub(crate) struct Planned {
    pub(crate) target: TargetId,
    pub(crate) driver: Driver,
    pub(crate) plan: Plan,
}

impl Commit<'_, '_> {
    pub(crate) fn plan(
        &mut self,
        targets: &[TargetId],
        dirty: &[(u64, u64)],
    ) -> Result<SmallVec<[Planned; 1]>, ChangeError> {
        let mut plans: SmallVec<[Planned; 1]> = SmallVec::new();
        let mut state = self.inner.landed(targets, dirty);
        let state = &mut *state;
        let mut left_to_others = Vec::new();
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
                if self.class.may_be_refused() && !known {
                    return Err(refused(&state.layout, target, piece));
                }
                if known {
                    continue;
                }
                if target.joining || is_awaited(&state.busy, &self.taken_back, piece.region) {
                    left_to_others.push((id, piece.start));
                } else {
                    let missing = (id, range, piece.reason.clone());
                    self.report.ram_missing.push(missing);
                }
            }
            plans.push(Planned {
                target: id,
                driver: target.driver.clone(),
                plan,
            });
        }
        // Nothing is refused from here on.
        for Planned {
            target: id, plan, ..
        } in &plans
        {
            let Some(target) = state.targets.get_mut(id) else {
                continue;
            };
            if target.ledger.has_failures() {
                for (start, last) in whole_pages(dirty, target.limits.page_size) {
                    let forgotten = target.ledger.forget_failures(start, last);
                    if !forgotten.is_empty() {
                        self.forgotten.push((*id, forgotten));
                    }
                }
            }
            for piece in plan.unmappable.iter().filter(|piece| is_missing(piece)) {
                let (start, last) = (piece.start, piece.last);
                // Whoever is at it has to see that it is not known yet.
                if left_to_others.contains(&(*id, start)) {
                    continue;
                }
                target.ledger.fail(start, failure_of(piece));
                self.failed.push((*id, start, last));
            }
        }
        Ok(plans)
    }

    /// Whether RAM that nobody has told of cannot be mapped in a target as it now is: a commit that
    /// may be refused is refused for it, as it would have been from the start.
    pub(crate) fn still_mappable(
        &self,
        state: &State,
        target: &Target,
        plan: &Plan,
    ) -> Result<(), ChangeError> {
        let mut missing = plan.unmappable.iter().filter(|piece| is_missing(piece));
        let untold = missing.find(|piece| !target.ledger.is_known(piece.start, &failure_of(piece)));
        match untold {
            Some(piece) if self.class.may_be_refused() => {
                Err(refused(&state.layout, target, piece))
            }
            _ => Ok(()),
        }
    }

    /// Notes that RAM is missing in a target. A target that is still joining, and RAM that is
    /// still being added, are not counted on yet: that commit finds out for itself.
    pub(crate) fn miss_ram(
        &mut self,
        id: TargetId,
        range: IovaRange,
        region: RegionId,
        reason: &Reason,
    ) {
        let state = self.inner.state.lock();
        let joining = state.targets.get(&id).is_none_or(|target| target.joining);
        if !joining && !is_awaited(&state.busy, &self.taken_back, region) {
            self.report.ram_missing.push((id, range, reason.clone()));
        }
    }
}

/// Whether RAM of a region is not counted on yet: an unfinished host's commit is at it, and not
/// on its way back.
fn is_awaited(busy: &IdSet<RegionId>, taken_back: &[RegionId], region: RegionId) -> bool {
    busy.contains(&region) && !taken_back.contains(&region)
}

fn refused(layout: &Layout, target: &Target, piece: &Unmappable) -> ChangeError {
    match layout.region(piece.region) {
        Ok(region) => ChangeError::Refused {
            target: target.options.name.clone(),
            range: iova(piece.start, piece.last),
            region: region.name.clone(),
            reason: piece.reason.clone(),
        },
        Err(unknown) => unknown.into(),
    }
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
