//! A reach in words.

use memory_map::{Reach, Reason};

/// A reach in words.
pub struct Described {
    /// `mapped`, `partly` or `unavailable`.
    pub word: &'static str,
    /// What is missing and why; none where all is mapped.
    pub reason: Option<String>,
    /// Whether the reason is an obstacle, rather than policy, a BAR smaller than a page, or one
    /// trapped by design.
    pub counts: bool,
}

impl Described {
    pub fn new(reach: &Reach) -> Self {
        let (word, reason, by_design) = match reach {
            Reach::Mapped => ("mapped", None, true),
            Reach::Partly { missing, .. } => (
                "partly",
                Some(reach.to_string()),
                missing.iter().all(|missing| by_design(&missing.reason)),
            ),
            Reach::Unavailable(reason) => {
                ("unavailable", Some(reason.to_string()), by_design(reason))
            }
        };
        Self {
            word,
            reason,
            counts: !by_design,
        }
    }
}

/// Whether nobody could expect the piece to be mapped, or somebody wanted it not to be.
fn by_design(reason: &Reason) -> bool {
    matches!(
        reason,
        Reason::Trapped | Reason::SmallerThanPage { .. } | Reason::Filtered
    )
}
