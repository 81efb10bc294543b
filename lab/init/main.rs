//! PID 1 of the nested machine.
//!
//! It mounts what programs expect, loads the kernel's modules, binds every PCI function that is not
//! part of the machine's own chipset to vfio-pci, and then runs the commands that come over the
//! channel (see [`lab::channel`]) until it is told to power off. What goes wrong on the way is
//! collected and told to the host with the first message; nothing here panics, because a PID 1 that
//! ends takes the machine with it.

mod commands;
mod modules;
mod mounts;
mod pci;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::process::Command;
use std::sync::{Arc, Mutex};

use lab::channel::{ChannelError, GREETING, Message};
use rustix::system::RebootCommand;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// The second serial port; the first is the console.
const CHANNEL: &str = "/dev/ttyS1";

/// What did not go as it should, in words.
#[derive(Debug, Default)]
pub struct Problems(Vec<String>);

impl Problems {
    /// Notes a problem.
    pub fn note(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    /// Notes what was tried and how it failed, if it did.
    pub fn check<T, E: std::fmt::Display>(
        &mut self,
        what: &str,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.note(format!("{what}: {error}"));
                None
            }
        }
    }
}

fn main() {
    let mut problems = Problems::default();
    mounts::mount_all(&mut problems);
    modules::load_all(&mut problems);
    let bound = pci::bind_all(&mut problems);
    problems.check(
        "installing busybox's applets",
        Command::new("/bin/busybox")
            .args(["--install", "-s", "/bin"])
            .status(),
    );
    if let Err(error) = serve(bound, problems) {
        // To the console: the host shows its end.
        eprintln!("lab_init: {error}");
    }
    power_off();
}

/// Serves commands until the host wants the machine off.
fn serve(bound: Vec<String>, problems: Problems) -> Result<(), ChannelError> {
    let bytes = |list: Vec<String>| list.into_iter().map(String::into_bytes).collect();
    let mut line = open_line()?;
    line.write_all(GREETING)?;
    let answers = Arc::new(Mutex::new(line.try_clone()?));
    let ready = Message::Ready {
        bound: bytes(bound),
        problems: bytes(problems.0),
    };
    commands::answer(&answers, &ready)?;
    loop {
        match Message::read_from(&mut line)? {
            Some(Message::Run { id, argv, env }) => commands::run(id, &argv, &env, &answers)?,
            Some(Message::PowerOff) | None => return Ok(()),
            // The host sends nothing else.
            Some(_) => {}
        }
    }
}

/// The channel's line, raw: no echo, no signals, every byte as it is.
fn open_line() -> std::io::Result<File> {
    // Opening a terminal makes it PID 1's controlling one unless O_NOCTTY says no.
    let noctty = i32::try_from(rustix::fs::OFlags::NOCTTY.bits()).unwrap_or(0);
    let line = std::os::unix::fs::OpenOptionsExt::custom_flags(
        OpenOptions::new().read(true).write(true),
        noctty,
    )
    .open(CHANNEL)?;
    let mut attributes = tcgetattr(&line)?;
    attributes.make_raw();
    tcsetattr(&line, OptionalActions::Flush, &attributes)?;
    Ok(line)
}

fn power_off() {
    rustix::fs::sync();
    for command in [RebootCommand::PowerOff, RebootCommand::Restart] {
        if let Err(error) = rustix::system::reboot(command) {
            eprintln!("lab_init: {command:?}: {error}");
        }
    }
    // Returning ends PID 1, which is a panic, which ends QEMU: the last resort.
}
