//! Says so when a function cannot reach what it may.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use machine::Notices;
use memory_map::{Reach, ReachChanges, ReachSubscription, Reason, RegionManager};

/// What the watching thread waits for.
enum Event {
    /// There is something to look at.
    Changed,
    End,
}

/// Watches the reach of everyone until it is dropped.
pub struct ReachWatch {
    events: Sender<Event>,
    thread: Option<JoinHandle<()>>,
}

impl ReachWatch {
    /// Begins to.
    pub fn new(map: &RegionManager, notices: Arc<Notices>) -> Result<Self> {
        let (events, received) = mpsc::channel();
        let wake = events.clone();
        let subscription = map.subscribe(move || {
            // The thread is gone when the machine is about to be.
            let _unheard = wake.send(Event::Changed);
        });
        let thread = thread::Builder::new()
            .name("reach".to_owned())
            .spawn(move || watch(&received, &subscription, &notices))
            .context("starting a thread for the reach failed")?;
        Ok(Self {
            events,
            thread: Some(thread),
        })
    }
}

impl Drop for ReachWatch {
    fn drop(&mut self) {
        let _unheard = self.events.send(Event::End);
        if let Some(thread) = self.thread.take() {
            // What it says is said, whatever became of it.
            let _ended = thread.join();
        }
    }
}

fn watch(events: &Receiver<Event>, subscription: &ReachSubscription, notices: &Notices) {
    while let Ok(Event::Changed) = events.recv() {
        tell(&subscription.take(), notices);
    }
}

fn tell(changes: &ReachChanges, notices: &Notices) {
    for entry in &changes.reach {
        let obstacle = match &entry.reach {
            Reach::Mapped => None,
            Reach::Unavailable(reason) => Some(reason).filter(|reason| is_obstacle(reason)),
            Reach::Partly { missing, .. } => missing
                .iter()
                .map(|missing| &missing.reason)
                .find(|reason| is_obstacle(reason)),
        };
        if let Some(reason) = obstacle {
            let who = format!("{} in {}", entry.region_name, entry.target_name);
            notices.note(&who, "is not reached", reason);
        }
    }
}

/// Whether it is neither what the guest wants, nor policy, nor by design, nor about to end.
const fn is_obstacle(reason: &Reason) -> bool {
    !matches!(
        reason,
        Reason::Disabled(_)
            | Reason::Covered { .. }
            | Reason::Trapped
            | Reason::SmallerThanPage { .. }
            | Reason::Filtered
            | Reason::Pending
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use host_memory::Ram;
    use memory_map::{
        Access, Backing, Gpa, GpaRange, Priority, RegionKind, RegionSpec, SubMapping, TargetOptions,
    };

    use super::*;
    use crate::run::narrow_iommu::Narrow;

    #[test]
    fn a_bar_that_the_guest_puts_where_no_iommu_leads_is_told_and_nothing_else_is() {
        let map = RegionManager::new();
        let options = TargetOptions::new("IOAS 0");
        let _iommu = map.register(Box::new(Narrow), options).unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        let notices = Notices::new(move |line| heard.lock().unwrap().push(line.to_owned()));
        let watch = ReachWatch::new(&map, Arc::new(notices)).unwrap();

        let mut change = map.change();
        let bar = change.add(RegionSpec {
            name: "gpu BAR0".into(),
            range: GpaRange::new(Gpa::new(0xe000_0000), 0x1000).unwrap(),
            priority: Priority(0),
            kind: RegionKind::DeviceMemory,
            access: Access::ReadWrite,
            shareable: false,
            label: None,
            sub_mappings: vec![SubMapping {
                offset: 0,
                size: 0x1000,
                backing: Backing::new(Ram::memfd(c"bar", 0x1000).unwrap()),
                backing_offset: 0,
            }],
        });
        change.enable(bar);
        change.commit().unwrap();
        for _ in 0..5 {
            let mut change = map.change();
            change.disable(bar, memory_map::DisabledBecause::DecodingOff);
            change.commit_guest().unwrap();
            let mut change = map.change();
            change.enable(bar);
            change.commit_guest().unwrap();
        }
        let mut change = map.change();
        change.move_to(bar, Gpa::new(1 << 40));
        change.commit_guest().unwrap();
        // It has looked when it has ended.
        drop(watch);
        let said = said.lock().unwrap();
        let [line] = &said[..] else {
            panic!("{said:?}");
        };
        assert!(
            line.starts_with("gpu BAR0 in IOAS 0: is not reached: outside"),
            "{line}"
        );
    }
}
