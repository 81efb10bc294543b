//! `type1-contract`: the contract, tried on the kernel that this runs on.

fn main() {}
