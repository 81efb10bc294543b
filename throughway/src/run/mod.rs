//! `throughway run`: a virtual machine with assigned functions.

mod assembly;
mod device;
mod giving_back;
mod holdings;
mod known_to_kvm;
mod memory;
#[cfg(test)]
mod narrow_iommu;
mod outlet;
mod reach_watch;
mod report;
mod signals;
mod snapshot;
mod terminal;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use machine::kvm::Hypervisor;
use machine::{Ended, Images, Notices};
use serde_json::json;
use vfio_sys::Bdf;

use self::assembly::{Assembly, Powered};
use self::device::Device;
use self::giving_back::GivingBack;
use self::memory::Memory;
use self::outlet::Outlet;
use self::terminal::RawTerminal;
use crate::host::choice::Iommu;
use crate::host::policy::{P2pChoice, Policy};

/// Run a virtual machine whose devices reach each other
///
/// Boots a Linux kernel on KVM with PCI functions that are bound to vfio-pci. The guest puts their
/// BARs where it likes and moves them, and the IOMMU follows: every function reaches the guest's
/// RAM and every other's BARs. The first serial port is this terminal: Ctrl-C goes to the guest,
/// Ctrl-A X ends the machine, Ctrl-A A types Ctrl-A. SIGTERM presses the power button; a second
/// one, or 30 seconds, end the machine. Functions are reset before the guest gets them, when it is
/// reset, and at the end. A function that the host wants back meanwhile, because it is pulled out or
/// unbound from vfio-pci, is given back at once: to the guest it is as if it had been pulled out, and
/// it stays away; the others go on. At SIGUSR1 the map as the guest has laid it out by then, and who
/// reaches whom in it, are printed on standard error.
///
/// The exit status is 0 if the guest turned itself off or was told to end, 1 if it could not go on or
/// something was left mapped (with --dry-run: if not everyone reaches whom --p2p required says), 3 if
/// its kernel panicked, 2 if the machine could not be started, or could not be begun anew when the
/// guest reset it.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The guest's kernel: a bzImage, or an ELF file with an entry for PVH
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// The guest's RAM: size=SIZE[,hugepages=off|transparent|2M|1G]
    ///
    /// SIZE has a unit of M, G or T and is a multiple of 2 MiB (of 1 GiB for pages of that size).
    /// Pages of 2M and 1G have to be reserved; transparent ones are joined as far as
    /// /sys/kernel/mm/transparent_hugepage/shmem_enabled lets them be. All of it is pinned as soon as
    /// there is an assigned function.
    #[arg(long, value_name = "SIZE", default_value = "size=1G")]
    pub memory: Memory,
    /// How many processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    pub cpus: u8,
    /// A PCI function that is bound to vfio-pci, such as 0000:01:00.0[,id=NAME]. May be repeated
    #[arg(long, value_name = "BDF")]
    pub device: Vec<Device>,
    /// How to program the IOMMU
    #[arg(long, value_enum, default_value_t = Iommu::Auto)]
    pub iommu: Iommu,
    /// Who may reach whose BARs: all, none, required or group=NAME:BDF,BDF
    ///
    /// As for `throughway p2p`. With `required` nothing is started unless everyone reaches, with the
    /// BARs where a guest would put them, whom they may.
    #[arg(long, value_name = "WHO", default_value = "all")]
    pub p2p: Vec<P2pChoice>,
    /// Print the layout, the address spaces and who reaches whom, and start nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON objects instead of text
    #[arg(long)]
    pub json: bool,
}

/// Where KVM is.
const KVM: &str = "/dev/kvm";

