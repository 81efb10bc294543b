//! What the map keeps in memory for each segment, and how long it takes to build a big one.

#![expect(clippy::unwrap_used, reason = "a benchmark that fails just ends")]
#![expect(unsafe_code, reason = "counting allocations takes a global allocator")]

mod machine;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use machine::{Machine, Window};

/// The system's allocator, counting the bytes that are in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's, with the same arguments; counting allocates
// nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's obligations are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's obligations are the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Makes something, and tells how many bytes it keeps and how long it took.
fn measured<T>(make: impl FnOnce() -> T) -> (T, usize, Duration) {
    let before = IN_USE.load(Ordering::Relaxed);
    let start = Instant::now();
    let made = make();
    let took = start.elapsed();
    (
        made,
        IN_USE.load(Ordering::Relaxed).saturating_sub(before),
        took,
    )
}

fn main() {
    println!("regions    segments  map/segment  target/segment  build      register   BAR move");
    for regions in [1_000, 100_000, 812_500] {
        let (mut machine, map, build) = measured(|| Machine::new(regions));
        let (target, ledger, register) = measured(|| machine.register());
        let segments = machine.map.view().len();
        let moves = 10_000;
        let start = Instant::now();
        for _ in 0..moves {
            machine.bar_move();
        }
        println!(
            "{regions:9}  {segments:8}  {:9} B  {:12} B  {build:8.1?}  {register:8.1?}  {:.2?}",
            map / segments,
            ledger / segments,
            start.elapsed() / moves,
        );
        drop(target);
    }
    println!();
    println!("sub-mappings of one region   map and target/sub-mapping  build and register");
    for others in [1_000, 100_000, 1_000_000] {
        let (window, bytes, took) = measured(|| Window::new(others));
        let each = bytes / usize::try_from(others).unwrap();
        println!("{others:9}                    {each:24} B  {took:.1?}");
        drop(window);
    }
}
