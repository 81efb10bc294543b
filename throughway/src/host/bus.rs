//! Functions of one slot or bus, which a hot reset resets together.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use assigned_pci::{AssignedFunction, BusyRetry, HostCall, HostError, ResetSet};

/// Asks the host for a hot reset.
pub type HotReset = dyn Fn() -> io::Result<()> + Send + Sync;

/// Such functions. It is made where the functions are opened, and lasts until one of them goes.
#[derive(Clone)]
pub struct Bus {
    /// Their places among all functions, ascending.
    pub members: Vec<usize>,
    pub reset: Arc<HotReset>,
}

impl Bus {
    /// Resets `functions`, which are its members. All of them are as at power-on afterwards, and what
    /// was mapped of them counts as revoked, whatever the host says: that is what comes back.
    pub fn reset(&self, functions: Vec<Arc<AssignedFunction>>) -> Result<Option<HostError>> {
        let set = ResetSet::new(functions)?;
        let outcome = set.hot_reset(BusyRetry::default(), &mut || (self.reset)());
        if let Some(error) = outcome.map_errors.first() {
            bail!("the memory map does not follow the reset of a bus: {error}");
        }
        let (refused, others): (Vec<HostError>, _) = outcome
            .host_errors
            .into_iter()
            .partition(|error| error.call == HostCall::HotReset);
        if let Some(error) = others.into_iter().next() {
            return Err(error).context("resetting a bus");
        }
        Ok(refused.into_iter().next())
    }
}
