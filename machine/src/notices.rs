//! What is said of a guest's doing: a bounded number of times, whatever it does.
//!
//! The embedder makes one [`Notices`] for a machine and gives it a place to say things. A subject
//! is spoken of when it comes up first, and then each time it has come up ten times as often. So a
//! guest that does something a million times makes seven lines.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use assigned_pci::Outcome;

/// How many subjects are told apart. What comes after them is not spoken of.
const SUBJECTS: usize = 256;

/// Says what went wrong.
pub struct Notices {
    say: Box<dyn Fn(&str) + Send + Sync>,
    seen: Mutex<BTreeMap<Subject, u64>>,
}

/// What a notice is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Subject {
    who: String,
    what: &'static str,
}

impl Notices {
    /// Notices that are said by `say`, one line each, without its end.
    #[must_use]
    pub fn new(say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self {
            say: Box::new(say),
            seen: Mutex::default(),
        }
    }

    /// Says that `what` happened to `who`, if it is time to. `detail` is this occasion's.
    pub fn note(&self, who: &str, what: &'static str, detail: &dyn fmt::Display) {
        let subject = Subject {
            who: who.to_owned(),
            what,
        };
        let count = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let full = seen.len() >= SUBJECTS;
            let count = match seen.get_mut(&subject) {
                Some(count) => count,
                None if full => return,
                None => seen.entry(subject).or_default(),
            };
            *count = count.saturating_add(1);
            *count
        };
        if !is_power_of_ten(count) {
            return;
        }
        let line = match count {
            1 => format!("{who}: {what}: {detail}"),
            _ => format!("{who}: {what}, {count} times by now: {detail}"),
        };
        (self.say)(&line);
    }

    /// Notes what the host and the map refused of something that the guest did to a function, and
    /// where its IOMMUs or memory slots are not what the map says since.
    pub fn note_outcome(&self, function: &str, outcome: &Outcome) {
        for error in &outcome.host_errors {
            self.note(function, "the host refuses", &ErrorChain(error));
        }
        for error in &outcome.map_errors {
            self.note(function, "the memory map refuses", error);
        }
        for report in &outcome.reports {
            for (_, why) in &report.quarantined {
                self.note(function, "something may be left mapped", why);
            }
            for (_, range, reason) in &report.ram_missing {
                let what = "RAM is missing for devices or processors";
                self.note(function, what, &format_args!("{range}: {reason}"));
            }
        }
    }
}

impl fmt::Debug for Notices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notices").finish_non_exhaustive()
    }
}

/// An error with all its causes.
pub(crate) struct ErrorChain<'e>(pub(crate) &'e dyn std::error::Error);

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

fn is_power_of_ten(mut number: u64) -> bool {
    while number.is_multiple_of(10) && number > 1 {
        number = number.checked_div(10).unwrap_or(0);
    }
    number == 1
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn listened() -> (Notices, Arc<Mutex<Vec<String>>>) {
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        let notices = Notices::new(move |line| heard.lock().unwrap().push(line.to_owned()));
        (notices, said)
    }

    #[test]
    fn a_million_times_are_seven_lines() {
        let (notices, said) = listened();
        for number in 0..1_000_000 {
            notices.note("gpu", "the host refuses", &number);
        }
        let said = said.lock().unwrap();
        assert_eq!(said.len(), 7, "{said:?}");
        assert_eq!(said[0], "gpu: the host refuses: 0");
        assert_eq!(
            said[6],
            "gpu: the host refuses, 1000000 times by now: 999999"
        );
    }

    #[test]
    fn as_many_subjects_as_there_may_be_and_no_more() {
        let (notices, said) = listened();
        for number in 0..10 * SUBJECTS {
            notices.note(&number.to_string(), "something", &"else");
        }
        assert_eq!(said.lock().unwrap().len(), SUBJECTS);
    }
}
