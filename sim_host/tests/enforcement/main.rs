//! The simulated host enforces: each rule with its negative control, from outside.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

mod containers;
mod functions;
mod revocation;
mod rig;
mod translation;
