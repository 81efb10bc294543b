//! The nested machine itself: that commands, devices and deaths are reported as they are.

use std::time::Duration;

use super::{BOTH_KERNELS, EDU_AND_IVSHMEM};
use crate::channel::Status;
use crate::dmar::RequesterId;
use crate::machine::MachineError;
use crate::scenario::{Bench, Scenario, ScenarioError, Sharing, ensure};

/// This file's scenarios.
pub static SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "lab_reports_exit_status",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Shared,
        run: lab_reports_exit_status,
    },
    Scenario {
        name: "lab_carries_binary_output",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Shared,
        run: lab_carries_binary_output,
    },
    Scenario {
        name: "devices_are_bound_to_vfio_pci",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Shared,
        run: devices_are_bound_to_vfio_pci,
    },
    Scenario {
        name: "kvm_is_there_for_a_guest",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Shared,
        run: kvm_is_there_for_a_guest,
    },
    Scenario {
        name: "blocked_dma_is_witnessed",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Shared,
        run: blocked_dma_is_witnessed,
    },
    Scenario {
        name: "time_limit_is_an_error",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Own,
        run: time_limit_is_an_error,
    },
    Scenario {
        name: "machine_death_is_an_error",
        shape: &EDU_AND_IVSHMEM,
        kernels: BOTH_KERNELS,
        sharing: Sharing::Own,
        run: machine_death_is_an_error,
    },
];

fn lab_reports_exit_status(bench: &mut Bench) -> Result<(), ScenarioError> {
    for (script, expected) in [
        ("true", Status::Exited(0)),
        ("exit 3", Status::Exited(3)),
        ("exit 255", Status::Exited(255)),
        ("kill -TERM $$", Status::Signalled(15)),
        ("kill -KILL $$", Status::Signalled(9)),
    ] {
        let status = bench.run(&["sh", "-c", script])?.status;
        ensure(status == expected, || {
            format!("`{script}`: {status} instead of {expected}")
        })?;
    }
    let output = bench.run(&["no-such-program"])?;
    ensure(output.status == Status::Exited(127), || {
        format!("a missing program: {}", output.status)
    })?;
    ensure(output.stderr_text().contains("no-such-program"), || {
        format!("a missing program is not named: {}", output.stderr_text())
    })
}

fn lab_carries_binary_output(bench: &mut Bench) -> Result<(), ScenarioError> {
    // Every byte value, among them those a terminal would change, on both streams.
    let script = "i=0; while [ $i -lt 256 ]; do printf \"\\\\$(printf %o $i)\"; i=$((i+1)); done";
    let every: Vec<u8> = (0..=255).collect();
    let output = bench.run(&["sh", "-c", script])?;
    ensure(output.stdout == every, || {
        format!("stdout changed on its way: {:?}", output.stdout)
    })?;
    let output = bench.run(&["sh", "-c", &format!("{{ {script}; }} >&2")])?;
    ensure(output.stderr == every && output.stdout.is_empty(), || {
        format!("stderr changed on its way: {:?}", output.stderr)
    })?;
    // More than pipe, tty and FIFO hold, ended by the writer's exit.
    let output = bench.run(&["dd", "if=/dev/zero", "bs=1k", "count=256"])?;
    ensure(output.stdout == vec![0; 256 << 10], || {
        format!("{} bytes of 262144 arrived", output.stdout.len())
    })
}

fn devices_are_bound_to_vfio_pci(bench: &mut Bench) -> Result<(), ScenarioError> {
    let devices = ["0000:00:05.0", "0000:00:06.0"];
    let bound = bench.machine().bound().to_vec();
    ensure(bound == devices, || format!("bound are {bound:?}"))?;
    for device in devices {
        let sysfs = format!("/sys/bus/pci/devices/{device}");
        let driver = bench.run_ok(&["readlink", &format!("{sysfs}/driver")])?;
        ensure(driver.trim_end().ends_with("/vfio-pci"), || {
            format!("{device}: driver is {driver}")
        })?;
        let group = bench.run_ok(&["readlink", &format!("{sysfs}/iommu_group")])?;
        let number = group.trim_end().rsplit('/').next().unwrap_or_default();
        bench.run_ok(&["test", "-c", &format!("/dev/vfio/{number}")])?;
    }
    let problems = bench.machine().problems();
    ensure(problems.is_empty(), || problems.join("\n"))
}

