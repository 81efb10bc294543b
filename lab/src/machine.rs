//! A running nested machine.
//!
//! [`Machine::boot`] starts QEMU and waits until `lab_init` is ready in it; the [`Machine`] owns
//! the QEMU process and the [`RunDirectory`] with its logs, and both end with it. One boot runs
//! any number of commands, one after the other.
//!
//! ```text
//!   this machine                     QEMU                         nested machine
//!   Machine ── stdin/stdout ── chardev ── second serial port ── /dev/ttyS1 ── lab_init ── command
//!           ┌─ console.log  ── chardev ── first serial port  ── console=ttyS0
//!   RunDirectory
//!           ├─ trace.log    ── -trace vtd_dmar_fault
//!           ├─ command.log  what the latest command wrote
//!           └─ monitor      ── QMP, see `Monitor`
//! ```

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::channel::{ChannelError, Message, Status};
use crate::dmar::{self, DmarFault};
use crate::initramfs::{self, GuestFile, Initramfs, InitramfsError};
use crate::line;
use crate::monitor::{Monitor, MonitorError};
use crate::parts::Parts;
use crate::run_directory::RunDirectory;
use crate::spec::Spec;

/// What a command is to be.
#[derive(Debug, Clone, Default)]
pub struct Invocation {
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// Variables to add to the environment, each `NAME=VALUE`.
    pub env: Vec<Vec<u8>>,
}

impl Invocation {
    /// A program with arguments.
    pub fn new(argv: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        Self {
            argv: argv.into_iter().map(|a| a.as_ref().into()).collect(),
            env: vec![],
        }
    }
}

/// One of a command's two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// The standard output as text.
    #[must_use]
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The standard error as text.
    #[must_use]
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// A place in QEMU's trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TraceMark(u64);

/// Why a nested machine did not do what it should. The logs named in these errors are kept.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Its initramfs could not be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// A file of the run could not be made or read.
    #[error("cannot use {path}")]
    Logs {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU could not be started at all.
    #[error("cannot start QEMU")]
    Start(#[source] io::Error),
    /// The command does not fit the channel; nothing was run.
    #[error("the command is too long")]
    Command(#[source] ChannelError),
    /// QEMU ended, of itself or because the nested kernel panicked.
    #[error("the nested machine died while {during}: {how}\n{tail}  logs kept in {logs}")]
    Died {
        /// What it was doing.
        during: String,
        /// The panic's message, or QEMU's exit status.
        how: String,
        /// The end of what QEMU and the console said.
        tail: String,
        /// Where all of it is.
        logs: PathBuf,
    },
    /// A time limit passed. The machine was ended.
    #[error(
        "the nested machine took more than {} s {during}\n{tail}  logs kept in {logs}",
        .limit.as_secs_f64()
    )]
    TimeLimit {
        /// What it was doing.
        during: String,
        /// The limit.
        limit: Duration,
        /// The end of what QEMU and the console said.
        tail: String,
        /// Where all of it is.
        logs: PathBuf,
    },
    /// What came over the channel was no message.
    #[error("the channel to the nested machine broke while {during}\n{tail}  logs kept in {logs}")]
    Channel {
        /// What the machine was doing.
        during: String,
        /// How it broke.
        #[source]
        source: ChannelError,
        /// The end of what QEMU and the console said.
        tail: String,
        /// Where all of it is.
        logs: PathBuf,
    },
    /// QEMU's monitor did not do what it should. The machine goes on.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// An earlier error ended the machine.
    #[error("the nested machine is gone since an earlier error")]
    Gone,
}

/// A running nested machine. Dropping it ends QEMU at once; [`Machine::shut_down`] is the way to
/// learn whether it ended well.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    to_guest: Sender<Vec<u8>>,
    from_guest: Receiver<Result<Message, ChannelError>>,
    directory: RunDirectory,
    monitor: Option<Monitor>,
    bound: Vec<String>,
    problems: Vec<String>,
    boot_time: Duration,
    next_id: u32,
    alive: bool,
}

