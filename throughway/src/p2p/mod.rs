//! `throughway p2p`: who reaches whom on a real host.

mod assembly;
mod control;
mod exercise;
mod hold;
mod report;
mod revocation;
mod scratch;
mod spot;
mod stress;
mod windows;
mod witness;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;

use anyhow::{Result, bail};
use clap::Args;
use host_memory::Ram;
use memory_map::{Backing, GRANULE};
use vfio_sys::Bdf;

use self::assembly::{Assembly, Parts};
use self::hold::{Ask, Holding};
use self::report::P2pReport;
use self::scratch::NvmeScratch;
use crate::host::choice::{Choice, Iommu, Kind};
use crate::host::policy::{P2pChoice, Policy};
use crate::host::{self, Requests};

/// Tell which of this host's devices can reach each other's BARs, or why not
///
/// Opens PCI functions that are bound to vfio-pci, lays out RAM and all their BARs in a memory map
/// as a guest would, registers the IOMMU, and tells for every ordered pair whether the one reaches
/// the other's BARs. The functions must not be in use; they are reset when the program ends.
///
/// The exit status is 0 only if every memory BAR area of at least a page that is not trapped by
/// design, and not kept out by --p2p, is mapped, every exercise is ok and every control is blocked;
/// 1 if not; 2 if it could not be found out, or makes no sense.
#[derive(Debug, Args)]
pub struct P2pArgs {
    /// The PCI functions, such as 0000:01:00.0
    #[arg(required = true, num_args = 2.., value_name = "BDF")]
    pub functions: Vec<Bdf>,
    /// How to program the IOMMU
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    pub iommu: Iommu,
    /// Who may reach whose BARs: all, none, required or group=NAME:BDF,BDF
    ///
    ///   all       every function every other; what cannot be is a reason in the report (default)
    ///   none      nobody: functions reach RAM only
    ///   required  who may has to: a BAR that is not mapped is named on standard error, with the
    ///             reason; nothing is exercised then, and the exit status is 1
    ///   group=NAME:BDF,BDF
    ///             those listed reach each other; a function in no group reaches nobody, one in
    ///             several reaches all of theirs. May be repeated, also along with required
    ///
    /// It is the address spaces that enforce it: functions with different peers have different
    /// ones. Functions that the IOMMU cannot tell apart (an IOMMU group) must be treated alike. Where
    /// traffic may go past the IOMMU, because a port above has no access control services (ACS), the
    /// report has a warning.
    #[arg(long, value_name = "WHO", default_value = "all", verbatim_doc_comment)]
    pub p2p: Vec<P2pChoice>,
    /// Move data with every DMA engine there is a driver for, and compare
    ///
    /// A pattern goes from RAM into each peer's prefetchable BARs and back (and into a register of
    /// another edu), and what was in the BAR is put back afterwards; then the BAR is moved, and all of that is done again. As a
    /// control, the engine is also pointed at addresses that are not mapped any more: of RAM that
    /// was taken away, of a peer that does not decode, sleeps or was reset (if it can; by itself, with
    /// its decoding on or off, and with all of its bus), of a BAR that was moved. There is a driver
    /// for QEMU's edu, and one for NVMe controllers, see --nvme-scratch.
    #[arg(long)]
    pub exercise: bool,
    /// Change everything at once, in so many rounds, and compare what is reached with what is told
    ///
    /// In each round, all at the same time: BARs that a DMA engine moves data into are moved to and
    /// fro, their functions stop decoding, sleep and are reset, by themselves and with their bus, and
    /// every address space is registered again. When all that is over, what is told to be mapped has
    /// to be reached, and nothing may arrive where nothing is. Functions with an engine are left
    /// alone.
    #[arg(long, value_name = "ROUNDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub stress: Option<u32>,
    /// Keep everything mapped until Enter is pressed or standard input ends
    ///
    /// Standard error says when that begins. A function that the host wants back meanwhile, because
    /// it is pulled out or unbound from vfio-pci, leaves every address space and is given back; the
    /// others stay. With --exercise, what was its BAR is tried as a control, and the others move
    /// data once more. Without --hold, the host waits until the program ends.
    #[arg(long)]
    pub hold: bool,
    /// Blocks of an NVMe controller's disk that may be overwritten, so that it serves as a DMA engine
    ///
    /// What an NVMe controller moves from one place of the bus to another goes by way of its disk.
    /// These blocks of its first namespace are lent for that; END is the first that is not. They are
    /// read before they are first overwritten, and written back at the end, but NOT if the program is
    /// killed, or the controller fails, in between. Nothing is ever written to any other block, nor
    /// to a disk of which no blocks are lent. May be repeated, once for each controller.
    #[arg(long, value_name = "BDF:FIRST..END", requires = "exercise")]
    pub nvme_scratch: Vec<NvmeScratch>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// RAM of the guest that is stood in for, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub memory: u64,
}

