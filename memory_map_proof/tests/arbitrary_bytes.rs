//! Arbitrary bytes as scripts, for a bounded number of them: no panic, no broken contract.

#![expect(
    clippy::unwrap_used,
    reason = "all of this file is a test: a panic there is a failed test and nothing else"
)]

use memory_map_proof::random::{from_source, run};
use memory_map_proof::raw;
use memory_map_proof::script::{Bytes, EVERYTHING, Random, Source};

/// How many scripts.
const SCRIPTS: u64 = 60_000;

fn bytes(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let length = 16 + random.below(800);
    let byte = |random: &mut Random| u8::try_from(random.below(256)).unwrap();
    (0..length).map(|_| byte(&mut random)).collect()
}

#[test]
fn arbitrary_numbers_neither_panic_nor_break_the_contract() {
    for seed in 0..SCRIPTS {
        let bytes = bytes(seed);
        if let Err(what) = raw::run(&bytes) {
            panic!("bytes of seed {seed}: {what}");
        }
    }
}

#[test]
fn arbitrary_bytes_are_scripts_that_the_model_understands() {
    for seed in 0..SCRIPTS / 20 {
        let bytes = bytes(seed);
        let turns = from_source(&mut Bytes(&bytes), EVERYTHING);
        if let Err(what) = run(&turns, EVERYTHING) {
            panic!("bytes of seed {seed}: {what}");
        }
    }
}
