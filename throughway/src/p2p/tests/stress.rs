//! Everything at once.

use super::super::exercise;
use super::super::stress::{Stress, run};
use super::*;

const ROUNDS: u32 = 8;

/// So many rounds, with the report as it is then.
fn stressed(assembly: &mut Assembly, kind: Kind) -> P2pReport {
    let mut pairs = assembly.pairs().unwrap();
    exercise::all(assembly, &mut pairs).unwrap();
    let revokes = kind == Kind::Iommufd;
    let (stress, controls) = run(assembly, &mut pairs, ROUNDS, revokes).unwrap();
    let mut report = P2pReport::new(choice(), pairs, controls);
    report.stress = Some(stress);
    report
}

#[test]
fn what_is_told_after_everything_at_once_is_true() {
    let choices: [&[&str]; 2] = [&[], &["group=a:00:05.0,00:06.0", "group=b:00:07.0,00:06.0"]];
    for (kind, choices) in KINDS
        .into_iter()
        .flat_map(|kind| choices.map(|it| (kind, it)))
    {
        let host = SimHost::default();
        let functions = three_functions(&host);
        let parts = spaces(&host, kind, &functions, &policy(choices));
        // By itself on its bus, which is busy at first.
        let bus = SimBus::new([Arc::clone(&functions[1])]);
        bus.be_busy(3);
        let bus = Bus {
            members: vec![1],
            reset: Arc::new(move || bus.hot_reset()),
        };
        let mut assembly = assemble_with(&host, parts, Vec::new(), vec![bus]);
        let spaces = u64::try_from(assembly.targets.len()).unwrap();
        let report = stressed(&mut assembly, kind);
        assert!(report.ok, "{report}");
        let Some(Stress {
            rounds,
            events,
            registrations,
            reached,
            blocked,
            ..
        }) = report.stress
        else {
            panic!("{report}");
        };
        let times = u64::from(ROUNDS);
        assert_eq!((rounds, registrations), (ROUNDS, times * 2 * spaces));
        assert_eq!(events, times * 8);
        // Both edus, at least when all was put back, each time.
        assert!(reached >= times * 2 && blocked >= times * 2, "{report}");
        assert_eq!(
            host.bus_errors(),
            [],
            "nothing leads to what does not answer"
        );
        drop(assembly);
        ensure_clean(&host);
    }
}

#[test]
fn a_mapping_that_stays_is_told_after_everything_at_once() {
    let host = SimHost::default();
    let mut assembly = wrapped(&host, |target| Box::new(Deaf(target)));
    let report = stressed(&mut assembly, Kind::Type1);
    assert!(!report.ok);
    let mut controls = report.controls.iter();
    assert!(controls.any(|control| control.observed == Observed::Arrived));
}

/// An IOMMU that says it has mapped a BAR, and has not.
struct Idle(Box<dyn DmaTarget>, Vec<IovaRange>);

impl DmaTarget for Idle {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.0.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.0.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        // RAM, and each BAR once.
        if self.1.contains(&request.iova) {
            return Ok(());
        }
        self.1.push(request.iova);
        self.0.map(request)
    }
    fn unmap(&mut self, iova: IovaRange) -> Result<(), TargetError> {
        self.0.unmap(iova).or(Ok(()))
    }
}

#[test]
fn a_mapping_that_is_not_made_is_told_after_everything_at_once() {
    let host = SimHost::default();
    let mut assembly = wrapped(&host, |target| Box::new(Idle(target, Vec::new())));
    let report = stressed(&mut assembly, Kind::Type1);
    assert!(!report.ok);
    let wrong = pair(&report, EDU, PEER, 2);
    assert_eq!(wrong.exercised, Some(Exercised::Mismatch));
    let note = wrong.note.as_deref().unwrap();
    assert!(
        note.contains("of --stress: what is told to be mapped"),
        "{note}"
    );
}
