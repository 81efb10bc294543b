//! What the program `guest` said, in a guest or in the nested machine itself.

use serde_json::Value;

use crate::scenario::{ScenarioError, ensure};

/// What its lines start with.
const MARK: &str = "guest: ";

/// Its lines, in order, each one step's.
#[derive(Debug, Clone)]
pub struct GuestLines {
    lines: Vec<Value>,
    /// What else was on the console, for messages.
    console: String,
}

impl GuestLines {
    /// Picks them from what a console or a standard output held. A kernel's message in the middle of
    /// a line would make it unreadable: such a line is an error.
    pub fn read(console: &str) -> Result<Self, ScenarioError> {
        let mut lines = Vec::new();
        for line in console.lines() {
            let Some((_, text)) = line.split_once(MARK) else {
                continue;
            };
            let value = serde_json::from_str(text.trim_end());
            lines.push(value.map_err(|source| ScenarioError::Json {
                output: line.to_owned(),
                source,
            })?);
        }
        Ok(Self {
            lines,
            console: console.to_owned(),
        })
    }

    /// All that was found.
    pub fn all(&self) -> Value {
        Value::Array(self.lines.clone())
    }

    /// The steps that were done, in order.
    pub fn steps(&self) -> Vec<&str> {
        let steps = self.lines.iter().map(|line| line.get("step")?.as_str());
        steps.map(Option::unwrap_or_default).collect()
    }

    /// That exactly these steps were done, in this order, and all went well.
    pub fn ensure_steps(&self, steps: &[&str]) -> Result<(), ScenarioError> {
        let failed: Vec<&Value> = self
            .lines
            .iter()
            .filter(|line| line.get("ok") != Some(&Value::Bool(true)))
            .collect();
        ensure(failed.is_empty(), || {
            format!("steps failed: {failed:#?}\n{}", self.console)
        })?;
        ensure(self.steps() == steps, || {
            format!("steps {:?}, not {steps:?}\n{}", self.steps(), self.console)
        })
    }

    /// What the step of that name found, the first time.
    pub fn found(&self, step: &str) -> Result<&Value, ScenarioError> {
        let is_it = |line: &&Value| line.get("step").and_then(Value::as_str) == Some(step);
        self.lines
            .iter()
            .find(is_it)
            .ok_or_else(|| ScenarioError::unexpected(format!("no step {step}:\n{}", self.console)))
    }

    /// A list that a step found, of which there must be at least so many.
    pub fn list(&self, step: &str, name: &str, least: usize) -> Result<&[Value], ScenarioError> {
        let found = self.found(step)?;
        let list = found.get(name).and_then(Value::as_array);
        let list = list.map_or(&[][..], Vec::as_slice);
        ensure(list.len() >= least, || {
            format!("fewer than {least} {name} in {found:#}")
        })?;
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "[    0.1] Linux version\r\n\
        guest: {\"step\":\"boot\",\"ok\":true}\r\n\
        noise guest: {\"step\":\"p2p\",\"ok\":true,\"moved\":[1,2]}\r\n";

    #[test]
    fn lines_are_found_among_the_kernels() {
        let lines = GuestLines::read(CONSOLE).unwrap();
        lines.ensure_steps(&["boot", "p2p"]).unwrap();
        assert_eq!(lines.list("p2p", "moved", 2).unwrap().len(), 2);
    }

    #[test]
    fn failed_missing_and_unreadable_steps_are_errors() {
        let lines = GuestLines::read(CONSOLE).unwrap();
        assert!(lines.ensure_steps(&["boot"]).is_err());
        assert!(lines.found("move").is_err());
        assert!(lines.list("p2p", "moved", 3).is_err());
        let failed = "guest: {\"step\":\"p2p\",\"ok\":false,\"error\":\"no\"}";
        let failed = GuestLines::read(failed).unwrap();
        assert!(failed.ensure_steps(&["p2p"]).is_err());
        assert!(GuestLines::read("guest: {\"step\":[   1.0] oops").is_err());
    }
}
