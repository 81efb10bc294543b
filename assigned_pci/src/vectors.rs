//! The vectors of one kind that the guest has enabled, each with its connections: to the host,
//! which signals it, and to the guest, to whom it is delivered.
//!
//! Made when the guest enables the kind; [`Vectors::disconnect`] ends it. Each vector is brought to
//! what the guest wants of it by itself ([`Vectors::apply`]), and nothing is asked for twice:
//!
//! - it is connected when the guest first unmasks it: first its route, then the host's side, so
//!   that the first signal has somewhere to go. It then stays connected to the host. What the
//!   device signals before that goes nowhere;
//! - masked, it keeps its signals, and the host's side is not touched;
//! - what is refused is tried again when the guest next writes something that concerns it.
//!
//! # Hosts that cannot add a vector
//! MSI always, and MSI-X before Linux 6.5, are enabled with a number of vectors that then stays.
//! So all that the guest may use are enabled with the first, unconnected. If the host has not so
//! many, it is as many as are needed, and for each that is more all are disabled and enabled again.
//! What the device raises in between is lost, and each vector that was connected is signalled once
//! afterwards: an interrupt that nobody needs does no harm, one that is missing stops a driver.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;

use crate::{
    HostCall, HostError, HostFunction, HostVectors, MsiController, MsiKind, MsiMessage, MsiVector,
    Outcome,
};

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct Vectors {
    kind: MsiKind,
    dynamic: bool,
    /// So many the guest may use.
    count: u16,
    /// So many are enabled at the host; none before the first is connected.
    enabled: u16,
    /// By number, as far as any was needed.
    vectors: Vec<Option<Vector>>,
}

#[derive(Debug)]
struct Vector {
    guest: Box<dyn MsiVector>,
    /// How it is delivered; none while it is masked.
    delivered: Option<MsiMessage>,
    /// Whether the host signals it.
    connected: bool,
}

/// The two sides that vectors connect.
#[derive(Clone, Copy)]
pub(crate) struct Sides<'s> {
    pub(crate) host: &'s dyn HostFunction,
    pub(crate) controller: &'s dyn MsiController,
}

impl Vectors {
    /// The first `count` vectors of a kind, none of them connected.
    pub(crate) const fn new(kind: MsiKind, count: u16, host: HostVectors) -> Self {
        Self {
            kind,
            dynamic: host.dynamic,
            count,
            enabled: 0,
            vectors: Vec::new(),
        }
    }

    pub(crate) const fn kind(&self) -> MsiKind {
        self.kind
    }

    /// Which kind, and how many the guest may use.
    pub(crate) const fn extent(&self) -> (MsiKind, u16) {
        (self.kind, self.count)
    }

    /// Brings a vector to what the guest wants: delivered by this message, or masked.
    pub(crate) fn apply(
        &mut self,
        sides: Sides<'_>,
        number: u16,
        wanted: Option<MsiMessage>,
        outcome: &mut Outcome,
    ) {
        if number >= self.count {
            return;
        }
        let done = match wanted {
            Some(message) => self.deliver(sides, number, message, outcome),
            None => self.mask(number),
        };
        if let Err(error) = done {
            outcome.host_errors.push(error);
        }
    }

    /// Whether a vector that is not delivered has kept a signal.
    pub(crate) fn is_pending(&self, number: u16) -> bool {
        self.get(number)
            .is_some_and(|vector| vector.delivered.is_none() && vector.guest.is_pending())
    }

    /// Ends them all, the host's side first.
    pub(crate) fn disconnect(&mut self, host: &dyn HostFunction, outcome: &mut Outcome) {
        self.disable(host, outcome);
        self.vectors.clear();
    }

    fn get(&self, number: u16) -> Option<&Vector> {
        self.vectors.get(usize::from(number))?.as_ref()
    }

    fn mask(&mut self, number: u16) -> Result<(), HostError> {
        if let Some(Some(vector)) = self.vectors.get_mut(usize::from(number))
            && vector.delivered.is_some()
        {
            let call = HostCall::RouteVector(self.kind, number);
            vector
                .guest
                .mask()
                .map_err(|error| HostError::new(call, &error))?;
            vector.delivered = None;
        }
        Ok(())
    }

