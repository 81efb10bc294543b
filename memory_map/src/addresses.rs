//! The host addresses of backings, for targets that map by address.
//!
//! They are kept by backing, not by guest address, for as long as some region has the backing and
//! some registered target needs its address: moving a BAR makes none. Every ledger entry made
//! from one holds it too, so it outlives the mapping whatever happens here.

use crate::state::{Driver, Inner};
use crate::{Backing, BackingId, Errno, HostAddress};

/// A host address that is kept for the next mapping of its backing.
pub(crate) struct KeptAddress {
    backing: Backing,
    host: HostAddress,
}

impl KeptAddress {
    pub(crate) fn host(&self) -> HostAddress {
        self.host.clone()
    }
}

impl Inner {
    /// Makes the host address of a backing that has none. Whoever calls this has the turn, so no
    /// backing is mapped twice at a time.
    pub(crate) fn make_host_address(&self, backing: &Backing) -> Result<HostAddress, Errno> {
        let host = backing.map_host()?;
        let kept = KeptAddress {
            backing: backing.clone(),
            host: host.clone(),
        };
        self.state.lock().addresses.insert(backing.id(), kept);
        Ok(host)
    }

    /// Takes out the addresses of those backings that no region has any more. The caller drops
    /// them without a lock: giving an address up calls the embedder and the kernel.
    #[must_use]
    pub(crate) fn unused_addresses(&self, backings: &[BackingId]) -> Vec<KeptAddress> {
        if backings.is_empty() {
            return Vec::new();
        }
        let mut state = self.state.lock();
        let state = &mut *state;
        let unused = backings.iter().filter(|id| !state.layout.uses(**id));
        unused.filter_map(|id| state.addresses.remove(id)).collect()
    }

    /// Takes out the addresses of those backings from which nothing is mapped.
    #[must_use]
    pub(crate) fn unmapped_addresses(&self, backings: &[BackingId]) -> Vec<KeptAddress> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mapped = |id: &BackingId| {
            state.targets.values().any(|target| {
                let mut entries = target.ledger.entries.iter();
                entries.any(|(_, entry)| entry.backing.id() == *id)
            })
        };
        let unmapped = backings.iter().filter(|id| !mapped(id));
        unmapped
            .filter_map(|id| state.addresses.remove(id))
            .collect()
    }

    /// Takes out the addresses that no registered target needs any more.
    #[must_use]
    pub(crate) fn unneeded_addresses(&self) -> Vec<KeptAddress> {
        let state = self.state.lock();
        let backings: Vec<Backing> = state
            .addresses
            .values()
            .map(|kept| kept.backing.clone())
            .collect();
        let drivers: Vec<Driver> = state.targets.values().map(|t| t.driver.clone()).collect();
        drop(state);
        let needed = |backing: &Backing| {
            drivers
                .iter()
                .any(|driver| driver.lock().even_if_stopped().needs_host_address(backing))
        };
        let unneeded: Vec<Backing> = backings.into_iter().filter(|b| !needed(b)).collect();
        let mut state = self.state.lock();
        unneeded
            .iter()
            .filter_map(|backing| state.addresses.remove(&backing.id()))
            .collect()
    }
}
