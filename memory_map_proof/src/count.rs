//! Counts of what a run has exercised, by name.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;

use crate::kernel::{CallKind, Fault};

/// Counts by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<&'static str, u64>);

/// Everything that a run of random scripts has to exercise.
pub const REQUIRED: [&str; 37] = [
    "operation: add",
    "operation: remove",
    "operation: enable",
    "operation: disable",
    "operation: move",
    "operation: move that wraps",
    "operation: set access",
    "operation: set sub-mapping",
    "operation: remove sub-mapping",
    "operation: revoke",
    "operation: nonsense",
    "operation: register",
    "operation: register memory slots",
    "operation: register sharing",
    "operation: unregister",
    "operation: limits changed",
    "operation: epoch advanced",
    "operation: backing renewed",
    "failure: map refused",
    "failure: map revoked",
    "failure: map unknown, done",
    "failure: map unknown, not done",
    "failure: map done, then revoked",
    "failure: unmap refused",
    "failure: unmap unknown, done",
    "failure: unmap unknown, not done",
    "failure: unmap done, then revoked",
    "failure: no host address",
    "failure: limits not told",
    "failure: cancelled",
    "outcome: host's change done",
    "outcome: host's change refused before any call",
    "outcome: undo",
    "outcome: undo that failed in part",
    "outcome: guest's change done",
    "outcome: split",
    "outcome: quarantine",
];

/// The name of a failure.
#[must_use]
pub const fn failure(kind: CallKind, fault: Fault) -> &'static str {
    match (kind, fault) {
        (CallKind::MapHost, _) => "failure: no host address",
        (CallKind::Limits, _) => "failure: limits not told",
        (CallKind::Map, Fault::Refused) => "failure: map refused",
        (CallKind::Map, Fault::Revoked) => "failure: map revoked",
        (CallKind::Map, Fault::UnknownButDone) => "failure: map unknown, done",
        (CallKind::Map, Fault::UnknownNotDone) => "failure: map unknown, not done",
        (CallKind::Map, Fault::RevokedMeanwhile) => "failure: map done, then revoked",
        (CallKind::Unmap, Fault::Refused | Fault::Revoked) => "failure: unmap refused",
        (CallKind::Unmap, Fault::UnknownButDone) => "failure: unmap unknown, done",
        (CallKind::Unmap, Fault::UnknownNotDone) => "failure: unmap unknown, not done",
        (CallKind::Unmap, Fault::RevokedMeanwhile) => "failure: unmap done, then revoked",
    }
}

/// Prints past what the test harness captures: what a run that succeeds has counted is its result,
/// and is to be seen.
pub fn show(text: &str) {
    // Whoever cannot read it has not lost a test.
    let _unread = writeln!(std::io::stdout(), "\n{text}");
}

impl Counts {
    /// Counts one.
    pub fn one(&mut self, name: &'static str) {
        self.add(name, 1);
    }

    /// Counts several.
    pub fn add(&mut self, name: &'static str, number: u64) {
        *self.0.entry(name).or_default() += number;
    }

    /// How many.
    #[must_use]
    pub fn of(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// How many operations of all kinds.
    #[must_use]
    pub fn operations(&self) -> u64 {
        let all = self.0.iter();
        all.filter(|(name, _)| name.starts_with("operation:"))
            .map(|(_, number)| number)
            .sum()
    }

    /// Takes in another run's.
    pub fn merge(&mut self, other: &Self) {
        for (name, number) in &other.0 {
            self.add(name, *number);
        }
    }

    /// What has been exercised fewer than `least` times.
    #[must_use]
    pub fn fewer_than(&self, least: u64) -> Vec<&'static str> {
        let mut required = REQUIRED.to_vec();
        required.retain(|name| self.of(name) < least);
        required
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, number) in &self.0 {
            writeln!(f, "{number:>10}  {name}")?;
        }
        write!(f, "{:>10}  operations in all", self.operations())
    }
}
