//! The nested machine: QEMU in software emulation, a real kernel, a real IOMMU driver.
//!
//! The lab needs no hardware and no privileges: it boots a kernel under an emulated IOMMU, binds
//! emulated PCI functions to vfio-pci and runs programs there. [`parts::Parts::obtain`] fetches
//! what that takes into a [`cache::Cache`] with the system's package manager, and builds what no
//! package has; [`machine::Machine::boot`] starts a machine from it; [`scenario`] runs checks on
//! machines.
//!
//! ```text
//!   apt_sources -> apt -> { qemu, kernel, shell } -> parts ─┐
//!          cache, build ──────┘                             ├-> machine -> scenario(s)
//!   spec, cpio -> initramfs ────────────────────────────────┤
//!   channel (shared with lab_init), monitor ────────────────┤
//!   dmar, run_directory ────────────────────────────────────┘
//! ```
//!
//! The crate has a second half that runs inside: the program `lab_init`, the nested machine's
//! PID 1. The two halves share [`channel`] and the paths in [`initramfs`]. Also inside runs
//! `iommu_witness`, which compares what an IOMMU holds with what it should: see [`witness`].

pub mod apt;
pub mod apt_sources;
pub mod build;
pub mod cache;
pub mod channel;
pub mod cpio;
pub mod disk;
pub mod dmar;
pub mod headers;
pub mod initramfs;
pub mod kernel;
mod line;
pub mod machine;
pub mod monitor;
pub mod package;
mod package_tool;
pub mod parts;
pub mod progress;
pub mod qemu;
pub mod run_directory;
pub mod scenario;
pub mod scenarios;
pub mod shell;
pub mod spec;
pub mod witness;
