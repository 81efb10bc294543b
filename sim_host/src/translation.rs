//! DMA: how a function's access finds its bytes.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::RwLockReadGuard;

use memory_map::{Access, Iova};

use crate::host::{HostInner, State};
use crate::io_page_table::Source;
use crate::ioas_state::IoasKey;
use crate::log::{BusError, BusErrorCause, Fault, FaultCause, Violation};
use crate::page::pieces;
use crate::physical::PhysicalObject;

/// How to break the IOMMU's translation on purpose: the negative control of whoever claims to
/// prove that it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokenTranslation {
    /// Addresses go to the bus as they are, past the IOMMU.
    Identity,
    /// What is found is that many bytes further on.
    Shift(u64),
    /// Writes vanish and reads give all ones, and no fault is recorded.
    Drop,
}

/// Why an access ended nowhere.
enum Lost {
    Fault(FaultCause),
    Bus(BusErrorCause),
    Freed,
    Swallowed,
}

impl State {
    fn reach(
        &self,
        function: &str,
        iova: Iova,
        write: bool,
    ) -> Result<(Arc<PhysicalObject>, u64), Lost> {
        let iova = match self.broken {
            None => iova,
            Some(BrokenTranslation::Shift(by)) => Iova::new(iova.raw().wrapping_add(by)),
            Some(BrokenTranslation::Drop) => return Err(Lost::Swallowed),
            Some(BrokenTranslation::Identity) => {
                let (object, offset) = self
                    .bus
                    .find(iova.raw())
                    .ok_or(Lost::Bus(BusErrorCause::Unclaimed))?;
                return answered(object, offset);
            }
        };
        let group = self
            .functions
            .get(function)
            .and_then(|group| self.groups.get(group));
        if let Some(ioas) = group.and_then(|group| group.ioas) {
            return self.reach_by_ioas(ioas, iova, write);
        }
        let domain = group
            .and_then(|group| group.container)
            .and_then(|container| self.containers.get(&container))
            .and_then(|container| container.domain.as_ref())
            .ok_or(Lost::Fault(FaultCause::NoContainer))?;
        let mapping = domain
            .find(iova)
            .ok_or(Lost::Fault(FaultCause::NotMapped))?;
        if write && mapping.access == Access::ReadOnly {
            return Err(Lost::Fault(FaultCause::ReadOnly));
        }
        if !self.space.is_live(mapping.window) {
            return Err(Lost::Freed);
        }
        let into = iova.raw().wrapping_sub(mapping.iova.start().raw());
        answered(
            Arc::clone(&mapping.object),
            mapping.offset.wrapping_add(into),
        )
    }
}

impl State {
    /// The same through an address space of an iommufd.
    fn reach_by_ioas(
        &self,
        ioas: IoasKey,
        iova: Iova,
        write: bool,
    ) -> Result<(Arc<PhysicalObject>, u64), Lost> {
        let area = self
            .ioas(ioas)
            .ok()
            .and_then(|table| table.find(iova))
            .ok_or(Lost::Fault(FaultCause::NotMapped))?;
        if self.is_dead(area) {
            return Err(Lost::Fault(FaultCause::Revoked));
        }
        if write && area.access == Access::ReadOnly {
            return Err(Lost::Fault(FaultCause::ReadOnly));
        }
        if let Source::Address(window) = area.pages.source
            && !self.space.is_live(window)
        {
            return Err(Lost::Freed);
        }
        let Some(object) = &area.pages.object else {
            return Err(Lost::Fault(FaultCause::NotMapped));
        };
        let into = iova.raw().wrapping_sub(area.iova.start().raw());
        let offset = area.pages.offset.wrapping_add(area.start);
        answered(Arc::clone(object), offset.wrapping_add(into))
    }
}

fn answered(object: Arc<PhysicalObject>, offset: u64) -> Result<(Arc<PhysicalObject>, u64), Lost> {
    match &object.owner {
        Some(owner) if !owner.gate.decodes_memory() => {
            Err(Lost::Bus(BusErrorCause::PeerNotDecoding {
                peer: Arc::clone(&owner.function),
                bar: owner.bar,
            }))
        }
        _ => Ok((object, offset)),
    }
}

thread_local! {
    /// How many accesses this thread is in the middle of: registers that one of them reaches may
    /// issue DMA of their own.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Keeps the host as it is while an access is under way.
struct Still<'h>(RwLockReadGuard<'h, State>);

impl Deref for Still<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.0
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get().saturating_sub(1));
    }
}

impl HostInner {
    fn hold_still(&self) -> Still<'_> {
        let depth = DEPTH.get();
        // The outermost access lets a waiting unmap go first; a nested one must not wait for
        // whoever waits for it.
        let state = if depth == 0 {
            self.state.read()
        } else {
            self.state.read_recursive()
        };
        DEPTH.set(depth.saturating_add(1));
        Still(state)
    }

    /// A DMA read by `function`; what faults reads as all ones. Whether all of it was answered.
    pub fn dma_read(&self, function: &Arc<str>, iova: Iova, data: &mut [u8]) -> bool {
        let mut answered = true;
        for piece in pieces(iova.raw(), data.len()) {
            let Some(into) = data
                .get_mut(piece.at..)
                .and_then(|rest| rest.get_mut(..piece.len))
            else {
                continue;
            };
            let at = Iova::new(piece.address);
            let state = self.hold_still();
            match state.reach(function, at, false) {
                Ok((object, offset)) => object.read(offset, into),
                Err(lost) => {
                    into.fill(0xff);
                    answered = false;
                    self.lose(function, at, false, lost);
                }
            }
        }
        answered
    }

    /// A DMA write by `function`; what faults goes nowhere. Whether all of it was answered.
    pub fn dma_write(&self, function: &Arc<str>, iova: Iova, data: &[u8]) -> bool {
        let mut answered = true;
        for piece in pieces(iova.raw(), data.len()) {
            let Some(from) = data.get(piece.at..).and_then(|rest| rest.get(..piece.len)) else {
                continue;
            };
            let at = Iova::new(piece.address);
            let state = self.hold_still();
            match state.reach(function, at, true) {
                Ok((object, offset)) => object.write(offset, from),
                Err(lost) => {
                    answered = false;
                    self.lose(function, at, true, lost);
                }
            }
        }
        answered
    }

    /// Records an access that nobody answered.
    pub fn bus_error(&self, function: &Arc<str>, iova: Iova, write: bool, cause: BusErrorCause) {
        self.logs.lock().bus_errors.push(BusError {
            function: Arc::clone(function),
            iova,
            write,
            cause,
        });
    }

    fn lose(&self, function: &Arc<str>, iova: Iova, write: bool, lost: Lost) {
        let function = Arc::clone(function);
        match lost {
            Lost::Swallowed => {}
            Lost::Bus(cause) => self.bus_error(&function, iova, write, cause),
            Lost::Fault(cause) => self.logs.lock().faults.push(Fault {
                function,
                iova,
                write,
                cause,
            }),
            Lost::Freed => self.logs.lock().violations.push(Violation::DmaToFreed {
                function,
                iova,
                write,
            }),
        }
    }
}
