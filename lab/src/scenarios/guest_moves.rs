//! A guest that moves its BARs, and lays them under RAM and under one another.
//!
//! `nvme-contract --guest` compares the data, and knows which addresses nobody may reach; QEMU's
//! trace tells that nothing else was blocked.

use serde_json::Value;

use super::{BOTH_KERNELS, EDU, IVSHMEM, NVME};
use crate::dmar::DmarFault;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios: by iommufd and by type1, where the kernel has both.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    ROOT_PORTS:
        ram_is_copied_without_a_fault_while_a_bar_moves,
        what_is_seen_of_a_covered_bar_is_reached;
];

/// Where the BAR of 4 MiB was moved away from, and is tried then, in its middle: a page at each.
const LEFT: [u64; 2] = [0x6020_0000, 0x7020_0000];
const PAGE: u64 = 0x1000;

/// Runs cases of `nvme-contract --guest`, once for each way to program the IOMMU, and has `look` see
/// the faults of each run.
fn each_way(
    bench: &mut Bench,
    filter: &str,
    cases: usize,
    look: fn(&[DmarFault]) -> Result<(), ScenarioError>,
) -> Result<(), ScenarioError> {
    let has_iommufd = bench.run(&["test", "-c", "/dev/iommu"])?.status.success();
    let ways: &[&str] = if has_iommufd {
        &["iommufd", "type1"]
    } else {
        &["type1"]
    };
    for way in ways {
        bench.forget_faults()?;
        let mut argv = vec!["nvme-contract", "--json", "--guest", "--iommu", *way];
        argv.extend(["--filter", filter, NVME, IVSHMEM, EDU]);
        let (status, report) = bench.run_json(&argv)?;
        let found = report.get("cases").and_then(Value::as_array);
        let found = found.map_or(&[][..], Vec::as_slice);
        let passed = |case: &&Value| case.get("ok") == Some(&Value::Bool(true));
        let passed = found.iter().filter(passed).count();
        ensure(status.success() && passed == cases, || {
            format!("{way}: {status}, {report:#}")
        })?;
        look(&bench.dmar_faults()?)?;
    }
    Ok(())
}

/// 400 moves and more, one of four of them onto RAM, while 50 copies of 64 KiB and more are made. The
/// witness is awake: it saw what was tried where the BAR had been.
fn ram_is_copied_without_a_fault_while_a_bar_moves(bench: &mut Bench) -> Result<(), ScenarioError> {
    each_way(bench, "ram_is_copied", 1, |faults| {
        let left = |fault: &&DmarFault, page: u64| {
            fault.device.to_string() == NVME
                && fault.write
                && (page..page.saturating_add(PAGE)).contains(&fault.iova)
        };
        for page in LEFT {
            let any = faults.iter().any(|fault| left(&fault, page));
            ensure(any, || format!("nothing was blocked at {page:#x}"))?;
        }
        let explained = |fault: &&DmarFault| LEFT.iter().any(|page| left(fault, *page));
        match faults.iter().find(|fault| !explained(fault)) {
            None => Ok(()),
            Some(fault) => Err(ScenarioError::unexpected(format!("not a control: {fault}"))),
        }
    })
}

fn what_is_seen_of_a_covered_bar_is_reached(bench: &mut Bench) -> Result<(), ScenarioError> {
    each_way(bench, "a_bar_under", 2, |faults| {
        ensure(faults.is_empty(), || {
            format!("what is there was blocked: {faults:?}")
        })
    })
}
