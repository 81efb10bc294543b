//! `throughway demo`: the main job on the simulated host.

mod machine;
mod revocation;
mod script;
mod space;
mod step;

use anyhow::Result;
use clap::{Args, ValueEnum};
use sim_host::BrokenTranslation;

use self::space::Kind;

/// Show the main job on a simulated host: devices that reach each other while BARs move
///
/// Brings up three devices behind two IOMMU address spaces as a guest would, moves data from RAM
/// through a DMA engine into a peer's BAR, moves that BAR, turns decoding off, has the device sleep
/// and be reset (at each of which the kernel revokes what iommufd has mapped of it), and unregisters
/// an address space; after each step the data and the faults are compared with what they should be.
/// It needs no privileges, no hardware and no kernel support. The exit status is 0 if every step was
/// as expected, 1 if one was not, 2 if it could not be run.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// How the simulated IOMMU is programmed
    #[arg(long, value_enum, default_value_t = Kind::Type1)]
    pub iommu: Kind,
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
    let report = script::play(args.iommu, args.break_translation.map(Into::into))?;
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

    const KINDS: [Kind; 2] = [Kind::Type1, Kind::Iommufd];

    #[test]
    fn every_step_is_as_expected() {
        for kind in KINDS {
            let report = script::play(kind, None).unwrap();
            assert!(report.ok, "{report}");
            let step = |name: &str| {
                let found = report.steps.iter().find(|step| step.name == name);
                found.unwrap_or_else(|| panic!("no step {name}"))
            };
            for (name, maps, unmaps) in [
                ("the other half is written", 2, 0),
                ("decoding goes off", 0, 2),
                ("decoding comes back", 2, 0),
                ("the peer goes to sleep", 0, 2),
                ("the peer wakes", 2, 0),
                ("the peer is reset", 0, 2),
                ("the peer is put back", 2, 0),
            ] {
                let step = step(name);
                assert_eq!((step.maps, step.unmaps), (maps, unmaps), "{kind:?}: {name}");
            }
            let peer = report.map.0.iter().find(|row| row.name.ends_with("BAR2"));
            let first = format!("{} 0", kind.noun());
            assert_eq!(peer.unwrap().reach[&first], "mapped");
        }
    }

    #[test]
    fn on_iommufd_the_second_address_space_copies_ram_and_no_bar() {
        let report = script::play(Kind::Iommufd, None).unwrap();
        let changes = report.steps.iter().flat_map(|step| {
            let changes = step.changes.iter();
            changes.map(|change| (step.name.as_str(), change.as_str()))
        });
        let copied: Vec<_> = changes.filter(|(_, it)| it.contains("copied")).collect();
        assert!(!copied.is_empty());
        assert!(
            copied.iter().all(|(step, _)| *step == "IOAS 1 joins"),
            "{copied:?}"
        );
    }

    #[test]
    fn a_broken_iommu_makes_it_fail() {
        for kind in KINDS {
            for how in [Break::Identity, Break::Shift, Break::Drop] {
                let report = script::play(kind, Some(how.into())).unwrap();
                assert!(!report.ok, "{kind:?}, {how:?} goes unnoticed");
            }
        }
    }
}
