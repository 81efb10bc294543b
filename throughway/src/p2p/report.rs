//! What was found, as data and as text.

use std::fmt;

use assigned_pci::BarIndex;
use memory_map::{Reach, Reason};
use serde::Serialize;

use super::assembly::{Member, MemberBar};

/// How moving data ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Exercised {
    Ok,
    Mismatch,
}

/// Whether one function reaches one BAR of another.
#[derive(Debug, Serialize)]
pub struct Pair {
    pub from: String,
    pub to: String,
    /// The BAR's number.
    pub bar: u8,
    /// `mapped`, `partly` or `unavailable`.
    pub reach: &'static str,
    /// What is missing and why; null where all is mapped.
    pub reason: Option<String>,
    /// Whether `reason` is an obstacle, rather than a BAR smaller than a page or trapped by
    /// design.
    pub counts: bool,
    /// Null where no data were moved.
    pub exercised: Option<Exercised>,
    /// Where the BAR was when data were moved into it and back, and compared.
    pub at: Vec<u64>,
    /// Why no data were moved, or what did not match.
    pub note: Option<String>,
    #[serde(skip)]
    pub from_member: usize,
    #[serde(skip)]
    pub to_member: usize,
    #[serde(skip)]
    pub index: BarIndex,
}

impl Pair {
    pub fn new(
        from_member: usize,
        from: &Member,
        to_member: usize,
        to: &Member,
        bar: &MemberBar,
        reach: &Reach,
    ) -> Self {
        let (word, reason, by_design) = match reach {
            Reach::Mapped => ("mapped", None, false),
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
            from: from.function.name().to_owned(),
            to: to.function.name().to_owned(),
            bar: bar.info.index.get(),
            reach: word,
            counts: reason.is_some() && !by_design,
            reason,
            exercised: None,
            at: Vec::new(),
            note: None,
            from_member,
            to_member,
            index: bar.info.index,
        }
    }

    fn ok(&self) -> bool {
        !self.counts && self.exercised != Some(Exercised::Mismatch)
    }
}

/// Whether nobody could expect the piece to be mapped.
fn by_design(reason: &Reason) -> bool {
    matches!(reason, Reason::Trapped | Reason::SmallerThanPage { .. })
}

/// Whether an access to an address that is not mapped went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Observed {
    Blocked,
    Arrived,
}

/// An access to an address that is not mapped any more.
#[derive(Debug, Serialize)]
pub struct Control {
    pub from: String,
    pub iova: u64,
    /// What was mapped there.
    pub what: &'static str,
    pub observed: Observed,
    /// Who says so besides the data: the kernel's own line on the fault, if it printed one.
    pub witness: String,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct P2pReport {
    pub ok: bool,
    pub pairs: Vec<Pair>,
    pub controls: Vec<Control>,
}

impl P2pReport {
    pub fn new(pairs: Vec<Pair>, controls: Vec<Control>) -> Self {
        let blocked = controls.iter().all(|c| c.observed == Observed::Blocked);
        Self {
            ok: blocked && pairs.iter().all(Pair::ok),
            pairs,
            controls,
        }
    }
}

impl fmt::Display for P2pReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<14}{:<14}{:<6}{:<13}data",
            "who", "whose", "BAR", "reach"
        )?;
        for pair in &self.pairs {
            let data = match pair.exercised {
                Some(Exercised::Ok) => "ok",
                Some(Exercised::Mismatch) => "MISMATCH",
                None => "-",
            };
            let Pair {
                from,
                to,
                bar,
                reach,
                ..
            } = pair;
            write!(f, "{from:<14}{to:<14}{bar:<6}{reach:<13}{data}")?;
            let notes = [pair.reason.as_deref(), pair.note.as_deref()];
            for at in &pair.at {
                write!(f, "  at {at:#x}")?;
            }
            for note in notes.into_iter().flatten() {
                write!(f, "  ({note})")?;
            }
            writeln!(f)?;
        }
        for control in &self.controls {
            let observed = match control.observed {
                Observed::Blocked => "blocked",
                Observed::Arrived => "ARRIVED",
            };
            let Control {
                from,
                iova,
                what,
                witness,
                ..
            } = control;
            writeln!(
                f,
                "control: {from} at {iova:#x}, {what}: {observed} ({witness})"
            )?;
        }
        f.write_str(if self.ok {
            "every device reaches every other"
        } else {
            "not every device reaches every other"
        })
    }
}
