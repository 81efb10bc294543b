//! What iommufd does: its address spaces, and what becomes of BARs in them.

mod address_cases;
mod attach_cases;
mod bench;
mod cases;
mod copy_cases;
mod counted;
mod dma_buf_cases;
mod dma_cases;
mod figures;
mod limit_cases;
mod map_cases;
mod mapping_times;
mod model;
mod placement_cases;
mod random_cases;
mod real;
mod reset_cases;
mod target_cases;
mod unmap_cases;

pub use bench::{Bench, Function, IommufdHost};
pub use cases::{Case, cases, resetting_cases, run};
pub use counted::{Calls, Counted};
pub use figures::{Figure, bar_events, registration};
pub use mapping_times::{MappingTime, mapping_times, ram_that_is_there};
pub use real::RealHost;
