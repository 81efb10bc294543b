//! Guests of `throughway run`: what they drive reaches each other, wherever they put it.
//!
//! The nested machine's kernel is the host, and its guest the same kernel again.

use std::collections::BTreeSet;

use serde_json::Value;

use super::footprint::Footprint;
use super::running_vm::RunningVm;
use super::vm_run::VmRun;
use super::{EDU, IGB, IOMMUFD_KERNEL, IVSHMEM, NVME, VM_IVSHMEM};
use crate::channel::Status;
use crate::dmar::DmarFault;
use crate::scenario::{Bench, Scenario, ScenarioError, Sharing, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "vm_devices_reach_each_other_wherever_the_guest_puts_them_by_type1",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Own,
        run: |bench| devices_reach_each_other(bench, "type1"),
    },
    Scenario {
        name: "vm_devices_reach_each_other_wherever_the_guest_puts_them_by_iommufd",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Own,
        run: |bench| devices_reach_each_other(bench, "iommufd"),
    },
    Scenario {
        name: "vm_killed_leaves_nothing_and_starts_again_by_type1",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Shared,
        run: |bench| killed_leaves_nothing(bench, "type1"),
    },
    Scenario {
        name: "vm_killed_leaves_nothing_and_starts_again_by_iommufd",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Shared,
        run: |bench| killed_leaves_nothing(bench, "iommufd"),
    },
    Scenario {
        name: "vm_whose_kernel_panics_ends_with_its_status",
        shape: &super::VIRTUAL_MACHINE,
        kernels: IOMMUFD_KERNEL,
        sharing: Sharing::Shared,
        run: panic_ends_the_machine,
    },
];

/// All of the shape's functions.
pub(super) const ALL: [&str; 5] = [EDU, IVSHMEM, VM_IVSHMEM, NVME, IGB];
/// The drive behind [`NVME`].
const DISK: &str = "disk0";
/// What the guest leaves on the disk, by its driver and from a peer: from, to, and the pattern's
/// number.
const WRITTEN: [(u64, u64, u64); 2] = [
    (0x30_0000, 0x34_0000, 0x6b65_726e),
    (0x40_0000, 0x40_1000, 0x7065_6572),
];

/// What the program `guest` writes: the word at an offset of a pattern.
fn pattern(seed: u64, offset: u64) -> u64 {
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(offset)
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn devices_reach_each_other(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    let first = [
        "p2p", "nobody", "move", "rescan", "flr", "reset", "p2p", "reboot",
    ];
    let second = ["p2p", "nvme-driver", "nvme-peer", "race", "poweroff"];
    let steps = format!("{}/{}", first.join(","), second.join(","));
    let before = Footprint::take(bench)?;
    let mut told = vec!["boot"];
    told.extend(&first[..first.len() - 1]);
    told.extend(["end", "boot"]);
    told.extend(&second[..second.len() - 1]);
    told.push("end");
    let lines = VmRun::new(iommu, &ALL, &steps).run_well(bench, &told)?;
    before.ensure_same(bench)?;

    // By hand with decoding off and with decoding on, in the low window and in the high one.
    let moves = lines.list("move", "moves", 8)?;
    let to = |one: &Value| one["to"].as_u64().unwrap_or_default();
    for decoding in [false, true] {
        let of_it = moves
            .iter()
            .filter(|one| one["decoding"] == Value::Bool(decoding));
        let high: BTreeSet<bool> = of_it.map(|one| to(one) >= 1 << 32).collect();
        ensure(high.len() == 2, || {
            format!("decoding {decoding}: {moves:#?}")
        })?;
    }
    lines.list("flr", "resets", 2)?;
    lines.list("reset", "resets", 2)?;
    let driver = lines.found("nvme-driver")?;
    let kinds = driver["kinds"].to_string();
    ensure(kinds.contains("PCI-MSIX"), || format!("no MSI-X: {driver}"))?;
    disk_holds_what_was_written(bench)?;
    let tried = nobodies(&lines.all());
    ensure(tried.len() >= 16, || format!("few controls: {tried:x?}"))?;
    blocked_where_nobody_is(&tried, &bench.dmar_faults()?)
}

/// The pages where the guest tried that nobody is.
pub(super) fn nobodies(value: &Value) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    match value {
        Value::Array(list) => found.extend(list.iter().flat_map(nobodies)),
        Value::Object(object) => {
            for (name, value) in object {
                match name.as_str() {
                    "nobody" if value.is_u64() => found.extend(value.as_u64()),
                    "nobody" | "where it was" => {
                        let list = value
                            .as_array()
                            .map_or(std::slice::from_ref(value), Vec::as_slice);
                        found.extend(list.iter().filter_map(|one| one["address"].as_u64()));
                    }
                    _ => found.extend(nobodies(value)),
                }
            }
        }
        _ => {}
    }
    found.into_iter().map(|address| address & !0xfff).collect()
}

/// QEMU's IOMMU blocked a write to each such place. What else it blocked is not looked at: what is sent
/// to a BAR while it moves is blocked, too.
pub(super) fn blocked_where_nobody_is(
    tried: &BTreeSet<u64>,
    faults: &[DmarFault],
) -> Result<(), ScenarioError> {
    let writes = faults.iter().filter(|fault| fault.write);
    let blocked: BTreeSet<u64> = writes.map(|fault| fault.iova & !0xfff).collect();
    let reached: Vec<&u64> = tried.difference(&blocked).collect();
    ensure(reached.is_empty(), || format!("not blocked: {reached:x?}"))
}

fn disk_holds_what_was_written(bench: &mut Bench) -> Result<(), ScenarioError> {
    for (from, to, seed) in WRITTEN {
        let found = bench.machine().read_disk(DISK, from..to)?;
        // The kernel's driver wrote the pattern by the disk's offsets, the peer's by its own.
        let origin = if to - from > 0x1000 { 0 } else { from };
        for (bytes, offset) in found.chunks_exact(8).zip((from..).step_by(8)) {
            ensure(
                bytes == pattern(seed, offset - origin).to_le_bytes(),
                || format!("the disk holds {bytes:02x?} at {offset:#x}"),
            )?;
        }
    }
    Ok(())
}

/// What `throughway run` ends with when the guest's kernel has panicked.
const PANICKED: u8 = 3;

fn panic_ends_the_machine(bench: &mut Bench) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let end = VmRun::new("type1", &[EDU, IVSHMEM], "p2p,panic").run(bench)?;
    end.lines.ensure_steps(&["boot", "p2p", "end"])?;
    ensure(end.status == Status::Exited(PANICKED), || {
        format!("ended with {}: {}", end.status, end.said)
    })?;
    before.ensure_same(bench)
}

fn killed_leaves_nothing(bench: &mut Bench, iommu: &str) -> Result<(), ScenarioError> {
    let before = Footprint::take(bench)?;
    let run = VmRun::new(iommu, &ALL, "p2p,wait");
    let (vm, lines) = RunningVm::start_until_it_waits(bench, &run)?;
    lines.ensure_steps(&["boot", "p2p", "end"])?;
    // Negative control of the footprint: while it runs, its RAM is pinned.
    let pinned = Footprint::take(bench)?.pinned_pages();
    ensure(pinned >= Some((512 << 20) / 0x1000), || {
        format!("{pinned:?} pages are pinned by a guest of 512 MiB")
    })?;
    vm.send(bench, "KILL")?;
    vm.await_end(bench)?;
    before.ensure_same(bench)?;
    VmRun::new(iommu, &ALL, "p2p,poweroff").run_well(bench, &["boot", "p2p", "end"])?;
    before.ensure_same(bench)
}