impl Machine {
    /// Boots a machine and waits until it takes commands.
    ///
    /// # Errors
    /// When it cannot be started, dies, or takes too long.
    pub fn boot(parts: &Parts, spec: &Spec) -> Result<Self, MachineError> {
        let start = Instant::now();
        let mut directory = RunDirectory::new().map_err(|source| MachineError::Logs {
            path: std::env::temp_dir(),
            source,
        })?;
        if spec.keep_logs {
            directory.keep();
            eprintln!("lab: logs in {}", directory.path().display());
        }
        initramfs_of(parts, spec)?.write(&directory.initramfs())?;
        for disk in &spec.disks {
            let path = directory.disk(&disk.id);
            disk.write(&path)
                .map_err(|source| MachineError::Logs { path, source })?;
        }
        let (qemu, stdin, stdout) = start_qemu(parts, spec, &directory)?;
        let mut machine = Self {
            qemu,
            to_guest: line::writer(stdin),
            from_guest: line::reader(stdout),
            directory,
            monitor: None,
            bound: vec![],
            problems: vec![],
            boot_time: Duration::ZERO,
            next_id: 0,
            alive: true,
        };
        loop {
            if let Message::Ready { bound, problems } =
                machine.next_message("booting", start, spec.boot_limit)?
            {
                machine.bound = texts(bound);
                machine.problems = texts(problems);
                machine.boot_time = start.elapsed();
                return Ok(machine);
            }
        }
    }

    /// Runs a command to its end and collects what it writes.
    ///
    /// # Errors
    /// When the machine dies, or the command takes longer than `limit`; the machine is gone then.
    pub fn run(&mut self, argv: &[&str], limit: Duration) -> Result<Output, MachineError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = self.stream(
            &Invocation::new(argv),
            limit,
            &mut |stream, bytes| match stream {
                Stream::Stdout => stdout.extend_from_slice(bytes),
                Stream::Stderr => stderr.extend_from_slice(bytes),
            },
        )?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Runs a command to its end and hands on what it writes, as it writes it.
    ///
    /// A program that cannot be started gives status 127 or 126 and a line on standard error, as a
    /// shell would.
    ///
    /// # Errors
    /// When the machine dies, or the command takes longer than `limit`; the machine is gone then.
    pub fn stream(
        &mut self,
        invocation: &Invocation,
        limit: Duration,
        sink: &mut dyn FnMut(Stream, &[u8]),
    ) -> Result<Status, MachineError> {
        if !self.alive {
            return Err(MachineError::Gone);
        }
        let during = format!("running {}", shown(invocation));
        self.next_id = self.next_id.wrapping_add(1);
        let command = self.next_id;
        let message = Message::Run {
            id: command,
            argv: invocation.argv.clone(),
            env: invocation.env.clone(),
        };
        let mut frame = Vec::new();
        message
            .write_to(&mut frame)
            .map_err(MachineError::Command)?;
        // A writer that is gone means a machine that is gone: the reader knows why.
        let _ = self.to_guest.send(frame);
        let path = self.directory.command();
        let logged = |source| MachineError::Logs {
            path: path.clone(),
            source,
        };
        let mut log = File::create(&path).map_err(logged)?;
        let start = Instant::now();
        loop {
            // What an earlier command's children still write is not this command's.
            let (stream, bytes) = match self.next_message(&during, start, limit)? {
                Message::Stdout { id, bytes } if id == command => (Stream::Stdout, bytes),
                Message::Stderr { id, bytes } if id == command => (Stream::Stderr, bytes),
                Message::Exit { id, status } if id == command => return Ok(status),
                _ => continue,
            };
            log.write_all(&bytes).map_err(logged)?;
            sink(stream, &bytes);
        }
    }

