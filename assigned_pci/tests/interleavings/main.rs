//! Cut-offs in the middle of everything else, in every order that a model checker comes up with:
//! `RUSTFLAGS="--cfg shuttle" cargo test -p assigned_pci --test interleavings`.

#![cfg(shuttle)]

#[cfg(test)]
mod schedules;
