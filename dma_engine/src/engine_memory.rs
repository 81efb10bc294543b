//! RAM that a driver needs for itself.

use std::io;

use memory_map::IovaRange;

/// RAM that the caller lends to a driver, for queues and lists that the device reads and writes on
/// its own.
///
/// The caller makes it, maps it for the device's DMA at [`iova`](Self::iova), readable and
/// writable, and keeps it mapped while the driver is used and until the driver is dropped: a
/// controller that is still enabled may write to it at any time. Nobody else may use these bytes.
pub trait EngineMemory: Send {
    /// Where the device sees it.
    fn iova(&self) -> IovaRange;

    /// Reads at an offset in bytes. What the device has written before is seen; of what it is writing
    /// meanwhile, some bytes may be seen and others not yet, in any order.
    ///
    /// # Errors
    /// Where the bytes do not all lie within it, or cannot be accessed.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes at an offset in bytes. The device sees it in what it reads afterwards.
    ///
    /// # Errors
    /// Where the bytes do not all lie within it, or cannot be accessed.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}
