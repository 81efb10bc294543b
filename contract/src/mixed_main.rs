//! `mixed-contract`: a type1 container beside an iommufd, on the kernel that this runs on.

use std::process::ExitCode;

use clap::Parser;
use contract::mixed::{Case, RealHost, cases, run};
use contract::report;
use vfio_sys::Bdf;

/// Puts one function into a type1 container and the other into an address space of an iommufd, each
/// way about, and moves data from the one to the other's BAR and back.
///
/// Both functions must be bound to vfio-pci, in groups of their own, and nobody else may use them.
/// Needs Linux 6.19 or newer with both ways. Ends with status 0 only if every case passes.
#[derive(Debug, Parser)]
#[command(name = "mixed-contract")]
struct Arguments {
    /// A function with a DMA engine: QEMU's edu, with dma_mask=0xffffffffffffffff.
    engine: Bdf,
    /// A function with a prefetchable memory BAR of at least 64 KiB: QEMU's ivshmem-plain.
    peer: Bdf,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
    /// Only the cases whose names contain this.
    #[arg(long, default_value = "")]
    filter: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let Arguments {
        engine,
        peer,
        json,
        filter,
    } = Arguments::parse();
    let chosen = |case: &Case| case.name.contains(&filter);
    anyhow::ensure!(
        cases().iter().any(chosen),
        "no case has {filter:?} in its name"
    );
    let host = RealHost { engine, peer };
    Ok(report(json, |tell| run(&host, &filter, tell))?)
}
