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

impl Inner {
    /// The host address of a backing, made now if there is none yet. Whoever calls this has the
    /// turn, so no backing is mapped twice at a time.
    pub(crate) fn host_address(&self, backing: &Backing) -> Result<HostAddress, Errno> {
        if let Some(kept) = self.state.lock().addresses.get(&backing.id()) {
            return Ok(kept.host.clone());
        }
        let host = backing.map_host()?;
        let kept = KeptAddress {
            backing: backing.clone(),
            host: host.clone(),
        };
        self.state.lock().addresses.insert(backing.id(), kept);
        Ok(host)
    }

    /// Gives up the addresses of those backings that no region has any more.
    pub(crate) fn release_addresses(&self, backings: &[BackingId]) {
        if backings.is_empty() {
            return;
        }
        let mut released = Vec::new();
        let mut state = self.state.lock();
        for &backing in backings {
            if !state.layout.uses(backing) {
                released.extend(state.addresses.remove(&backing));
            }
        }
        // Giving an address up calls the embedder and the kernel: not under the lock.
        drop(state);
        drop(released);
    }

    /// Gives up the addresses that no registered target needs any more.
    pub(crate) fn release_unneeded_addresses(&self) {
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
                .any(|driver| driver.lock().needs_host_address(backing))
        };
        for backing in backings {
            if !needed(&backing) {
                let released = self.state.lock().addresses.remove(&backing.id());
                drop(released);
            }
        }
    }
}
