//! A guest that does nothing but nonsense, on a simulated host: two processors at once make random
//! and chosen accesses to config space, BARs, MSI-X tables and ports, and the devices issue DMA of
//! their own, while two engines go on moving data to a peer's BAR and back.
//!
//! It makes ten million accesses, or as many as `THROUGHWAY_HOSTILE_ACCESSES` says. Accesses to RAM
//! do nothing in here: on a real machine they have a memory slot, and this RAM is none that the
//! board could get at.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

mod check;
mod guest;
mod pulled_out;
mod reset;
mod rig;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use memory_map::{Backing, DmaTarget, Errno, IovaRange, MapRequest, TargetError, TargetLimits};
use sim_host::{BrokenTranslation, BusErrorCause, Call};

use check::compare;
use guest::{Dice, Processor};
use rig::Rig;

/// How many accesses are made if nobody says otherwise.
const ACCESSES: u64 = 10_000_000;
/// After how many everything stops for a comparison.
const BETWEEN_COMPARISONS: u64 = 50_000;
/// How many steps a processor makes before it has the pair verified.
const BETWEEN_VERIFICATIONS: u64 = 1000;
/// What happens ten million times makes eight lines, and a dozen kinds of things happen.
const MOST_LINES: usize = 100;

/// Has both processors make that many accesses.
fn run(rig: &Rig, seed: u64, accesses: u64) -> u64 {
    let made = AtomicU64::new(0);
    let verifying = std::sync::Mutex::new(seed << 32);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (made, verifying) = (&made, &verifying);
            scope.spawn(move || {
                let dice = Dice::new(seed * 2 + number + 1);
                let mut processor = Processor { rig, dice, made };
                while made.load(Ordering::Relaxed) < accesses {
                    for _ in 0..BETWEEN_VERIFICATIONS {
                        processor.step();
                    }
                    let mut turn = verifying.lock().unwrap();
                    *turn += 1;
                    rig.verify_pair(*turn);
                }
            });
        }
    });
    made.into_inner()
}

#[test]
fn nonsense_does_no_harm_and_the_iommus_hold_what_the_map_says() {
    let wanted = std::env::var("THROUGHWAY_HOSTILE_ACCESSES");
    let wanted = wanted.map_or(ACCESSES, |number| number.parse().unwrap());
    let rig = Rig::new(|target| target);
    rig.verify_pair(0);
    let (mut made, mut seed, mut bar_pages) = (0, 0, 0);
    let mut reasons = BTreeSet::new();
    while made < wanted {
        seed += 1;
        made += run(&rig, seed, BETWEEN_COMPARISONS.min(wanted - made));
        let findings = compare(&rig);
        let first: Vec<_> = findings.wrong.iter().take(10).collect();
        assert!(first.is_empty(), "after {made}: {first:#?}");
        bar_pages += findings.bar_pages;
        reasons.extend(findings.reasons);
        // Nothing was let through that nobody answered.
        for error in rig.host.take_bus_errors() {
            let harmless = !matches!(error.cause, BusErrorCause::PeerNotDecoding { .. });
            assert!(harmless, "{error}");
        }
        let _blocked = rig.host.take_faults();
        rig.host.forget_calls();
    }
    rig.verify_pair(u64::MAX >> 16);

    // It was about something.
    let (maps, unmaps) = (
        rig.host.count(Call::MapDma) + rig.host.count(Call::MapFile),
        rig.host.count(Call::UnmapDma) + rig.host.count(Call::IoasUnmap),
    );
    let lines = rig.lines.load(Ordering::Relaxed);
    assert!(maps > made / 1000 && unmaps > made / 1000);
    assert!(bar_pages > 0);
    for call in [Call::BarRead, Call::BarWrite, Call::ConnectVectors] {
        assert!(rig.host.count(call) > made / 10_000, "{call:?}");
    }
    let causes = rig.causes.lock().unwrap().clone();
    for (function, cause) in [
        ("everything", "FunctionLevelReset"),
        ("everything", "Reset"),
        ("everything", "Sleep"),
        ("shared", "FunctionLevelReset"),
        ("stubborn", "FunctionLevelReset"),
    ] {
        let there = causes.contains(&(function.to_owned(), cause.to_owned()));
        assert!(there, "no {cause} of {function} among {causes:?}");
    }
    for reason in [
        "Covered",
        "OutsideAperture",
        "ReservedWindow",
        "SmallerThanPage",
    ] {
        assert!(
            reasons.contains(reason),
            "{reason} is not among {reasons:?}"
        );
    }
    assert!(rig.asked.load(Ordering::Relaxed) > 0);

    assert!(lines < MOST_LINES, "{lines} lines");
    assert_eq!(rig.host.violations(), []);
    assert!(rig.switch.state().is_none(), "devices were cut off");

    // All that is left when the machine begins again is RAM.
    rig.board.reset();
    let findings = compare(&rig);
    assert_eq!(findings.wrong, Vec::<String>::new());
    assert_eq!(findings.bar_pages, 0);
}

/// An IOMMU that says that it has dropped what it keeps.
struct Keeper {
    inner: Box<dyn DmaTarget>,
    drops: u32,
}

impl DmaTarget for Keeper {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.inner.limits()
    }

    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.inner.needs_host_address(backing)
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.inner.map(request)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        self.drops += 1;
        if self.drops == 100 {
            return Ok(());
        }
        self.inner.unmap(range)
    }
}

#[test]
fn an_iommu_that_keeps_one_mapping_is_found_out() {
    let rig = Rig::new(|inner| Box::new(Keeper { inner, drops: 0 }));
    assert_eq!(compare(&rig).wrong, Vec::<String>::new());
    run(&rig, 1, 20_000);
    rig.board.reset();
    let wrong = compare(&rig).wrong;
    let kept = |name: &str| wrong.iter().any(|line| line.starts_with(name));
    assert!(kept("type1, view") && kept("type1, reach"), "{wrong:#?}");
    assert!(!kept("iommufd"), "{wrong:#?}");
}

#[test]
#[should_panic(expected = "wrote something else to the peer")]
fn an_iommu_that_loses_what_the_pair_moves_is_found_out() {
    let rig = Rig::new(|inner| inner);
    rig.verify_pair(0);
    rig.host.break_translation(Some(BrokenTranslation::Drop));
    rig.verify_pair(1);
}
