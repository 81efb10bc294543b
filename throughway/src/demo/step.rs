//! What one step of the demonstration did, as data and as text.

use std::fmt;

use serde::Serialize;
use sim_host::{Call, CallRecord};

use crate::map_table::MapTable;

/// One step.
#[derive(Debug, Serialize)]
pub struct Step {
    pub name: &'static str,
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
    /// Takes down what the simulated host has seen during the step.
    pub fn count(&mut self, calls: &[CallRecord]) {
        for record in calls.iter().filter(|record| record.result.is_ok()) {
            let sign = match record.call {
                Call::MapDma => {
                    self.maps += 1;
                    '+'
                }
                Call::UnmapDma => {
                    self.unmaps += 1;
                    '-'
                }
                _ => continue,
            };
            if let Some(iova) = record.iova {
                self.changes.push(format!("{} {sign} {iova}", record.on));
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
