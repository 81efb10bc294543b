//! `iommufd-contract`: the contract of iommufd, tried on the kernel that this runs on.

use std::process::ExitCode;

use clap::Parser;
use contract::iommufd::{Case, RealHost, cases, resetting_cases, run};
use contract::report;
use vfio_sys::Bdf;

/// Holds the kernel's iommufd, and its mapping of BARs as dma-bufs, to the contract that the
/// simulated host keeps too. Needs Linux 6.19 or newer.
///
/// Both functions must be bound to vfio-pci, and nobody else may use them or their groups. Ends
/// with status 0 only if every case passes.
#[derive(Debug, Parser)]
#[command(name = "iommufd-contract")]
struct Arguments {
    /// A function with a DMA engine: QEMU's edu, with dma_mask=0xffffffffffffffff.
    engine: Bdf,
    /// A function with a memory BAR of at least 64 KiB: QEMU's ivshmem-plain.
    memory: Bdf,
    /// Also the cases for which MEMORY must be such that it can be reset, by itself and through its
    /// config space, and put to sleep: QEMU's nvme with cmb_size_mb=16, behind a pcie-root-port.
    #[arg(long)]
    resets: bool,
    /// Without a look at which IOMMU groups the functions are in: they move from one address space to
    /// another in two steps then.
    #[arg(long)]
    unknown_groups: bool,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
    /// Only the cases whose names contain this.
    #[arg(long, default_value = "")]
    filter: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut chosen = cases();
    if arguments.resets {
        chosen.extend(resetting_cases());
    }
    chosen.retain(|case: &Case| case.name.contains(&arguments.filter));
    anyhow::ensure!(
        !chosen.is_empty(),
        "no case has {:?} in its name",
        arguments.filter
    );
    let mut host = RealHost::new(arguments.engine, arguments.memory);
    if arguments.unknown_groups {
        host = host.without_groups();
    }
    let status = report(arguments.json, |tell| run(&host, &chosen, tell))?;
    Ok(status)
}
