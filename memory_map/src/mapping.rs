//! Making one mapping: the call to the target, with or without the turn, and its ledger entry.

use crate::commit::Commit;
use crate::ledger::Entry;
use crate::plan::NewMapping;
use crate::state::{Callee, Driver, InFlight, NoAnswer, TakenOff};
use crate::translation::iova;
use crate::{
    ChangeError, DmaTarget, Epoch, Errno, IovaRange, MapRequest, Quarantine, Reason, RegionId,
    TargetError, TargetId,
};

/// Of Linux, on every processor.
const EIO: i32 = 5;

/// How often a mapping is tried that is revoked while it is being made.
const REVOKED_TRIES: usize = 3;

/// How a call to map ended.
enum Called {
    /// Made in one epoch of its backing.
    Mapped(Epoch),
    /// Not there.
    Refused(Reason),
    /// May be there.
    Unknown(Quarantine),
    /// The target gets no more calls, or has panicked in this one.
    NoAnswer(NoAnswer),
}

/// Has a target make a mapping. Needs no lock of the map's.
fn call_map(callee: &mut Callee, request: &MapRequest) -> Called {
    let called = callee.call(|target| try_to_map(target, request));
    match &called {
        Ok(Called::Unknown(_)) => callee.stop(),
        // It may be mapped: its pages are never given back.
        Err(NoAnswer::Panicked(_)) => {
            std::mem::forget((request.backing.clone(), request.host.clone()));
        }
        _ => {}
    }
    called.unwrap_or_else(Called::NoAnswer)
}

fn try_to_map(target: &mut dyn DmaTarget, request: &MapRequest) -> Called {
    let range = request.iova;
    for _ in 0..REVOKED_TRIES {
        let epoch = request.backing.epoch();
        match target.map(request) {
            Ok(()) if request.backing.epoch() == epoch => return Called::Mapped(epoch),
            // Revoked meanwhile: whatever is there now is dead, or may be.
            Ok(()) => {
                if let Err(error) = target.unmap(range) {
                    return Called::Unknown(Quarantine::Unmap { range, error });
                }
            }
            Err(TargetError::Refused(reason)) => return Called::Refused(reason),
            // Trying again helps only if the revocation is known to be over.
            Err(TargetError::Revoked) if request.backing.epoch() == epoch => break,
            Err(TargetError::Revoked) => {}
            Err(error @ TargetError::Unknown(errno)) => {
                // If it can be taken down, it was there and now is not.
                if target.unmap(range).is_err() {
                    return Called::Unknown(Quarantine::Map { range, error });
                }
                return Called::Refused(Reason::Kernel { errno, hint: None });
            }
        }
    }
    Called::Refused(Reason::Revoked)
}

/// Has a target take mappings down. Whoever gets an error, or no answer, notes the quarantine.
pub(crate) fn call_unmap(
    driver: &Driver,
    range: IovaRange,
) -> Result<Result<(), TargetError>, NoAnswer> {
    let mut callee = driver.lock();
    let outcome = callee.call(|target| target.unmap(range))?;
    if outcome.is_err() {
        callee.stop();
    }
    Ok(outcome)
}

impl Commit<'_, '_> {
    /// Makes a mapping and enters it in the ledger. `Ok(Some(_))` says why it is not there.
    pub(crate) fn try_map(
        &mut self,
        id: TargetId,
        driver: &Driver,
        new: NewMapping,
        yielding: bool,
    ) -> Result<Option<Reason>, ChangeError> {
        let flight = yielding.then_some((new.start, new.last));
        let taken_off = self.inner.take_off(id, new.backing.id(), flight);
        let TakenOff { kept, in_flight } = match taken_off {
            Ok(taken_off) => taken_off,
            Err(reason) => return Ok(Some(reason)),
        };
        if let Some(in_flight) = &in_flight {
            self.seen_steps = in_flight.steps;
        }
        let mut callee = driver.lock();
        let mut host = None;
        if callee.even_if_stopped().needs_host_address(&new.backing) {
            host = kept;
            if host.is_none() {
                drop(callee);
                match self.inner.make_host_address(&new.backing) {
                    Ok(made) => host = Some(made),
                    Err(errno) => return Ok(Some(Reason::NoHostAddress(errno))),
                }
                self.made.push(new.backing.id());
                callee = driver.lock();
            }
        }
        if in_flight.is_some() {
            self.turn = None;
        }
        let request = MapRequest {
            iova: iova(new.start, new.last),
            access: new.access,
            kind: new.kind,
            backing: new.backing,
            offset: new.offset,
            host,
        };
        let called = call_map(&mut callee, &request);
        drop(callee);
        let (reason, why) = self.enter(id, new.region, request, called, in_flight);
        if self.turn.is_none() {
            drop(std::mem::take(&mut self.leftovers.plans));
            self.turn = Some(self.inner.turns.take());
        }
        match why {
            Some(why) => self.quarantine(id, why).map(|()| reason),
            None => Ok(reason),
        }
    }

    /// Why a target is to be quarantined that does not answer, unless it is: it has panicked, or
    /// another thread is about to say.
    pub(crate) fn unanswered(
        &mut self,
        id: TargetId,
        range: IovaRange,
        no_answer: NoAnswer,
    ) -> Option<Quarantine> {
        if let NoAnswer::Panicked(payload) = no_answer {
            self.panicked.get_or_insert(payload);
        }
        let quarantined = self
            .inner
            .with_target(id, |target| target.quarantined.is_some());
        let error = TargetError::Unknown(Errno::new(EIO));
        (quarantined == Some(false)).then_some(Quarantine::Map { range, error })
    }

    /// Enters in the ledger what is there, or may be. The ledger is exact before anybody can plan
    /// with it again. Returns why the mapping is not there, and why the target is to be
    /// quarantined.
    fn enter(
        &mut self,
        id: TargetId,
        region: RegionId,
        request: MapRequest,
        called: Called,
        mut in_flight: Option<InFlight<'_>>,
    ) -> (Option<Reason>, Option<Quarantine>) {
        let (epoch, why) = match called {
            // Landed when it is dropped.
            Called::Refused(reason) => return (Some(reason), None),
            Called::NoAnswer(no_answer) => {
                let why = self.unanswered(id, request.iova, no_answer);
                return (Some(Reason::Quarantined), why);
            }
            Called::Mapped(epoch) => (epoch, None),
            // Its pages stay, and the end of the target tries once more to take it down.
            Called::Unknown(why) => (request.backing.epoch(), Some(why)),
        };
        let start = request.iova.start().raw();
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
        let mut cut_off = None;
        self.inner.with_target(id, |target| {
            // Quarantined at once, so that nobody takes it for a mapping like any other. Whoever
            // does that has its devices cut off; the target may leave before the next turn.
            if let Some(why) = why.as_ref().filter(|_| target.quarantined.is_none()) {
                target.quarantined = Some(why.clone());
                cut_off = Some(target.options.clone());
            }
            if let Some(entry) = entry.take() {
                // Somebody else may have failed to make it meanwhile.
                drop(target.ledger.forget_failures(start, entry.last));
                target.ledger.entries.insert(start, entry);
            }
            if let Some(in_flight) = &mut in_flight {
                in_flight.land(target);
            }
        });
        // Nobody unregisters a target while something is in flight to it; if it were gone all
        // the same, the pages would have to stay.
        entry.into_iter().for_each(std::mem::forget);
        if let (Some(options), Some(why)) = (cut_off, &why) {
            self.cut_off(&options, why);
        }
        (why.as_ref().map(|_| Reason::Quarantined), why)
    }
}
