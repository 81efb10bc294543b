//! What one step of the demonstration did, as data and as text.

use std::fmt;

use serde::Serialize;
use sim_host::{Call, CallRecord};

use super::space::Kind;
use crate::map_table::MapTable;

/// One step.
#[derive(Debug, Serialize)]
pub struct Step {
    pub name: String,
    /// What the guest, or the host, did.
    pub did: String,
    pub expected: String,
    pub observed: String,
    pub ok: bool,
    /// How many mappings the simulated IOMMUs were told to make, as they counted them.
    pub maps: usize,
    /// How many they were told to take down.
    pub unmaps: usize,
    /// Each of those, in order.
    pub changes: Vec<String>,
}

impl Step {
    /// Takes down what the simulated host has seen during the step; `names` says what it calls
    /// an address space, and how it is called here.
    pub fn count(&mut self, calls: &[CallRecord], names: &[(String, String)]) {
        for record in calls.iter().filter(|record| record.result.is_ok()) {
            let (sign, how) = match record.call {
                Call::MapDma | Call::MapFile | Call::IoasMap => ('+', ""),
                Call::IoasCopy => ('+', " (copied)"),
                Call::UnmapDma | Call::IoasUnmap => ('-', ""),
                _ => continue,
            };
            if sign == '+' {
                self.maps += 1;
            } else {
                self.unmaps += 1;
            }
            if let Some(iova) = record.iova {
                let on = names.iter().find(|(label, _)| **label == *record.on);
                let on = on.map_or(&*record.on, |(_, name)| name);
                self.changes.push(format!("{on} {sign} {iova}{how}"));
            }
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.ok { "ok" } else { "NOT AS EXPECTED" };
        writeln!(f, "{}: {verdict}", self.name)?;
        writeln!(f, "  did       {}", self.did)?;
        for (index, change) in self.changes.iter().enumerate() {
            let title = if index == 0 { "mappings" } else { "" };
            writeln!(f, "  {title:<8}  {change}")?;
        }
        writeln!(f, "  expected  {}", self.expected)?;
        writeln!(f, "  observed  {}", self.observed)
    }
}

/// The whole demonstration.
#[derive(Debug, Serialize)]
pub struct DemoReport {
    /// Whether every step was as expected.
    pub ok: bool,
    /// How the IOMMU was programmed.
    pub iommu: Kind,
    pub steps: Vec<Step>,
    /// The map before the machine was taken apart.
    pub map: MapTable,
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        writeln!(f, "the map before the last step")?;
        writeln!(f, "{}", self.map)?;
        let good = self.steps.iter().filter(|step| step.ok).count();
        write!(f, "{good} of {} steps as expected", self.steps.len())
    }
}
