//! What every DMA engine can do, and which function has one.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::HostFunction;
use memory_map::{Iova, IovaRange, RangeError};

use crate::{Edu, NvmeError};

/// A DMA engine with a buffer of its own.
///
/// It need not be able to tell whether the IOMMU let an access through: a blocked write goes
/// nowhere, and a blocked read leaves something else in the buffer, on most machines zeroes or all
/// ones. Whoever wants to know compares the bytes; an engine that does tell says so by an error that
/// [`is_of_the_bus`](EngineError::is_of_the_bus).
pub trait DmaEngine: Send {
    /// For people: what kind of engine it is, and of which function.
    fn name(&self) -> String;

    /// How many bytes one transfer can move at the most: the size of the engine's buffer. An
    /// engine that moves whole blocks only takes any multiple of a block up to that.
    fn max_transfer(&self) -> u64;

    /// The highest bus address that it can be given.
    fn last_address(&self) -> Iova;

    /// Copies `len` bytes from the bus to the start of the engine's buffer, and waits until they
    /// are there.
    ///
    /// # Errors
    /// See [`EngineError`].
    fn load(&mut self, from: Iova, len: u64) -> Result<(), EngineError>;

    /// Copies `len` bytes from the start of the engine's buffer to the bus, and waits until they
    /// have gone.
    ///
    /// # Errors
    /// See [`EngineError`].
    fn store(&mut self, to: Iova, len: u64) -> Result<(), EngineError>;

    /// Copies `len` bytes from one bus address to another, piece by piece.
    ///
    /// # Errors
    /// See [`EngineError`]; a part may have been copied by then.
    fn copy(&mut self, from: Iova, to: Iova, len: u64) -> Result<(), EngineError> {
        copy_in_pieces(self, from, to, len)
    }

    /// Puts back what transfers have changed beside the bus, such as blocks of a disk, and stops
    /// the engine. It wants to be called while what the engine was lent is still mapped, and before
    /// its function is reset; afterwards nothing of that is accessed, the buffer's contents are
    /// undefined, and the next transfer begins anew.
    ///
    /// # Errors
    /// See [`EngineError`]; it can then be tried again.
    fn finish(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Copies in pieces of as much as one transfer can move.
pub(crate) fn copy_in_pieces<E: DmaEngine + ?Sized>(
    engine: &mut E,
    from: Iova,
    to: Iova,
    len: u64,
) -> Result<(), EngineError> {
    let most = engine.max_transfer().max(1);
    let mut done = 0;
    while done < len {
        let piece = most.min(len.saturating_sub(done));
        let beyond = |start: Iova| EngineError::Range {
            source: RangeError::Wraps {
                start: start.raw(),
                size: len,
            },
        };
        engine.load(from.checked_add(done).ok_or_else(|| beyond(from))?, piece)?;
        engine.store(to.checked_add(done).ok_or_else(|| beyond(to))?, piece)?;
        done = done.saturating_add(piece);
    }
    Ok(())
}

/// Why a DMA engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host refused an access to the function.
    #[error("accessing {function} failed")]
    Access {
        /// The function.
        function: String,
        /// The host's errno; `EIO` where the function does not decode memory.
        #[source]
        source: io::Error,
    },
    /// The function has no BAR where the engine's registers should be.
    #[error("{function} has no BAR0 of at least {needed:#x} bytes")]
    NoRegisters {
        /// The function.
        function: String,
        /// How large the BAR must be.
        needed: u64,
    },
    /// The registers do not say what the driver expects.
    #[error("{function} identifies itself as {found:#010x}, which is no edu")]
    Identification {
        /// The function.
        function: String,
        /// What the identification register holds.
        found: u32,
    },
    /// The liveness register does not answer with the inverse of what was written.
    #[error(
        "{function} does not answer its liveness check: wrote {wrote:#010x}, read {read:#010x}"
    )]
    NotAlive {
        /// The function.
        function: String,
        /// What was written.
        wrote: u32,
        /// What came back instead of its inverse.
        read: u32,
    },
    /// The transfer was not done in time.
    #[error("{function} was still busy after {waited:?}")]
    Timeout {
        /// The function.
        function: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The transfer has no bytes, or more than the engine's buffer.
    #[error("cannot transfer {len:#x} bytes at once, only 1 to {most:#x}")]
    Length {
        /// How many were asked for.
        len: u64,
        /// How many fit.
        most: u64,
    },
    /// The engine cannot be given that address.
    #[error(
        "{function} cannot be given {range}, only addresses up to {last}: the kernel cuts 8-byte \
         accesses in two"
    )]
    OutOfReach {
        /// The function.
        function: String,
        /// The bus addresses.
        range: IovaRange,
        /// The highest that it can be given.
        last: Iova,
    },
    /// An NVMe controller did not do it.
    #[error(transparent)]
    Nvme(#[from] NvmeError),
    /// The bus addresses wrap past the end of the address space.
    #[error("no such bus addresses")]
    Range {
        /// Why.
        #[source]
        source: RangeError,
    },
}

impl EngineError {
    /// Whether the engine cannot be asked for such a transfer at all, because of its length or its
    /// addresses. Nothing was moved then, and that says nothing of the bus.
    #[must_use]
    pub fn is_of_the_request(&self) -> bool {
        matches!(
            self,
            Self::Length { .. }
                | Self::OutOfReach { .. }
                | Self::Range { .. }
                | Self::Nvme(NvmeError::Length { .. } | NvmeError::Address { .. })
        )
    }

    /// Whether this is how an engine tells that it could not access the bus: a transfer that it
    /// ended with an error of that kind, or queues in memory that it does not reach, so that it
    /// fails or falls silent.
    #[must_use]
    pub fn is_of_the_bus(&self) -> bool {
        match self {
            Self::Nvme(NvmeError::Status { status, .. }) => status.is_data_transfer_error(),
            Self::Nvme(error) => matches!(
                error,
                NvmeError::Fatal { .. } | NvmeError::Timeout { .. } | NvmeError::NotReady { .. }
            ),
            _ => false,
        }
    }
}

/// The engine of a function, if there is a driver for one that needs nothing but the function. It
/// goes by vendor and device id; a function whose config space cannot be read has none. An
/// [`NvmeEngine`](crate::NvmeEngine) needs memory, and blocks that it may overwrite: it is only
/// made by name.
#[must_use]
pub fn find_engine(function: &Arc<dyn HostFunction>) -> Option<Box<dyn DmaEngine>> {
    let mut id = [0; 4];
    function.config_read(0, &mut id).ok()?;
    let [vendor_low, vendor_high, device_low, device_high] = id;
    let vendor = u16::from_le_bytes([vendor_low, vendor_high]);
    let device = u16::from_le_bytes([device_low, device_high]);
    match (vendor, device) {
        (Edu::VENDOR, Edu::DEVICE) => Some(Box::new(Edu::new(Arc::clone(function)))),
        _ => None,
    }
}
