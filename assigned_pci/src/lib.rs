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
//! # What may kill a mapping
//! The kernel revokes what was mapped from a function's BARs at the events below, says so to
//! nobody, and does it even where the event then fails. So all of them are intercepted, and each is
//! done in the same order: the BARs leave the map in one commit, and their reach says why; the host
//! is asked; the BARs' revocation epochs advance, whatever the host said, and what decodes now is
//! mapped anew, in one commit. No lock of the map is held while the host is asked.
//!
//! | event | the reach says meanwhile | the host is asked to | then |
//! |---|---|---|---|
//! | memory decoding off | `DecodingOff` | write the command register | the BARs stay out |
//! | memory decoding on | `DecodingOff` | write the command register, *before* anything | the BARs come, without a revocation |
//! | any command write to a virtual function | `DecodingOff` | write it | what decodes is mapped anew |
//! | D1, D2, D3hot | `Sleeping` | write PMCSR; it is read back | they stay out, unless the function is still awake |
//! | back to D0 | `Sleeping` | write PMCSR; it is read back | they come back; without *No_Soft_Reset*, from D3hot, as after a reset |
//! | function-level reset (PCI Express, advanced features) | `Resetting` | clear the command register, carry the write out, clear the command register again if it was restored | registers as at power-on: command 0, BARs at 0 |
//! | [`AssignedFunction::reset`] | `Resetting` | the same, with its own reset | the same; one that still sleeps is woken |
//! | [`AssignedFunction::quiesce`] | `DecodingOff` | clear the command register | registers as at power-on |
//! | [`ResetSet::hot_reset`] | `Resetting`, all functions of the set | the same, all at once; `EBUSY` again, a bounded number of times | the same, all of them |
//! | somebody else's reset ([`AssignedFunction::mappings_may_be_revoked`], [`ResetSet::mappings_may_be_revoked`]) | it has happened | tell the command register and PMCSR | what decodes is mapped anew |
//! | nobody answers ([`AssignedFunction::hide_if_dead`]) | it has happened | tell the command register | the BARs stay out |
//! | [cut off](CutOffSwitch) | `Resetting` | turn bus mastering off, for good; then as a reset | the same |
//! | [`AssignedFunction::remove`] | the regions are gone | turn bus mastering off, for good | it never comes back |
//! | a BAR written in halves, or sized, with decoding on | `HalfWritten`, `Sizing` | nothing: BARs are emulated | it comes when it is whole |
//!
//! [`AssignedFunction::stop_mastering`] is no such event: it writes the command register as it is, but
//! for bus mastering. It goes before the end of several functions, so that no peer writes into a BAR
//! that has just left the map.
//!
//! vfio-pci hides resets from its user: it saves config space before and restores it afterwards,
//! the command register with it. The guest, which expects a reset, is shown one, and the physical
//! command register is made to say what the guest reads.
//!
//! # What the guest sees of config space
//! [`CapabilityRule::all`] is one table that says of each capability whether it is shown, emulated
//! or hidden, and why. What is not in it is shown as the host has it. A hidden one is not in the
//! list, reads zero and takes no writes. BARs are emulated; the expansion ROM, built-in self-test
//! and the interrupt pin read zero.
//!
//! # Interrupts
//! A function that is given an [`MsiController`] has MSI and MSI-X: config space, the table and the
//! pending bits are emulated, also where the rest of their page is the device's, and each vector
//! that the guest unmasks is connected, from the host's eventfd to a [`MsiVector`]. Changes are
//! applied one by one: nothing is asked of the host or the controller that did not change. A vector
//! that is masked again keeps its signals, shows them in its pending bit, and delivers them when it
//! is unmasked; what a device signals before the guest first unmasks the vector is lost.
//! A reset of any kind, a wake-up that is as one, and the removal of the function end all of them.
//! Without a controller both capabilities are hidden, and the table is the host's.
//!
//! What this crate does not do: INTx (with a controller, *interrupt disable* stays set in the
//! physical command register), the expansion ROM, I/O ports (the registers of I/O BARs are emulated,
//! nothing follows from them), and a PCI Express port above the function: the capability is shown
//! with the type and the link that the host has.

mod bar;
mod bar_access;
mod capability;
mod capability_table;
mod command;
mod config_access;
mod config_space;
mod controls;
mod cut_off;
mod discovery;
mod error;
mod filter;
mod firmware;
mod function;
mod guarded_host;
mod host_function;
mod interrupts;
mod mappable;
mod msi;
mod msi_controller;
mod msix;
mod msix_table;
mod outcome;
mod power;
mod reset;
mod reset_set;
mod shown;
mod sync;
#[cfg(test)]
mod tests;
mod vectors;
mod vfio;

pub use bar::BarKind;
pub use capability::Capability;
pub use capability_table::{CapabilityRule, Treatment};
pub use cut_off::{CutOffState, CutOffSwitch};
pub use error::{
    BarProblem, CapabilityList, CapabilityProblem, FunctionError, MsixProblem, MsixStructure,
};
pub use firmware::{PlaceError, Placed, Placement, Windows, place_bars, put_bars};
pub use function::{AssignedFunction, BarInfo, CpuAccess, FunctionOptions, VendorDevice};
pub use host_function::{BarIndex, HostBar, HostBarArea, HostFunction, HostVectors, MsiKind};
pub use msi_controller::{MsiController, MsiMessage, MsiVector};
pub use msix::{Msix, MsixArea};
pub use outcome::{HostCall, HostError, Outcome};
pub use power::PowerState;
pub use reset_set::{BusyRetry, MixedMaps, ResetSet};
pub use vfio::{VfioFunction, VfioFunctionError};
