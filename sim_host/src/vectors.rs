//! A simulated function's interrupt vectors, with the rules of vfio-pci: one kind at a time, as
//! many as the first call asks for, more of MSI-X alone and on newer kernels.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use assigned_pci::{HostVectors, MsiKind};
use libc::{EINVAL, ENOSPC};
use parking_lot::Mutex;

use crate::function_spec::FunctionSpec;
use crate::gate::Gate;

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// The vectors of one function: its host's side, and the device's, which raises them.
#[derive(Debug)]
pub(crate) struct Vectors {
    gate: Arc<Gate>,
    msi: HostVectors,
    msix: HostVectors,
    /// So many the host can enable.
    left: u16,
    enabled: Mutex<Option<Enabled>>,
}

#[derive(Debug)]
struct Enabled {
    kind: MsiKind,
    /// So many are.
    count: u16,
    eventfds: BTreeMap<u16, OwnedFd>,
}

impl Vectors {
    pub fn new(spec: &FunctionSpec, gate: Arc<Gate>) -> Self {
        Self {
            gate,
            msi: HostVectors {
                count: spec.msi.map_or(0, |msi| msi.vectors),
                dynamic: false,
            },
            msix: HostVectors {
                count: spec.msix.map_or(0, |msix| msix.vectors),
                dynamic: !spec.fixed_vectors,
            },
            left: spec.host_vectors,
            enabled: Mutex::default(),
        }
    }

    pub fn lent(&self, kind: MsiKind) -> HostVectors {
        match kind {
            MsiKind::Msi => self.msi,
            MsiKind::MsiX => self.msix,
        }
    }

    pub fn connect(
        &self,
        kind: MsiKind,
        first: u16,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let lent = self.lent(kind);
        let end = u16::try_from(eventfds.len())
            .ok()
            .and_then(|count| first.checked_add(count))
            .filter(|end| *end <= lent.count && *end > first);
        let Some(end) = end else {
            return refused(EINVAL);
        };
        let mut enabled = self.enabled.lock();
        let state = match &mut *enabled {
            Some(state) if state.kind != kind => return refused(EINVAL),
            Some(state) if end > state.count && !lent.dynamic => return refused(EINVAL),
            Some(_) | None if end > self.left => return refused(ENOSPC),
            Some(state) => state,
            none => none.insert(Enabled {
                kind,
                count: end,
                eventfds: BTreeMap::new(),
            }),
        };
        for (vector, eventfd) in (first..).zip(eventfds) {
            match eventfd {
                Some(eventfd) => {
                    let eventfd = eventfd.try_clone_to_owned()?;
                    state.eventfds.insert(vector, eventfd);
                }
                None => {
                    state.eventfds.remove(&vector);
                }
            }
        }
        Ok(())
    }

    pub fn disconnect(&self, kind: MsiKind) -> io::Result<()> {
        let mut enabled = self.enabled.lock();
        if enabled.as_ref().is_none_or(|state| state.kind != kind) {
            return refused(EINVAL);
        }
        *enabled = None;
        Ok(())
    }

    /// Has the device raise a vector of the kind that is enabled, and tells whether anybody was
    /// signalled. A message is a write like any other: nothing comes of it without bus mastering.
    pub fn raise(&self, vector: u16) -> bool {
        let enabled = self.enabled.lock();
        let eventfd = enabled
            .as_ref()
            .and_then(|state| state.eventfds.get(&vector));
        let Some(eventfd) = eventfd.filter(|_| self.gate.masters_bus()) else {
            return false;
        };
        let signal = |eventfd: OwnedFd| File::from(eventfd).write_all(&1_u64.to_ne_bytes());
        eventfd.try_clone().and_then(signal).is_ok()
    }

    /// Which vectors are connected, and of which kind.
    pub fn connected(&self) -> Option<(MsiKind, Vec<u16>)> {
        let enabled = self.enabled.lock();
        let state = enabled.as_ref()?;
        Some((state.kind, state.eventfds.keys().copied().collect()))
    }
}
