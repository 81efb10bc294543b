//! The lab's scenarios.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use lab::cache::Cache;
use lab::kernel::{KernelChoice, OwnKernel};
use lab::parts::Parts;
use lab::scenario::{Report, Trial, Verdict, run_all};
use lab::scenarios;

use crate::guest_programs;

/// Which scenarios are run.
#[derive(Debug, Default)]
pub struct Choice {
    /// Those whose name contains this; else all.
    pub filter: Option<String>,
    /// Those on this kernel; else all.
    pub kernel: Option<OwnKernel>,
}

/// Runs the chosen scenarios, one kernel after the other, and says how they ended.
///
/// A machine that cannot have the lab (no apt, no mirror, no compiler) gives skips, with the reason.
pub fn test(choice: &Choice, list: bool, no_skips: bool) -> anyhow::Result<ExitCode> {
    let chosen: Vec<Trial> = scenarios::all()
        .into_iter()
        .flat_map(Trial::of)
        .filter(|trial| choice.kernel.is_none_or(|kernel| trial.kernel == kernel))
        .filter(|trial| {
            let name = trial.name();
            choice
                .filter
                .as_ref()
                .is_none_or(|part| name.contains(part))
        })
        .collect();
    if chosen.is_empty() {
        bail!(
            "no scenario{} has a name that contains {:?}",
            choice
                .kernel
                .map_or(String::new(), |kernel| format!(" on {}", kernel.name())),
            choice.filter.as_deref().unwrap_or_default()
        );
    }
    if list {
        for trial in chosen {
            println!("{}", trial.name());
        }
        return Ok(ExitCode::SUCCESS);
    }

    let programs = guest_programs::build()?;
    let mut count = Count::default();
    let cache = Cache::from_environment()?;
    for kernel in OwnKernel::ALL {
        let trials: Vec<Trial> = chosen
            .iter()
            .copied()
            .filter(|trial| trial.kernel == kernel)
            .collect();
        if trials.is_empty() {
            continue;
        }
        match Parts::obtain(&cache, &KernelChoice::Own(kernel), programs.clone()) {
            Ok(parts) => {
                eprintln!(
                    "lab: QEMU {}, kernel {}",
                    parts.qemu.version, parts.kernel.description
                );
                run_all(&parts, &trials, &mut |report| count.add(&report));
            }
            Err(error) => {
                let reason = format!("{:#}", anyhow::Error::from(error));
                for trial in trials {
                    count.add(&Report {
                        name: trial.name(),
                        verdict: Verdict::Skipped(reason.clone()),
                        duration: Duration::ZERO,
                    });
                }
            }
        }
    }
    if count.skipped > 0 && no_skips {
        println!("skips are refused (CI=true or --no-skips)");
    }
    println!("{}", count.line());
    Ok(if count.failed > 0 || (count.skipped > 0 && no_skips) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

#[derive(Debug, Default)]
struct Count {
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Count {
    fn add(&mut self, report: &Report) {
        let seconds = report.duration.as_secs_f64();
        let name = &report.name;
        let (counter, line) = match &report.verdict {
            Verdict::Passed => (
                &mut self.passed,
                format!("scenario {name} ... ok ({seconds:.1} s)"),
            ),
            Verdict::Failed(why) => (
                &mut self.failed,
                format!(
                    "scenario {name} ... FAILED ({seconds:.1} s)\n  {}",
                    indented(why)
                ),
            ),
            Verdict::Skipped(why) => (
                &mut self.skipped,
                format!("scenario {name} ... skipped: {}", indented(why)),
            ),
        };
        *counter = counter.saturating_add(1);
        println!("{line}");
    }

    /// The closing line.
    fn line(&self) -> String {
        let mut line = format!("{} passed, {} failed", self.passed, self.failed);
        if self.skipped > 0 {
            line.push_str(&format!(", {} skipped", self.skipped));
        }
        line
    }
}

fn indented(text: &str) -> String {
    text.trim_end().replace('\n', "\n  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_counts() {
        let mut count = Count::default();
        let mut add = |verdict| {
            count.add(&Report {
                name: "x".to_owned(),
                verdict,
                duration: Duration::ZERO,
            });
        };
        add(Verdict::Passed);
        add(Verdict::Failed("a\nb".into()));
        assert_eq!(count.line(), "1 passed, 1 failed");
        count.add(&Report {
            name: "y".to_owned(),
            verdict: Verdict::Skipped("no mirror".into()),
            duration: Duration::ZERO,
        });
        assert_eq!(count.line(), "1 passed, 1 failed, 1 skipped");
    }
}
