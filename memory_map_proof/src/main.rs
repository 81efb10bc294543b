//! Runs as many random operations as wanted, and says from which seed.

use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use clap::Parser;
use memory_map_proof::exhaustive;
use memory_map_proof::random::{Scripts, run_threads};

/// Holds the memory map to its model under random scripts.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many operations, at the least. A script that has begun is finished.
    #[arg(long, default_value_t = 1_000_000)]
    operations: u64,
    /// Where to begin. Without it, somewhere new each time.
    #[arg(long)]
    seed: Option<u64>,
    /// How many threads, each of which goes on from a seed of its own; one for each processor.
    #[arg(long)]
    threads: Option<u64>,
    /// Which scripts.
    #[arg(long, value_enum, default_value_t = Scripts::Everything)]
    scripts: Scripts,
    /// Every short script in a small world instead, with every failure.
    #[arg(long, conflicts_with_all = ["operations", "seed", "scripts"])]
    exhaustive: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let threads = arguments.threads.unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64)
    });
    let began = Instant::now();
    let outcome = if arguments.exhaustive {
        exhaustive::run(usize::try_from(threads).unwrap_or(1)).map(|sums| sums.to_string())
    } else {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seed = arguments
            .seed
            .unwrap_or_else(|| now.map_or(0, |now| now.as_secs()));
        println!("seed {seed}, {threads} threads");
        run_threads(seed, arguments.operations, arguments.scripts, threads)
            .map(|counts| counts.to_string())
    };
    match outcome {
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
