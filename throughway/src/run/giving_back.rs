//! Gives the host what it wants back while the machine runs.
//!
//! A thread waits for VFIO's request interrupts. It owns the [`Holdings`] meanwhile, and returns them
//! when it is told that the machine has ended. A mistake of ours ends the listening and nothing else:
//! holdings that are dropped would take every IOMMU from a guest that runs.

use std::fmt;
use std::io::{self, PipeWriter};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
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
                let mut serve = || {
                    serve(
                        &mut holdings,
                        &mut requests,
                        ended.as_fd(),
                        &pull_out,
                        &notices,
                    )
                };
                let deaf = |why: &dyn fmt::Display| {
                    let what = "cannot be heard any more if it wants a function back";
                    notices.note("the host", what, why);
                };
                loop {
                    match catch_unwind(AssertUnwindSafe(&mut serve)) {
                        Ok(Ok(ControlFlow::Continue(()))) => {}
                        Ok(Ok(ControlFlow::Break(()))) => break,
                        Ok(Err(error)) => {
                            deaf(&format_args!("{error:#}"));
                            break;
                        }
                        Err(_) => {
                            deaf(&"its thread panicked, which is a bug in this program: please report it");
                            break;
                        }
                    }
                }
                holdings
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

/// Waits for a request and does what it asks for; breaks at the end.
fn serve(
    holdings: &mut Holdings,
    requests: &mut Requests,
    ended: BorrowedFd<'_>,
    pull_out: &impl Fn(usize) -> Option<PulledOut>,
    notices: &Notices,
) -> Result<ControlFlow<()>> {
    let Some(bdf) = requests.next(ended)? else {
        return Ok(ControlFlow::Break(()));
    };
    let mut members = holdings.members.iter();
    if let Some(place) = members.position(|member| member.bdf == bdf)
        && let Some(pulled) = pull_out(place)
    {
        give_back(holdings, place, pulled, notices);
    }
    Ok(ControlFlow::Continue(()))
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