fn kvm_is_there_for_a_guest(bench: &mut Bench) -> Result<(), ScenarioError> {
    bench.run_ok(&["test", "-c", "/dev/kvm"])?;
    let nested_paging = bench.run_ok(&["cat", "/sys/module/kvm_amd/parameters/npt"])?;
    ensure(matches!(nested_paging.trim(), "Y" | "1"), || {
        format!("kvm_amd without nested paging: {nested_paging}")
    })
}

/// Has edu at `0000:00:05.0` read 16 bytes from an address, without VFIO: the function's own IOMMU
/// domain is empty then. The registers are in the lab's facts and in QEMU's `docs/specs/edu.rst`.
pub(super) fn edu_reads(bench: &mut Bench, iova: u64) -> Result<(), ScenarioError> {
    bench.shell(&format!("iova={iova:#x}\n{EDU_READS}"))?;
    Ok(())
}

const EDU_READS: &str = r"
    sysfs=/sys/bus/pci/devices/0000:00:05.0
    printf '\006\000' | dd of=$sysfs/config bs=2 seek=2 conv=notrunc 2>/dev/null
    bar=$(head -n 1 $sysfs/resource | cut -d ' ' -f 1)
    devmem $((bar + 0x80)) 64 $iova
    devmem $((bar + 0x88)) 64 0x40000
    devmem $((bar + 0x90)) 64 16
    devmem $((bar + 0x98)) 64 1
    while [ $(($(devmem $((bar + 0x98)) 64) & 1)) = 1 ]; do usleep 10000; done
    printf '\000\000' | dd of=$sysfs/config bs=2 seek=2 conv=notrunc 2>/dev/null
";

fn blocked_dma_is_witnessed(bench: &mut Bench) -> Result<(), ScenarioError> {
    let edu = RequesterId::new(0, 5, 0);
    edu_reads(bench, 0x1234_5678)?;
    let faults = bench.dmar_faults()?;
    let first = faults.first().copied();
    ensure(
        first.is_some_and(|f| Some(f.device) == edu && f.iova == 0x1234_5678 && !f.write),
        || format!("edu's blocked read left {faults:?}"),
    )?;
    bench.forget_faults()?;
    let after = bench.dmar_faults()?;
    ensure(after.is_empty(), || {
        format!("forgotten, but still there: {after:?}")
    })
}

fn time_limit_is_an_error(bench: &mut Bench) -> Result<(), ScenarioError> {
    let limit = Duration::from_secs(1);
    match bench.machine().run(&["sleep", "60"], limit) {
        Err(MachineError::TimeLimit { logs, .. }) => forget_logs(&logs),
        other => Err(ScenarioError::unexpected(format!(
            "a command past its time limit gave {other:?}"
        ))),
    }
}

fn machine_death_is_an_error(bench: &mut Bench) -> Result<(), ScenarioError> {
    match bench.run(&["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"]) {
        Err(ScenarioError::Machine(MachineError::Died {
            how, tail, logs, ..
        })) => {
            ensure(how.contains("Kernel panic"), || {
                format!("the panic is not told: {how}\n{tail}")
            })?;
            forget_logs(&logs)
        }
        other => Err(ScenarioError::unexpected(format!(
            "a panicking kernel gave {other:?}"
        ))),
    }
}

/// The logs of a death that was wanted are of no use to anybody.
fn forget_logs(logs: &std::path::Path) -> Result<(), ScenarioError> {
    std::fs::remove_dir_all(logs).map_err(|error| {
        ScenarioError::unexpected(format!("cannot remove {}: {error}", logs.display()))
    })
}
