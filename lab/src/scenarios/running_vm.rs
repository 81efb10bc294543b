//! A run of `throughway run` in the background, that is asked for things while its guest waits.

use super::guest_lines::GuestLines;
use super::vm_run::{CONSOLE, LIMIT, SAID, STATUS, VmRun};
use crate::scenario::{Bench, ScenarioError, ensure};

/// What is typed, and its process.
const KEYS: &str = "/tmp/vm-keys";
const PROCESS: &str = "/tmp/vm-process";

/// A virtual machine that runs, until [`await_end`](super::vm_run::await_end). Where a scenario fails it
/// is left to the nested machine's end.
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

    /// Waits until a step of the guest's has ended so many times, well or not, and gives all lines up
    /// to then.
    pub fn await_step(
        &self,
        bench: &mut Bench,
        step: &str,
        times: usize,
    ) -> Result<GuestLines, ScenarioError> {
        let script = format!(
            "until [ $(grep -c '\"step\":\"{step}\".*}}' {CONSOLE}) -ge {times} ]; do
                 if [ -e {STATUS} ]; then cat {CONSOLE} {SAID} >&2; exit 1; fi
                 usleep 200000
             done
             cat {CONSOLE}"
        );
        let output = bench.machine().run(&["sh", "-uc", &script], LIMIT)?;
        ensure(output.status.success(), || {
            let said = output.stderr_text();
            format!("ended before the step {step}: {said}")
        })?;
        GuestLines::read(&output.stdout_text())
    }

    /// Presses Enter on its console.
    pub fn press_enter(&self, bench: &mut Bench) -> Result<(), ScenarioError> {
        bench.shell(&format!("echo > {KEYS}"))?;
        Ok(())
    }

    /// Asks it for its map, which it was started with `--json` to tell, and copies to `file` all that
    /// it has said with this as the last.
    pub fn tell_map(&self, bench: &mut Bench, file: &str) -> Result<(), ScenarioError> {
        bench.shell(&format!(
            "told() {{ grep -c '^{{\"view\".*}}' {SAID} || true; }}
             before=$(told)
             kill -USR1 {}
             until [ $(told) -gt $before ]; do usleep 10000; done
             cp {SAID} {file}",
            self.process
        ))?;
        Ok(())
    }
}
