//! Runs as many random operations as wanted, and says from which seed.

use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use clap::Parser;
use memory_map_proof::exhaustive;
use memory_map_proof::random::run_threads;
use memory_map_proof::script::{EVERYTHING, QUIET};

/// Holds the memory map to its model under random scripts.
#[derive(Parser)]
struct Arguments {
    /// How many operations, at the least.
    #[arg(long, default_value_t = 1_000_000)]
    operations: u64,
    /// Where to begin. Without it, somewhere new each time.
    #[arg(long)]
    seed: Option<u64>,
    /// How many threads.
    #[arg(long)]
    threads: Option<u64>,
    /// No failures; count the calls instead.
    #[arg(long)]
    quiet: bool,
    /// Every short script in a small world instead.
    #[arg(long)]
    exhaustive: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = arguments
        .seed
        .unwrap_or_else(|| now.map_or(0, |now| now.as_secs()));
    let threads = arguments.threads.unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64)
    });
    if arguments.exhaustive {
        let began = Instant::now();
        let sums = exhaustive::run(usize::try_from(threads).unwrap_or(1));
        println!("{sums:?}\n{:.1?}", began.elapsed());
        return sums.map_or(ExitCode::FAILURE, |_| ExitCode::SUCCESS);
    }
    println!("seed {seed}, {threads} threads");
    let style = if arguments.quiet { QUIET } else { EVERYTHING };
    let began = Instant::now();
    match run_threads(seed, arguments.operations, style, threads) {
        Ok(counts) => {
            println!("{counts}\n{:.1?}", began.elapsed());
            ExitCode::SUCCESS
        }
        Err(what) => {
            eprintln!("{what}");
            ExitCode::FAILURE
        }
    }
}
