//! Being told by the host that it wants a function back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use assigned_pci::VfioFunction;
use vfio_sys::{Bdf, EventFd, IrqIndex, wait_for_any};

/// The functions that the host has not asked for yet, with the eventfds by which it will.
#[derive(Debug)]
pub struct Requests(Vec<(String, EventFd)>);

impl Requests {
    /// From now on what the host asks for is noticed.
    pub fn of(functions: &[(Bdf, Arc<VfioFunction>)]) -> Result<Self> {
        let mut requests = Vec::new();
        for (bdf, function) in functions {
            let listen = || -> io::Result<EventFd> {
                let event = EventFd::new()?;
                let line = [Some(event.as_fd())];
                function.device().enable_irqs(IrqIndex::REQUEST, 0, &line)?;
                Ok(event)
            };
            let event = listen();
            let event =
                event.with_context(|| format!("{bdf} cannot tell that the host wants it back"))?;
            requests.push((bdf.to_string(), event));
        }
        Ok(Self(requests))
    }

    /// Waits for the next one, by its name, or for something to be read from `end`: then it is none.
    pub fn next(&mut self, end: BorrowedFd<'_>) -> Result<Option<String>> {
        let files = self.0.iter().map(|(_, event)| event.as_fd());
        let files: Vec<BorrowedFd<'_>> = files.chain([end]).collect();
        let ready = wait_for_any(&files).context("waiting for what the host wants back")?;
        // A function that is wanted comes before the end.
        match ready.first() {
            Some(place) if *place < self.0.len() => Ok(Some(self.0.remove(*place).0)),
            _ => Ok(None),
        }
    }
}
