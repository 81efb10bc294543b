//! The two sides of interrupt vectors: a host that signals them, and a controller that counts what
//! it is asked for. Sockets stand for the eventfds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{HostVectors, MsiController, MsiKind, MsiMessage, MsiVector};

pub(super) const EINVAL: i32 = 22;
pub(super) const ENOSPC: i32 = 28;

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// The host's side, with the kernel's rules.
#[derive(Debug, Default)]
pub(super) struct FakeVectors {
    lent: BTreeMap<MsiKind, HostVectors>,
    state: Mutex<Enabled>,
}

#[derive(Debug, Default)]
struct Enabled {
    kind: Option<(MsiKind, u16)>,
    eventfds: BTreeMap<u16, OwnedFd>,
    /// So many can be enabled; all, if it says nothing.
    limit: Option<u16>,
}

impl FakeVectors {
    pub(super) fn lend(&mut self, kind: MsiKind, count: u16, dynamic: bool) {
        self.lent.insert(kind, HostVectors { count, dynamic });
    }

    pub(super) fn limit(&self, limit: Option<u16>) {
        self.state.lock().limit = limit;
    }

    pub(super) fn lent(&self, kind: MsiKind) -> HostVectors {
        self.lent.get(&kind).copied().unwrap_or_default()
    }

    /// Has the device raise a vector, and tells whether anybody is signalled.
    pub(super) fn raise(&self, kind: MsiKind, vector: u16) -> bool {
        let state = self.state.lock();
        let enabled = state.kind.is_some_and(|(enabled, _)| enabled == kind);
        let Some(fd) = state.eventfds.get(&vector).filter(|_| enabled) else {
            return false;
        };
        let mut file = File::from(fd.try_clone().unwrap());
        file.write_all(&1_u64.to_ne_bytes()).unwrap();
        true
    }

    /// Which vectors are connected.
    pub(super) fn connected(&self) -> Vec<u16> {
        self.state.lock().eventfds.keys().copied().collect()
    }

    pub(super) fn connect(
        &self,
        kind: MsiKind,
        first: u16,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let mut state = self.state.lock();
        let lent = self.lent(kind);
        let end = first + u16::try_from(eventfds.len()).unwrap();
        if end > lent.count {
            return refused(EINVAL);
        }
        let over = |limit: Option<u16>| limit.is_some_and(|limit| end > limit);
        match state.kind {
            None if over(state.limit) => return refused(ENOSPC),
            None => state.kind = Some((kind, end)),
            Some((enabled, _)) if enabled != kind => return refused(EINVAL),
            Some((_, count)) if end > count && !lent.dynamic => return refused(EINVAL),
            Some(_) if over(state.limit) => return refused(ENOSPC),
            Some(_) => {}
        }
        for (vector, fd) in (first..).zip(eventfds) {
            match fd {
                Some(fd) => {
                    let fd = fd.try_clone_to_owned().unwrap();
                    state.eventfds.insert(vector, fd);
                }
                None => {
                    state.eventfds.remove(&vector);
                }
            }
        }
        Ok(())
    }

    pub(super) fn disconnect(&self, kind: MsiKind) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.kind.is_none_or(|(enabled, _)| enabled != kind) {
            return refused(EINVAL);
        }
        state.kind = None;
        state.eventfds.clear();
        Ok(())
    }
}

/// What a controller was asked for. Vectors are numbered as they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Made(usize),
    Routed(usize, MsiMessage),
    Masked(usize),
    Ended(usize),
}

#[derive(Debug, Default)]
struct Book {
    made: usize,
    asked: Vec<Asked>,
    delivered: Vec<MsiMessage>,
    live: BTreeMap<usize, Live>,
    refuses: bool,
}

#[derive(Debug)]
struct Live {
    signals: UnixStream,
    kept: u64,
    route: Option<MsiMessage>,
}

impl Book {
    /// Takes what was signalled to a vector, and delivers it if it has a route.
    fn pump(&mut self, number: usize) {
        let Some(live) = self.live.get_mut(&number) else {
            return;
        };
        let mut signal = [0; 8];
        while live.signals.read_exact(&mut signal).is_ok() {
            live.kept += u64::from_ne_bytes(signal);
        }
        if let (Some(route), true) = (live.route, live.kept > 0) {
            live.kept = 0;
            self.delivered.push(route);
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct FakeController(Arc<Mutex<Book>>);

impl FakeController {
    /// What was asked since the last look.
    pub(super) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.lock().asked)
    }

    /// What was delivered since the last look.
    pub(super) fn delivered(&self) -> Vec<MsiMessage> {
        let mut book = self.0.lock();
        for number in 0..book.made {
            book.pump(number);
        }
        std::mem::take(&mut book.delivered)
    }

    pub(super) fn live(&self) -> usize {
        self.0.lock().live.len()
    }

    pub(super) fn refuse(&self, refuses: bool) {
        self.0.lock().refuses = refuses;
    }
}

impl MsiController for FakeController {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let mut book = self.0.lock();
        if book.refuses {
            return refused(ENOSPC);
        }
        let number = book.made;
        book.made += 1;
        book.asked.push(Asked::Made(number));
        let (eventfd, signals) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        let (kept, route) = (0, None);
        book.live.insert(
            number,
            Live {
                signals,
                kept,
                route,
            },
        );
        Ok(Box::new(FakeVector {
            number,
            eventfd,
            book: self.0.clone(),
        }))
    }
}

#[derive(Debug)]
struct FakeVector {
    number: usize,
    eventfd: UnixStream,
    book: Arc<Mutex<Book>>,
}

impl FakeVector {
    fn set_route(&self, asked: Asked, route: Option<MsiMessage>) -> io::Result<()> {
        let mut book = self.book.lock();
        book.pump(self.number);
        book.asked.push(asked);
        if book.refuses {
            return refused(ENOSPC);
        }
        let before = std::mem::replace(&mut book.live.get_mut(&self.number).unwrap().route, route);
        assert_ne!(before, route, "asked for what is there");
        book.pump(self.number);
        Ok(())
    }
}

impl MsiVector for FakeVector {
    fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    fn route(&mut self, message: MsiMessage) -> io::Result<()> {
        self.set_route(Asked::Routed(self.number, message), Some(message))
    }

    fn mask(&mut self) -> io::Result<()> {
        self.set_route(Asked::Masked(self.number), None)
    }

    fn is_pending(&self) -> bool {
        let mut book = self.book.lock();
        book.pump(self.number);
        book.live[&self.number].kept > 0
    }
}

impl Drop for FakeVector {
    fn drop(&mut self) {
        let mut book = self.book.lock();
        book.asked.push(Asked::Ended(self.number));
        book.live.remove(&self.number);
    }
}
