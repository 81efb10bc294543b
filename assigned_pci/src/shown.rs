//! What the map shows of a function: its BARs' regions, kept as its registers stand.

use std::ops::{Deref, DerefMut};

use memory_map::{Backing, Change, DisabledBecause, Gpa, RegionId};

use crate::bar::Bar;
use crate::function::State;
use crate::{AssignedFunction, BarInfo, Outcome};

/// A BAR's register beside what the map was told last.
#[derive(Debug)]
pub(crate) struct AssignedBar {
    pub(crate) bar: Bar,
    pub(crate) backings: Vec<Backing>,
    pub(crate) shown: Option<Shown>,
}

/// What the map was told last of a memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) region: RegionId,
    pub(crate) at: u64,
    /// None: enabled.
    pub(crate) down: Option<DisabledBecause>,
}

impl Shown {
    /// Asks for what `want` says and this does not.
    fn become_in(&self, want: &Self, change: &mut Change<'_>) {
        if want.at != self.at {
            change.move_to(want.region, Gpa::new(want.at));
        }
        match want.down {
            Some(because) if want.down != self.down => change.disable(want.region, because),
            None if self.down.is_some() => change.enable(want.region),
            _ => {}
        }
    }
}

impl AssignedBar {
    pub(crate) fn info(&self) -> BarInfo {
        BarInfo {
            index: self.bar.index(),
            kind: self.bar.kind(),
            size: self.bar.size(),
            address: self.bar.address(),
            region: self.shown.map(|shown| shown.region),
            enabled: self.shown.is_some_and(|shown| shown.down.is_none()),
        }
    }

    /// What the map should show, if it should show something else. `down` is why nothing of the
    /// function may be seen, if nothing may.
    fn wanted(&self, down: Option<DisabledBecause>) -> Option<Shown> {
        let shown = self.shown?;
        let want = Shown {
            region: shown.region,
            at: self.bar.address(),
            down: down.or_else(|| match (self.bar.is_placed(), self.bar.is_sized()) {
                (true, _) => None,
                (false, true) => Some(DisabledBecause::Sizing),
                (false, false) => Some(DisabledBecause::HalfWritten),
            }),
        };
        (want != shown).then_some(want)
    }
}

impl State {
    /// Whether memory accesses are answered.
    pub(crate) const fn decodes(&self) -> bool {
        self.decoding && self.power.is_awake()
    }

    /// Why no BAR may be seen, if none may. What helps least comes last: a guest that turns
    /// decoding on in a function that sleeps sees nothing yet.
    const fn down(&self) -> Option<DisabledBecause> {
        match (self.held, self.power.is_awake(), self.decoding) {
            (Some(because), ..) => Some(because),
            (None, false, _) => Some(DisabledBecause::Sleeping),
            (None, true, false) => Some(DisabledBecause::DecodingOff),
            (None, true, true) => None,
        }
    }

    /// Whether memory accesses are answered may have changed. `decoded` is what it was before.
    pub(crate) fn decoding_changed(&mut self, decoded: bool) {
        if !decoded && self.decodes() {
            self.settle();
        }
    }

    /// What was written to the BARs so far is meant.
    pub(crate) fn settle(&mut self) {
        self.bars.iter_mut().for_each(|a| a.bar.settle());
    }

    fn backings(&self) -> impl Iterator<Item = &Backing> {
        self.bars.iter().flat_map(|assigned| &assigned.backings)
    }
}

/// The BARs are out of the map until they are [brought back](AssignedFunction::bring_back).
#[must_use]
pub(crate) struct Down {
    decoded: bool,
}

impl AssignedFunction {
    /// Takes the BARs out of the map, in one commit, before the host is asked for something that
    /// revokes.
    pub(crate) fn take_down(
        &self,
        state: &mut State,
        because: DisabledBecause,
        outcome: &mut Outcome,
    ) -> Down {
        state.held = Some(because);
        self.sync(state, false, outcome);
        Down {
            decoded: state.decodes(),
        }
    }

    /// After something that may have revoked: the epochs advance, and what decodes is in the map
    /// again, in one commit.
    pub(crate) fn bring_back(&self, state: &mut State, down: Down, outcome: &mut Outcome) {
        state.held = None;
        state.decoding_changed(down.decoded);
        self.sync(state, true, outcome);
    }

    /// Makes the map show what the registers say, in one commit, or in none if it does already.
    /// With `revoked`, what was mapped from the BARs counts as dead, also where others mapped it.
    pub(crate) fn sync(&self, state: &mut State, revoked: bool, outcome: &mut Outcome) {
        sync_all(&mut [(self, state)], revoked, outcome);
    }
}

/// Like [`AssignedFunction::sync`], for several functions of one map in one commit.
pub(crate) fn sync_all<S: Deref<Target = State> + DerefMut>(
    functions: &mut [(&AssignedFunction, S)],
    revoked: bool,
    outcome: &mut Outcome,
) {
    let Some((first, _)) = functions.first() else {
        return;
    };
    let map = &first.map;
    let mut change = map.change();
    let mut any = false;
    for (_, state) in &*functions {
        if revoked {
            for backing in state.backings() {
                change.revoke(backing);
                any = true;
            }
        }
        let down = state.down();
        for assigned in &state.bars {
            if let (Some(shown), Some(want)) = (assigned.shown, assigned.wanted(down)) {
                shown.become_in(&want, &mut change);
                any = true;
            }
        }
    }
    if !any {
        return;
    }
    let report = change.commit_guest();
    let whole = report.is_ok();
    if whole {
        outcome.record(report);
    } else if revoked {
        let mut change = map.change();
        for (_, state) in &*functions {
            state.backings().for_each(|backing| change.revoke(backing));
        }
        outcome.record(change.commit_guest());
    }
    for (_, state) in functions {
        let down = state.down();
        for assigned in &mut state.bars {
            let (Some(shown), Some(want)) = (assigned.shown, assigned.wanted(down)) else {
                continue;
            };
            // Somebody else has removed a region: the others follow one by one, for what must go
            // must not stay because of another.
            let follows = whole || {
                let mut change = map.change();
                shown.become_in(&want, &mut change);
                outcome.record(change.commit_guest())
            };
            if follows {
                assigned.shown = Some(want);
            }
        }
    }
}
