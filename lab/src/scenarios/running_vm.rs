//! A run of `throughway run` in the background, that is asked for things meanwhile.

use super::guest_lines::GuestLines;
use super::vm_run::{LIMIT, VmEnd, VmRun};
use crate::scenario::{Bench, ScenarioError, ensure};

/// How long it is waited for, in seconds: shorter than [`LIMIT`], so that what it has said by then is
/// told where nothing comes.
const PATIENCE: u32 = 220;
/// Where it reads and writes, its process's number, and, when it has ended, its status.
const KEYS: &str = "/tmp/vm-keys";
const TERMINAL: &str = "/dev/ttyp0";
const TERMINAL_BEFORE: &str = "/tmp/vm-terminal-before";
const TERMINAL_AFTER: &str = "/tmp/vm-terminal-after";
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
        Self::start_with(bench, run, "", &format!("0<> {KEYS} > {CONSOLE}"), "")
    }

    /// Starts it on a terminal, which is typed on by [`type_in`](Self::type_in).
    pub fn start_on_terminal(bench: &mut Bench, run: &VmRun<'_>) -> Result<Self, ScenarioError> {
        // The kernel's old kind, whose two ends are files.
        let prepare = format!(
            "exec 3<> /dev/ptyp0 4<> {TERMINAL}
             stty -a <&4 > {TERMINAL_BEFORE}
             cat 0<> {KEYS} >&3 4<&- & typing=$!
             cat <&3 > {CONSOLE} 4<&- & reading=$!"
        );
        let finish = format!(
            "stty -a <&4 > {TERMINAL_AFTER}
             kill $typing $reading"
        );
        Self::start_with(bench, run, &prepare, "<&4 >&4 3<&- 4<&-", &finish)
    }

    fn start_with(
        bench: &mut Bench,
        run: &VmRun<'_>,
        prepare: &str,
        redirections: &str,
        finish: &str,
    ) -> Result<Self, ScenarioError> {
        bench.forget_faults()?;
        let quoted: Vec<String> = run.argv().iter().map(|word| format!("'{word}'")).collect();
        let process = bench.shell(&format!(
            "rm -f {CONSOLE} {SAID} {KEYS} {PROCESS} {STATUS}
             mkfifo {KEYS}
             {{ {prepare}
                {} {redirections} 2> {SAID} & echo $! > {PROCESS}
                status=0; wait $! || status=$?
                {finish}
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
            "until=$(($(date +%s) + {PATIENCE}))
             until [ $(grep -c '{said}.*}}.$' {CONSOLE}) -ge {times} ]; do
                 if [ -e {STATUS} ] || [ $(date +%s) -ge $until ]; then
                     cat {CONSOLE} {SAID} >&2
                     exit 1
                 fi
                 usleep 200000
             done
             cat {CONSOLE}"
        );
        let output = bench.machine().run(&["sh", "-uc", &script], LIMIT)?;
        ensure(output.status.success(), || {
            format!("it does not say {said}: {}", output.stderr_text())
        })?;
        GuestLines::read(&output.stdout_text())
    }

    /// Types keys, written as for `printf`.
    pub fn type_in(&self, bench: &mut Bench, keys: &str) -> Result<(), ScenarioError> {
        bench.shell(&format!("printf '{keys}' > {KEYS}"))?;
        Ok(())
    }

    /// Waits until this is on its console.
    pub fn await_on_console(&self, bench: &mut Bench, text: &str) -> Result<(), ScenarioError> {
        bench.shell(&format!(
            "until grep -qF '{text}' {CONSOLE}; do usleep 20000; done"
        ))?;
        Ok(())
    }

    /// How its terminal is set, as `stty` tells it.
    pub fn terminal(&self, bench: &mut Bench) -> Result<String, ScenarioError> {
        bench.shell(&format!("stty -a -F {TERMINAL}"))
    }

    /// Presses Enter on its console.
    pub fn press_enter(&self, bench: &mut Bench) -> Result<(), ScenarioError> {
        self.type_in(bench, r"\n")
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
            "until=$(($(date +%s) + {PATIENCE}))
             until [ -e {STATUS} ] || [ $(date +%s) -ge $until ]; do usleep 20000; done
             cat {CONSOLE}
             cat {SAID} >&2
             if [ -e {STATUS} ]; then exit $(cat {STATUS}); fi
             echo 'it does not end' >&2
             exit 1"
        );
        VmEnd::of(&bench.machine().run(&["sh", "-euc", &script], LIMIT)?)
    }
}

/// How the terminal was set before and after a run on it, as `stty` tells it.
pub fn terminal_before_and_after(bench: &mut Bench) -> Result<[String; 2], ScenarioError> {
    let before = bench.shell(&format!("cat {TERMINAL_BEFORE}"))?;
    let after = bench.shell(&format!("cat {TERMINAL_AFTER}"))?;
    Ok([before, after])
}
