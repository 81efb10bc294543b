//! What delivers a function's interrupts to the guest: the embedder's side of MSI and MSI-X.
//!
//! The embedder implements [`MsiController`] once for its machine, with KVM by an irqfd and a route
//! for each vector, and gives it to its functions
//! ([`FunctionOptions::interrupts`](crate::FunctionOptions::interrupts)). A function takes a
//! [`MsiVector`] from it when the guest first unmasks that vector, owns it, and drops it when the
//! guest disables the interrupts, when the function is reset and when it is removed. The device's
//! eventfd goes from the kernel's driver to KVM; nobody here sees an interrupt pass:
//!
//! ```text
//!   device -> vfio-pci -> MsiVector::eventfd ---- route ----> the guest's interrupt controller
//!                                  |
//!                                  +-- masked: the signals stay in the eventfd
//! ```
//!
//! All of it is called with the function's lock held, so an implementation must not call an
//! [`AssignedFunction`](crate::AssignedFunction).

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

/// A message signalled interrupt, as the guest wrote it: a memory write of `data` to `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MsiMessage {
    /// Where it goes; a multiple of four. It is the guest's number and may be anything.
    pub address: u64,
    /// What is written there; 16 bits of it for MSI.
    pub data: u32,
}

/// A machine's side of message signalled interrupts.
pub trait MsiController: Send + Sync + fmt::Debug {
    /// A vector of its own for one of a function's: masked, nothing pending.
    ///
    /// # Errors
    /// The kernel's errno: there is no eventfd or no interrupt left.
    fn vector(&self) -> io::Result<Box<dyn MsiVector>>;
}

/// One vector of a function. To drop it ends it; what is pending is lost.
pub trait MsiVector: Send + fmt::Debug {
    /// What the device signals. It is the same as long as the vector lives.
    fn eventfd(&self) -> BorrowedFd<'_>;

    /// From now on signals are delivered by this message, those too that were kept while it was
    /// masked. A message that no interrupt controller of the machine listens to is no error: its
    /// signals are lost, as on a bus. Called only with a message that is not already the one, or
    /// for a masked vector.
    ///
    /// # Errors
    /// The kernel's errno. The vector is then as it was before.
    fn route(&mut self, message: MsiMessage) -> io::Result<()>;

    /// From now on signals are kept. Called only for a vector that has a route.
    ///
    /// # Errors
    /// The kernel's errno. The vector is then as it was before.
    fn mask(&mut self) -> io::Result<()>;

    /// Whether a masked vector has kept a signal. Takes none away.
    fn is_pending(&self) -> bool;
}
