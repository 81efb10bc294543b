//! Running one command, with its output sent to the host as it comes.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lab::channel::{ChannelError, Message, Status};
use rustix::process::{Pid, WaitOptions, WaitStatus, wait};

/// The channel's sending end, shared by the threads that carry output.
type Answers = Arc<Mutex<std::fs::File>>;

/// Once a command has ended, its output is complete when both pipes are closed, or when a child it
/// left behind has kept one open for this long without writing.
const SILENCE: Duration = Duration::from_millis(500);

/// Sends one message to the host.
pub fn answer(answers: &Answers, message: &Message) -> Result<(), ChannelError> {
    let mut line = answers.lock().unwrap_or_else(PoisonError::into_inner);
    message.write_to(&mut *line)
}

/// Runs a command to its end and reports it. A command that cannot be run is reported as a shell
/// would: a line on its standard error, status 127 or 126.
pub fn run(
    id: u32,
    argv: &[Vec<u8>],
    env: &[Vec<u8>],
    answers: &Answers,
) -> Result<(), ChannelError> {
    // What earlier commands left behind and has ended since.
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}

    let status = match start(argv, env) {
        Ok((pid, pipes)) => {
            let sent = Arc::new(AtomicU64::new(0));
            let (done, ends) = mpsc::channel();
            for (pipe, wrap) in pipes {
                carry(pipe, id, wrap, answers, &sent, &done);
            }
            drop(done);
            let status = await_end(pid);
            await_output(&ends, &sent);
            status
        }
        Err(error) => {
            let name = argv.first().map(|a| String::from_utf8_lossy(a));
            let text = format!(
                "lab_init: cannot run `{}`: {error}\n",
                name.unwrap_or_default()
            );
            let bytes = text.into_bytes();
            answer(answers, &Message::Stderr { id, bytes })?;
            Status::Exited(match error.kind() {
                io::ErrorKind::NotFound => 127,
                _ => 126,
            })
        }
    };
    answer(answers, &Message::Exit { id, status })
}

type Pipe = Box<dyn Read + Send>;
type Wrap = fn(u32, Vec<u8>) -> Message;

fn start(argv: &[Vec<u8>], env: &[Vec<u8>]) -> io::Result<(Pid, [(Pipe, Wrap); 2])> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text);
    let (program, arguments) = argv.split_first().ok_or_else(|| invalid("no command"))?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(arguments.iter().map(|a| OsStr::from_bytes(a)))
        .env_clear()
        .env("PATH", "/lab/bin:/bin")
        .env("HOME", "/root")
        .env("USER", "root")
        .env("TERM", "dumb")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for variable in env {
        let at = variable.iter().position(|&byte| byte == b'=');
        let (name, value) = at
            .and_then(|at| variable.split_at_checked(at))
            .ok_or_else(|| invalid("a variable without `=`"))?;
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(&value[1..]));
    }
    let mut child = command.spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    match (pid, child.stdout.take(), child.stderr.take()) {
        (Some(pid), Some(stdout), Some(stderr)) => Ok((
            pid,
            [
                (Box::new(stdout), |id, bytes| Message::Stdout { id, bytes }),
                (Box::new(stderr), |id, bytes| Message::Stderr { id, bytes }),
            ],
        )),
        _ => Err(io::Error::other("the child has no pid or no pipes")),
    }
}

/// Carries what comes out of a pipe to the host, in a thread of its own, until the pipe closes.
fn carry(
    mut pipe: Pipe,
    id: u32,
    wrap: Wrap,
    answers: &Answers,
    sent: &Arc<AtomicU64>,
    done: &Sender<()>,
) {
    let (answers, sent, done) = (Arc::clone(answers), Arc::clone(sent), done.clone());
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                    if answer(&answers, &wrap(id, bytes)).is_err() {
                        break;
                    }
                    sent.fetch_add(1, Ordering::SeqCst);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // The receiver may have stopped waiting.
        let _ = done.send(());
    });
}

/// Waits for the end of one child, and buries every other that ends meanwhile: orphans become
/// PID 1's.
fn await_end(child: Pid) -> Status {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == child => return status_of(status),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // No children at all: somebody has buried it already.
            Err(_) => return Status::Exited(u8::MAX),
        }
    }
}

fn status_of(status: WaitStatus) -> Status {
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match status.terminating_signal() {
        Some(signal) => Status::Signalled(byte(signal)),
        None => Status::Exited(byte(status.exit_status().unwrap_or(i32::MAX))),
    }
}

fn await_output(ends: &mpsc::Receiver<()>, sent: &AtomicU64) {
    let mut last = sent.load(Ordering::SeqCst);
    loop {
        match ends.recv_timeout(SILENCE) {
            Ok(()) => {}
            // Both carriers are gone.
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let now = sent.load(Ordering::SeqCst);
                if now == last {
                    return;
                }
                last = now;
            }
        }
    }
}
