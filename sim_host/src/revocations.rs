//! When the kernel revokes what was exported of a function's BARs, and when it can be used again.
//!
//! As vfio-pci does it: before the event takes effect, whether it then succeeds or not; and after
//! it, if the function has memory enabled then, what was revoked can be mapped again. What had
//! been mapped before stays dead.

use std::fmt;

use parking_lot::Mutex;

/// Why the kernel revokes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RevocationCause {
    /// The command register was written without memory decoding; also where it was off before,
    /// and for a virtual function, which decodes all the same.
    CommandWrite,
    /// The function goes to D3hot.
    Sleep,
    /// A function-level reset, initiated in config space.
    FunctionLevelReset,
    /// `VFIO_DEVICE_RESET`.
    Reset,
    /// A hot reset of the function's bus or slot.
    HotReset,
}

/// What happens to a function's exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Revocation {
    /// All that was mapped from its BARs is dead, and nothing can be mapped.
    Revoked(RevocationCause),
    /// The function has memory enabled after an event: its BARs can be mapped again.
    Restored,
}

type Listener = dyn Fn(Revocation) + Send + Sync;

/// Who is told of a function's revocations, in the order in which they asked to be.
#[derive(Default)]
pub(crate) struct Revocations(Mutex<Vec<Box<Listener>>>);

impl Revocations {
    pub fn add(&self, listener: impl Fn(Revocation) + Send + Sync + 'static) {
        self.0.lock().push(Box::new(listener));
    }

    /// Tells everybody. The host's state is locked for writing, so no DMA is under way.
    pub fn tell(&self, revocation: Revocation) {
        for listener in &*self.0.lock() {
            listener(revocation);
        }
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Revocations({} listeners)", self.0.lock().len())
    }
}
