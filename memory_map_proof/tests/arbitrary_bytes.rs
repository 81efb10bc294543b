//! Arbitrary bytes as scripts, for a bounded number of them: no panic, no broken contract.

use memory_map_proof::count::show;
use memory_map_proof::random::{Scripts, run_threads};

/// As in the other tests: always as many, so that every machine runs the same scripts.
const THREADS: u64 = 4;

#[test]
fn arbitrary_numbers_neither_panic_nor_break_the_contract() {
    let counts = run_threads(0, 1_000_000, Scripts::Numbers, THREADS)
        .unwrap_or_else(|what| panic!("{what}"));
    show(&format!("arbitrary numbers, from seed 0:\n{counts}"));
}

#[test]
fn arbitrary_bytes_are_scripts_that_the_model_understands() {
    let counts =
        run_threads(0, 100_000, Scripts::Bytes, THREADS).unwrap_or_else(|what| panic!("{what}"));
    show(&format!("arbitrary bytes, from seed 0:\n{counts}"));
}
