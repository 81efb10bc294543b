//! PCI as the guest sees it: a root bus, root ports, and the functions behind them. No KVM, no
//! system calls.
//!
//! ```text
//!   bus 0   00.0 host bridge
//!           01.0 root port ---- bus N  00.0  a PCI Express function
//!           02.0 root port ---- bus M  00.0  another
//!           03.0 a conventional function
//! ```
//!
//! A PCI Express function sits behind a root port of its own, a conventional one on the root bus,
//! where such functions are at home. There is no firmware: BARs and bridges are as at power-on, and the guest's
//! kernel numbers the buses and places everything.
//!
//! A root port's windows are registers and nothing more: what a BAR says is where it is, whatever
//! the windows above it say. A guest that keeps them as PCI asks sees no difference.

mod header;
mod host_bridge;
mod root;
mod root_port;

pub use root::{ConfigAddress, ConfigSpace, NoRoom, Place, Root};