    fn deliver(
        &mut self,
        sides: Sides<'_>,
        number: u16,
        message: MsiMessage,
        outcome: &mut Outcome,
    ) -> Result<(), HostError> {
        let route = |error| HostError::new(HostCall::RouteVector(self.kind, number), &error);
        let at = usize::from(number);
        if self.vectors.len() <= at {
            self.vectors.resize_with(at.saturating_add(1), || None);
        }
        let Some(slot) = self.vectors.get_mut(at) else {
            return Ok(());
        };
        let vector = match slot {
            Some(vector) => vector,
            None => slot.insert(Vector {
                guest: sides.controller.vector().map_err(route)?,
                delivered: None,
                connected: false,
            }),
        };
        if vector.delivered != Some(message) {
            vector.guest.route(message).map_err(route)?;
            vector.delivered = Some(message);
        }
        if vector.connected {
            return Ok(());
        }
        let connected = if number >= self.enabled && !self.dynamic {
            self.enable_more(sides.host, number, outcome)
        } else {
            self.connect(sides.host, number)
        };
        let call = HostCall::ConnectVector(self.kind, number);
        connected.map_err(|error| HostError::new(call, &error))
    }

    /// Has the host signal a vector that can be enabled by itself, or is.
    fn connect(&mut self, host: &dyn HostFunction, number: u16) -> io::Result<()> {
        if self.enabled == 0 {
            // None of them: as few of the host's interrupts as there can be.
            host.connect_vectors(self.kind, 0, &[None])?;
            self.enabled = 1;
        }
        if let Some(Some(vector)) = self.vectors.get_mut(usize::from(number)) {
            let eventfd = Some(vector.guest.eventfd());
            host.connect_vectors(self.kind, number, &[eventfd])?;
            vector.connected = true;
        }
        Ok(())
    }

    /// Enables so many that `number` is among them, and connects it and those that were. Where the
    /// host has not so many, those that were are as before.
    fn enable_more(
        &mut self,
        host: &dyn HostFunction,
        number: u16,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        let before = self.enabled;
        self.disable(host, outcome);
        // MSI's vectors are told apart by the bits of one message, so it is all or none.
        let needed = match self.kind {
            MsiKind::Msi => self.count,
            MsiKind::MsiX => number.saturating_add(1),
        };
        let mut sizes = vec![self.count, needed, before];
        sizes.dedup();
        let mut refused = None;
        for size in sizes.into_iter().filter(|size| *size > 0) {
            match self.enable(host, number, size) {
                Ok(()) => break,
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        let enabled = self.enabled;
        for (at, vector) in (0..).zip(&mut self.vectors) {
            let Some(vector) = vector else { continue };
            vector.connected &= at < enabled;
            if vector.connected
                && at != number
                && let Err(error) = signal(vector.guest.eventfd())
            {
                let call = HostCall::ConnectVector(self.kind, at);
                outcome.host_errors.push(HostError::new(call, &error));
            }
        }
        match refused {
            Some(error) if number >= enabled => Err(error),
            _ => Ok(()),
        }
    }

    /// Enables `size` vectors at the host, where none is: connected are `number`, if it is one of
    /// them, and those that have been.
    fn enable(&mut self, host: &dyn HostFunction, number: u16, size: u16) -> io::Result<()> {
        let eventfds: Vec<Option<BorrowedFd<'_>>> = (0..size)
            .map(|at| {
                let vector = self.get(at)?;
                (vector.connected || at == number).then(|| vector.guest.eventfd())
            })
            .collect();
        host.connect_vectors(self.kind, 0, &eventfds)?;
        self.enabled = size;
        if number < size
            && let Some(Some(vector)) = self.vectors.get_mut(usize::from(number))
        {
            vector.connected = true;
        }
        Ok(())
    }

    /// Disables them at the host, if any is enabled. What is connected stays marked so.
    fn disable(&mut self, host: &dyn HostFunction, outcome: &mut Outcome) {
        if std::mem::take(&mut self.enabled) > 0
            && let Err(error) = host.disconnect_vectors(self.kind)
        {
            let call = HostCall::DisconnectVectors(self.kind);
            outcome.host_errors.push(HostError::new(call, &error));
        }
    }
}

/// Signals an eventfd once.
fn signal(eventfd: BorrowedFd<'_>) -> io::Result<()> {
    File::from(eventfd.try_clone_to_owned()?).write_all(&1_u64.to_ne_bytes())
}