    /// Powers the machine off and waits for its end.
    ///
    /// # Errors
    /// When it does not end within `limit`, or QEMU reports a failure.
    pub fn shut_down(mut self, limit: Duration) -> Result<(), MachineError> {
        if !self.alive {
            return Err(MachineError::Gone);
        }
        let mut frame = Vec::new();
        Message::PowerOff
            .write_to(&mut frame)
            .map_err(MachineError::Command)?;
        let _ = self.to_guest.send(frame);
        let start = Instant::now();
        match self.ended_within(limit) {
            Some(status) if status.success() => {
                self.alive = false;
                Ok(())
            }
            Some(_) => Err(self.died("powering off")),
            None => Err(self.too_slow("powering off", start.elapsed())),
        }
    }

    /// QEMU's monitor, connected at the first call.
    ///
    /// # Errors
    /// When an earlier error ended the machine, or QEMU does not answer.
    pub fn monitor(&mut self) -> Result<&mut Monitor, MachineError> {
        if !self.alive {
            return Err(MachineError::Gone);
        }
        match &mut self.monitor {
            Some(monitor) => Ok(monitor),
            empty => Ok(empty.insert(Monitor::connect(&self.directory.monitor())?)),
        }
    }

    /// The PCI functions bound to vfio-pci, as sysfs writes them.
    #[must_use]
    pub fn bound(&self) -> &[String] {
        &self.bound
    }

    /// What did not go as it should while booting, in words; empty when all went well.
    #[must_use]
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// How long it took from the start of QEMU until commands could be run.
    #[must_use]
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Whether commands can be run.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.alive
    }

    /// All that the kernel said on its console until now.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn console(&self) -> Result<String, MachineError> {
        read_from(&self.directory.console(), 0)
    }

    /// The bytes of a disk's file, as the host sees them: what a device has written and completed
    /// is there.
    ///
    /// # Errors
    /// When there is no such disk, or it is not that long.
    pub fn read_disk(&self, id: &str, range: Range<u64>) -> Result<Vec<u8>, MachineError> {
        let path = self.directory.disk(id);
        let size = range.end.saturating_sub(range.start);
        let read = |file: File| {
            let mut data = vec![0; usize::try_from(size).map_err(io::Error::other)?];
            file.read_exact_at(&mut data, range.start)?;
            Ok(data)
        };
        let read = File::open(&path).and_then(read);
        read.map_err(|source| MachineError::Logs { path, source })
    }

    /// This moment's place in QEMU's trace. QEMU writes a line before the device sees its DMA
    /// fail, so faults of later commands are behind the mark and faults of earlier ones before it.
    ///
    /// # Errors
    /// When the trace cannot be looked at.
    pub fn trace_mark(&self) -> Result<TraceMark, MachineError> {
        let path = self.directory.trace();
        match std::fs::metadata(&path) {
            Ok(metadata) => Ok(TraceMark(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(TraceMark(0)),
            Err(source) => Err(MachineError::Logs { path, source }),
        }
    }

    /// The DMA faults QEMU's IOMMU has reported since the mark.
    ///
    /// # Errors
    /// When the trace cannot be read.
    pub fn dmar_faults_since(&self, mark: TraceMark) -> Result<Vec<DmarFault>, MachineError> {
        let trace = read_from(&self.directory.trace(), mark.0)?;
        Ok(dmar::parse_trace(&trace))
    }

    fn next_message(
        &mut self,
        during: &str,
        start: Instant,
        limit: Duration,
    ) -> Result<Message, MachineError> {
        let left = limit.saturating_sub(start.elapsed());
        match self.from_guest.recv_timeout(left) {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(source)) => {
                let tail = self.end();
                Err(MachineError::Channel {
                    during: during.to_owned(),
                    source,
                    tail,
                    logs: self.directory.path().to_owned(),
                })
            }
            Err(RecvTimeoutError::Timeout) => Err(self.too_slow(during, limit)),
            Err(RecvTimeoutError::Disconnected) => Err(self.died(during)),
        }
    }

    fn too_slow(&mut self, during: &str, limit: Duration) -> MachineError {
        let tail = self.end();
        MachineError::TimeLimit {
            during: during.to_owned(),
            limit,
            tail,
            logs: self.directory.path().to_owned(),
        }
    }

    /// QEMU has closed its end of the channel: it is ending.
    fn died(&mut self, during: &str) -> MachineError {
        let status = self.ended_within(Duration::from_secs(5));
        let console = self.console().unwrap_or_default();
        let panic = console
            .lines()
            .filter_map(|line| line.find("Kernel panic").and_then(|at| line.get(at..)))
            .next_back();
        let how = match (panic, status) {
            (Some(panic), _) => panic.trim().to_owned(),
            (None, Some(status)) => format!("QEMU ended, {status}"),
            (None, None) => "QEMU closed the channel".to_owned(),
        };
        let tail = self.end();
        MachineError::Died {
            during: during.to_owned(),
            how,
            tail,
            logs: self.directory.path().to_owned(),
        }
    }

    fn ended_within(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let start = Instant::now();
        loop {
            match self.qemu.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if start.elapsed() < limit => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return None,
            }
        }
    }

    /// Ends QEMU, keeps the logs and gives their end.
    fn end(&mut self) -> String {
        self.alive = false;
        self.kill();
        self.directory.keep();
        self.directory.tail()
    }

    fn kill(&mut self) {
        // Both fail only when QEMU has ended and was waited for, which is what is wanted.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn initramfs_of(parts: &Parts, spec: &Spec) -> Result<Initramfs, InitramfsError> {
    let mut initramfs = Initramfs::new(&parts.programs.init, &parts.busybox)?;
    let mut order = String::new();
    for module in &parts.kernel.modules {
        let file = GuestFile::inside(initramfs::MODULES, module)?;
        initramfs.add(module, &file.guest)?;
        order.push_str(&file.guest);
        order.push('\n');
    }
    initramfs.text(initramfs::MODULE_ORDER, &order)?;
    for program in &parts.programs.others {
        let file = GuestFile::inside(initramfs::PROGRAMS, program)?;
        initramfs.add(program, &file.guest)?;
    }
    if spec.guest {
        initramfs.add(&parts.kernel.image, initramfs::GUEST_KERNEL)?;
        if let Some(elf) = &parts.kernel.elf {
            initramfs.add(elf, initramfs::GUEST_ELF)?;
        }
        let guest = Initramfs::of_guest(&parts.programs.guest)?;
        initramfs.nest(&guest, initramfs::GUEST_INITRD)?;
    }
    for file in &spec.files {
        initramfs.add(&file.host, &file.guest)?;
    }
    Ok(initramfs)
}

