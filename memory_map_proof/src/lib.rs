//! Holds the memory map to its promises, from outside: through its public interface, with
//! consumers that enforce what consumers may rely on.
//!
//! - [`World`] carries random scripts out on a map and on a [model](model), cell by cell so naive
//!   that it is obviously right, and compares everything after every step.
//! - [`bound`] counts how many calls a step may take, and the map is held to it.
//! - [`exhaustive`] enumerates every short script in a small world, with every failure.
//! - [`raw`] makes scripts of arbitrary numbers and bytes, to look for panics.
//!
//! The tests run a fixed number of each; `cargo run --release -p memory_map_proof --
//! --operations N --seed S` as many random operations as wanted.

#![expect(
    clippy::unwrap_used,
    reason = "all of this crate is a test: a panic there is a failed test and nothing else"
)]

pub mod bound;
mod check;
pub mod count;
pub mod exhaustive;
pub mod kernel;
pub mod model;
pub mod outcome;
pub mod random;
pub mod raw;
mod reach;
mod refusal;
pub mod script;
pub mod shape;
mod small;
mod world;

pub use world::{Before, Excuses, Target, World};

/// Half a page: the unit in which the model looks at the address space.
pub const CELL: u64 = 0x800;
/// The granule of sub-mappings.
pub const GRANULE: u64 = memory_map::GRANULE;
