//! What a scenario is, and how a list of them is run.
//!
//! A [`Scenario`] is a named check on a running nested machine of a given [`Shape`], made once on
//! each kernel that it names: a [`Trial`]. Trials of one shape and kernel share a boot, in the order
//! of the list; after one that has failed or lost its machine, another is booted for the next one. A
//! scenario asks by [`Sharing::Own`] for a machine that nobody else uses.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::channel::Status;
use crate::disk::Disk;
use crate::dmar::DmarFault;
use crate::kernel::OwnKernel;
use crate::machine::{Machine, MachineError, Output, TraceMark};
use crate::monitor::{Monitor, MonitorError};
use crate::parts::Parts;
use crate::spec::{Iommu, Spec};

/// How long one command of a scenario may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// How long a machine may take to power off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);

/// A machine that scenarios want.
#[derive(Debug)]
pub struct Shape {
    /// Its name, in reports.
    pub name: &'static str,
    /// Its IOMMU.
    pub iommu: Iommu,
    /// Disks, for devices that name them as their `drive`.
    pub disks: &'static [Disk],
    /// QEMU `-object` values.
    pub objects: &'static [&'static str],
    /// QEMU `-device` values.
    pub devices: &'static [&'static str],
    /// Options for the kernel's command line, behind the lab's own.
    pub kernel_options: &'static [&'static str],
    /// Whether it is to hold what a guest boots from.
    pub guest: bool,
}

/// Whether a scenario's machine may serve other scenarios too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// It leaves the machine as it found it.
    Shared,
    /// It needs a machine of its own.
    Own,
}

/// A named check on a nested machine.
#[derive(Debug)]
pub struct Scenario {
    /// What it shows, as a test's name.
    pub name: &'static str,
    /// On which machine.
    pub shape: &'static Shape,
    /// On which kernels.
    pub kernels: &'static [OwnKernel],
    /// Whether the machine may serve others, too.
    pub sharing: Sharing,
    /// The check.
    pub run: fn(&mut Bench) -> Result<(), ScenarioError>,
}

/// A scenario on one of its kernels.
#[derive(Debug, Clone, Copy)]
pub struct Trial {
    /// The scenario.
    pub scenario: &'static Scenario,
    /// The kernel.
    pub kernel: OwnKernel,
}

impl Trial {
    /// The trials of a scenario.
    pub fn of(scenario: &'static Scenario) -> impl Iterator<Item = Self> {
        let on = move |&kernel| Self { scenario, kernel };
        scenario.kernels.iter().map(on)
    }

    /// The scenario's name, with the kernel's behind it unless that is the stock one.
    #[must_use]
    pub fn name(&self) -> String {
        match self.kernel {
            OwnKernel::Stock => self.scenario.name.to_owned(),
            other => format!("{}@{}", self.scenario.name, other.name()),
        }
    }

    /// Whether the two may share a machine. Any trial may with itself.
    fn shares_with(&self, other: &Self) -> bool {
        let (one, two) = (self.scenario, other.scenario);
        let shared = one.sharing == Sharing::Shared && two.sharing == Sharing::Shared;
        self.kernel == other.kernel
            && (std::ptr::eq(one, two) || (shared && std::ptr::eq(one.shape, two.shape)))
    }
}

/// Why a scenario did not pass.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// What was seen is not what was expected.
    #[error("{0}")]
    Unexpected(String),
    /// The machine cannot do what the scenario is about: a skip, not a failure.
    #[error("{0}")]
    Unsupported(String),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// QEMU's monitor did not do what it should.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// A command's output is not the JSON it should be.
    #[error("no JSON on standard output:\n{output}")]
    Json {
        /// What there was.
        output: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

impl ScenarioError {
    /// An [`ScenarioError::Unexpected`] of anything that can be shown.
    pub fn unexpected(seen: impl std::fmt::Display) -> Self {
        Self::Unexpected(seen.to_string())
    }
}

/// Fails with a message unless a condition holds.
///
/// # Errors
/// [`ScenarioError::Unexpected`] with the message.
pub fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), ScenarioError> {
    if holds {
        Ok(())
    } else {
        Err(ScenarioError::Unexpected(otherwise()))
    }
}

/// A machine as a scenario sees it.
#[derive(Debug)]
pub struct Bench {
    machine: Machine,
    mark: TraceMark,
}

impl Bench {
    /// The machine, for what the bench does not offer.
    pub fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn monitor(&mut self) -> Result<&mut Monitor, ScenarioError> {
        Ok(self.machine.monitor()?)
    }

