//! An assigned PCI function as the guest sees it.
//!
//! An [`AssignedFunction`] stands between the guest and a [`HostFunction`], the host's side of a
//! PCI function (VFIO's, or a simulated one), and drives the memory map:
//!
//! ```text
//!   guest                 config_write                     bar_read, bar_write
//!     |                        |                                    |
//!     v                        v                                    v
//!   +--------------------- AssignedFunction ----------------------------+
//!   | BARs (emulated)   command register: memory bit    everything else |
//!   +-----|----------------------|-----------------------------|--------+
//!         v                      v                             v
//!   RegionManager: the     on: write, then map           HostFunction
//!   BARs' regions move,    off: unmap, then write
//!   come and go
//! ```
//!
//! The guest cannot make a call fail: what it does is answered as hardware would answer it, and
//! what the host or the map said to it is in the [`Outcome`].
//!
//! What this crate does not do: interrupts, the expansion ROM (hidden), I/O ports (the registers
//! of I/O BARs are emulated, nothing follows from them), and power states and resets that the
//! guest reaches through capabilities, which go to the host as they are.

mod bar;
mod bar_access;
mod capability;
mod command;
mod config_access;
mod config_space;
mod discovery;
mod error;
mod firmware;
mod function;
mod host_function;
mod mappable;
mod msix;
mod outcome;
#[cfg(test)]
mod tests;
mod vfio;

pub use bar::BarKind;
pub use capability::Capability;
pub use error::{
    BarProblem, CapabilityList, CapabilityProblem, FunctionError, MsixProblem, MsixStructure,
};
pub use firmware::{PlaceError, Placed, Placement, Windows, place_bars};
pub use function::{AssignedFunction, BarInfo, CpuAccess, FunctionOptions, VendorDevice};
pub use host_function::{BarIndex, HostBar, HostBarArea, HostFunction};
pub use msix::{Msix, MsixArea};
pub use outcome::{HostCall, HostError, Outcome};
pub use vfio::{VfioFunction, VfioFunctionError};
