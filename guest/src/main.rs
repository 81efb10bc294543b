//! `guest`: what a guest's own software does to its devices, without drivers.
//!
//! As a guest's PID 1 it takes its steps from the kernel's command line:
//!
//! ```text
//! throughway.steps=p2p,move,reboot/p2p,poweroff throughway.run=7
//! ```
//!
//! Steps are separated by commas, boots by slashes, and a number behind a colon says how often or
//! how long. Which boot this is, is kept in the last page of the first ivshmem's memory, which a
//! reset leaves alone, under the number of the run. As a command it takes steps as arguments, on
//! any machine without an IOMMU: bus addresses must be physical ones.
//!
//! What each step found is one line on standard output, `guest: ` and a JSON object with `step`,
//! `ok`, and for a failure `error`. Devices are found by their ids, and accessed by sysfs and by
//! the physical addresses that their registers hold, whatever the kernel thinks of them.

mod dma_memory;
mod function;
mod mapping;
mod mounts;
mod pattern;
mod peer;
mod place;
mod plan;
mod ports;
mod report;
mod steps;

use std::process::ExitCode;

use plan::Plan;
use steps::Ending;

fn main() -> ExitCode {
    let first = rustix::process::getpid().is_init();
    if first && let Err(error) = mounts::mount_all() {
        report::failed("mount", &error);
    }
    let ending = match plan(first) {
        Ok(plan) => steps::run_all(&plan),
        Err(error) => {
            report::failed("plan", &error);
            steps::Outcome {
                ok: false,
                ending: None,
            }
        }
    };
    if first {
        // A PID 1 that ends is a panic: whatever was planned, it does not.
        steps::end(ending.ending.unwrap_or(Ending::PowerOff));
    }
    if ending.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The steps, from the kernel's command line or from this program's.
fn plan(first: bool) -> anyhow::Result<Plan> {
    if first {
        Plan::read(&std::fs::read_to_string("/proc/cmdline")?)
    } else {
        Plan::of_arguments(std::env::args().skip(1))
    }
}
