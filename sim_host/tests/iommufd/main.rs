//! A memory map over address spaces of a simulated iommufd: RAM and BARs that follow it, RAM that
//! is pinned once, and revocations at every point.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

mod calls_per_event;
mod copies;
mod revocation;
mod rig;
