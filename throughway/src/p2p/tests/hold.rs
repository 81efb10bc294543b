//! Functions that the host wants back while everything is held.

use std::sync::Weak;

use super::super::exercise;
use super::super::hold::{Ask, until_end};
use super::*;

/// Asks for these, one after the other, and sees at each that the one before is gone.
struct Script {
    asked: Vec<&'static str>,
    functions: Vec<Weak<SimFunction>>,
    begun: usize,
}

impl Script {
    fn new(functions: &[Arc<SimFunction>], asked: &[&'static str]) -> Self {
        Self {
            asked: asked.to_vec(),
            functions: functions.iter().map(Arc::downgrade).collect(),
            begun: 0,
        }
    }

    fn is_open(&self, name: &str) -> bool {
        let open = self.functions.iter().filter_map(Weak::upgrade);
        let names: Vec<String> = open.map(|it| HostFunction::name(&*it)).collect();
        names.iter().any(|it| it == name)
    }
}

impl Holding for Script {
    fn begins(&mut self, so_far: &P2pReport) {
        assert!(so_far.ok, "{so_far}");
        self.begun += 1;
    }

    fn next(&mut self) -> anyhow::Result<Ask> {
        if self.asked.is_empty() {
            return Ok(Ask::End);
        }
        let name = self.asked.remove(0);
        assert!(self.is_open(name));
        Ok(Ask::GiveBack(name.into()))
    }

    fn given_back(&mut self, function: &str) {
        assert!(!self.is_open(function), "nobody holds {function} any more");
    }
}

#[test]
fn a_function_that_is_given_back_is_reached_by_nobody_and_the_others_go_on() {
    let choices: [&[&str]; 2] = [&[], &["group=a:00:05.0,00:06.0", "group=b:00:07.0,00:06.0"]];
    for (kind, choices) in KINDS
        .into_iter()
        .flat_map(|kind| choices.map(|it| (kind, it)))
    {
        let host = SimHost::default();
        let functions = three_functions(&host);
        let parts = spaces(&host, kind, &functions, &policy(choices));
        let mut assembly = assemble_with(&host, parts, Vec::new(), vec![busy_bus(&functions)]);
        let spaces = assembly.targets.len();
        let mut script = Script::new(&functions, &[PEER]);
        drop(functions);
        let report = held(&host, &mut assembly, Some(&mut script));
        assert!(report.ok && script.begun == 1, "{report}");
        let taken = report.controls.iter();
        let taken = taken.filter(|it| it.what == "a BAR of a function that the host takes back");
        let taken: Vec<_> = taken.map(|it| (it.from.as_str(), it.observed)).collect();
        assert_eq!(
            taken,
            [(EDU, Observed::Blocked), (OTHER, Observed::Blocked)]
        );
        let bar2 = pair(&report, EDU, PEER, 2);
        assert_eq!((bar2.reach, bar2.counts), ("unavailable", false));
        assert_eq!(
            bar2.reason.as_deref(),
            Some("0000:00:06.0 was given back to the host")
        );
        assert_eq!(report.removed.len(), 1);
        let others = report.removed[0].others;
        if choices.is_empty() {
            assert_eq!(others, Some(Exercised::Ok));
            let sibling = pair(&report, EDU, OTHER, 0);
            assert_eq!(sibling.at.len(), 3, "once more after that");
            assert_eq!(assembly.members.len(), 2);
        } else {
            assert_eq!(
                others, None,
                "the two edus have nothing to do with each other"
            );
        }
        // The controls at the end have taken those that were left.
        assert!(assembly.targets.is_empty() && spaces > 0);
        drop(assembly);
        ensure_clean(&host);
    }
}

#[test]
fn all_functions_can_be_given_back_and_then_nothing_is_left_to_hold() {
    for kind in KINDS {
        let host = SimHost::default();
        let functions = three_functions(&host);
        let parts = spaces(
            &host,
            kind,
            &functions,
            &policy(&["group=a:00:05.0,00:06.0"]),
        );
        let mut assembly = assemble(&host, parts);
        let mut script = Script::new(&functions, &[OTHER, EDU, PEER]);
        drop(functions);
        let report = held(&host, &mut assembly, Some(&mut script));
        assert!(report.ok, "{report}");
        let given: Vec<&str> = report.removed.iter().map(|it| &*it.function).collect();
        assert_eq!(given, [OTHER, EDU, PEER]);
        assert!(assembly.members.is_empty() && assembly.targets.is_empty());
        // Nothing but RAM was mapped, and its containers are gone.
        ensure_clean(&host);
        let text = report.to_string();
        assert!(
            text.contains("0000:00:05.0 was given back to the host"),
            "{text}"
        );
    }
}

#[test]
fn a_function_that_stays_mapped_when_it_is_given_back_is_told() {
    let host = SimHost::default();
    let mut assembly = wrapped(&host, |target| Box::new(Deaf(target)));
    let mut witness =
        || -> anyhow::Result<Box<dyn Evidence>> { Ok(Box::new(SimFaults(host.clone()))) };
    let mut pairs = assembly.pairs().unwrap();
    exercise::all(&mut assembly, &mut pairs).unwrap();
    let mut report = P2pReport::new(choice(), pairs, Vec::new());
    let ended = until_end(
        &mut assembly,
        &mut report,
        &mut Asks(vec![PEER]),
        Some(&mut witness),
    );
    ended.unwrap();
    let report = report.judged();
    assert!(!report.ok);
    assert_eq!(report.controls[0].observed, Observed::Arrived);
}

/// A [`Script`] that does not look who holds what.
struct Asks(Vec<&'static str>);

impl Holding for Asks {
    fn begins(&mut self, _: &P2pReport) {}

    fn next(&mut self) -> anyhow::Result<Ask> {
        Ok(self.0.pop().map_or(Ask::End, |it| Ask::GiveBack(it.into())))
    }

    fn given_back(&mut self, _: &str) {}
}
