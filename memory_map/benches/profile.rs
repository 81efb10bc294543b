//! Runs one step so many times and nothing else, for counting instructions: of two runs under
//! callgrind the difference is what the steps cost, whatever else the computer does.

#![expect(clippy::unwrap_used, reason = "a benchmark that fails just ends")]

mod machine;

use machine::{Machine, Window};

const USAGE: &str = "profile (bar_move|bar_move_seen|bar_move_any|bar_move_covered|register) REGIONS TIMES\n\
                     profile targets TARGETS TIMES\n\
                     profile sub_mapping OTHERS TIMES";

fn main() {
    // `cargo bench` adds --bench.
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let [step, size, times] = words[..] else {
        println!("{USAGE}");
        return;
    };
    let (size, times): (u64, u64) = (size.parse().unwrap(), times.parse().unwrap());
    match step {
        "bar_move" => repeat(times, Machine::with_targets(size, 1), Machine::bar_move),
        "bar_move_seen" => repeat(
            times,
            Machine::with_targets(size, 1),
            Machine::bar_move_seen,
        ),
        "bar_move_any" => repeat(times, Machine::with_targets(size, 1), Machine::bar_move_any),
        "bar_move_covered" => {
            repeat(
                times,
                Machine::with_targets(size, 1),
                Machine::bar_move_covered,
            );
        }
        "register" => repeat(times, Machine::new(size), |machine| {
            drop(machine.register())
        }),
        "targets" => repeat(times, Machine::with_targets(1_000, size), Machine::bar_move),
        "sub_mapping" => repeat(times, Window::new(size), Window::step),
        _ => println!("{USAGE}"),
    }
}

fn repeat<T>(times: u64, mut on: T, step: impl Fn(&mut T)) {
    for _ in 0..times {
        step(&mut on);
    }
    // Ending is not part of it.
    std::mem::forget(on);
}
