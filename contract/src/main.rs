//! `type1-contract`: the contract, tried on the kernel that this runs on.

use std::process::ExitCode;

use clap::Parser;
use contract::{RealHost, cases, report, run};
use vfio_sys::Bdf;

/// Holds the kernel's VFIO type1 to the contract that the simulated host keeps too.
///
/// Both functions must be bound to vfio-pci, and nobody else may use them. Ends with status 0
/// only if every case passes.
#[derive(Debug, Parser)]
#[command(name = "type1-contract")]
struct Arguments {
    /// A function with a DMA engine: QEMU's edu, with dma_mask=0xffffffffffffffff.
    engine: Bdf,
    /// A function with a memory BAR of at least 64 KiB: QEMU's ivshmem-plain.
    memory: Bdf,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
    /// Only the cases whose names contain this.
    #[arg(long, default_value = "")]
    filter: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let chosen = |case: &contract::Case| case.name.contains(&arguments.filter);
    anyhow::ensure!(
        cases().iter().any(chosen),
        "no case has {:?} in its name",
        arguments.filter
    );
    let host = RealHost::new(arguments.engine, arguments.memory);
    let status = report(arguments.json, |tell| run(&host, &arguments.filter, tell))?;
    Ok(status)
}
