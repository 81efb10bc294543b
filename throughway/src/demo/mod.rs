//! `throughway demo`: the main job on the simulated host.

mod machine;
mod script;
mod step;

use anyhow::Result;
use clap::{Args, ValueEnum};
use sim_host::BrokenTranslation;

/// Show the main job on a simulated host: devices that reach each other while BARs move
///
/// Brings up three devices behind two IOMMU containers as a guest would, moves data from RAM
/// through a DMA engine into a peer's BAR, moves that BAR, turns decoding off, and unregisters a
/// container; after each step the data and the faults are compared with what they should be. It
/// needs no privileges, no hardware and no kernel support. The exit status is 0 if every step was
/// as expected, 1 if one was not, 2 if it could not be run.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Break the simulated IOMMU on purpose, to see the demonstration fail
    #[arg(long, value_name = "HOW")]
    pub break_translation: Option<Break>,
}

/// How to break the simulated IOMMU.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Break {
    /// Addresses go past the IOMMU as they are
    Identity,
    /// What is found is one page further on
    Shift,
    /// Accesses vanish without a fault
    Drop,
}

impl From<Break> for BrokenTranslation {
    fn from(how: Break) -> Self {
        match how {
            Break::Identity => Self::Identity,
            Break::Shift => Self::Shift(0x1000),
            Break::Drop => Self::Drop,
        }
    }
}

/// Runs the demonstration and prints it. Whether all was as expected.
pub fn run(args: &DemoArgs) -> Result<bool> {
    let report = script::play(args.break_translation.map(Into::into))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(report.ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_as_expected() {
        let report = script::play(None).unwrap();
        assert!(report.ok, "{report}");
        let step = |name: &str| {
            let found = report.steps.iter().find(|step| step.name == name);
            found.unwrap_or_else(|| panic!("no step {name}"))
        };
        let moved = step("the other half is written");
        assert_eq!((moved.maps, moved.unmaps), (2, 0));
        let off = step("decoding goes off");
        assert_eq!((off.maps, off.unmaps), (0, 2));
        let peer = report.map.0.iter().find(|row| row.name.ends_with("BAR2"));
        assert_eq!(peer.unwrap().reach["container 0"], "mapped");
    }

    #[test]
    fn a_broken_iommu_makes_it_fail() {
        for how in [Break::Identity, Break::Shift, Break::Drop] {
            let report = script::play(Some(how.into())).unwrap();
            assert!(!report.ok, "{how:?} goes unnoticed");
        }
    }
}
