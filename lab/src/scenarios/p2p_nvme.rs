//! NVMe controllers as DMA engines of `throughway p2p`, with blocks of their disk that are lent.
//!
//! The disk's own file tells what is on it afterwards, and QEMU's monitor how much was written, and
//! how far up.

use serde_json::{Value, json};

use super::bad_input::{NOT_DONE, works};
use super::entry_limit;
use super::footprint::Footprint;
use super::p2p_run::{
    ASLEEP, BEFORE_THE_MOVE, DECODING_OFF, KEPT_OUT, OWN_UNREGISTERED, P2pRun, RAM_TAKEN_AWAY,
    RESET, UNREGISTERED, p2p,
};
use super::{BOTH_KERNELS, EDU, IVSHMEM, NVME};
use crate::disk::word_at;
use crate::scenario::{Bench, Scenario, ScenarioError, ensure};

/// This file's scenarios. The stock kernel has type1 only, the other one takes iommufd by itself.
pub static SCENARIOS: &[Scenario] = shared_scenarios![
    on BOTH_KERNELS;
    ROOT_PORTS:
        every_pair_of_edu_ivshmem_and_nvme_is_mapped_and_the_data_match,
        policy_keeps_an_nvme_from_a_bar_that_it_reaches_without_it,
        required_pair_of_an_nvme_that_is_not_mapped_is_named_and_nothing_moves,
        disk_that_is_not_lent_is_not_written_and_bad_loans_are_refused;
];

/// The drive behind [`NVME`], its size, and the size of a block.
const DISK: &str = "disk0";
const DISK_SIZE: u64 = 16 << 20;
const BLOCK: u64 = 512;
/// What is lent of it: 8 KiB.
const LOAN: &str = "0000:01:00.0:2048..2064";
const LOAN_END: u64 = 2064;

/// What QEMU has counted of the disk's writes.
#[derive(Debug, PartialEq, Eq)]
struct Writes {
    count: u64,
    /// The end of the furthest one, in bytes.
    furthest: u64,
}

impl Writes {
    fn so_far(bench: &mut Bench) -> Result<Self, ScenarioError> {
        let answer = bench.monitor()?.execute("query-blockstats", json!({}))?;
        let disks = answer.as_array().into_iter().flatten();
        let mut stats = disks
            .filter(|disk| disk.get("device").and_then(Value::as_str) == Some(DISK))
            .filter_map(|disk| disk.get("stats"));
        let number = |stats: &Value, name: &str| stats.get(name).and_then(Value::as_u64);
        let found = stats.next().and_then(|stats| {
            Some(Self {
                count: number(stats, "wr_operations")?,
                furthest: number(stats, "wr_highest_offset")?,
            })
        });
        found.ok_or_else(|| ScenarioError::unexpected(format!("no {DISK} in {answer:#}")))
    }
}

/// What was there before a run that is not the first: a controller that the firmware has looked for
/// a system on still masters the bus until vfio-pci has closed it once.
fn after_first_use(bench: &mut Bench) -> Result<Footprint, ScenarioError> {
    works(bench, &[EDU, IVSHMEM, NVME])?;
    Footprint::take(bench)
}

/// That the disk's file holds what it did when the machine was booted.
fn ensure_disk_as_it_was(bench: &mut Bench) -> Result<(), ScenarioError> {
    let found = bench.machine().read_disk(DISK, 0..DISK_SIZE)?;
    let words = found.chunks_exact(8).zip((0..).step_by(8));
    let mut differing = words.filter(|(bytes, at)| *bytes != word_at(*at).to_le_bytes());
    match differing.next() {
        None => Ok(()),
        Some((bytes, at)) => Err(ScenarioError::unexpected(format!(
            "the disk holds {bytes:02x?} at {at:#x}"
        ))),
    }
}

fn every_pair_of_edu_ivshmem_and_nvme_is_mapped_and_the_data_match(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = after_first_use(bench)?;
    let written = Writes::so_far(bench)?;
    let run = P2pRun::exercise_with(
        bench,
        &["--p2p", "required", "--nvme-scratch", LOAN],
        &[EDU, IVSHMEM, NVME],
    )?;
    for pair in &run.pairs {
        // A BAR of 256 bytes is what no IOMMU can map.
        let expected = if (pair.to.as_str(), pair.bar) == (IVSHMEM, 0) {
            "unavailable"
        } else {
            "mapped"
        };
        ensure(pair.reach == expected, || format!("{pair:?}"))?;
    }
    ensure(run.pairs.len() == 10, || format!("{:#?}", run.pairs))?;
    for (from, to) in [(EDU, IVSHMEM), (EDU, NVME), (NVME, IVSHMEM)] {
        run.ensure_exercised(from, to, 2)?;
        run.blocked_for_a_while(from, DECODING_OFF)?;
    }
    for from in [EDU, NVME] {
        run.blocked(from, RAM_TAKEN_AWAY)?;
        run.blocked(from, BEFORE_THE_MOVE)?;
    }
    // The controller's memory buffer, while the controller is a DMA engine itself.
    for what in [ASLEEP, RESET] {
        run.blocked_for_a_while(EDU, what)?;
    }
    run.blocked(EDU, UNREGISTERED)?;
    run.blocked(NVME, OWN_UNREGISTERED)?;
    run.ensure_witnessed(&bench.dmar_faults()?)?;
    before.ensure_same(bench)?;
    // It did go by way of the disk, and by the lent blocks only; and they were put back.
    let now = Writes::so_far(bench)?;
    let within = now.furthest == LOAN_END * BLOCK;
    ensure(now.count > written.count && within, || {
        format!("before: {written:?}, now: {now:?}")
    })?;
    ensure_disk_as_it_was(bench)
}

