//! The ledger of one target: the mappings it really holds, and what it refused.

use crate::stretches::{Stretch, Stretches};
use crate::{Access, Backing, Epoch, HostAddress, Reason, RegionId, RegionKind};

/// One mapping that a target holds; its first address is its key.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) last: u64,
    pub(crate) region: RegionId,
    pub(crate) kind: RegionKind,
    pub(crate) access: Access,
    pub(crate) backing: Backing,
    pub(crate) offset: u64,
    /// The backing's epoch when the mapping was made.
    pub(crate) epoch: Epoch,
    /// Held for its drop: the host address that the mapping was made from outlives it.
    pub(crate) _host: Option<HostAddress>,
}

impl Entry {
    /// Whether the kernel may have revoked the mapping since it was made.
    pub(crate) fn is_stale(&self) -> bool {
        self.epoch != self.backing.epoch()
    }
}

/// A piece that the target should hold and does not; its first address is its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) last: u64,
    /// Of which region.
    pub(crate) region: RegionId,
    pub(crate) reason: Reason,
}

impl Stretch for Entry {
    fn last(&self) -> u64 {
        self.last
    }
}

impl Stretch for Failure {
    fn last(&self) -> u64 {
        self.last
    }
}

/// What a target holds. An entry is made when a map has succeeded and removed when an unmap has.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) entries: Stretches<Entry>,
    failures: Stretches<Failure>,
}

impl Drop for Ledger {
    /// What is still entered may still be mapped, and its memory must never be used for anything
    /// else.
    fn drop(&mut self) {
        std::mem::take(&mut self.entries)
            .into_values()
            .for_each(std::mem::forget);
    }
}

impl Ledger {
    /// The entries that overlap `start..=last`, by address.
    pub(crate) fn entries_in(&self, start: u64, last: u64) -> impl Iterator<Item = (u64, &Entry)> {
        self.entries.overlapping(start, last)
    }

    /// Whether it refused anything that it should hold.
    pub(crate) fn has_failures(&self) -> bool {
        !self.failures.is_empty()
    }

    /// Notes that the target does not hold `start..=last` although it should.
    pub(crate) fn fail(&mut self, start: u64, failure: Failure) {
        drop(self.forget_failures(start, failure.last));
        self.failures.insert(start, failure);
    }

    /// Whether it is noted that the target lacks all of this, of the same region and for the same
    /// reason, be it in one piece or in several.
    pub(crate) fn is_known(&self, start: u64, missing: &Failure) -> bool {
        let mut next = Some(start);
        while let Some(at) = next.filter(|&at| at <= missing.last) {
            let known = self.failures.at_or_below(at);
            let Some((_, known)) = known.filter(|(_, known)| {
                known.last >= at && known.region == missing.region && known.reason == missing.reason
            }) else {
                return false;
            };
            next = known.last.checked_add(1);
        }
        true
    }

    /// Why the target does not hold `address`, if it should.
    pub(crate) fn failure_at(&self, address: u64) -> Option<(u64, &Reason)> {
        let (_, failure) = self.failures.at_or_below(address)?;
        (failure.last >= address).then_some((failure.last, &failure.reason))
    }

    /// Where the next failure begins after `address`, at which there is none.
    pub(crate) fn failure_after(&self, address: u64) -> Option<u64> {
        self.failures
            .starting_from(address)
            .next()
            .map(|(at, _)| at)
    }

    /// Forgets the failures in `start..=last`, and returns what was forgotten.
    pub(crate) fn forget_failures(&mut self, start: u64, last: u64) -> Vec<(u64, Failure)> {
        if !self.has_failures() {
            return Vec::new();
        }
        let hit = self.failures.overlapping(start, last);
        let hit: Vec<u64> = hit.map(|(at, _)| at).collect();
        let mut forgotten = Vec::with_capacity(hit.len());
        for at in hit {
            let Some(failure) = self.failures.remove(at) else {
                continue;
            };
            if at < start {
                let head = Failure {
                    last: start.wrapping_sub(1),
                    ..failure.clone()
                };
                self.failures.insert(at, head);
            }
            if failure.last > last {
                self.failures.insert(last.wrapping_add(1), failure.clone());
            }
            let kept_last = failure.last.min(last);
            forgotten.push((
                at.max(start),
                Failure {
                    last: kept_last,
                    ..failure
                },
            ));
        }
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgetting_a_part_of_a_failure_keeps_the_rest() {
        let mut ledger = Ledger::default();
        let failure = Failure {
            last: 0x4fff,
            region: RegionId(1),
            reason: Reason::Trapped,
        };
        ledger.fail(0x1000, failure);
        let forgotten = ledger.forget_failures(0x2000, 0x2fff);
        assert_eq!(forgotten.len(), 1);
        assert_eq!((forgotten[0].0, forgotten[0].1.last), (0x2000, 0x2fff));
        assert_eq!(ledger.failure_at(0x1fff), Some((0x1fff, &Reason::Trapped)));
        assert_eq!(ledger.failure_at(0x2000), None);
        assert_eq!(ledger.failure_at(0x3000), Some((0x4fff, &Reason::Trapped)));
    }
}
