//! The workspace's chores: check, test, lab.

mod check;
mod guest_programs;
mod lab_run;
mod lab_test;
mod tool;
mod workspace;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lab::disk::Disk;
use lab::kernel::{KernelChoice, OwnKernel};
use lab::spec::Iommu;

/// The workspace's chores.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Format, lints, documentation, licences: what CI runs first.
    ///
    /// Runs cargo fmt, clippy and doc with warnings as errors, and cargo-deny (licences, bans and
    /// sources). cargo-deny is built into the cache the first time, which takes a few minutes.
    Check,
    /// `check`, then all tests, then all lab scenarios.
    ///
    /// Tests are units, properties, contract tests on the simulated host, and documentation. Ends
    /// with the lab's count on a line of its own.
    Test(Strictness),
    /// The nested machine: QEMU, a real kernel, a real IOMMU driver.
    ///
    /// What it needs (QEMU, a stock kernel, a shell; about 200 MB of packages) is fetched with apt
    /// into $THROUGHWAY_CACHE, else $XDG_CACHE_HOME/throughway, else ~/.cache/throughway. QEMU is
    /// built there, once, from Debian's source with a patch (six minutes of processor time), and so
    /// is a second kernel, `iommufd` (170 MB; 2 GB of disk while it is built; fifteen minutes of
    /// processor time). Nothing is installed, and no privileges are needed; building wants gcc on the
    /// PATH.
    #[command(subcommand)]
    Lab(Box<LabChore>),
}

#[derive(Debug, Subcommand)]
enum LabChore {
    /// Boots a nested machine and runs a command in it, as root.
    ///
    /// Every PCI function given with --device is bound to vfio-pci. The workspace's programs
    /// (throughway among them) and busybox's applets are on the PATH. The command's standard output
    /// and standard error are this program's; everything else goes to standard error or to logs.
    /// Ends with the command's exit status (128 and the signal's number if a signal ended it, 127 if
    /// there is no such program), or with 125 if the machine could not be had, died, or took too
    /// long.
    Run(Box<RunArgs>),
    /// Runs the lab's scenarios.
    Test(TestArgs),
    /// Fetches and builds what the lab needs into the cache, and does nothing else.
    Fetch(FetchArgs),
}

/// What `lab fetch` is told.
#[derive(Debug, Args)]
struct FetchArgs {
    /// Only this kernel; else both.
    #[arg(long, value_name = "stock|iommufd")]
    kernel: Option<OwnKernel>,
}

