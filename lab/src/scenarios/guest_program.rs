//! The program `guest` where there is neither a virtual machine nor an IOMMU: on the nested machine
//! itself. What it says there is its own, so that what it says in a guest is the machine's.

use serde_json::Value;

use super::guest_lines::GuestLines;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios. It leaves BARs elsewhere than they were: after others on their machine.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    NO_IOMMU:
        guest_program_finds_and_moves_devices_on_bare_metal,
        guest_program_tells_what_it_lacks;
];

fn guest_program_finds_and_moves_devices_on_bare_metal(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let steps = [
        "devices",
        "ram",
        "p2p",
        "nobody",
        "move",
        "move-time",
        "rescan",
    ];
    let told = bench.run_ok(&[&["guest"], &steps[..]].concat())?;
    let lines = GuestLines::read(&told)?;
    lines.ensure_steps(&[&["boot"], &steps[..]].concat())?;
    lines.list("p2p", "moved", 1)?;
    // By hand with decoding off, and with decoding on.
    let moves = lines.list("move", "moves", 2)?;
    for decoding in [false, true] {
        ensure(
            moves
                .iter()
                .any(|one| one["decoding"] == Value::Bool(decoding)),
            || format!("no move with decoding {decoding}: {moves:#?}"),
        )?;
    }
    Ok(())
}

fn guest_program_tells_what_it_lacks(bench: &mut Bench) -> Result<(), ScenarioError> {
    for (step, said) in [
        ("flr", "no function has a function-level reset"),
        ("nvme-peer", "there is no NVMe controller"),
        ("nonsense", "there is no step"),
    ] {
        let output = bench.run(&["guest", step])?;
        let lines = GuestLines::read(&output.stdout_text())?;
        let error = lines.found(step)?["error"].as_str().unwrap_or_default();
        ensure(!output.status.success() && error.contains(said), || {
            format!("{step}: {}, {error}", output.status)
        })?;
    }
    Ok(())
}
