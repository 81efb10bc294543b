//! `vm-figures`: what a virtual machine costs, whichever program runs it.
//!
//! It starts the program on a terminal of its own, notes when the guest first says something (the
//! lines of the program `guest`), and looks at the process when the guest says that it waits. Then
//! it kills it, and prints one JSON object.

mod process;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Value, json};

/// What the guest's lines begin with.
const MARK: &str = "guest: ";
/// How long the guest may take until it waits, unless `--limit` says otherwise.
const LIMIT: Duration = Duration::from_secs(60);
const USAGE: &str = "\
usage: vm-figures [--limit SECONDS] PROGRAM [ARGUMENT]...

The guest's last step must be `wait`.";

fn main() -> ExitCode {
    let argv: Vec<String> = std::env::args().skip(1).collect();
    let Some((limit, program, arguments)) = read(&argv) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match measure(limit, program, arguments) {
        Ok(figures) => {
            println!("{figures}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vm-figures: {error}");
            ExitCode::FAILURE
        }
    }
}

fn read(argv: &[String]) -> Option<(Duration, &str, &[String])> {
    match argv {
        [option, limit, program, arguments @ ..] if option == "--limit" => {
            let limit = Duration::from_secs(limit.parse().ok()?);
            Some((limit, program, arguments))
        }
        [program, arguments @ ..] => Some((LIMIT, program, arguments)),
        [] => None,
    }
}

/// Starts it, and kills it when all is known or nothing comes.
fn measure(
    limit: Duration,
    program: &str,
    arguments: &[String],
) -> Result<Value, Box<dyn std::error::Error>> {
    let (ours, theirs) = terminal()?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::from(theirs.try_clone()?))
        .stdout(Stdio::from(theirs.try_clone()?))
        .stderr(Stdio::from(theirs));
    let start = Instant::now();
    let mut child = command.spawn()?;
    // What was said is at its end when nobody has the other side any more.
    drop(command);
    let pid = child.id();
    let (known, wait) = channel::<()>();
    let reader = thread::spawn(move || {
        // It is dropped at the end, whatever that is.
        let _known = known;
        watch(ours, start, pid).map_err(|error| error.to_string())
    });
    wait_for(&wait, limit);
    child.kill()?;
    child.wait()?;
    let figures = reader.join().map_err(|_| "reading what it says panicked")?;
    Ok(figures?)
}

fn wait_for(end: &Receiver<()>, limit: Duration) {
    // Nothing is ever sent: it is the end, or it took too long.
    let _ = end.recv_timeout(limit);
}

/// Reads what it says, until the guest waits.
fn watch(said: File, start: Instant, pid: u32) -> Result<Value, Box<dyn std::error::Error>> {
    let mut lines = Vec::new();
    let mut first = None;
    let mut other = Vec::new();
    for line in BufReader::new(said).split(b'\n') {
        // A terminal whose other side is gone is an error to read.
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line).into_owned();
        let Some((_, line)) = line.split_once(MARK) else {
            other.push(line);
            continue;
        };
        first.get_or_insert_with(|| start.elapsed());
        let line: Value = serde_json::from_str(line.trim_end())?;
        let waits = line["how"] == "wait";
        lines.push(line);
        if waits {
            return Ok(json!({
                "first line seconds": first.map(|time| time.as_secs_f64()),
                "memory": process::memory(pid)?,
                "threads": process::threads(pid)?,
                "kvm": process::kvm_counters(pid)?,
                "guest": lines,
            }));
        }
    }
    let lines = lines.iter().map(Value::to_string).chain(other);
    let lines: Vec<String> = lines.collect();
    Err(format!(
        "the guest does not wait. What was said:\n{}",
        lines.join("\n")
    )
    .into())
}

/// Both sides of a new terminal, which changes nothing of what is written to it.
fn terminal() -> std::io::Result<(File, File)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let theirs = open(name, flags, Mode::empty())?;
    let mut settings = tcgetattr(&theirs)?;
    settings.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &settings)?;
    Ok((ours.into(), theirs.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_may_come_first() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<String>>();
        let of = |argv: &[String]| {
            read(argv).map(|(limit, program, rest)| (limit, program.to_owned(), rest.len()))
        };
        let ten = Duration::from_secs(10);
        assert_eq!(
            of(&words("--limit 10 vmm a b")),
            Some((ten, "vmm".into(), 2))
        );
        assert_eq!(of(&words("vmm --limit 10")), Some((LIMIT, "vmm".into(), 2)));
        assert_eq!(of(&words("--limit x vmm")), None);
        assert_eq!(of(&[]), None);
    }
}
