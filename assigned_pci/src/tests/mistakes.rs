//! Mistakes that others made in config space and that have no place of their own. The rest are
//! `half_written_64_bit_bar_is_never_mapped`, `cyclic_capability_list_is_refused`,
//! `truncated_capability_list_is_refused` and `bar_swap_keeps_both`.

use std::sync::atomic::Ordering;

use memory_map::{CutOff, Reach, Reason, TargetName};

use super::fake::*;
use crate::{BarIndex, Outcome};

fn full_bench(extended: bool) -> Bench {
    let mut host = FakeHost::new();
    if extended {
        host = host.extended();
    }
    Bench::new(
        host.with_controls(false)
            .bar(0, MEMORY_32, 0x100, &[])
            .bar(1, IO, 0x20, &[])
            .whole_bar(2, MEMORY_64_PREFETCHABLE, 0x1000)
            .whole_bar(4, MEMORY_64, 0x2_0000),
    )
}

/// A guest-reachable `expect`, `assert` or `todo`: with `panic = "abort"` the guest kills its VMM.
#[test]
fn no_access_of_the_guest_panics() {
    let mut accesses = 0_u32;
    for extended in [false, true] {
        let end: u16 = if extended { 0x1000 } else { 0x100 };
        for stage in 0..5 {
            let bench = full_bench(extended);
            match stage {
                1 => {
                    let mut refuse = bench.host.refuse.lock();
                    refuse.config_read = true;
                    refuse.config_write = true;
                    refuse.bar_access = true;
                    refuse.reset = true;
                }
                2 => bench.full.store(true, Ordering::SeqCst),
                3 => bench.function.cut_off().unwrap(),
                4 => drop(bench.function.remove()),
                _ => {}
            }
            let offsets = (0..0x110)
                .chain(end - 8..=end)
                .chain([u16::MAX - 1, u16::MAX]);
            for offset in offsets {
                for width in 0..=9 {
                    for byte in [0x00, 0xff, 0x06, 0x83] {
                        let _ = bench.function.config_write(offset, &vec![byte; width]);
                        let _ = bench.function.config_read(offset, &mut vec![0; width]);
                        accesses += 2;
                    }
                }
                let _ = bench.cpu_access_of_any(u64::from(offset) << 48);
            }
            for bar in BarIndex::ALL {
                for at in [0, 1, 0xff, 0x1000, u64::MAX - 3, u64::MAX] {
                    let _ = bench.function.bar_read(bar, at, &mut [0; 9]);
                    let _ = bench.function.bar_write(bar, at, &[0; 9]);
                }
            }
        }
    }
    assert!(accesses > 200_000, "{accesses}");
}

impl Bench {
    fn cpu_access_of_any(&self, gpa: u64) -> Option<crate::CpuAccess> {
        self.function.cpu_access(memory_map::Gpa::new(gpa))
    }
}

/// A failed move that is taken back in one place and not in the others: registers at the new
/// address, the map at the old one.
#[test]
fn a_move_that_cannot_be_mapped_moves_registers_view_and_reach_together() {
    let bench = Bench::with_32_bit_bar();
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    bench.full.store(true, Ordering::SeqCst);
    let outcome = bench.bar(0, 0x9000_0000);
    assert_eq!((outcome.unmaps(), outcome.maps()), (1, 0));
    assert_eq!(bench.read(0x10), 0x9000_0000);
    assert_eq!(bench.view(), [(0x9000_0000, 0x1_0000)]);
    assert_eq!(bench.mapped(), []);
    let refused = Reach::Unavailable(Reason::Kernel {
        errno: memory_map::Errno::new(EIO),
        hint: None,
    });
    assert_eq!(bench.reach(0), refused);
    // Nor is the BAR lost: the next time it appears it is tried again.
    bench.full.store(false, Ordering::SeqCst);
    let _ = bench.bar(0, 0x8000_0000);
    assert_eq!(bench.mapped(), [0x8000_0000]);
    assert_eq!(bench.reach(0), Reach::Mapped);
}

/// The same for what brings it back after a sleep.
#[test]
fn a_wake_that_cannot_be_mapped_is_tried_again_at_the_next() {
    let bench = Bench::new(
        FakeHost::new()
            .with_controls(true)
            .whole_bar(0, MEMORY_32, 0x1000),
    );
    let _ = bench.bar(0, 0x8000_0000);
    let _ = bench.command(ON);
    let _ = bench.function.config_write(PMCSR, &[3]);
    bench.full.store(true, Ordering::SeqCst);
    let _ = bench.function.config_write(PMCSR, &[0]);
    assert_eq!((bench.view().len(), bench.mapped()), (1, vec![]));
    bench.full.store(false, Ordering::SeqCst);
    let _ = bench.function.config_write(PMCSR, &[3]);
    let _ = bench.function.config_write(PMCSR, &[0]);
    assert_eq!(bench.mapped(), [0x8000_0000]);
}

/// Warnings that the guest triggers at will: a log flood. What is refused is a value, which the
/// embedder may count; nothing is written anywhere, and nothing that is kept grows.
#[test]
fn what_the_guest_repeats_is_told_each_time_and_kept_once() {
    let bench = full_bench(false);
    bench.host.refuse.lock().config_write = true;
    let target = TargetName::from("target");
    let why = memory_map::Quarantine::Unmap {
        range: memory_map::IovaRange::new(memory_map::Iova::new(0), 0x1000).unwrap(),
        error: memory_map::TargetError::Unknown(memory_map::Errno::new(EIO)),
    };
    bench.host.config.lock()[4] = 4;
    let size = |outcome: &Outcome| outcome.host_errors.len() + outcome.reports.len();
    let first = size(&bench.command(ON));
    for _ in 0..1000 {
        assert_eq!(size(&bench.command(ON)), first);
        bench.switch.cut_off(&target, &why);
        bench.host.config.lock()[4] = 4;
    }
    assert_eq!(bench.switch.state().unwrap().failed.len(), 1);
    let after = bench.function.cut_off_outcome().unwrap();
    assert!(size(&after) < 8, "{after:?}");
}