/// What `lab run` is told.
#[derive(Debug, Args)]
struct RunArgs {
    /// Debian's kernel (VFIO by groups), the one the lab builds (cdev, iommufd and dma-bufs as well;
    /// see lab/kernel/iommufd.config), or an image (bzImage or vmlinux) with everything built in.
    #[arg(long, value_name = "stock|iommufd|PATH", default_value = "stock")]
    kernel: KernelChoice,
    /// A QEMU object, as after QEMU's -object. May be repeated.
    #[arg(long = "object", value_name = "QEMU-OBJECT")]
    objects: Vec<String>,
    /// A QEMU device, as after QEMU's -device. May be repeated.
    #[arg(long = "device", value_name = "QEMU-DEVICE")]
    devices: Vec<String>,
    /// A disk for a device that names it as its drive (nvme,drive=ID), of so many MiB. Its words
    /// hold their own offsets, see lab::disk. May be repeated.
    #[arg(long = "disk", value_name = "ID=MIB")]
    disks: Vec<Disk>,
    /// The machine's IOMMU.
    #[arg(long, value_name = "intel|intel-39-bit|amd", default_value = "intel")]
    iommu: Iommu,
    /// An option for the kernel's command line. May be repeated.
    #[arg(long = "kernel-option", value_name = "OPTION")]
    kernel_options: Vec<String>,
    /// Put there what a guest in the nested machine boots from: /lab/guest/kernel (the same kernel),
    /// /lab/guest/vmlinux (it again as an ELF file, of the kernel that the lab builds) and
    /// /lab/guest/initrd (the program `guest`).
    #[arg(long)]
    guest: bool,
    /// A file for the nested machine; at /lab/files under its own name unless GUEST, an absolute
    /// path, says otherwise. May be repeated.
    #[arg(long = "file", value_name = "HOST[:GUEST]")]
    files: Vec<String>,
    /// The machine's memory, in QEMU's notation.
    #[arg(long, default_value = "2G")]
    memory: String,
    /// How long the command may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Have the machine's clock count instructions, each as a nanosecond, instead of time: what
    /// programs in it measure is then the same however busy this machine is. What its devices do,
    /// its IOMMU among them, takes no time.
    #[arg(long)]
    count_instructions: bool,
    /// Keep the machine's logs (console, QEMU, traces) even if all goes well, and say where.
    #[arg(long)]
    keep_logs: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What `lab test` is told.
#[derive(Debug, Args)]
struct TestArgs {
    /// Only scenarios whose name contains this. A scenario's name ends with `@iommufd` where it runs
    /// on that kernel; many run on both.
    filter: Option<String>,
    /// Only scenarios on this kernel.
    #[arg(long, value_name = "stock|iommufd")]
    kernel: Option<OwnKernel>,
    /// List them instead of running them.
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    strictness: Strictness,
}

impl TestArgs {
    fn choice(&self) -> lab_test::Choice {
        lab_test::Choice {
            filter: self.filter.clone(),
            kernel: self.kernel,
        }
    }
}

/// What a skip counts for.
#[derive(Debug, Clone, Copy, Args)]
struct Strictness {
    /// A skipped scenario fails the run. Implied by CI=true in the environment.
    #[arg(long)]
    no_skips: bool,
}

impl Strictness {
    fn refuses_skips(self) -> bool {
        self.no_skips || std::env::var("CI").is_ok_and(|ci| ci == "true" || ci == "1")
    }
}

/// The files of `--file`, read and checked.
fn guest_files(texts: &[String]) -> anyhow::Result<Vec<lab::initramfs::GuestFile>> {
    let mut files = Vec::new();
    for text in texts {
        files.push(lab::initramfs::GuestFile::parse(text)?);
    }
    Ok(files)
}

/// The status of an error of our own, told apart from those of commands in the nested machine.
const OWN_ERROR: u8 = 125;

fn main() -> ExitCode {
    let result = match Cli::parse().chore {
        Chore::Check => check::check().map(|()| ExitCode::SUCCESS),
        Chore::Test(strictness) => test(strictness),
        Chore::Lab(chore) => match *chore {
            LabChore::Run(args) => {
                return lab_run::run(&args).unwrap_or_else(|error| {
                    complain(&error);
                    ExitCode::from(OWN_ERROR)
                });
            }
            LabChore::Test(args) => {
                lab_test::test(&args.choice(), args.list, args.strictness.refuses_skips())
            }
            LabChore::Fetch(args) => fetch(args.kernel),
        },
    };
    result.unwrap_or_else(|error| {
        complain(&error);
        ExitCode::FAILURE
    })
}

fn test(strictness: Strictness) -> anyhow::Result<ExitCode> {
    check::check()?;
    let headers = headers()?;
    workspace::cargo(
        &["test", "--workspace", "--locked"],
        &[("THROUGHWAY_UAPI", &headers)],
    )?;
    interleavings()?;
    lab_test::test(
        &lab_test::Choice::default(),
        false,
        strictness.refuses_skips(),
    )
}

/// The map's threads and the cut-off's under a model checker, in a build folder of their own: everything below is
/// built with another configuration.
fn interleavings() -> anyhow::Result<()> {
    let folder = workspace::target()?.join("shuttle");
    let folder = folder.to_string_lossy();
    let arguments = [
        "test",
        "--release",
        "--locked",
        "--package",
        "memory_map",
        "--package",
        "assigned_pci",
        "--test",
        "interleavings",
    ];
    let environment = [
        ("RUSTFLAGS", "--cfg shuttle"),
        ("CARGO_TARGET_DIR", &folder),
    ];
    workspace::cargo(&arguments, &environment)
}

/// The C headers of a kernel that knows all that `vfio_sys` does.
fn headers() -> anyhow::Result<String> {
    let cache = lab::cache::Cache::from_environment()?;
    let headers = lab::headers::obtain(&mut lab::apt::Packages::new(&cache))?;
    Ok(headers.to_string_lossy().into_owned())
}

fn fetch(only: Option<OwnKernel>) -> anyhow::Result<ExitCode> {
    let cache = lab::cache::Cache::from_environment()?;
    for kernel in OwnKernel::ALL {
        if only.is_some_and(|only| only != kernel) {
            continue;
        }
        let (qemu, got, shell) = lab::parts::fetch(&cache, &KernelChoice::Own(kernel))?;
        println!("QEMU    {}", qemu.version);
        println!("kernel  {}: {}", kernel.name(), got.description);
        println!("shell   {}", shell.display());
    }
    println!("cache   {}", cache.root().display());
    Ok(ExitCode::SUCCESS)
}

/// An error with its causes, on standard error.
fn complain(error: &anyhow::Error) {
    eprintln!("xtask: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
}
