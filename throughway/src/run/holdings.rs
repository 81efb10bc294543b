//! What a machine holds of the host: functions, their address spaces, and what KVM knows of them.
//!
//! The assembly makes it. While the machine runs, the thread that [gives functions
//! back](super::giving_back) owns it; afterwards whoever ends the machine. So nobody shares it, and
//! there is nothing to lock.
//!
//! What always holds:
//!
//! 1. A function that is given back goes in the order of [`crate::host`]'s requests: out of the map
//!    and so out of every address space and memory slot, then its address space if it was the last one
//!    there, then KVM's knowledge of it, then the handles.
//! 2. Nothing that fails on the way keeps the rest from being done: the host waits for all of it.
//! 3. Places are those among the machine's functions, and stay what they are.
//! 4. An address space has a target for as long as a function is behind it.

use std::sync::Arc;

use anyhow::{Context, Error, Result, ensure};
use assigned_pci::AssignedFunction;
use machine::PulledOut;
use memory_map::{TargetHandle, TargetId};
use vfio_sys::Bdf;

use super::known_to_kvm::KnownToKvm;
use crate::host::ensure_left;

/// A function that the guest gets.
pub struct Member {
    pub name: String,
    pub bdf: Bdf,
    /// None once it was given back.
    pub function: Option<Arc<AssignedFunction>>,
    /// Its address space's place among all.
    pub space: usize,
}

/// See the [module's documentation](self). Fields end in this order.
pub struct Holdings {
    pub members: Vec<Member>,
    spaces: Vec<Space>,
    known: Option<KnownToKvm>,
    /// What could not be given back.
    failed: Option<Error>,
}

/// An address space of an IOMMU.
struct Space {
    name: String,
    /// None once nobody is behind it any more.
    target: Option<TargetHandle>,
}

impl Holdings {
    /// All that there is at first.
    pub fn new(
        members: Vec<Member>,
        spaces: Vec<(String, TargetHandle)>,
        known: Option<KnownToKvm>,
    ) -> Self {
        let spaces = spaces.into_iter().map(|(name, target)| Space {
            name,
            target: Some(target),
        });
        Self {
            members,
            spaces: spaces.collect(),
            known,
            failed: None,
        }
    }

    /// The functions that are there, by their places.
    pub fn functions(&self) -> impl Iterator<Item = &Arc<AssignedFunction>> {
        self.members
            .iter()
            .filter_map(|member| member.function.as_ref())
    }

    /// An address space's name.
    pub fn space_name(&self, space: usize) -> Option<&str> {
        self.spaces.get(space).map(|space| space.name.as_str())
    }

    /// An address space's target.
    pub fn target(&self, space: usize) -> Option<TargetId> {
        Some(self.spaces.get(space)?.target.as_ref()?.id())
    }

    /// Gives a function back that was pulled out of the machine, by its place. What fails is
    /// returned, and told once more at the [end](Self::end) if something may be left mapped.
    pub fn give_back(&mut self, place: usize, pulled: PulledOut) -> Result<()> {
        let member = self.members.get_mut(place).context("no such function")?;
        let (bdf, space) = (member.bdf, member.space);
        let ours = member.function.take();
        let left = ensure_left(&bdf.to_string(), &pulled.outcome);
        let ended = if self.is_empty(space) {
            self.unregister(space)
        } else {
            Ok(())
        };
        let forgotten = match &self.known {
            Some(known) => known.forget(bdf),
            None => Ok(()),
        };
        drop((ours, pulled));
        let mapped = left.and(ended);
        if let Err(error) = &mapped {
            let failed = Error::msg(format!("{error:#}"));
            self.failed.get_or_insert(failed);
        }
        mapped.and(forgotten)
    }

    /// Takes everything down, and makes sure that nothing is left mapped.
    pub fn end(mut self) -> Result<()> {
        self.members.clear();
        let mut ended = self.failed.take().map_or(Ok(()), Err);
        for space in 0..self.spaces.len() {
            ended = ended.and(self.unregister(space));
        }
        ended
    }

    /// Whether nobody is behind an address space any more.
    fn is_empty(&self, space: usize) -> bool {
        let mut behind = self.members.iter().filter(|member| member.space == space);
        behind.all(|member| member.function.is_none())
    }

    fn unregister(&mut self, space: usize) -> Result<()> {
        let Some(Space { name, target }) = self.spaces.get_mut(space) else {
            return Ok(());
        };
        let report = target.take().map(TargetHandle::unregister);
        let quarantined = report.unwrap_or_default().quarantined;
        ensure!(
            quarantined.is_empty(),
            "something is left mapped in {name}: {quarantined:?}"
        );
        Ok(())
    }
}