    /// Runs a command to its end, however it ends.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn run(&mut self, argv: &[&str]) -> Result<Output, ScenarioError> {
        Ok(self.machine.run(argv, COMMAND_LIMIT)?)
    }

    /// Runs a command that must end with status 0, and gives its standard output.
    ///
    /// # Errors
    /// When it ends otherwise, with what it wrote; when the machine fails.
    pub fn run_ok(&mut self, argv: &[&str]) -> Result<String, ScenarioError> {
        let output = self.run(argv)?;
        ensure(output.status.success(), || told(argv, &output))?;
        Ok(output.stdout_text())
    }

    /// Runs a shell script that must end with status 0, and gives its standard output.
    ///
    /// # Errors
    /// As [`Bench::run_ok`].
    pub fn shell(&mut self, script: &str) -> Result<String, ScenarioError> {
        self.run_ok(&["sh", "-euc", script])
    }

    /// Runs a command that must end with status `status` and say all of `said` on its standard
    /// error, and gives all that it said there.
    ///
    /// # Errors
    /// When it ends otherwise or does not say it; when the machine fails.
    pub fn run_refused(
        &mut self,
        argv: &[&str],
        status: u8,
        said: &[&str],
    ) -> Result<String, ScenarioError> {
        let output = self.run(argv)?;
        let stderr = output.stderr_text();
        ensure(output.status == Status::Exited(status), || {
            format!("not status {status}: {}", told(argv, &output))
        })?;
        for part in said {
            ensure(stderr.contains(part), || {
                format!("{part:?} is not said: {}", told(argv, &output))
            })?;
        }
        Ok(stderr)
    }

    /// Runs a command and reads its standard output as one JSON value, however the command ends.
    ///
    /// # Errors
    /// When it is no JSON; when the machine fails.
    pub fn run_json(
        &mut self,
        argv: &[&str],
    ) -> Result<(Status, serde_json::Value), ScenarioError> {
        let output = self.run(argv)?;
        let value =
            serde_json::from_slice(&output.stdout).map_err(|source| ScenarioError::Json {
                output: told(argv, &output),
                source,
            })?;
        Ok((output.status, value))
    }

    /// The DMA faults QEMU's IOMMU has reported since the scenario began, or since the last call
    /// of [`Bench::forget_faults`].
    ///
    /// # Errors
    /// When the trace cannot be read.
    pub fn dmar_faults(&self) -> Result<Vec<DmarFault>, ScenarioError> {
        Ok(self.machine.dmar_faults_since(self.mark)?)
    }

    /// Leaves the faults up to now out of what [`Bench::dmar_faults`] gives.
    ///
    /// # Errors
    /// When the trace cannot be looked at.
    pub fn forget_faults(&mut self) -> Result<(), ScenarioError> {
        self.mark = self.machine.trace_mark()?;
        Ok(())
    }
}

fn told(argv: &[&str], output: &Output) -> String {
    let mut text = format!("`{}`: {}", argv.join(" "), output.status);
    for (name, content) in [
        ("stdout", output.stdout_text()),
        ("stderr", output.stderr_text()),
    ] {
        if !content.trim().is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n{name}:\n{}", content.trim_end());
        }
    }
    text
}

/// How a scenario ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As expected.
    Passed,
    /// Not as expected.
    Failed(String),
    /// Not at all, for this reason.
    Skipped(String),
}

/// One line of the report.
#[derive(Debug)]
pub struct Report {
    /// The trial's name.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// How long it took, without the boot.
    pub duration: Duration,
}

/// Runs trials on the kernel in `parts`, grouped by shape, and reports each as it ends. They must be
/// that kernel's.
pub fn run_all(parts: &Parts, trials: &[Trial], report: &mut dyn FnMut(Report)) {
    for group in groups(trials) {
        run_group(parts, &group, report);
    }
}

/// The trials that share a machine, together; groups in the order of their first trials.
fn groups(trials: &[Trial]) -> Vec<Vec<Trial>> {
    let mut groups = Vec::new();
    let mut left = trials.to_vec();
    while let Some(first) = left.first().copied() {
        let (group, rest) = left.iter().partition(|trial| trial.shares_with(&first));
        left = rest;
        groups.push(group);
    }
    groups
}

