//! Gives the host what it wants back while the machine runs.
//!
//! A thread waits for VFIO's request interrupts. It owns the [`Holdings`] meanwhile, and returns them
//! when it is told that the machine has ended.

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use machine::{Notices, PulledOut};

use super::holdings::Holdings;
use crate::host::Requests;

/// The thread. Dropping it ends it, and the holdings with it.
pub struct GivingBack {
    /// Closing it is the thread's end.
    running: Option<PipeWriter>,
    thread: Option<JoinHandle<Holdings>>,
}

impl GivingBack {
    /// Begins to listen. `pull_out` takes a function out of the machine, by its place.
    pub fn start(
        mut holdings: Holdings,
        mut requests: Requests,
        pull_out: impl Fn(usize) -> Option<PulledOut> + Send + 'static,
        notices: Arc<Notices>,
    ) -> Result<Self> {
        let (ended, running) = io::pipe().context("making a pipe failed")?;
        let thread = thread::Builder::new()
            .name("requests".to_owned())
            .spawn(move || {
                loop {
                    match requests.next(ended.as_fd()) {
                        Ok(Some(bdf)) => {
                            let members = &holdings.members;
                            let place = members.iter().position(|member| member.bdf == bdf);
                            if let Some(place) = place
                                && let Some(pulled) = pull_out(place)
                            {
                                give_back(&mut holdings, place, pulled, &notices);
                            }
                        }
                        Ok(None) => return holdings,
                        Err(error) => {
                            let what = "cannot be heard any more if it wants a function back";
                            notices.note("the host", what, &format_args!("{error:#}"));
                            return holdings;
                        }
                    }
                }
            })
            .context("starting a thread for the host's requests failed")?;
        Ok(Self {
            running: Some(running),
            thread: Some(thread),
        })
    }

    /// Ends it. What is left is the caller's.
    pub fn end(mut self) -> Result<Holdings> {
        self.join()
            .context("the thread for the host's requests has ended before")?
            .map_err(|_| anyhow!("the thread for the host's requests panicked"))
    }

    fn join(&mut self) -> Option<thread::Result<Holdings>> {
        drop(self.running.take());
        Some(self.thread.take()?.join())
    }
}

impl Drop for GivingBack {
    fn drop(&mut self) {
        // Holdings end by themselves, and a panic has said so itself.
        drop(self.join());
    }
}

fn give_back(holdings: &mut Holdings, place: usize, pulled: PulledOut, notices: &Notices) {
    let given = holdings.give_back(place, pulled);
    let name = holdings.members.get(place);
    let name = name.map_or("a function", |member| member.name.as_str());
    match given {
        Ok(()) => {
            let how = "it has left the machine";
            notices.note(name, "the host wanted it back", &how);
        }
        Err(error) => {
            let how = format_args!("{error:#}");
            notices.note(name, "the host wants it back and may not get it", &how);
        }
    }
}
