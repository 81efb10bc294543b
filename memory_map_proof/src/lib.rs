//! Holds the memory map to its promises, from outside: through its public interface, with
//! consumers that enforce what consumers may rely on. It is a crate of its own because it takes
//! nothing from the map but that interface, and because its scripts can be run for as long as
//! wanted.
//!
//! # What is proved
//! | test | what holds |
//! |---|---|
//! | `random` | After every step of a million random operations: the visible map, the mappings of every target, the reach with its reasons, and the report are what the [model] says, whatever call failed |
//! | `random`, counting | The number of map calls, unmap calls and bisections is exactly the [lower bound](bound), in the stated order of consumers |
//! | `exhaustive` | The same in a small world, for [every script](exhaustive) of four operations, with every failure at every call |
//! | `fail_every_call` | Named scenarios, each call of which fails once in every way: the promise of the change's class, no target that holds anything else, and the next try succeeds |
//! | `arbitrary_bytes` | Arbitrary [numbers](raw) and bytes through the whole interface: no panic, no broken contract |
//!
//! Three parts have no knowledge of each other, and none of the map's inside:
//! - the [model] looks at every region for every half page, without a thought to cost;
//! - the [kernel] is what the consumers call: page tables that refuse what goes against the
//!   contract (an overlap, a bisecting unmap, a call after quarantine, a request against the
//!   limits, memory freed while a device can reach it), and that fail the calls they are told to;
//! - the [`World`] carries scripts out on the map and on the model, and compares.
//!
//! Every consumer kind takes part ([`shape`]): IOMMUs by address and by file, with small and large
//! pages, reserved windows, few entries, small largest mappings, filters; memory slots; sharing
//! consumers.
//!
//! The concurrent parts are proved elsewhere, under a model checker (`memory_map`'s test
//! `interleavings`).
//!
//! # How to read the output
//! The tests print how often each operation, each way to fail and each outcome occurred, also when
//! they succeed; fewer than a thousand of any is a failed test. `outcome: split` counts mappings
//! that were bisected, `outcome: undo` changes of the host's that were taken back after some call
//! had been made, `outcome: undo that failed in part` those of them in which another call failed.
//! Seeds and the number of threads are fixed, so every machine runs the same scripts.
//!
//! A failure tells its seed, the script cut down to the steps that matter, the calls of the last
//! one, and the command that runs it again. To run as many operations as wanted, from a new seed
//! each time:
//!
//! ```text
//! cargo run --release -p memory_map_proof -- --operations 100000000
//! cargo run --release -p memory_map_proof -- --scripts calls --operations 10000000 --seed 7
//! cargo run --release -p memory_map_proof -- --exhaustive
//! ```

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
mod notice;
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
