//! Where what is said goes, without ever waiting for whoever reads it.
//!
//! A processor that prints must not stand still because a pipe is full, and a machine must come to
//! its end. So a thread writes, and what there is no room for is lost.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How much waits to be written at the most, in bytes.
const ROOM: usize = 4 << 20;
/// How long the end waits for what has not been written.
const PATIENCE: Duration = Duration::from_secs(2);

/// A standard stream that is written to in the background. Clones are handles on the same.
#[derive(Clone)]
pub struct Outlet(Arc<Shared>);

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// Whether the thread is writing what it has taken.
    writing: bool,
    /// Whether nobody reads any more.
    closed: bool,
}

impl Outlet {
    /// One that writes to `stream`.
    pub fn new(stream: impl AsFd) -> Result<Self> {
        let file = stream.as_fd().try_clone_to_owned();
        let file = File::from(file.context("opening a standard stream again failed")?);
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        thread::Builder::new()
            .name("outlet".to_owned())
            .spawn(move || theirs.write_to(file))
            .context("starting a thread for output failed")?;
        Ok(Self(shared))
    }

    /// Says a line of this program's, for a terminal that may be raw.
    pub fn say(&self, line: impl std::fmt::Display) {
        // It takes everything.
        let _said = write!(self.clone(), "throughway: {line}\r\n");
    }

    /// Waits until all is written, but not for ever.
    pub fn drain(&self) {
        let until = Instant::now() + PATIENCE;
        let mut waiting = self.0.waiting();
        while !waiting.closed && (waiting.writing || !waiting.bytes.is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.0.changed.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Outlet {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.waiting();
        if !waiting.closed {
            let room = ROOM.saturating_sub(waiting.bytes.len());
            waiting.bytes.extend(data.iter().take(room));
            self.0.changed.notify_all();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Bytes and two flags, each changed at once.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes for as long as somebody reads.
    fn write_to(&self, mut file: File) {
        loop {
            let taken: Vec<u8> = {
                let mut waiting = self.waiting();
                waiting.writing = false;
                self.changed.notify_all();
                while waiting.bytes.is_empty() {
                    let woken = self.changed.wait(waiting);
                    waiting = woken.unwrap_or_else(PoisonError::into_inner);
                }
                waiting.writing = true;
                waiting.bytes.drain(..).collect()
            };
            if file.write_all(&taken).is_err() {
                let mut waiting = self.waiting();
                waiting.closed = true;
                waiting.bytes.clear();
                self.changed.notify_all();
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_said_arrives_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut outlet = Outlet::new(&writer).unwrap();
        let text: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let said = text.clone();
        let saying = thread::spawn(move || {
            for piece in said.chunks(7) {
                outlet.write_all(piece).unwrap();
            }
            outlet
        });
        let mut read = vec![0; text.len()];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(read, text);
        saying.join().unwrap().drain();
    }

    #[test]
    fn nobody_waits_for_a_pipe_that_is_full() {
        let (reader, writer) = io::pipe().unwrap();
        let mut outlet = Outlet::new(&writer).unwrap();
        // More than the pipe and the outlet take together.
        for _ in 0..1000 {
            outlet.write_all(&[b'x'; 10_000]).unwrap();
        }
        assert!(outlet.0.waiting().bytes.len() <= ROOM);
        drop(reader);
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut outlet = Outlet::new(&writer).unwrap();
        outlet.write_all(b"to nobody").unwrap();
        outlet.drain();
        outlet.write_all(b"nor now").unwrap();
    }
}
