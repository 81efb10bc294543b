//! What was found, as data and as text.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;

use assigned_pci::BarIndex;
use memory_map::{Reach, Reason};
use serde::Serialize;

use super::assembly::{Member, MemberBar};
use super::stress::Stress;
use crate::described::Described;
use crate::host::choice::Choice;

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
    /// Whether `reason` is an obstacle, rather than policy, a BAR smaller than a page, or one
    /// trapped by design.
    pub counts: bool,
    /// How the one may get at the other without the IOMMU, so that nothing here holds; null where
    /// it cannot, as far as is known.
    pub bypass: Option<String>,
    /// Null where no data were moved.
    pub exercised: Option<Exercised>,
    /// Where the BAR was when data were moved into it and back, and compared.
    pub at: Vec<u64>,
    /// Why no data were moved, or what did not match.
    pub note: Option<String>,
    /// Whether policy keeps it out.
    #[serde(skip)]
    pub filtered: bool,
    /// Whether one of the two was given back to the host; then the members are nobody's places.
    #[serde(skip)]
    pub removed: bool,
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
        let Described {
            word,
            reason,
            counts,
        } = Described::new(reach);
        Self {
            from: from.function.name().to_owned(),
            to: to.function.name().to_owned(),
            bar: bar.info.index.get(),
            reach: word,
            counts,
            reason,
            bypass: None,
            filtered: matches!(reach, Reach::Unavailable(Reason::Filtered)),
            removed: false,
            exercised: None,
            at: Vec::new(),
            note: None,
            from_member,
            to_member,
            index: bar.info.index,
        }
    }

    pub fn with_bypass(mut self, bypass: Option<String>) -> Self {
        self.bypass = bypass;
        self
    }

    /// The member at this place was given back to the host; those behind it have moved up.
    pub fn after_removal(&mut self, place: usize) {
        if self.removed {
            return;
        }
        match (
            place_after(self.from_member, place),
            place_after(self.to_member, place),
        ) {
            (Some(from), Some(to)) => (self.from_member, self.to_member) = (from, to),
            (from, _) => {
                let gone = if from.is_none() { &self.from } else { &self.to };
                self.reason = Some(format!("{gone} was given back to the host"));
                self.reach = "unavailable";
                self.counts = false;
                self.removed = true;
            }
        }
    }

    fn ok(&self) -> bool {
        !self.counts && self.exercised != Some(Exercised::Mismatch)
    }
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
    /// How the host said that it failed to do that; null where it did not. What may have revoked a
    /// mapping counts as having done so.
    pub failed: Option<String>,
    pub observed: Observed,
    /// How moving data ended when it was mapped again; null where it was not tried.
    pub afterwards: Option<Exercised>,
    /// Who says so besides the data: the kernel's own line on the fault, if it printed one.
    pub witness: String,
}

/// A function that the host wanted back.
#[derive(Debug, Serialize)]
pub struct Removed {
    pub function: String,
    /// How moving data between the others ended after that; null where none were moved.
    pub others: Option<Exercised>,
}

/// Where a member is once the one at `removed` has left; none for that one.
pub fn place_after(place: usize, removed: usize) -> Option<usize> {
    match place.cmp(&removed) {
        Ordering::Less => Some(place),
        Ordering::Equal => None,
        Ordering::Greater => place.checked_sub(1),
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct P2pReport {
    pub ok: bool,
    /// How the IOMMU was programmed.
    pub iommu: Choice,
    pub pairs: Vec<Pair>,
    pub controls: Vec<Control>,
    /// What was given back meanwhile.
    pub removed: Vec<Removed>,
    /// What came of changing everything at once; null where that was not done.
    pub stress: Option<Stress>,
}

impl P2pReport {
    pub fn new(iommu: Choice, pairs: Vec<Pair>, controls: Vec<Control>) -> Self {
        let new = Self {
            ok: false,
            iommu,
            pairs,
            controls,
            removed: Vec::new(),
            stress: None,
        };
        new.judged()
    }

    /// With the verdict on what it says by now.
    pub fn judged(mut self) -> Self {
        self.ok = self.controls.iter().all(Control::ok) && self.pairs.iter().all(Pair::ok);
        self
    }

    /// The pairs that have to be mapped and are not, each with its reason.
    pub fn missing(&self) -> impl Iterator<Item = String> {
        let missing = self.pairs.iter().filter(|pair| pair.counts);
        missing.map(|pair| {
            let Pair { from, to, bar, .. } = pair;
            let reason = pair.reason.as_deref().unwrap_or_default();
            format!("{from} does not reach BAR{bar} of {to}: {reason}")
        })
    }
}

impl Control {
    fn ok(&self) -> bool {
        self.observed == Observed::Blocked && self.afterwards != Some(Exercised::Mismatch)
    }
}

impl fmt::Display for P2pReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Choice { chosen, because } = &self.iommu;
        writeln!(f, "IOMMU by {}: {because}", chosen.name())?;
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
        let mut warned = BTreeSet::new();
        for pair in &self.pairs {
            if let Pair {
                from,
                to,
                bypass: Some(bypass),
                ..
            } = pair
                && warned.insert((from, to))
            {
                writeln!(
                    f,
                    "warning: what {from} sends to {to} may go past the IOMMU: {bypass}"
                )?;
            }
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
                failed,
                witness,
                ..
            } = control;
            write!(
                f,
                "control: {from} at {iova:#x}, {what}: {observed} ({witness})"
            )?;
            if let Some(failed) = failed {
                write!(f, ", though {failed}")?;
            }
            f.write_str(match control.afterwards {
                Some(Exercised::Ok) => ", and ok again afterwards\n",
                Some(Exercised::Mismatch) => ", and MISMATCH afterwards\n",
                None => "\n",
            })?;
        }
        if let Some(stress) = &self.stress {
            let Stress {
                rounds,
                events,
                moves,
                registrations,
                reached,
                blocked,
            } = stress;
            writeln!(
                f,
                "stress: in {rounds} rounds {events} events, {moves} moves of BARs and \
                 {registrations} registrations; after them {reached} times reached and {blocked} \
                 times blocked as told"
            )?;
        }
        for Removed { function, others } in &self.removed {
            write!(f, "{function} was given back to the host")?;
            f.write_str(match others {
                Some(Exercised::Ok) => ", and the others reach each other\n",
                Some(Exercised::Mismatch) => ", and MISMATCH between the others\n",
                None => "\n",
            })?;
        }
        let filtered = self.pairs.iter().any(|pair| pair.filtered);
        f.write_str(match (self.ok, filtered) {
            (true, false) => "every device reaches every other",
            (true, true) => "every device reaches those that it may, and no other",
            (false, false) => "not every device reaches every other",
            (false, true) => "not every device reaches those that it may, or one reaches others",
        })
    }
}
