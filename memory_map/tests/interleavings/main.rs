//! Threads that change one map at the same time, in every order that a model checker comes up
//! with: `RUSTFLAGS="--cfg shuttle" cargo test -p memory_map --test interleavings`.
//!
//! The page tables enforce what a target may rely on; at the end of every schedule each holds
//! exactly what the map says.

#![cfg(shuttle)]

#[cfg(test)]
#[path = "../engine/page_table.rs"]
#[expect(dead_code, reason = "the engine's own tests use the rest of it")]
mod page_table;
#[cfg(test)]
mod schedules;