fn policy_keeps_an_nvme_from_a_bar_that_it_reaches_without_it(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let functions = [NVME, IVSHMEM];
    // Negative control: without it the same controller gets to the same address.
    let options = ["--p2p", "required", "--nvme-scratch", LOAN];
    let run = P2pRun::exercise_with(bench, &options, &functions)?;
    run.ensure_exercised(NVME, IVSHMEM, 2)?;
    let reached = run.blocked(NVME, BEFORE_THE_MOVE)?;
    let reached: Vec<u64> = reached.iter().map(|control| control.iova).collect();

    let options = ["--p2p", "none", "--nvme-scratch", LOAN];
    let run = P2pRun::exercise_with(bench, &options, &functions)?;
    let pair = run.pair(NVME, IVSHMEM, 2)?;
    let told = pair.reason.as_deref().unwrap_or_default();
    let kept = pair.reach == "unavailable" && told.contains("policy") && !pair.counts;
    ensure(kept && pair.exercised.is_none(), || format!("{pair:?}"))?;
    let kept_out = run.blocked(NVME, KEPT_OUT)?;
    let kept_out: Vec<u64> = kept_out.iter().map(|control| control.iova).collect();
    ensure(kept_out == reached, || {
        format!("reached was {reached:x?}, kept out {kept_out:x?}")
    })?;
    run.ensure_witnessed(&bench.dmar_faults()?)?;
    ensure_disk_as_it_was(bench)
}

/// The negative control of `--p2p required`: a kernel that takes two mappings has none left for
/// BARs. Then the loan is not used either.
fn required_pair_of_an_nvme_that_is_not_mapped_is_named_and_nothing_moves(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let written = Writes::so_far(bench)?;
    bench.forget_faults()?;
    let options = ["--exercise", "--p2p", "required", "--iommu", "type1"];
    let options = [&options[..], &["--nvme-scratch", LOAN]].concat();
    let argv = p2p(&options, &[NVME, IVSHMEM]);
    entry_limit::while_it_is(2, bench, |bench| {
        let pair = format!("{NVME} does not reach BAR2 of {IVSHMEM}: ");
        bench.run_refused(&argv, 1, &[&pair, "--p2p required"])
    })?;
    let faults = bench.dmar_faults()?;
    let now = Writes::so_far(bench)?;
    ensure(faults.is_empty() && now == written, || {
        format!("something moved: {faults:?}, {written:?}, {now:?}")
    })
}

fn disk_that_is_not_lent_is_not_written_and_bad_loans_are_refused(
    bench: &mut Bench,
) -> Result<(), ScenarioError> {
    let before = after_first_use(bench)?;
    let written = Writes::so_far(bench)?;
    let run = P2pRun::exercise(bench, &[NVME, IVSHMEM])?;
    let pair = run.pair(NVME, IVSHMEM, 2)?;
    let still = pair.reach == "mapped" && pair.exercised.is_none();
    ensure(still && run.controls.is_empty(), || format!("{run:#?}"))?;
    let text = bench.run_ok(&p2p(&["--exercise"], &[NVME, IVSHMEM]))?;
    ensure(text.contains("--nvme-scratch"), || text.clone())?;
    let elsewhere = format!("{EDU}:1..9");
    for (loan, functions, said) in [
        // Blocks that the disk does not have: of 16 MiB.
        (
            "0000:01:00.0:32760..32776",
            [NVME, IVSHMEM],
            "0x8000 blocks",
        ),
        (LOAN, [EDU, IVSHMEM], "name it among them too"),
        (&elsewhere, [EDU, IVSHMEM], "no NVMe controller"),
        ("0000:01:00.0:9..1", [NVME, IVSHMEM], "FIRST..END"),
    ] {
        let argv = p2p(&["--exercise", "--nvme-scratch", loan], &functions);
        bench.run_refused(&argv, NOT_DONE, &[said])?;
    }
    // Without --exercise nothing moves, so nothing is to be lent.
    let argv = p2p(&["--nvme-scratch", LOAN], &[NVME, IVSHMEM]);
    bench.run_refused(&argv, NOT_DONE, &["--exercise"])?;
    let now = Writes::so_far(bench)?;
    ensure(now == written, || {
        format!("before: {written:?}, now: {now:?}")
    })?;
    ensure_disk_as_it_was(bench)?;
    before.ensure_same(bench)
}
