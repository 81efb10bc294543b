//! An NVMe controller whose disk's blocks go into a peer's BAR and come from there.
//!
//! `nvme-contract` compares the data; from outside, the disk's own file tells what arrived, and
//! QEMU's trace what the IOMMU blocked.

use serde_json::Value;

use super::{BOTH_KERNELS, EDU, IOMMUFD_KERNEL, IVSHMEM, NVME};
use crate::disk::word_at;
use crate::scenario::{Bench, Scenario, ScenarioError, Sharing, ensure};

/// This file's scenarios. They write to the disk, so that each wants a new one.
pub static SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nvme_moves_blocks_between_its_disk_and_a_peers_bar_by_type1",
        shape: &super::ROOT_PORTS,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Own,
        run: by_type1,
    },
    Scenario {
        name: "nvme_moves_blocks_between_its_disk_and_a_peers_bar_by_iommufd",
        shape: &super::ROOT_PORTS,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Own,
        run: by_iommufd,
    },
];

/// The drive behind [`NVME`].
const DISK: &str = "disk0";
/// How many cases there are at least: a suite that has lost its cases passes too easily.
const FEWEST: usize = 15;
/// What `nvme-contract` leaves on the disk, from here to there, in bytes: what was in the BAR.
const FROM_BAR: std::ops::Range<u64> = 0x20_0000..0x21_0000;
/// What its cases leave alone.
const UNTOUCHED: std::ops::Range<u64> = 0x10_0000..0x20_0000;

/// What eight bytes from the BAR hold.
const fn word_from_bar(offset: u64) -> u64 {
    offset ^ 0x6261_7200_0000_0000
}

fn by_type1(bench: &mut Bench) -> Result<(), ScenarioError> {
    blocks_move(bench, "type1")
}

fn by_iommufd(bench: &mut Bench) -> Result<(), ScenarioError> {
    blocks_move(bench, "iommufd")
}

fn blocks_move(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    // Negative control of what is looked for on the disk: it is not there yet.
    ensure_disk(bench, FROM_BAR, word_at)?;
    let argv = [
        "nvme-contract",
        "--json",
        "--iommu",
        iommu,
        NVME,
        IVSHMEM,
        EDU,
    ];
    let (status, report) = bench.run_json(&argv)?;
    let cases = report.get("cases").and_then(Value::as_array);
    let cases = cases.map_or(&[][..], Vec::as_slice);
    let not_passed: Vec<&Value> = cases
        .iter()
        .filter(|case| case.get("ok") != Some(&Value::Bool(true)))
        .collect();
    ensure(status.success() && not_passed.is_empty(), || {
        format!("{status}, not passed: {not_passed:#?}")
    })?;
    ensure(cases.len() >= FEWEST, || {
        format!("only {} cases", cases.len())
    })?;
    ensure_disk(bench, FROM_BAR, word_from_bar)?;
    ensure_disk(bench, UNTOUCHED, word_at)?;
    // The controls were blocked by the IOMMU, both ways: at the BAR, where nothing is mapped then.
    let faults = bench.dmar_faults()?;
    let at_the_bar = |iova: u64| (0x4000_0000..0x4000_1000).contains(&iova);
    ensure(faults.iter().any(|fault| at_the_bar(fault.iova)), || {
        format!("the IOMMU blocked nothing at the BAR: {faults:?}")
    })
}

/// That the disk's file holds these words.
fn ensure_disk(
    bench: &mut Bench,
    range: std::ops::Range<u64>,
    word: fn(u64) -> u64,
) -> Result<(), ScenarioError> {
    let found = bench.machine().read_disk(DISK, range.clone())?;
    let words = found.chunks_exact(8).zip(range.step_by(8));
    let mut differing = words.filter(|(bytes, offset)| *bytes != word(*offset).to_le_bytes());
    match differing.next() {
        None => Ok(()),
        Some((bytes, offset)) => Err(ScenarioError::unexpected(format!(
            "the disk holds {bytes:02x?} at {offset:#x}"
        ))),
    }
}
