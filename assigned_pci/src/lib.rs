//! An assigned PCI function as the guest sees it.

mod host_function;

pub use host_function::{BarIndex, HostBar, HostBarArea, HostFunction};
