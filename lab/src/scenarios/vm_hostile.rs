//! A guest of `throughway run` that writes nonsense wherever it can harms nobody.
//!
//! What the IOMMU holds then is read from the tables that it walks, by `iommu_witness`, and has to be
//! what the map is told to be, page by page.

use serde_json::Value;

use super::footprint::Footprint;
use super::kernel_log;
use super::running_vm::RunningVm;
use super::vm_run::VmRun;
use super::{EDU, IGB, IOMMUFD_KERNEL, IVSHMEM, NVME, VM_IVSHMEM};
use crate::scenario::{Bench, Scenario, ScenarioError, Sharing, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile_guest_harms_nobody_by_type1",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Own,
        run: |bench| hostile_guest_harms_nobody(bench, "type1"),
    },
    Scenario {
        name: "hostile_guest_harms_nobody_by_iommufd",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Own,
        run: |bench| hostile_guest_harms_nobody(bench, "iommufd"),
    },
];

/// Those that reach each other. The igb is kept to itself.
const TOGETHER: [&str; 4] = [EDU, IVSHMEM, VM_IVSHMEM, NVME];
const ALL: [&str; 5] = [EDU, IVSHMEM, VM_IVSHMEM, NVME, IGB];
/// How many accesses the guest makes, and how often data has to arrive meanwhile.
const ACCESSES: u64 = 100_000;
const ROUNDS: u64 = 20;
/// The guest's RAM in pages.
const RAM_PAGES: u64 = (512 << 20) / 4096;
/// How many lines may be said. A thing that goes wrong a hundred thousand times is six of them.
const MOST_LINES: usize = 150;
/// What was told before the guest began, and last.
const BEFORE: &str = "/tmp/told-before";
const NOW: &str = "/tmp/told-now";

fn hostile_guest_harms_nobody(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let steps = format!("p2p,enter,hostile:{ACCESSES},enter,pile,p2p,enter,poweroff");
    let policy = format!("group=together:{}", TOGETHER.join(","));
    let mut run = VmRun::new(iommu, &ALL, &steps);
    let options = ["--json", "--p2p", &policy];
    run.options = &options;
    let vm = RunningVm::start(bench, &run)?;

    vm.await_step(bench, "p2p", 1)?;
    vm.tell_map(bench, BEFORE)?;
    let at_first = witness(bench, &vm, BEFORE)?;
    ensure_all_in_place(&at_first)?;

    vm.press_enter(bench)?;
    let lines = vm.await_step(bench, "hostile", 1)?;
    lines.ensure_steps(&["boot", "p2p", "enter", "hostile"])?;
    let found = lines.found("hostile")?;
    let number = |name: &str| found[name].as_u64().unwrap_or_default();
    let enough = number("accesses") >= ACCESSES && number("rounds") >= ROUNDS;
    ensure(enough, || format!("too little was done: {found}"))?;
    vm.tell_map(bench, NOW)?;
    let spoilt = witness(bench, &vm, NOW)?;
    ensure_same(&spoilt)?;
    ensure_pages(&spoilt, &SPARED)?;

    vm.press_enter(bench)?;
    // Data goes to the peer that was piled up, too.
    vm.await_step(bench, "p2p", 2)?;
    vm.tell_map(bench, NOW)?;
    let piled = witness(bench, &vm, NOW)?;
    ensure_same(&piled)?;
    ensure_cut(&piled)?;
    // Negative control: it is not what was told before the largest BAR was moved.
    ensure_differs(&witness(bench, &vm, BEFORE)?, &["missing", "extra"])?;

    vm.press_enter(bench)?;
    let end = vm.await_end(bench)?.ensure_well(&[
        "boot", "p2p", "enter", "hostile", "enter", "pile", "p2p", "enter", "end",
    ])?;
    let said = end.said.lines().filter(|line| !line.starts_with('{'));
    let count = said.count();
    ensure(count <= MOST_LINES, || {
        format!("{count} lines were said:\n{}", end.said)
    })?;
    kernel_log::ensure_clean(bench)?;
    before.ensure_same(bench)
}

/// What `iommu_witness` sees, by a file of what was told.
fn witness(bench: &mut Bench, vm: &RunningVm, told: &str) -> Result<Value, ScenarioError> {
    let together = TOGETHER.join(",");
    let spaces = [format!("{together}={together}"), format!("{IGB}=")];
    let argv = ["iommu_witness", &vm.process, told, &spaces[0], &spaces[1]];
    let (_, seen) = bench.run_json(&argv)?;
    Ok(seen)
}

fn ensure_same(seen: &Value) -> Result<(), ScenarioError> {
    ensure(seen["same"] == Value::Bool(true), || {
        format!("the IOMMU does not hold what is told: {seen:#}")
    })?;
    // Who is alone reaches RAM and nothing else, each page of it.
    let alone = &seen["spaces"][1][0];
    ensure(alone["pages"].as_u64() == Some(RAM_PAGES), || {
        format!("not RAM alone: {seen:#}")
    })
}

/// The pair that goes on moving data: a function, its BAR, and the pages of it.
const SPARED: [(&str, u8, u64); 2] = [(EDU, 0, 256), (IVSHMEM, 2, 1024)];
/// The others of those that reach each other. MSI-X takes the rest of nvme's registers.
const ABUSED: [(&str, u8, u64); 3] = [(VM_IVSHMEM, 2, 256), (NVME, 0, 2), (NVME, 2, 4096)];

/// The guest's kernel has found every BAR a place: those that reach each other have all of them.
fn ensure_all_in_place(seen: &Value) -> Result<(), ScenarioError> {
    ensure_same(seen)?;
    ensure_pages(seen, &SPARED)?;
    ensure_pages(seen, &ABUSED)
}

/// They have all pages of these BARs.
fn ensure_pages(seen: &Value, bars: &[(&str, u8, u64)]) -> Result<(), ScenarioError> {
    for (function, bar, pages) in bars {
        let bar = format!("{function} BAR{bar}");
        let found = pages_of(seen, &bar);
        ensure(found == *pages, || {
            format!("{bar}: {found} pages in {seen:#}")
        })?;
    }
    Ok(())
}

/// Of what lies under others a part is held.
fn ensure_cut(seen: &Value) -> Result<(), ScenarioError> {
    let found = pages_of(seen, &format!("{NVME} BAR2"));
    ensure((1..4096).contains(&found), || {
        format!("{found} pages of what lies under others: {seen:#}")
    })
}

/// How many pages of a BAR those have who reach each other.
fn pages_of(seen: &Value, bar: &str) -> u64 {
    seen["spaces"][0][0]["bars"][bar]
        .as_u64()
        .unwrap_or_default()
}

/// Those who reach each other have pages that differ from what is told, of each of these kinds.
fn ensure_differs(seen: &Value, kinds: &[&str]) -> Result<(), ScenarioError> {
    let differences = &seen["spaces"][0][0]["differences"];
    let all = kinds
        .iter()
        .all(|kind| differences[kind].as_u64() > Some(0));
    ensure(all && seen["same"] == Value::Bool(false), || {
        format!("not {kinds:?} by what was told before: {seen:#}")
    })
}
