//! Whether the kernel has complained about itself.

use crate::scenario::{Bench, ScenarioError, ensure};

/// What the kernel says when something is wrong with itself.
const COMPLAINTS: [&str; 8] = [
    "cut here",
    "WARNING: CPU",
    "BUG:",
    "Oops",
    "Call Trace",
    "refcount_t",
    "general protection fault",
    "blocked for more than",
];

/// That its log, which it returns, is the one of this boot and has none of that.
pub fn ensure_clean(bench: &mut Bench) -> Result<String, ScenarioError> {
    let log = bench.run_ok(&["dmesg"])?;
    let complaints: Vec<&str> = log
        .lines()
        .filter(|line| COMPLAINTS.iter().any(|word| line.contains(word)))
        .collect();
    ensure(complaints.is_empty(), || complaints.join("\n"))?;
    // Not emptied since the boot.
    ensure(log.contains("Linux version"), || {
        format!("not the whole log: {log}")
    })?;
    Ok(log)
}
