//! What the engine itself costs: the consumers only count. See `docs/performance.md`.

#![expect(clippy::unwrap_used, reason = "a benchmark that fails just ends")]

mod machine;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use machine::{Machine, Window};

fn bar_move(c: &mut Criterion) {
    type Step = fn(&mut Machine);
    let kinds: [(&str, Step); 4] = [
        ("bar_move", Machine::bar_move),
        ("bar_move_seen", Machine::bar_move_seen),
        ("bar_move_any", Machine::bar_move_any),
        ("bar_move_covered", Machine::bar_move_covered),
    ];
    for (name, step) in kinds {
        let mut group = c.benchmark_group(name);
        for regions in [10, 1_000, 100_000] {
            if name == "bar_move_covered" && regions == 10 {
                continue; // Only one place is covered.
            }
            let mut machine = Machine::with_targets(regions, 1);
            group.bench_function(BenchmarkId::from_parameter(regions), |b| {
                b.iter(|| step(&mut machine));
            });
        }
    }
}

fn register(c: &mut Criterion) {
    let mut group = c.benchmark_group("register");
    group.sample_size(20);
    for regions in [10, 1_000, 10_000, 100_000] {
        let machine = Machine::new(regions);
        group.bench_function(BenchmarkId::from_parameter(regions), |b| {
            b.iter_custom(|times| {
                let mut sum = Duration::ZERO;
                for _ in 0..times {
                    let start = Instant::now();
                    let target = machine.register();
                    sum += start.elapsed();
                    // Taking it down again is not part of it.
                    drop(target);
                }
                sum
            });
        });
    }
}

fn targets(c: &mut Criterion) {
    let mut group = c.benchmark_group("targets");
    for targets in [1, 8, 64] {
        let mut machine = Machine::with_targets(1_000, targets);
        let (maps, unmaps) = machine.calls.so_far();
        machine.bar_move();
        let after = machine.calls.so_far();
        assert_eq!(after, (maps + targets, unmaps + targets));
        group.bench_function(BenchmarkId::from_parameter(targets), |b| {
            b.iter(|| machine.bar_move());
        });
    }
}

fn sub_mapping(c: &mut Criterion) {
    let mut group = c.benchmark_group("sub_mapping");
    for others in [10, 1_000, 100_000] {
        let mut window = Window::new(others);
        let (maps, unmaps) = window.calls.so_far();
        window.step();
        window.step();
        assert_eq!(window.calls.so_far(), (maps + 1, unmaps + 1));
        group.bench_function(BenchmarkId::from_parameter(others), |b| {
            b.iter(|| window.step());
        });
    }
}

criterion_group!(benches, bar_move, register, targets, sub_mapping);
criterion_main!(benches);