/// Runs it, until it ends.
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    let functions: Vec<Bdf> = args.device.iter().map(|device| device.bdf).collect();
    let distinct: BTreeSet<&Bdf> = functions.iter().collect();
    ensure!(
        distinct.len() == functions.len(),
        "a function is named twice: name each once"
    );
    let policy = Policy::new(&args.p2p, &functions)?;
    let images = Images {
        kernel: open(&args.kernel, "the kernel")?,
        initrd: match &args.initrd {
            Some(path) => Some(open(path, "the initial RAM disk")?),
            None => None,
        },
        command_line: args.cmdline.clone(),
    };
    let hypervisor = Hypervisor::open(Path::new(KVM))?;
    ensure!(
        usize::from(args.cpus) <= hypervisor.most_processors(),
        "KVM runs {} processors here at the most, not {}",
        hypervisor.most_processors(),
        args.cpus
    );
    // Whoever asks before there is an answer waits for it.
    let questions = signals::questions()?;
    let said = Outlet::new(io::stderr())?;
    let assembly = Assembly::new(args, &policy, &hypervisor, &said)?;
    if args.dry_run || policy.required {
        let report = assembly.rehearse(args);
        said.drain();
        let report = report?;
        if policy.required {
            let missing: Vec<_> = report.missing().collect();
            for missing in &missing {
                say(&format!(
                    "throughway: {missing}; --p2p required wants it mapped"
                ));
            }
            if !missing.is_empty() && !args.dry_run {
                bail!("not started: not everyone reaches whom they have to");
            }
        }
        if args.dry_run {
            let text = if args.json {
                serde_json::to_string_pretty(&report)? + "\n"
            } else {
                report.to_string()
            };
            let written = io::stdout().write_all(text.as_bytes());
            written.context("the report cannot be written")?;
            let fits = !policy.required || report.missing().next().is_none();
            return Ok(if fits {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
    }
    let console = Outlet::new(io::stdout())?;
    let new_notices = || {
        let said = said.clone();
        Arc::new(Notices::new(move |line| said.say(line)))
    };
    // Of its own, so that a guest that puts many BARs out of reach does not use up the others'.
    let watch = assembly.watch(&new_notices())?;
    let notices = new_notices();
    let roster = assembly.roster()?;
    let Powered {
        mut machine,
        holdings,
        requests,
    } = assembly.power_on(args, images, console.clone(), notices.clone())?;
    let controls = machine.controls();
    let pull_out = {
        let controls = controls.clone();
        move |place| controls.pull_out(place)
    };
    let giving_back = GivingBack::start(holdings, requests, pull_out, notices)?;
    signals::press_for(controls.clone())?;
    signals::tell_for(questions, roster, said.clone(), args.json)?;
    let terminal = RawTerminal::take()?;
    terminal::type_for(controls, terminal.is_some())?;
    let ended = machine.run();
    drop(terminal);
    let ended = ended?;
    // What the host wants now it has in a moment.
    let holdings = giving_back.end()?;
    drop(machine);
    drop(watch);
    console.drain();
    said.drain();
    let status = tell(&ended, args.json);
    if let Err(error) = holdings.end() {
        say(&format!("throughway: {error:#}"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(status)
}

/// Says something on standard error, if anybody listens.
fn say(text: &str) {
    let _unheard = writeln!(io::stderr(), "{text}");
}

/// Says how the machine ended, and with which status.
fn tell(ended: &Ended, json: bool) -> ExitCode {
    let (how, text, status) = match ended {
        Ended::PoweredOff => ("powered-off", "the guest turned itself off".to_owned(), 0),
        Ended::Told => ("told", "the machine was told to end".to_owned(), 0),
        Ended::Panicked => ("panicked", "the guest's kernel panicked".to_owned(), 3),
        Ended::Failed { processor, why } => {
            ("failed", format!("processor {processor} stopped: {why}"), 1)
        }
        Ended::SlotsLost { why } => {
            let text = format!("KVM does not take a memory slot away: {why}");
            ("failed", text, 1)
        }
        other => ("other", format!("{other:?}"), 1),
    };
    if json {
        say(&json!({ "ended": how, "text": text, "status": status }).to_string());
    } else {
        say(&format!("throughway: {text}"));
    }
    ExitCode::from(status)
}

fn open(path: &Path, what: &str) -> Result<File> {
    File::open(path).with_context(|| format!("{what} {} cannot be opened", path.display()))
}

#[cfg(test)]
mod tests;
