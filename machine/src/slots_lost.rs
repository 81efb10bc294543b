//! The memory slots' cut-off: what becomes of a machine whose slots no longer follow the map.
//!
//! KVM may refuse to take a slot away. The map then quarantines the slots: they are told nothing more,
//! and the processors may go on seeing a BAR where it no longer is. They have no device that could be
//! stopped; what has to stop are the processors. So the machine ends.
//!
//! The machine makes one and registers its slots with it; the map calls it in whichever thread
//! changes the map. It waits for nobody and calls nobody: it sends an event.

use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use memory_map::{ConsumerKind, CutOff, Quarantine, TargetName, TargetOptions};

use crate::machine::{Ended, Event};

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct SlotsLost {
    events: Sender<Event>,
    /// Stays, should nobody listen to the event: the machine does not begin anew after it.
    why: OnceLock<String>,
}

impl SlotsLost {
    pub(crate) fn new(events: Sender<Event>) -> Arc<Self> {
        Arc::new(Self {
            events,
            why: OnceLock::new(),
        })
    }

    /// What the slots are registered with.
    pub(crate) fn options(self: &Arc<Self>) -> TargetOptions {
        let mut options = TargetOptions::new("memory slots");
        options.kind = ConsumerKind::MemorySlots;
        options.cut_off = Some(self.clone());
        options
    }

    /// How the machine has ended, if it has by this.
    pub(crate) fn ended(&self) -> Option<Ended> {
        let why = self.why.get()?.clone();
        Some(Ended::SlotsLost { why })
    }
}

impl CutOff for SlotsLost {
    fn cut_off(&self, _: &TargetName, why: &Quarantine) {
        let why = self.why.get_or_init(|| why.to_string()).clone();
        // Nobody listens between two runs, nor when the machine is gone.
        let _unheard = self.events.send(Event::SlotsLost(why));
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::sync::mpsc;

    use memory_map::{
        Access, Backing, BackingObject, DisabledBecause, DmaTarget, Errno, GRANULE, Gpa, GpaRange,
        HostMapping, Iova, IovaRange, MapRequest, Priority, Reason, RegionKind, RegionManager,
        RegionSpec, SubMapping, TargetError, TargetLimits,
    };

    use super::*;
    use crate::Notices;
    use crate::chipset::Request;
    use crate::machine::{again, wait};

    /// Memory slots of which KVM takes none away, if it is so.
    struct Slots {
        kept: bool,
    }

    impl DmaTarget for Slots {
        fn limits(&self) -> Result<TargetLimits, Errno> {
            Ok(TargetLimits {
                page_size: GRANULE,
                allowed: vec![IovaRange::new(Iova::new(0), 1 << 40).unwrap()],
                entry_limit: None,
                largest_mapping: 1 << 40,
                read_only: true,
                device_memory: true,
                unmap_spans: false,
            })
        }

        fn needs_host_address(&self, _: &Backing) -> bool {
            false
        }

        fn map(&mut self, _: &MapRequest) -> Result<(), TargetError> {
            Ok(())
        }

        fn unmap(&mut self, _: IovaRange) -> Result<(), TargetError> {
            match self.kept {
                true => Err(TargetError::kernel(Errno::new(libc::EINVAL))),
                false => Ok(()),
            }
        }
    }

    #[derive(Debug)]
    struct Page;

    impl BackingObject for Page {
        fn size(&self) -> u64 {
            GRANULE
        }

        fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
            Err(Errno::new(libc::ENODEV))
        }
    }

    /// A BAR comes and goes; what the machine hears of it, and what the change reports.
    fn bar_goes(kept: bool) -> (Arc<SlotsLost>, mpsc::Receiver<Event>, memory_map::Report) {
        let (sender, events) = mpsc::channel();
        let lost = SlotsLost::new(sender);
        let map = RegionManager::new();
        let slots = map.register(Box::new(Slots { kept }), lost.options());
        let mut change = map.change();
        let bar = change.add(RegionSpec {
            name: "BAR".into(),
            range: GpaRange::new(Gpa::new(0xc000_0000), GRANULE).unwrap(),
            priority: Priority(0),
            kind: RegionKind::DeviceMemory,
            access: Access::ReadWrite,
            shareable: false,
            label: None,
            sub_mappings: vec![SubMapping {
                offset: 0,
                size: GRANULE,
                backing: Backing::new(Page),
                backing_offset: 0,
            }],
        });
        change.enable(bar);
        assert_eq!(change.commit().unwrap().maps(), 1);
        assert!(events.try_recv().is_err());
        let mut change = map.change();
        change.disable(bar, DisabledBecause::DecodingOff);
        let report = change.commit_guest().unwrap();
        drop(slots);
        (lost, events, report)
    }

    #[test]
    fn a_slot_that_stays_ends_the_machine() {
        let notices = Notices::new(|_| {});
        let (lost, events, _) = bar_goes(true);
        let ControlFlow::Break(Ended::SlotsLost { why }) = wait(&events, &notices) else {
            panic!("the machine goes on");
        };
        assert!(why.contains("0xc0000000"), "{why}");
        assert_eq!(lost.ended(), Some(Ended::SlotsLost { why }));
    }

    #[test]
    fn a_machine_whose_slots_are_lost_does_not_begin_anew() {
        let reset = || ControlFlow::Continue(());
        let (lost, ..) = bar_goes(true);
        assert_eq!(again(reset(), false, &lost), lost.ended());
        let off = ControlFlow::Break(Ended::PoweredOff);
        assert_eq!(again(off, false, &lost), Some(Ended::PoweredOff));
        assert_eq!(again(reset(), true, &lost), Some(Ended::Told));
    }

    #[test]
    fn slots_that_follow_end_nothing() {
        let notices = Notices::new(|_| {});
        let (lost, events, report) = bar_goes(false);
        assert_eq!((report.unmaps(), lost.ended()), (1, None));
        assert_eq!(again(ControlFlow::Continue(()), false, &lost), None);
        lost.events.send(Event::Asked(Request::Reset)).unwrap();
        assert_eq!(wait(&events, &notices), ControlFlow::Continue(()));
    }

    #[test]
    fn what_may_be_left_mapped_is_noted_and_what_is_missing() {
        let (sender, said) = mpsc::channel();
        let notices = Notices::new(move |line: &str| sender.send(line.to_owned()).unwrap());
        let (_, _, mut report) = bar_goes(true);
        let range = IovaRange::new(Iova::new(0), GRANULE).unwrap();
        let missing = (report.quarantined[0].0, range, Reason::Quarantined);
        report.ram_missing.push(missing);
        let mut outcome = assigned_pci::Outcome::default();
        outcome.reports.push(report);
        notices.note_outcome("gpu", &outcome);
        let said: Vec<_> = said.try_iter().collect();
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].starts_with("gpu: something may be left mapped: "));
        assert!(said[1].starts_with("gpu: RAM is missing for devices or processors: "));
    }
}
