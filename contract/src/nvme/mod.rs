//! What an NVMe controller reaches through an IOMMU that follows a memory map: blocks of its disk
//! go into a peer's BAR and come from there, and others reach its memory buffer. And what interrupts
//! it raises, and another engine.
//!
//! The cases want a disk whose contents tell where they are from, see [`word_at`].

mod bench;
mod cases;
mod guest;
mod guest_cases;
mod interrupt_cases;
mod real;

pub use bench::{Bench, NvmeHost, Parts, RamAccess};
pub use cases::{Case, FROM_BAR, cases, guest_cases, run, word_at, word_from_bar};
pub use real::{Iommu, RealHost};
pub(crate) use real::{RealRam, open};
