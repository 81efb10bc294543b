//! What is printed: one line for each step.

use std::io::Write;

use serde_json::{Map, Value, json};

/// What a line starts with, before its JSON object.
const MARK: &str = "guest: ";

/// What a step found, by name.
pub type Findings = Map<String, Value>;

/// Prints a line.
pub fn say(step: &str, ok: bool, findings: Findings) {
    let mut object = Findings::new();
    object.insert("step".into(), step.into());
    object.insert("ok".into(), ok.into());
    object.extend(findings);
    // In one write, so that the kernel's own messages do not cut it. Nobody could be told of an
    // error.
    let line = format!("{MARK}{}\n", Value::Object(object));
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    // All of it is out before the kernel says anything more. Only a terminal can be waited for.
    let _ = rustix::termios::tcdrain(&out);
}

/// Prints that a step failed, and why.
pub fn failed(step: &str, error: &anyhow::Error) {
    let mut findings = Findings::new();
    findings.insert("error".into(), json!(format!("{error:#}")));
    say(step, false, findings);
}