/// Runs trials on one machine, as long as it lives.
fn run_group(parts: &Parts, group: &[Trial], report: &mut dyn FnMut(Report)) {
    let mut running: Option<Machine> = None;
    for trial in group {
        let scenario = trial.scenario;
        let mut say = |verdict, duration| {
            report(Report {
                name: trial.name(),
                verdict,
                duration,
            });
        };
        let machine = match running.take() {
            Some(machine) => machine,
            None => match boot(parts, scenario.shape) {
                Ok(machine) => machine,
                Err(error) => {
                    say(Verdict::Failed(chain(&error)), Duration::ZERO);
                    continue;
                }
            },
        };
        let mut start = Instant::now();
        let (mut attempt, mut machine) = on_bench(machine, scenario);
        if let Attempt::Stalled(why) = attempt {
            eprintln!("lab: {why}");
            eprintln!(
                "lab: a processor lost its timer: `{}` once more",
                trial.name()
            );
            (attempt, machine) = match boot(parts, scenario.shape) {
                Ok(machine) => {
                    start = Instant::now();
                    on_bench(machine, scenario)
                }
                Err(error) => (Attempt::Ended(Verdict::Failed(chain(&error))), None),
            };
        }
        let verdict = match attempt {
            Attempt::Ended(verdict) => verdict,
            Attempt::Stalled(why) => Verdict::Failed(why),
        };
        // A scenario that stopped half-way has not put back what it changed.
        let as_found = !matches!(verdict, Verdict::Failed(_));
        say(verdict, start.elapsed());
        running = machine.filter(|machine| as_found && machine.is_alive());
    }
    if let Some(machine) = running
        && let Err(error) = machine.shut_down(POWER_OFF_LIMIT)
    {
        // The scenarios have had their verdicts; this is worth knowing all the same.
        eprintln!("lab: {}", chain(&error));
    }
}

/// How one attempt at a scenario ended.
enum Attempt {
    /// For good.
    Ended(Verdict),
    /// The emulation stood still, which has nothing to do with what is tested: under load, a
    /// processor of QEMU's now and then loses its timer for good.
    Stalled(String),
}

/// What the nested kernel says of a processor that has lost its timer.
const LOST_TIMER: &str = "Possible timer handling issue on cpu";

fn on_bench(machine: Machine, scenario: &Scenario) -> (Attempt, Option<Machine>) {
    let ended = |error: &dyn std::error::Error| Attempt::Ended(Verdict::Failed(chain(error)));
    let mark = match machine.trace_mark() {
        Ok(mark) => mark,
        Err(error) => return (ended(&error), None),
    };
    let mut bench = Bench { machine, mark };
    let attempt = match (scenario.run)(&mut bench) {
        Ok(()) => Attempt::Ended(Verdict::Passed),
        Err(ScenarioError::Unsupported(reason)) => Attempt::Ended(Verdict::Skipped(reason)),
        Err(ScenarioError::Machine(error @ MachineError::TimeLimit { .. }))
            if bench
                .machine
                .console()
                .is_ok_and(|text| text.contains(LOST_TIMER)) =>
        {
            Attempt::Stalled(chain(&error))
        }
        Err(error) => ended(&error),
    };
    (attempt, Some(bench.machine))
}

fn boot(parts: &Parts, shape: &Shape) -> Result<Machine, MachineError> {
    let owned = |values: &[&str]| values.iter().map(ToString::to_string).collect();
    let spec = Spec {
        iommu: shape.iommu,
        disks: shape.disks.to_vec(),
        objects: owned(shape.objects),
        devices: owned(shape.devices),
        kernel_options: owned(shape.kernel_options),
        guest: shape.guest,
        ..Spec::default()
    };
    let machine = Machine::boot(parts, &spec)?;
    let seconds = machine.boot_time().as_secs_f64();
    eprintln!("lab: machine `{}` up after {seconds:.1} s", shape.name);
    for problem in machine.problems() {
        eprintln!("lab: machine `{}`: {problem}", shape.name);
    }
    Ok(machine)
}

/// An error with its causes, on one line each.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  because: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    static SHAPE: Shape = Shape {
        name: "a shape",
        iommu: Iommu::Intel,
        disks: &[],
        objects: &[],
        devices: &[],
        kernel_options: &[],
        guest: false,
    };
    static OTHER: Shape = Shape {
        name: "another",
        ..SHAPE
    };

    const fn scenario(name: &'static str, shape: &'static Shape, sharing: Sharing) -> Scenario {
        Scenario {
            name,
            shape,
            kernels: &OwnKernel::ALL,
            sharing,
            run: |_| Ok(()),
        }
    }

    #[test]
    fn trials_of_one_kernel_and_shape_share_a_machine_unless_they_want_their_own() {
        static LIST: [Scenario; 5] = [
            scenario("a", &SHAPE, Sharing::Shared),
            scenario("b", &OTHER, Sharing::Shared),
            scenario("c", &SHAPE, Sharing::Own),
            scenario("d", &SHAPE, Sharing::Shared),
            scenario("e", &SHAPE, Sharing::Own),
        ];
        let trials: Vec<Trial> = LIST.iter().flat_map(Trial::of).collect();
        let names: Vec<Vec<String>> = groups(&trials)
            .iter()
            .map(|group| group.iter().map(Trial::name).collect())
            .collect();
        assert_eq!(
            names,
            [
                vec!["a", "d"],
                vec!["a@iommufd", "d@iommufd"],
                vec!["b"],
                vec!["b@iommufd"],
                vec!["c"],
                vec!["c@iommufd"],
                vec!["e"],
                vec!["e@iommufd"],
            ]
        );
    }
}
