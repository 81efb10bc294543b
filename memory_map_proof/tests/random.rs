//! A million random operations of every kind, with every failure, against the model.

use memory_map_proof::random::run_threads;
use memory_map_proof::script::{EVERYTHING, QUIET};

const SEED: u64 = 0x7468_726f_7567;

fn threads() -> u64 {
    std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64)
}

#[test]
fn a_million_operations_leave_the_map_as_the_model_says() {
    let counts = run_threads(SEED, 1_000_000, EVERYTHING, threads()).unwrap_or_else(|what| {
        panic!("{what}");
    });
    println!("seed {SEED}\n{counts}");
    assert!(counts.operations() >= 1_000_000);
    let few = counts.fewer_than(1000);
    assert_eq!(few, Vec::<&str>::new(), "exercised fewer than 1,000 times");
}

#[test]
fn the_number_of_kernel_calls_is_the_lower_bound() {
    let counts = run_threads(SEED, 200_000, QUIET, threads()).unwrap_or_else(|what| {
        panic!("{what}");
    });
    println!("seed {SEED}\n{counts}");
    assert!(counts.of("outcome: split") >= 1000);
}
