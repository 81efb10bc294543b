//! `throughway p2p`: who reaches whom on a real host.

mod assembly;
mod control;
mod exercise;
mod host;
mod report;
mod windows;
mod witness;

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use vfio_sys::Bdf;

use self::assembly::Assembly;
use self::report::P2pReport;

/// Tell which of this host's devices can reach each other's BARs, or why not
///
/// Opens PCI functions that are bound to vfio-pci, lays out RAM and all their BARs in a memory map
/// as a guest would, registers the IOMMU, and tells for every ordered pair whether the one reaches
/// the other's BARs. The functions must not be in use; they are reset when the program ends.
///
/// The exit status is 0 only if every memory BAR area of at least a page that is not trapped by
/// design is mapped, every exercise is ok and every control is blocked; 1 if not; 2 if it could
/// not be found out.
#[derive(Debug, Args)]
pub struct P2pArgs {
    /// The PCI functions, such as 0000:01:00.0
    #[arg(required = true, num_args = 2.., value_name = "BDF")]
    pub functions: Vec<Bdf>,
    /// How to program the IOMMU
    #[arg(long, value_enum, default_value_t = Iommu::Type1)]
    pub iommu: Iommu,
    /// Move data with every DMA engine there is a driver for, and compare
    ///
    /// A pattern goes from RAM into each peer's prefetchable BARs and back, and what was in the
    /// BAR is put back afterwards; then the BAR is moved, and all of that is done again. As a
    /// control, the engine is also pointed at addresses that are not mapped any more. There is a
    /// driver for QEMU's edu.
    #[arg(long)]
    pub exercise: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// RAM of the guest that is stood in for, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub memory: u64,
}

/// How to program the IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Iommu {
    /// VFIO groups and containers
    Type1,
}

/// Finds out and prints. Whether all is as it should be.
pub fn run(args: &P2pArgs) -> Result<bool> {
    let distinct: BTreeSet<Bdf> = args.functions.iter().copied().collect();
    if distinct.len() != args.functions.len() {
        bail!("a function is named twice: name each once");
    }
    let Iommu::Type1 = args.iommu;
    let parts = host::open(&args.functions, args.memory << 20)?;
    let mut assembly = Assembly::new(parts)?;
    let report = if args.exercise {
        examine(&mut assembly, Some(&mut witness::kernel_log))?
    } else {
        examine(&mut assembly, None)?
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(report.ok)
}

/// Tells for every pair what is reached, and moves data if there is somebody to ask for witness.
fn examine(
    assembly: &mut Assembly,
    witness: Option<&mut witness::Source<'_>>,
) -> Result<P2pReport> {
    let mut pairs = assembly.pairs()?;
    let mut controls = Vec::new();
    if let Some(witness) = witness {
        exercise::all(assembly, &mut pairs)?;
        controls = control::in_place(assembly, &pairs, witness)?;
        controls.extend(control::moved(assembly, &pairs, witness)?);
        exercise::all(assembly, &mut pairs)?;
        controls.extend(control::unregistered(assembly, witness)?);
    }
    Ok(P2pReport::new(pairs, controls))
}

#[cfg(test)]
mod tests;
