//! A million random operations of every kind, with every failure, against the model.

use memory_map_proof::count::show;
use memory_map_proof::random::{Scripts, run_threads};

/// Where the scripts begin. To change it is to run others.
const SEED: u64 = 0x7468_726f_7567;

/// Always as many, so that every machine runs the same scripts.
const THREADS: u64 = 4;

#[test]
fn a_million_operations_leave_the_map_as_the_model_says() {
    let counts = run_threads(SEED, 1_000_000, Scripts::Everything, THREADS)
        .unwrap_or_else(|what| panic!("{what}"));
    show(&format!("everything, from seed {SEED}:\n{counts}"));
    assert!(counts.operations() >= 1_000_000);
    let few = counts.fewer_than(1000);
    assert_eq!(few, Vec::<&str>::new(), "exercised fewer than 1,000 times");
}

#[test]
fn the_number_of_kernel_calls_is_the_lower_bound() {
    let counts =
        run_threads(SEED, 200_000, Scripts::Calls, THREADS).unwrap_or_else(|what| panic!("{what}"));
    show(&format!("counting calls, from seed {SEED}:\n{counts}"));
    assert!(counts.of("outcome: split") >= 1000);
    assert!(counts.of("call: map") >= 100_000);
    assert!(counts.of("call: unmap") >= 50_000);
}
