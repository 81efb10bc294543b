//! What is said of a machine before it starts, as data and as text.

use std::fmt;

use machine::layout::Layout;
use memory_map::{GpaRange, Reach};
use serde::Serialize;

use crate::described::Described;
use crate::host::choice::Choice;

/// A stretch of the guest's addresses.
#[derive(Debug, Serialize)]
pub struct Stretch {
    pub what: &'static str,
    pub first: u64,
    /// Inclusive.
    pub last: u64,
}

/// A function and its place.
#[derive(Debug, Serialize)]
pub struct Function {
    pub name: String,
    /// Which address space it is in.
    pub space: String,
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
    /// How the one may get at the other without the IOMMU; null where it cannot, as far as is known.
    pub bypass: Option<String>,
}

impl Pair {
    pub fn new(from: &str, to: &str, bar: u8, reach: &Reach, bypass: Option<&String>) -> Self {
        let described = Described::new(reach);
        Self {
            from: from.to_owned(),
            to: to.to_owned(),
            bar,
            reach: described.word,
            reason: described.reason,
            counts: described.counts,
            bypass: bypass.cloned(),
        }
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            to,
            bar,
            reach,
            ..
        } = self;
        write!(f, "{from} -> {to} BAR{bar}: ")?;
        match &self.reason {
            // It says by itself that it is a part.
            Some(reason) if *reach == "partly" => f.write_str(reason)?,
            Some(reason) => write!(f, "{reach} ({reason})")?,
            None => f.write_str(reach)?,
        }
        if let Some(bypass) = &self.bypass {
            write!(f, "; warning: it may go past the IOMMU: {bypass}")?;
        }
        Ok(())
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct RunReport {
    pub iommu: Choice,
    pub processors: u8,
    pub memory: String,
    pub layout: Vec<Stretch>,
    pub functions: Vec<Function>,
    /// Who reaches whose BARs, if these lie where a guest would put them.
    pub pairs: Vec<Pair>,
}

impl RunReport {
    /// The layout by address.
    pub fn stretches(layout: &Layout) -> Vec<Stretch> {
        let stretch = |what, range: GpaRange| Stretch {
            what,
            first: range.start().raw(),
            last: range.last().raw(),
        };
        let mut found: Vec<_> = layout
            .ram()
            .iter()
            .map(|piece| stretch("RAM", piece.range))
            .collect();
        found.push(stretch("32-bit BARs", layout.low_window()));
        found.extend(
            layout
                .high_window()
                .map(|high| stretch("64-bit BARs", high)),
        );
        found.sort_by_key(|stretch| stretch.first);
        found
    }

    /// The pairs that should be mapped and are not, with the reason.
    pub fn missing(&self) -> impl Iterator<Item = String> {
        self.pairs
            .iter()
            .filter(|pair| pair.counts)
            .map(Pair::to_string)
    }
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Choice { chosen, because } = &self.iommu;
        writeln!(f, "IOMMU by {}: {because}", chosen.name())?;
        writeln!(f, "{} processors, {}", self.processors, self.memory)?;
        for Stretch { what, first, last } in &self.layout {
            writeln!(f, "  {first:#014x}-{last:#014x}  {what}")?;
        }
        for Function { name, space } in &self.functions {
            writeln!(f, "{name} in {space}")?;
        }
        for pair in &self.pairs {
            writeln!(f, "{pair}")?;
        }
        Ok(())
    }
}
