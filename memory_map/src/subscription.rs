//! Subscriptions: being told that the reach of regions may have changed.
//!
//! A subscription keeps the set of regions to look at again, and not a queue of events: a guest
//! that moves its BARs a million times while nobody looks costs one entry a region.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::query;
use crate::state::{Inner, State};
use crate::{ReachEntry, RegionId};

/// What has changed since it was last asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReachChanges {
    /// The reach, as it is now, of every target into every region whose reach may have changed.
    pub reach: Vec<ReachEntry>,
    /// Regions that are no longer in the map.
    pub removed: Vec<RegionId>,
}

/// A subscription to changes of the reach. It ends when it is dropped.
pub struct ReachSubscription {
    inner: Arc<Inner>,
    id: u64,
}

impl ReachSubscription {
    pub(crate) fn new(inner: Arc<Inner>, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        let id = inner.next_id();
        let subscriber = Subscriber {
            wake,
            changed: BTreeSet::new(),
            all: false,
        };
        inner.state.lock().subscribers.0.insert(id, subscriber);
        Self { inner, id }
    }

    /// Takes what has changed since the last call. Never waits for a consumer.
    #[must_use]
    pub fn take(&self) -> ReachChanges {
        let mut state = self.inner.state.lock();
        let subscriber = state.subscribers.0.get_mut(&self.id);
        let (mut changed, all) = subscriber
            .map(|s| (std::mem::take(&mut s.changed), std::mem::take(&mut s.all)))
            .unwrap_or_default();
        if all {
            changed.extend(state.layout.regions.keys());
        }
        let mut changes = ReachChanges::default();
        for region in changed {
            match state.layout.regions.get(&region) {
                None => changes.removed.push(region),
                Some(found) => changes
                    .reach
                    .extend(query::reach_into(&state, region, found)),
            }
        }
        changes
    }
}

impl Drop for ReachSubscription {
    fn drop(&mut self) {
        let subscriber = self.inner.state.lock().subscribers.0.remove(&self.id);
        // The embedder's handle ends here, not under the lock.
        drop(subscriber);
    }
}

impl fmt::Debug for ReachSubscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReachSubscription({})", self.id)
    }
}

struct Subscriber {
    wake: Arc<dyn Fn() + Send + Sync>,
    changed: BTreeSet<RegionId>,
    /// Every region that is in the map, besides.
    all: bool,
}

/// All subscribers, by their ids.
#[derive(Default)]
pub(crate) struct Subscribers(BTreeMap<u64, Subscriber>);

impl Subscribers {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Those to be woken once all locks are dropped.
#[must_use]
#[derive(Default)]
pub(crate) struct Wakes(Vec<Arc<dyn Fn() + Send + Sync>>);

impl Wakes {
    pub(crate) fn and(mut self, more: Self) -> Self {
        self.0.extend(more.0);
        self
    }

    pub(crate) fn wake(self) {
        for wake in self.0 {
            wake();
        }
    }
}

impl State {
    /// Tells all subscribers to look at regions again.
    pub(crate) fn reach_changed(&mut self, regions: &[RegionId]) -> Wakes {
        let mut wakes = Wakes::default();
        for subscriber in self.subscribers.0.values_mut() {
            let slept = subscriber.changed.is_empty() && !subscriber.all;
            subscriber.changed.extend(regions);
            if slept && !subscriber.changed.is_empty() {
                wakes.0.push(subscriber.wake.clone());
            }
        }
        wakes
    }

    /// Tells all subscribers to look again at the regions that a commit touched, and at those that
    /// lie where it changed something, seen or covered.
    pub(crate) fn reach_changed_in(&mut self, touched: &[RegionId], dirty: &[(u64, u64)]) -> Wakes {
        if self.subscribers.is_empty() {
            return Wakes::default();
        }
        let mut regions: SmallVec<[RegionId; 16]> = touched.into();
        for &(start, last) in dirty {
            self.layout.view.lying_in(start, last, &mut regions);
        }
        regions.sort_unstable();
        regions.dedup();
        self.reach_changed(&regions)
    }

    /// Tells all subscribers to look at every region again.
    pub(crate) fn all_reach_changed(&mut self) -> Wakes {
        let mut wakes = Wakes::default();
        for subscriber in self.subscribers.0.values_mut() {
            let slept = subscriber.changed.is_empty() && !subscriber.all;
            subscriber.all = true;
            if slept {
                wakes.0.push(subscriber.wake.clone());
            }
        }
        wakes
    }
}
