//! `nvme-contract`: what an NVMe controller reaches on the kernel that this runs on.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use contract::nvme::{Iommu, RealHost, cases, guest_cases, run};
use contract::report;
use vfio_sys::Bdf;

/// Moves blocks between an NVMe controller's disk and a peer's BAR, and between another engine and
/// the controller's memory buffer, and compares.
///
/// The disk is OVERWRITTEN: it must have 5 MiB, each of whose eight bytes hold, little-endian,
/// their own offset with 0x7477_0000_0000_0000 added, as the lab's disks do. All functions must be
/// bound to vfio-pci, and nobody else may use them. Ends with status 0 only if every case passes.
#[derive(Debug, Parser)]
#[command(name = "nvme-contract")]
struct Arguments {
    /// The NVMe controller, such as QEMU's nvme with cmb_size_mb=16.
    nvme: Bdf,
    /// A function with a memory BAR of at least 64 KiB: QEMU's ivshmem-plain.
    peer: Bdf,
    /// Another DMA engine: QEMU's edu, with dma_mask=0xffffffffffffffff.
    engine: Option<Bdf>,
    /// How to program the IOMMU.
    #[arg(long, value_enum, default_value_t = Choice::Type1)]
    iommu: Choice,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
    /// Instead of these cases those of a guest that moves its BARs while the controller copies RAM,
    /// and lays them under RAM and under one another. They use 64 KiB of the disk and put them back.
    #[arg(long)]
    guest: bool,
    /// Only the cases whose names contain this.
    #[arg(long, default_value = "")]
    filter: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// VFIO groups and a container
    Type1,
    /// The functions' own files and an iommufd
    Iommufd,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut chosen = if arguments.guest {
        guest_cases()
    } else {
        cases()
    };
    chosen.retain(|case| case.name.contains(&arguments.filter));
    anyhow::ensure!(
        !chosen.is_empty(),
        "no case has {:?} in its name",
        arguments.filter
    );
    let host = RealHost {
        iommu: match arguments.iommu {
            Choice::Type1 => Iommu::Type1,
            Choice::Iommufd => Iommu::Iommufd,
        },
        nvme: arguments.nvme,
        peer: arguments.peer,
        engine: arguments.engine,
    };
    let status = report(arguments.json, |tell| run(&host, &chosen, tell))?;
    Ok(status)
}
