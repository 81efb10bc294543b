//! What a user who is not root can do, and what is said where they cannot.

use serde_json::Value;

use super::bad_input::{NOT_DONE, group_file, works};
use super::footprint::Footprint;
use super::p2p_run::p2p;
use super::{EDU, IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    EDU_AND_IVSHMEM:
        demo_runs_without_privileges,
        group_without_permission_comes_with_the_command_that_gives_it,
        locked_memory_limit_comes_with_the_need_and_how_to_raise_it,
];

/// The command that runs a script as a user without capabilities.
pub const fn as_nobody(script: &str) -> [&str; 6] {
    ["su", "nobody", "-s", "/bin/sh", "-c", script]
}

fn demo_runs_without_privileges(bench: &mut Bench) -> Result<(), ScenarioError> {
    let who = bench.run_ok(&as_nobody("id -u; grep CapEff /proc/self/status"))?;
    ensure(who.contains("65534\nCapEff:\t0000000000000000"), || {
        format!("not without privileges: {who}")
    })?;
    bench.run_ok(&as_nobody("throughway demo"))?;
    let (status, report) = bench.run_json(&as_nobody("throughway demo --json"))?;
    let steps = report.get("steps").and_then(Value::as_array);
    let well = status.success() && report.get("ok") == Some(&Value::Bool(true));
    ensure(well && steps.is_some_and(|steps| steps.len() > 5), || {
        format!("{status}: {report:#}")
    })?;
    // Negative control: the demonstration fails where data go missing.
    let broken = "throughway demo --json --break-translation drop";
    let (status, report) = bench.run_json(&as_nobody(broken))?;
    let fails = status.code() == 1 && report.get("ok") == Some(&Value::Bool(false));
    ensure(fails, || format!("{status}: {report:#}"))
}

/// Both group files are root's again afterwards.
fn group_without_permission_comes_with_the_command_that_gives_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    // So little RAM that the limit on locked memory is not in the way.
    let run = p2p(&["--exercise", "--memory", "4"], &[EDU, IVSHMEM]).join(" ");
    let groups = [group_file(bench, EDU)?, group_file(bench, IVSHMEM)?];
    for group in &groups {
        let before = Footprint::take(bench)?;
        let permission = format!("no permission to open {group}");
        let told = bench.run_refused(&as_nobody(&run), NOT_DONE, &[&permission])?;
        before.ensure_same(bench)?;
        let command = told.split_once("have root do: ").and_then(|(_, rest)| {
            let end = rest.find(": Permission denied")?;
            rest.get(..end)
        });
        let command =
            command.ok_or_else(|| ScenarioError::unexpected(format!("no command in: {told}")))?;
        bench.shell(&format!("USER=nobody; {command}"))?;
    }
    bench.run_ok(&as_nobody(&run))?;
    bench.shell(&format!("chown root {}", groups.join(" ")))?;
    works(bench, &[EDU, IVSHMEM])
}

fn locked_memory_limit_comes_with_the_need_and_how_to_raise_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let groups = [group_file(bench, EDU)?, group_file(bench, IVSHMEM)?].join(" ");
    bench.shell(&format!("chown nobody {groups}"))?;
    let run = p2p(&["--exercise"], &[EDU, IVSHMEM]).join(" ");
    // `su` keeps the limit that root has set, and drops root's CAP_IPC_LOCK.
    let limited = |kib: &str| format!("ulimit -l {kib}; exec {}", quoted(&as_nobody(&run)));
    // 64 MiB of RAM and a page, of which 8 MiB may be locked.
    let said = [
        "RLIMIT_MEMLOCK allows 8388608 bytes",
        "needs 67108864 more",
        "`ulimit -l 65540`",
        "LimitMEMLOCK=",
        "CAP_IPC_LOCK",
    ];
    let before = Footprint::take(bench)?;
    let told = bench.run_refused(&["sh", "-c", &limited("8192")], NOT_DONE, &said)?;
    before.ensure_same(bench)?;
    // Who takes the advice is there at once.
    let advice = told.split_once("`ulimit -l ").and_then(|(_, rest)| {
        let (kib, _) = rest.split_once('`')?;
        Some(kib.to_owned())
    });
    let kib = advice.ok_or_else(|| ScenarioError::unexpected(format!("no advice in: {told}")))?;
    bench.run_ok(&["sh", "-c", &limited(&kib)])?;
    // The capability bypasses the limit.
    bench.run_ok(&["sh", "-c", &format!("ulimit -l 64; exec {run}")])?;
    bench.shell(&format!("chown root {groups}"))?;
    before.ensure_same(bench)
}

/// A command as a shell reads it, each word in quotes.
pub fn quoted(argv: &[&str]) -> String {
    let words: Vec<String> = argv.iter().map(|word| format!("'{word}'")).collect();
    words.join(" ")
}
