//! What a type1 v2 container does, errno for errno: one test-suite for the simulated host and for
//! a real kernel, so that the simulated one stays honest.
//!
//! [`run`] tries every [`Case`] on a [`Type1Host`], each on a fresh container. The crate's tests
//! run it on `sim_host`; its binary `type1-contract` runs it on the kernel that it finds itself
//! on, with two functions that are bound to vfio-pci.

mod bench;
mod cases;
mod dma_cases;
mod limit_cases;
mod locked_limit;
mod map_cases;
mod model;
mod random_cases;
mod real;
mod unmap_cases;
mod verdict;

pub use bench::{Bench, Type1Host, Window};
pub use cases::{Case, cases, run};
pub use real::RealHost;
pub use verdict::{CaseResult, Complaint, Verdict};
