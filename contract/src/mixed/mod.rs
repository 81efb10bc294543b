//! Two functions of which one is in a type1 container and the other in an address space of an
//! iommufd: each target follows the same map, and so maps the other's BAR, the one by its address
//! and the other by its dma-buf.

mod bench;
mod cases;
mod real;

pub use bench::{Bench, MixedHost, Parts};
pub use cases::{Case, cases, run};
pub use real::RealHost;
