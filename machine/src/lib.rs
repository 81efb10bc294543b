//! A virtual machine for KVM, x86-64, whose disks, networks and engines are assigned PCI functions
//! that reach each other.
//!
//! ```text
//!            vCPU threads: KVM_RUN
//!      ports   |        | addresses without a memory slot
//!              v        v
//!   +-- chipset --+  +-- pci::Root ------------------------+   the memory map's
//!   | serial port |  | host bridge, root ports, functions  |   consumers:
//!   | power, reset|  | ECAM, 0xcf8: config space           |
//!   +-------------+  | BARs that are trapped               |   kvm::MemorySlots
//!                    +------------|------------------------+   the IOMMUs
//!                                 v                                ^
//!                       assigned_pci::AssignedFunction --- memory_map::RegionManager
//! ```
//!
//! # Who owns what
//! The embedder makes the memory map, registers the IOMMUs and opens the functions. A layout that
//! is chosen from what the IOMMUs allow says where everything goes, before any of it is made. The
//! machine owns its KVM file, its processors and its RAM, and shares the map and the functions.
//! When it ends, the processors' threads end first, then the functions are made quiet and reset,
//! then the memory slots go.
//!
//! # What always holds
//! 1. What a processor sees at an address is what the map's view says: RAM and BARs by memory
//!    slots, which follow the map as an IOMMU does; everything else, trapped, by the view. Slots that
//!    KVM does not let follow end the machine.
//! 2. A write to config space or to a BAR's register returns to the guest when every memory slot
//!    and every IOMMU has followed.
//! 3. A slot that is being redone is no hole in RAM: an access that falls into it is carried out
//!    on the RAM's own pages.
//! 4. Nothing that the guest does ends the process or a thread of it: it ends the machine at the
//!    worst, with a reason. What is said of it is said a bounded number of times.
//! 5. A function that was [pulled out](Controls::pull_out) is nobody from then on, whatever the guest
//!    was doing with it; what the others do is not touched.
//! 6. RAM and windows avoid whatever the IOMMUs reserve, and lie below the guest's physical
//!    address width. The firmware tables, the kernel's memory map and the windows come from one
//!    layout.

pub mod acpi;
mod board;
pub mod boot;
mod chipset;
mod function;
mod guest_ram;
mod hardware;
pub mod kvm;
pub mod layout;
mod machine;
mod notices;
pub mod pci;
pub mod platform;
mod slots_lost;

pub use board::{Access, Board};
pub use chipset::{Chipset, Line, Request};
pub use function::PulledOut;
pub use guest_ram::GuestRamError;
pub use hardware::{Asked, Hardware, HardwareError};
pub use machine::{Controls, Ended, Images, Machine, MachineError, Parts};
pub use notices::Notices;
