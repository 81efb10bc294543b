//! Being told by the host that it wants a function back, and seeing to it that it gets it.
//!
//! A host that pulls a function out, or unbinds it, signals VFIO's request interrupt and waits until
//! its file, its mappings and its dma-bufs are closed. Whoever has it gives it up in this order, so
//! that nobody reaches a device that is no longer theirs, and nothing else is taken down:
//!
//! 1. It masters the bus no more, and its BARs leave the map, and with it every address space, in one
//!    commit ([`AssignedFunction::remove`](assigned_pci::AssignedFunction::remove)).
//! 2. An address space that nobody else is behind is unregistered: a container ends with its last
//!    function.
//! 3. Whoever was told of its file forgets it ([`Announce`](super::Announce)).
//! 4. The last handle on it is dropped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use assigned_pci::{Outcome, VfioFunction};
use vfio_sys::{Bdf, EventFd, IrqIndex, wait_for_any};

/// The functions that the host has not asked for yet, with the eventfds by which it will.
#[derive(Debug)]
pub struct Requests(Vec<(Bdf, EventFd)>);

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
            requests.push((*bdf, event));
        }
        Ok(Self(requests))
    }

    /// The same of functions that signal these.
    #[cfg(test)]
    pub const fn by(events: Vec<(Bdf, EventFd)>) -> Self {
        Self(events)
    }

    /// Waits for the next one, or for something to be read from `end`, or for its end: then it is
    /// none. Each function is told once, however often the host asks.
    pub fn next(&mut self, end: BorrowedFd<'_>) -> Result<Option<Bdf>> {
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

/// That a function has left the map and every address space, by what came of its removal.
pub fn ensure_left(function: &str, outcome: &Outcome) -> Result<()> {
    if let Some(error) = outcome.map_errors.first() {
        bail!("{function} does not leave the memory map: {error}");
    }
    let mut quarantined = outcome.reports.iter().flat_map(|it| &it.quarantined);
    match quarantined.next() {
        Some((_, why)) => {
            Err(why.clone()).with_context(|| format!("taking {function} out of an address space"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn each_function_is_told_once_and_before_the_end() {
        let bdfs: [Bdf; 2] = ["0000:01:00.0", "0000:02:00.0"].map(|text| text.parse().unwrap());
        let (reader, writer) = io::pipe().unwrap();
        let requests = bdfs.map(|bdf| (bdf, EventFd::new().unwrap()));
        let ask = |number: usize| {
            let (_, event) = &requests[number];
            let file = event.as_fd().try_clone_to_owned().unwrap();
            move || {
                let file = std::fs::File::from(file.try_clone().unwrap());
                (&file).write_all(&1_u64.to_ne_bytes()).unwrap();
            }
        };
        let asks = [ask(0), ask(1)];
        let mut requests = Requests::by(requests.into());
        asks[1]();
        asks[1]();
        drop(writer);
        assert_eq!(requests.next(reader.as_fd()).unwrap(), Some(bdfs[1]));
        asks[1]();
        assert_eq!(requests.next(reader.as_fd()).unwrap(), None);
        asks[0]();
        assert_eq!(requests.next(reader.as_fd()).unwrap(), Some(bdfs[0]));
        assert_eq!(requests.next(reader.as_fd()).unwrap(), None);
    }
}