fn start_qemu(
    parts: &Parts,
    spec: &Spec,
    directory: &RunDirectory,
) -> Result<(Child, ChildStdin, ChildStdout), MachineError> {
    let emulator = directory.emulator();
    let log = File::create(&emulator).map_err(|source| MachineError::Logs {
        path: emulator,
        source,
    })?;
    let mut command = parts.qemu.command();
    command.args(spec.arguments(directory, &parts.kernel.image));
    let mut qemu = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(MachineError::Start)?;
    match (qemu.stdin.take(), qemu.stdout.take()) {
        (Some(stdin), Some(stdout)) => Ok((qemu, stdin, stdout)),
        _ => Err(MachineError::Start(io::ErrorKind::BrokenPipe.into())),
    }
}

fn read_from(path: &Path, offset: u64) -> Result<String, MachineError> {
    let read = || -> io::Result<String> {
        let mut file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
            other => other?,
        };
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().map_err(|source| MachineError::Logs {
        path: path.to_owned(),
        source,
    })
}

fn texts(list: Vec<Vec<u8>>) -> Vec<String> {
    list.iter()
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .collect()
}

fn shown(invocation: &Invocation) -> String {
    let words: Vec<_> = invocation
        .argv
        .iter()
        .map(|word| String::from_utf8_lossy(word))
        .collect();
    format!("`{}`", words.join(" "))
}
