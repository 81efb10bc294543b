//! A run of `throughway run` in the background, that is asked for things meanwhile.

use super::guest_lines::GuestLines;
use super::vm_run::{LIMIT, VmEnd, VmRun};
use crate::scenario::{Bench, ScenarioError, ensure};

/// Where it reads and writes, its process's number, and, when it has ended, its status.
const KEYS: &str = "/tmp/vm-keys";
const CONSOLE: &str = "/tmp/vm-console";
const SAID: &str = "/tmp/vm-said";
const PROCESS: &str = "/tmp/vm-process";
const STATUS: &str = "/tmp/vm-status";

/// A virtual machine that runs, until [`await_end`](Self::await_end). One at a time. Where a scenario
/// fails it is left to the nested machine's end.
#[derive(Debug)]
pub struct RunningVm {
    /// The process's number, as text.
    pub process: String,
}

impl RunningVm {
    /// Starts it. Its console is typed on by [`press_enter`](Self::press_enter).
    pub fn start(bench: &mut Bench, run: &VmRun<'_>) -> Result<Self, ScenarioError> {
        bench.forget_faults()?;
        let quoted: Vec<String> = run.argv().iter().map(|word| format!("'{word}'")).collect();
        let process = bench.shell(&format!(
            "rm -f {CONSOLE} {SAID} {KEYS} {PROCESS} {STATUS}
             mkfifo {KEYS}
             {{ {} 0<> {KEYS} > {CONSOLE} 2> {SAID} & echo $! > {PROCESS}
                status=0; wait $! || status=$?
                echo $status > {STATUS}.new; mv {STATUS}.new {STATUS}; }} > /dev/null 2>&1 &
             until [ -s {PROCESS} ]; do usleep 10000; done
             cat {PROCESS}",
            quoted.join(" ")
        ))?;
        Ok(Self {
            process: process.trim().to_owned(),
        })
    }

    /// Starts it and waits until the guest waits, with what it has said until then.
    pub fn start_until_it_waits(
        bench: &mut Bench,
        run: &VmRun<'_>,
    ) -> Result<(Self, GuestLines), ScenarioError> {
        let vm = Self::start(bench, run)?;
        let lines = vm.await_said(bench, r#""how":"wait""#, 1)?;
        Ok((vm, lines))
    }

    /// Waits until a step of the guest's has ended so many times, well or not, and gives all lines up
    /// to then.
    pub fn await_step(
        &self,
        bench: &mut Bench,
        step: &str,
        times: usize,
    ) -> Result<GuestLines, ScenarioError> {
        self.await_said(bench, &format!("\"step\":\"{step}\""), times)
    }

    /// Waits until the guest has said so many whole lines with this in them, and gives all up to then.
    fn await_said(
        &self,
        bench: &mut Bench,
        said: &str,
        times: usize,
    ) -> Result<GuestLines, ScenarioError> {
        let script = format!(
            "until [ $(grep -c '{said}.*}}.$' {CONSOLE}) -ge {times} ]; do
                 if [ -e {STATUS} ]; then cat {CONSOLE} {SAID} >&2; exit 1; fi
                 usleep 200000
             done
             cat {CONSOLE}"
        );
        let output = bench.machine().run(&["sh", "-uc", &script], LIMIT)?;
        ensure(output.status.success(), || {
            format!("ended before it said {said}: {}", output.stderr_text())
        })?;
        GuestLines::read(&output.stdout_text())
    }

    /// Presses Enter on its console.
    pub fn press_enter(&self, bench: &mut Bench) -> Result<(), ScenarioError> {
        bench.shell(&format!("echo > {KEYS}"))?;
        Ok(())
    }

    /// Sends it a signal.
    pub fn send(&self, bench: &mut Bench, signal: &str) -> Result<(), ScenarioError> {
        bench.run_ok(&["kill", &format!("-{signal}"), &self.process])?;
        Ok(())
    }

    /// Asks it for its map, which it was started with `--json` to tell, and copies to `file` all that
    /// it has said with this as the last.
    pub fn tell_map(&self, bench: &mut Bench, file: &str) -> Result<(), ScenarioError> {
        bench.shell(&format!(
            "told() {{ grep -c '^{{\"view\".*}}.$' {SAID} || true; }}
             before=$(told)
             kill -USR1 {}
             until [ $(told) -gt $before ]; do usleep 10000; done
             cp {SAID} {file}",
            self.process
        ))?;
        Ok(())
    }

    /// Waits until it has ended.
    pub fn await_end(self, bench: &mut Bench) -> Result<VmEnd, ScenarioError> {
        let script = format!(
            "until [ -e {STATUS} ]; do usleep 20000; done
             cat {CONSOLE}
             cat {SAID} >&2
             exit $(cat {STATUS})"
        );
        VmEnd::of(&bench.machine().run(&["sh", "-euc", &script], LIMIT)?)
    }
}
