//! What is to be done: the steps of each boot.

use anyhow::{Context, bail};

/// One step, with its number if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// How often, or how long.
    pub number: Option<u64>,
}

/// All boots' steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Each boot's.
    pub boots: Vec<Vec<Step>>,
    /// The run's number: another run begins with the first boot.
    pub run: u64,
}

impl Plan {
    /// Reads `throughway.steps` and `throughway.run` from a kernel's command line.
    pub fn read(command_line: &str) -> anyhow::Result<Self> {
        let option = |name: &str| {
            let mut words = command_line.split_whitespace();
            words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let steps = option("throughway.steps").context(
            "the kernel's command line has no throughway.steps, such as throughway.steps=p2p",
        )?;
        let run = match option("throughway.run") {
            None => 0,
            Some(text) => text.parse().context("throughway.run is no number")?,
        };
        let boots = steps.split('/').map(|boot| read_boot(boot.split(',')));
        Ok(Self {
            boots: boots.collect::<anyhow::Result<_>>()?,
            run,
        })
    }

    /// One boot's steps, each an argument.
    pub fn of_arguments(arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let arguments: Vec<String> = arguments.collect();
        if arguments.is_empty() {
            bail!("no steps: give their names, such as `guest devices p2p`");
        }
        Ok(Self {
            boots: vec![read_boot(arguments.iter().map(String::as_str))?],
            run: 0,
        })
    }
}

fn read_boot<'t>(steps: impl Iterator<Item = &'t str>) -> anyhow::Result<Vec<Step>> {
    steps.map(read_step).collect()
}

fn read_step(text: &str) -> anyhow::Result<Step> {
    let (name, number) = match text.split_once(':') {
        None => (text, None),
        Some((name, number)) => {
            let number = number.parse();
            let number = number.with_context(|| format!("{text:?}: no number behind the colon"))?;
            (name, Some(number))
        }
    };
    Ok(Step {
        name: name.to_owned(),
        number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, number: Option<u64>) -> Step {
        Step {
            name: name.to_owned(),
            number,
        }
    }

    #[test]
    fn boots_steps_and_numbers_are_told_apart() {
        let line = "console=ttyS0 throughway.steps=p2p,race:20,reboot/p2p,poweroff \
                    throughway.run=7 quiet\n";
        let plan = Plan::read(line).unwrap();
        assert_eq!(plan.run, 7);
        assert_eq!(
            plan.boots,
            [
                vec![
                    step("p2p", None),
                    step("race", Some(20)),
                    step("reboot", None)
                ],
                vec![step("p2p", None), step("poweroff", None)],
            ]
        );
    }

    #[test]
    fn a_command_line_without_steps_or_with_bad_numbers_is_refused() {
        for line in [
            "quiet",
            "throughway.steps=a:b",
            "throughway.steps=a throughway.run=x",
        ] {
            assert!(Plan::read(line).is_err(), "{line}");
        }
        assert!(Plan::of_arguments(std::iter::empty()).is_err());
    }
}
