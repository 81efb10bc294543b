//! What a type1 v2 container does, and what an iommufd does, errno for errno: one test-suite each
//! for the simulated host and for a real kernel, so that the simulated one stays honest.
//!
//! [`run`] tries every [`Case`] on a [`Type1Host`], each on a fresh container; [`iommufd::run`]
//! every [`iommufd::Case`] on an [`iommufd::IommufdHost`], each on a fresh iommufd. The crate's
//! tests run them on `sim_host`; its programs `type1-contract` and `iommufd-contract` run them on
//! the kernel that they find themselves on, with two functions that are bound to vfio-pci. [`mixed`]
//! puts one function into a container and the other into an iommufd.

mod bench;
mod cases;
mod dma_cases;
pub mod iommufd;
mod limit_cases;
mod locked_limit;
mod map_cases;
pub mod mixed;
mod model;
pub mod nvme;
mod random_cases;
mod real;
mod report;
mod unmap_cases;
mod verdict;

pub use bench::{Bench, Type1Host, Window};
pub use cases::{Case, cases, run};
pub use real::RealHost;
pub use report::report;
pub use verdict::{CaseResult, Complaint, Verdict};
