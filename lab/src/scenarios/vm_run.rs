//! One run of `throughway run`, with the program `guest` in it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::guest_lines::GuestLines;
use crate::channel::Status;
use crate::initramfs::{GUEST_INITRD, GUEST_KERNEL};
use crate::machine::Output;
use crate::scenario::{Bench, ScenarioError, ensure};

/// How long a guest may take, all its boots together.
const LIMIT: Duration = Duration::from_secs(240);
/// How long a run in the background is waited for, in seconds: longer than [`LIMIT`], which is how
/// it ends where what is waited for does not come.
const WAIT_LIMIT: u32 = 400;
/// Where a run in the background reads from, who keeps that open, where it writes to, and, when it has
/// ended, its status.
const INPUT: &str = "/tmp/vm-input";
const SLEEPER: &str = "/tmp/vm-sleeper";
const CONSOLE: &str = "/tmp/vm-console";
const SAID: &str = "/tmp/vm-said";
const STATUS: &str = "/tmp/vm-status";
/// The command that tells the number of its process.
pub const NUMBER: &str = "pidof throughway";

/// A number that no other run has: a guest that is booted more than once counts its boots under it.
fn next_run() -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
}

/// What is run.
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
    /// Further arguments.
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
            options: &[],
        }
    }

    /// The program and its arguments. `run` tells runs apart whose guests are booted more than once.
    fn argv(&self, run: u32) -> Vec<String> {
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
            "size=512M",
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
        let mut argv = self.argv(next_run());
        argv.extend(["--dry-run", "--p2p", "required"].map(str::to_owned));
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        bench.run_ok(&argv)?;
        Ok(())
    }

    /// Runs it to its end.
    pub fn run(&self, bench: &mut Bench) -> Result<VmEnd, ScenarioError> {
        bench.forget_faults()?;
        let argv = self.argv(next_run());
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        VmEnd::of(&bench.machine().run(&argv, LIMIT)?)
    }

    /// Runs it to its end, which must be the guest's turning itself off after all these steps.
    pub fn run_well(&self, bench: &mut Bench, steps: &[&str]) -> Result<GuestLines, ScenarioError> {
        Ok(self.run(bench)?.ensure_well(steps)?.lines)
    }

    /// Starts it and waits until the guest waits, with what it has said until then. It has to be
    /// ended with [`kill`].
    pub fn start(&self, bench: &mut Bench) -> Result<GuestLines, ScenarioError> {
        self.start_until(bench, "\"how\":\"wait\"")
    }

    /// Starts it and waits until the guest has said a line with this in it. It has to be ended with
    /// [`kill`] or [`finish`].
    pub fn start_until(&self, bench: &mut Bench, said: &str) -> Result<GuestLines, ScenarioError> {
        bench.forget_faults()?;
        let argv = self.argv(next_run());
        let quoted: Vec<String> = argv.iter().map(|word| format!("'{word}'")).collect();
        let script = format!(
            "rm -f {INPUT} {STATUS}
             mkfifo {INPUT}
             sleep 1000 > {INPUT} & echo $! > {SLEEPER}
             (status=0; {} < {INPUT} > {CONSOLE} 2> {SAID} || status=$?
              echo $status > {STATUS}.new; mv {STATUS}.new {STATUS}) > /dev/null 2>&1 &
             for second in $(seq {WAIT_LIMIT}); do
                 if grep -q '{said}.*}}' {CONSOLE}; then cat {CONSOLE}; exit 0; fi
                 if [ -e {STATUS} ]; then break; fi
                 sleep 1
             done
             cat {CONSOLE} {SAID} >&2
             exit 1",
            quoted.join(" ")
        );
        let output = bench.machine().run(&["sh", "-uc", &script], LIMIT)?;
        ensure(output.status.success(), || {
            format!("the guest does not say {said}: {}", output.stderr_text())
        })?;
        GuestLines::read(&output.stdout_text())
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
    fn of(output: &Output) -> Result<Self, ScenarioError> {
        Ok(Self {
            status: output.status,
            lines: GuestLines::read(&output.stdout_text())?,
            said: output.stderr_text(),
        })
    }

    /// That it was the guest's turning itself off after all these steps.
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

/// Sends the machine that was started in the background a signal, and waits until it has ended.
pub fn kill(bench: &mut Bench, signal: &str) -> Result<VmEnd, ScenarioError> {
    send(bench, signal)?;
    finish(bench)
}

/// Sends it a signal.
pub fn send(bench: &mut Bench, signal: &str) -> Result<(), ScenarioError> {
    bench.shell(&format!("kill -{signal} $({NUMBER})"))?;
    Ok(())
}

/// Presses Enter on its console.
pub fn enter(bench: &mut Bench) -> Result<(), ScenarioError> {
    bench.shell(&format!("echo > {INPUT}"))?;
    Ok(())
}

/// Waits until it has ended.
pub fn finish(bench: &mut Bench) -> Result<VmEnd, ScenarioError> {
    let script = format!(
        "until [ -e {STATUS} ]; do usleep 20000; done
         kill $(cat {SLEEPER}) || true
         cat {CONSOLE}
         cat {SAID} >&2
         exit $(cat {STATUS})"
    );
    VmEnd::of(&bench.machine().run(&["sh", "-euc", &script], LIMIT)?)
}