/// Finds out and prints. Whether all is as it should be.
pub fn run(args: &P2pArgs) -> Result<bool> {
    let distinct: BTreeSet<Bdf> = args.functions.iter().copied().collect();
    if distinct.len() != args.functions.len() {
        bail!("a function is named twice: name each once");
    }
    let policy = Policy::new(&args.p2p, &args.functions)?;
    scratch::check(&args.nvme_scratch, &args.functions)?;
    let (opened, bypasses, choice) = host::open(&args.functions, args.iommu, &policy, None)?;
    let page = GRANULE.max(host_memory::page_size());
    let mut assembly = Assembly::new(Parts {
        spaces: opened.spaces,
        functions: opened.functions,
        buses: opened.buses,
        bypasses,
        ram: Backing::new(Ram::memfd(c"throughway-ram", args.memory << 20)?),
        page: Backing::new(Ram::memfd(c"throughway-control", page)?),
        scratch: args.nvme_scratch.clone(),
    })?;
    let requests = args.hold.then(|| Requests::of(&opened.devices));
    // Whoever holds a device keeps the host from having it back.
    drop(opened.devices);
    let mut terminal = requests.transpose()?.map(|requests| Terminal {
        requests,
        json: args.json,
    });
    let holding = terminal.as_mut().map(|terminal| {
        let holding: &mut dyn Holding = terminal;
        holding
    });
    let witness: Option<&mut witness::Source<'_>> = if args.exercise {
        Some(&mut witness::kernel_log)
    } else {
        None
    };
    let plan = Plan {
        required: policy.required,
        stress: args.stress.unwrap_or(0),
    };
    let examined = examine(&mut assembly, choice, plan, witness, holding);
    // However that ended, what engines have overwritten is put back, or it is told that it is not.
    let report = match (examined, assembly.rest()) {
        (Ok(report), rested) => {
            rested?;
            report
        }
        (Err(error), rested) => {
            if let Err(left) = rested {
                eprintln!("throughway: {left:#}");
            }
            return Err(error);
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    if policy.required {
        for missing in report.missing() {
            eprintln!("throughway: {missing}; --p2p required wants it mapped");
        }
    }
    Ok(report.ok)
}

/// The one who started the program.
struct Terminal {
    requests: Requests,
    json: bool,
}

impl Holding for Terminal {
    fn begins(&mut self, so_far: &P2pReport) {
        if !self.json {
            println!("{so_far}");
        }
        eprintln!("throughway: everything stays mapped until Enter is pressed");
    }

    fn next(&mut self) -> Result<Ask> {
        let wanted = self.requests.next(io::stdin().as_fd())?;
        Ok(wanted.map_or(Ask::End, |bdf| Ask::GiveBack(bdf.to_string())))
    }

    fn given_back(&mut self, function: &str) {
        eprintln!("throughway: the host wanted {function} back, and has it");
    }
}

/// What is wanted.
#[derive(Debug, Clone, Copy, Default)]
struct Plan {
    /// Whether every pair has to be mapped: if one is not, nothing is tried.
    required: bool,
    /// In how many rounds everything is changed at once.
    stress: u32,
}

/// Tells for every pair what is reached; moves data if there is somebody to ask for witness; holds
/// all of it for as long as somebody wants.
fn examine(
    assembly: &mut Assembly,
    choice: Choice,
    plan: Plan,
    mut witness: Option<&mut witness::Source<'_>>,
    holding: Option<&mut dyn Holding>,
) -> Result<P2pReport> {
    let Plan { required, stress } = plan;
    let mut pairs = assembly.pairs()?;
    let mut controls = Vec::new();
    if required && pairs.iter().any(|pair| pair.counts) {
        return Ok(P2pReport::new(choice, pairs, controls));
    }
    if let Some(witness) = witness.as_deref_mut() {
        exercise::all(assembly, &mut pairs)?;
        controls = control::in_place(assembly, &pairs, witness)?;
        controls.extend(control::moved(assembly, &pairs, witness)?);
        exercise::all(assembly, &mut pairs)?;
    }
    let mut stressed = None;
    if stress != 0 {
        if witness.is_none() {
            exercise::all(assembly, &mut pairs)?;
        }
        let kernel_revokes = choice.chosen == Kind::Iommufd;
        let (done, tried) = stress::run(assembly, &mut pairs, stress, kernel_revokes)?;
        stressed = Some(done);
        controls.extend(tried);
    }
    let mut report = P2pReport::new(choice, pairs, controls);
    report.stress = stressed;
    if let Some(holding) = holding {
        hold::until_end(assembly, &mut report, holding, witness.as_deref_mut())?;
    }
    if let Some(witness) = witness {
        let controls = control::unregistered(assembly, witness)?;
        report.controls.extend(controls);
    }
    Ok(report.judged())
}

#[cfg(test)]
mod tests;
