//! Functions that are reset together: those of one slot or one bus.

use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use memory_map::DisabledBecause;

use crate::cut_off::Locked;
use crate::shown::sync_all;
use crate::{AssignedFunction, HostCall, HostError, Outcome};

/// How often a hot reset is tried that says `EBUSY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusyRetry {
    /// That many times in all.
    pub attempts: NonZeroU32,
    /// How long to wait between two.
    pub pause: Duration,
}

impl Default for BusyRetry {
    /// Ten times, 10 ms apart.
    fn default() -> Self {
        Self {
            attempts: const {
                match NonZeroU32::new(10) {
                    Some(ten) => ten,
                    None => NonZeroU32::MIN,
                }
            },
            pause: Duration::from_millis(10),
        }
    }
}

/// Functions of several maps cannot be reset in one commit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{first} and {other} are in different memory maps and cannot be reset together")]
pub struct MixedMaps {
    /// A function.
    pub first: String,
    /// One in another map.
    pub other: String,
}

/// Functions that a reset of their bus or slot resets together. It holds them alive.
///
/// A hot reset (`VFIO_DEVICE_PCI_HOT_RESET`) resets every function behind a slot or a bus, so the
/// kernel revokes what was mapped from all of them, whichever was asked. The kernel tells nobody;
/// who knows which functions belong together is the embedder, from
/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`. It makes one set of them, and everything that concerns
/// them all goes through that:
///
/// - [`hot_reset`](Self::hot_reset) takes the BARs of all of them down in one commit, resets, and
///   brings back in one commit what decodes;
/// - [`mappings_may_be_revoked`](Self::mappings_may_be_revoked) repairs all of them after a reset
///   that somebody else made, or for which a reset of one of them had to take the bus.
///
/// A hot reset only tries the locks of the functions that it needs and says `EBUSY` where one is
/// taken, having revoked some of them already. So `EBUSY` is tried again, a bounded number of
/// times, and however it ends all of them count as revoked and as reset.
#[derive(Debug, Clone)]
pub struct ResetSet {
    /// By name, each once: the order in which they are locked.
    functions: Vec<Arc<AssignedFunction>>,
}

impl ResetSet {
    /// The set of these functions, in any order; names tell them apart.
    ///
    /// # Errors
    /// [`MixedMaps`] where they are not all in one map.
    pub fn new(
        functions: impl IntoIterator<Item = Arc<AssignedFunction>>,
    ) -> Result<Self, MixedMaps> {
        let mut functions: Vec<_> = functions.into_iter().collect();
        let key =
            |function: &Arc<AssignedFunction>| (function.name().to_owned(), Arc::as_ptr(function));
        functions.sort_by_key(key);
        functions.dedup_by(|a, b| Arc::ptr_eq(a, b));
        if let Some((first, others)) = functions.split_first()
            && let Some(other) = others.iter().find(|other| !other.map.is_same(&first.map))
        {
            return Err(MixedMaps {
                first: first.name().to_owned(),
                other: other.name().to_owned(),
            });
        }
        Ok(Self { functions })
    }

    /// The functions, by name.
    #[must_use]
    pub fn functions(&self) -> &[Arc<AssignedFunction>] {
        &self.functions
    }

    /// Resets all of them with `reset`, the host's hot reset, and their emulated state to that at
    /// power-on, in the order of [`AssignedFunction::reset`]: one commit takes the BARs of all of
    /// them down, another brings back what decodes, whatever `reset` said in the end.
    ///
    /// All functions' locks are held meanwhile, the map's are not. `reset` must not call an
    /// [`AssignedFunction`].
    pub fn hot_reset(
        &self,
        retry: BusyRetry,
        reset: &mut dyn FnMut() -> io::Result<()>,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let mut locked = self.lock();
        for (_, state) in &mut locked {
            state.held = Some(DisabledBecause::Resetting);
        }
        sync_all(&mut locked, false, &mut outcome);
        for (function, state) in &mut locked {
            function.fall_silent(state, &mut outcome);
        }
        if let Err(error) = try_while_busy(retry, reset) {
            let error = HostError::new(HostCall::HotReset, &error);
            outcome.host_errors.push(error);
        }
        for (function, state) in &mut locked {
            function.after_reset(state, &mut outcome);
            state.held = None;
        }
        sync_all(&mut locked, true, &mut outcome);
        outcome
    }

    /// [`AssignedFunction::mappings_may_be_revoked`] for all of them, in one commit.
    pub fn mappings_may_be_revoked(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut locked = self.lock();
        for (function, state) in &mut locked {
            function.look_again(state, &mut outcome);
        }
        sync_all(&mut locked, true, &mut outcome);
        outcome
    }

    /// Locks those that have not been removed.
    fn lock(&self) -> Vec<(&AssignedFunction, Locked<'_>)> {
        self.functions
            .iter()
            .map(|function| (&**function, function.lock()))
            .filter(|(_, state)| !state.removed)
            .collect()
    }
}

fn try_while_busy(retry: BusyRetry, reset: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut left = retry.attempts.get();
    loop {
        let done = reset();
        left = left.saturating_sub(1);
        match &done {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && left > 0 => {
                std::thread::sleep(retry.pause);
            }
            _ => return done,
        }
    }
}
