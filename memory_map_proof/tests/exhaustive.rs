//! Every script of four operations in a small world, and every failure in each.

use memory_map_proof::count::show;
use memory_map_proof::exhaustive::{Sums, run};

#[test]
fn every_short_script_with_every_failure() {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let sums = run(threads).unwrap_or_else(|what| panic!("{what}"));
    show(&format!("exhaustive:\n{sums}"));
    let Sums {
        scripts,
        scripts_with_failure,
        ..
    } = sums;
    assert_eq!(scripts, 32_u64.pow(4));
    assert!(scripts_with_failure > 10_000_000);
}
