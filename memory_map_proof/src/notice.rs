//! Subscribers: whoever goes by what they are told knows the reach.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memory_map::{Reach, ReachEntry, ReachSubscription, RegionId, RegionManager, TargetId};

use crate::check::{Checked, ensure};
use crate::kernel::Fault;
use crate::world::{Before, World};

/// A subscription that is looked at after every step.
#[derive(Debug)]
pub(crate) struct Notices {
    subscription: ReachSubscription,
    wakes: Arc<AtomicU64>,
}

type Known = BTreeMap<(TargetId, RegionId), Reach>;

fn known(entries: Vec<ReachEntry>) -> Known {
    let entries = entries.into_iter();
    entries
        .map(|entry| ((entry.target, entry.region), entry.reach))
        .collect()
}

impl Notices {
    /// Subscribes.
    pub(crate) fn new(map: &RegionManager) -> Self {
        let wakes = Arc::new(AtomicU64::new(0));
        let counter = wakes.clone();
        let subscription = map.subscribe(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        Self {
            subscription,
            wakes,
        }
    }
}

impl World {
    /// What was known before the step and what was told of it are the reach now; and whoever is
    /// told something is woken, once.
    pub(crate) fn check_told(&self, before: &Before, advanced: bool) -> Checked {
        let changes = self.notices.subscription.take();
        let wakes = self.notices.wakes.swap(0, Ordering::Relaxed);
        let silent = changes.reach.is_empty() && changes.removed.is_empty();
        ensure(wakes == 1 || (silent && wakes == 0), || {
            format!("woken {wakes} times for {changes:?}")
        })?;
        let revoked =
            (self.kernel.state().fired.iter()).any(|(_, fault)| *fault == Fault::RevokedMeanwhile);
        if advanced || revoked {
            // Nobody has told the map, so it cannot tell anybody.
            return Ok(());
        }
        let now = known(self.map.reach());
        let mut told = known(before.reach.clone());
        told.extend(known(changes.reach));
        told.retain(|(_, region), _| !changes.removed.contains(region));
        // Who registers and unregisters targets knows which there are.
        told.retain(|(target, _), _| self.targets.iter().any(|t| t.handle.id() == *target));
        for (key, reach) in &now {
            let known = told.get(key);
            ensure(known == Some(reach), || {
                format!("{key:?} is {reach:?}; told was {known:?}")
            })?;
        }
        ensure(told.len() == now.len(), || {
            "told of a region that there is not".into()
        })
    }
}
