//! One run of `throughway run`, with the program `guest` in it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::guest_lines::GuestLines;
use crate::channel::Status;
use crate::initramfs::{GUEST_INITRD, GUEST_KERNEL};
use crate::machine::Output;
use crate::scenario::{Bench, ScenarioError, ensure};

/// How long a guest may take, all its boots together.
pub const LIMIT: Duration = Duration::from_secs(240);

/// A number that no other run has: a guest that is booted more than once counts its boots under it.
fn next_run() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
}

/// What is run, to its end; [`RunningVm`](super::running_vm::RunningVm) runs it in the background.
#[derive(Debug, Clone, Copy)]
pub struct VmRun<'a> {
    /// How the IOMMU is programmed: `type1` or `iommufd`.
    pub iommu: &'a str,
    /// The functions.
    pub devices: &'a [&'a str],
    /// The guest's steps, see the program `guest`.
    pub steps: &'a str,
    /// The guest's kernel.
    pub kernel: &'a str,
    /// The guest's RAM, see `throughway run --memory`.
    pub memory: &'a str,
    /// Further options of `throughway run`.
    pub options: &'a [&'a str],
}

impl<'a> VmRun<'a> {
    /// Two processors, 512 MiB, the nested machine's own kernel.
    pub fn new(iommu: &'a str, devices: &'a [&'a str], steps: &'a str) -> Self {
        Self {
            iommu,
            devices,
            steps,
            kernel: GUEST_KERNEL,
            memory: "size=512M",
            options: &[],
        }
    }

    /// The program and its arguments. Runs are told apart, for guests that are booted more than
    /// once.
    pub fn argv(&self) -> Vec<String> {
        let run = next_run();
        let command_line = format!(
            "console=ttyS0 quiet panic=-1 throughway.steps={} throughway.run={run}",
            self.steps
        );
        let mut argv: Vec<String> = [
            "throughway",
            "run",
            "--kernel",
            self.kernel,
            "--initrd",
            GUEST_INITRD,
            "--memory",
            self.memory,
            "--cpus",
            "2",
            "--iommu",
            self.iommu,
            "--cmdline",
            &command_line,
        ]
        .map(str::to_owned)
        .into();
        for device in self.devices {
            argv.extend(["--device".to_owned(), (*device).to_owned()]);
        }
        argv.extend(self.options.iter().map(|option| (*option).to_owned()));
        argv
    }

    /// Has it told who would reach whom, which must be everyone everyone, and not started.
    pub fn rehearse(&self, bench: &mut Bench) -> Result<(), ScenarioError> {
        let mut argv = self.argv();
        argv.extend(["--dry-run", "--p2p", "required"].map(str::to_owned));
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        bench.run_ok(&argv)?;
        Ok(())
    }

    /// Runs it to its end.
    pub fn run(&self, bench: &mut Bench) -> Result<VmEnd, ScenarioError> {
        bench.forget_faults()?;
        let argv = self.argv();
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        VmEnd::of(&bench.machine().run(&argv, LIMIT)?)
    }

    /// Runs it to its end, which must be the guest's turning itself off after all these steps.
    pub fn run_well(&self, bench: &mut Bench, steps: &[&str]) -> Result<GuestLines, ScenarioError> {
        Ok(self.run(bench)?.ensure_well(steps)?.lines)
    }
}

/// How it ended, and what was said.
#[derive(Debug)]
pub struct VmEnd {
    /// How.
    pub status: Status,
    /// What the guest's program said.
    pub lines: GuestLines,
    /// What `throughway run` said on its standard error.
    pub said: String,
}

impl VmEnd {
    /// Of a command that ends as the program did and writes what it wrote.
    pub fn of(output: &Output) -> Result<Self, ScenarioError> {
        Ok(Self {
            status: output.status,
            lines: GuestLines::read(&output.stdout_text())?,
            said: output.stderr_text(),
        })
    }

    /// That it ended with status 0, after all these steps.
    pub fn ensure_well(self, steps: &[&str]) -> Result<Self, ScenarioError> {
        ensure(self.status.success(), || {
            let Self {
                status,
                said,
                lines,
            } = &self;
            format!("ended with {status}: {said}\n{lines:?}")
        })?;
        self.lines.ensure_steps(steps)?;
        Ok(self)
    }
}
