//! The workspace's chores: check, test, lab.

fn main() {}
