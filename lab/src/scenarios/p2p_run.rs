//! One run of `throughway p2p`, and whether QEMU's IOMMU saw the same.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::channel::Status;
use crate::dmar::DmarFault;
use crate::scenario::{Bench, ScenarioError, ensure};

const PAGE: u64 = 0x1000;
/// The RAM of a run, in pages, unless it is told otherwise.
pub const RAM_PAGES: u64 = (64 << 20) / PAGE;

/// What controls there are, as `throughway p2p` names them.
pub const RAM_TAKEN_AWAY: &str = "RAM that was taken away";
pub const KEPT_OUT: &str = "a BAR that policy keeps out";
pub const DECODING_OFF: &str = "a BAR whose decoding is off";
pub const ASLEEP: &str = "a BAR that sleeps in D3hot";
pub const RESET: &str = "a BAR after a function-level reset";
pub const RESET_UNDECODED: &str = "a BAR after a function-level reset with its decoding off";
pub const HOT_RESET: &str = "a BAR after a hot reset of its bus";
pub const BEFORE_THE_MOVE: &str = "where a BAR was before it moved";
pub const TAKEN_BACK: &str = "a BAR of a function that the host takes back";
pub const UNREGISTERED: &str = "RAM after the IOMMU was unregistered";
/// Of an engine that fetches commands from RAM: it does not get that far.
pub const OWN_UNREGISTERED: &str = "the engine's own RAM after the IOMMU was unregistered";

/// How long a command is that NVMe controllers fetch.
const COMMAND: u64 = 64;

/// The ways to program the IOMMU that there are on the machine's kernel, the best one first.
pub fn ways(bench: &mut Bench) -> Result<&'static [&'static str], ScenarioError> {
    let has_iommufd = bench.run(&["test", "-c", "/dev/iommu"])?.status.success();
    Ok(if has_iommufd {
        &["iommufd", "type1"]
    } else {
        &["type1"]
    })
}

/// The arguments of a run.
pub fn p2p<'a>(options: &[&'a str], functions: &[&'a str]) -> Vec<&'a str> {
    [&["throughway", "p2p"], options, functions].concat()
}

/// What `throughway p2p --json` told.
#[derive(Debug)]
pub struct P2pRun {
    /// How it ended.
    pub status: Status,
    /// Its own verdict.
    pub ok: bool,
    /// How it programmed the IOMMU, and why in that way.
    pub iommu: Chosen,
    /// Who reaches whom.
    pub pairs: Vec<Pair>,
    /// What was tried at addresses that are not mapped.
    pub controls: Vec<Control>,
    /// What was given back to the host, and how moving data between the others ended.
    pub removed: Vec<(String, Option<String>)>,
}

/// What `--iommu` came to.
#[derive(Debug, Clone)]
pub struct Chosen {
    pub chosen: String,
    pub because: String,
}

/// One function and one BAR of another.
#[derive(Debug)]
pub struct Pair {
    pub from: String,
    pub to: String,
    pub bar: u64,
    pub reach: String,
    pub reason: Option<String>,
    pub counts: bool,
    pub exercised: Option<String>,
    pub bypass: Option<String>,
}

/// One access to an address that is not mapped.
#[derive(Debug, Clone)]
pub struct Control {
    pub from: String,
    pub iova: u64,
    pub what: String,
    pub failed: Option<String>,
    pub observed: String,
    pub afterwards: Option<String>,
}

impl P2pRun {
    /// Runs it with `--json` and `options`; the bench's faults are this run's afterwards.
    pub fn with(
        bench: &mut Bench,
        options: &[&str],
        functions: &[&str],
    ) -> Result<Self, ScenarioError> {
        bench.forget_faults()?;
        let options = [&["--json"], options].concat();
        Self::of(bench, &p2p(&options, functions))
    }

    /// Runs a command that prints the report of a run and ends as that did.
    pub fn of(bench: &mut Bench, argv: &[&str]) -> Result<Self, ScenarioError> {
        let (status, report) = bench.run_json(argv)?;
        Self::read(status, &report).ok_or_else(|| {
            ScenarioError::unexpected(format!("the report has other fields: {report:#}"))
        })
    }

    /// Runs it with `--exercise`, and sees that it calls itself ok and ends with status 0.
    pub fn exercise(bench: &mut Bench, functions: &[&str]) -> Result<Self, ScenarioError> {
        Self::exercise_with(bench, &[], functions)
    }

    /// The same with more options.
    pub fn exercise_with(
        bench: &mut Bench,
        options: &[&str],
        functions: &[&str],
    ) -> Result<Self, ScenarioError> {
        let options = [&["--exercise"], options].concat();
        let run = Self::with(bench, &options, functions)?;
        ensure(run.ok && run.status.success(), || {
            format!("ended with {}: {run:#?}", run.status)
        })?;
        Ok(run)
    }

    fn read(status: Status, report: &Value) -> Option<Self> {
        let list = |name| report.get(name).and_then(Value::as_array);
        Some(Self {
            status,
            ok: report.get("ok")?.as_bool()?,
            iommu: Chosen::read(report.get("iommu")?)?,
            pairs: list("pairs")?
                .iter()
                .map(Pair::read)
                .collect::<Option<_>>()?,
            controls: list("controls")?
                .iter()
                .map(Control::read)
                .collect::<Option<_>>()?,
            removed: list("removed")?
                .iter()
                .map(removed)
                .collect::<Option<_>>()?,
        })
    }

    /// The one pair of these.
    pub fn pair(&self, from: &str, to: &str, bar: u64) -> Result<&Pair, ScenarioError> {
        let is_it = |pair: &&Pair| pair.from == from && pair.to == to && pair.bar == bar;
        let mut found = self.pairs.iter().filter(is_it);
        match (found.next(), found.next()) {
            (Some(pair), None) => Ok(pair),
            _ => Err(ScenarioError::unexpected(format!(
                "not exactly one pair {from} → {to} BAR{bar}: {:#?}",
                self.pairs
            ))),
        }
    }

    /// That data went from one function into the other's BAR and back.
    pub fn ensure_exercised(&self, from: &str, to: &str, bar: u64) -> Result<(), ScenarioError> {
        let pair = self.pair(from, to, bar)?;
        let well = pair.reach == "mapped" && pair.exercised.as_deref() == Some("ok");
        ensure(well && pair.reason.is_none(), || format!("{pair:?}"))
    }

    /// The controls of a function that are of this kind, of which there must be some, all blocked.
    pub fn blocked(&self, from: &str, what: &str) -> Result<Vec<&Control>, ScenarioError> {
        let is_it = |control: &&Control| control.from == from && control.what == what;
        let found: Vec<&Control> = self.controls.iter().filter(is_it).collect();
        let all = found.iter().all(|control| control.observed == "blocked");
        ensure(all && !found.is_empty(), || {
            format!(
                "{from}, {what}: not blocked, or not tried: {:#?}",
                self.controls
            )
        })?;
        Ok(found)
    }

    /// The same, and that each reached again what it could not reach meanwhile.
    pub fn blocked_for_a_while(
        &self,
        from: &str,
        what: &str,
    ) -> Result<Vec<&Control>, ScenarioError> {
        let controls = self.blocked(from, what)?;
        let again = |control: &&Control| control.afterwards.as_deref() == Some("ok");
        ensure(controls.iter().all(again), || format!("{controls:#?}"))?;
        Ok(controls)
    }

    /// That there are no controls of this kind.
    pub fn ensure_not_tried(&self, what: &str) -> Result<(), ScenarioError> {
        let tried = self.controls.iter().any(|control| control.what == what);
        ensure(!tried, || format!("{what}: {:#?}", self.controls))
    }

    /// That it was programmed this way.
    pub fn ensure_way(&self, way: &str) -> Result<(), ScenarioError> {
        ensure(self.iommu.chosen == way, || format!("{:?}", self.iommu))
    }

    /// That QEMU's IOMMU blocked just what the controls tried, and nothing else: so no address
    /// faulted while it was mapped.
    pub fn ensure_witnessed(&self, faults: &[DmarFault]) -> Result<(), ScenarioError> {
        ensure(!self.controls.is_empty(), || "no controls".into())?;
        explained(&self.controls, faults).map_err(ScenarioError::Unexpected)
    }
}

impl Chosen {
    fn read(value: &Value) -> Option<Self> {
        let text = |name| Some(value.get(name)?.as_str()?.to_owned());
        Some(Self {
            chosen: text("chosen")?,
            because: text("because")?,
        })
    }
}

impl Pair {
    fn read(value: &Value) -> Option<Self> {
        let text = |name| Some(value.get(name)?.as_str()?.to_owned());
        Some(Self {
            from: text("from")?,
            to: text("to")?,
            bar: value.get("bar")?.as_u64()?,
            reach: text("reach")?,
            reason: text("reason"),
            counts: value.get("counts")?.as_bool()?,
            exercised: text("exercised"),
            bypass: text("bypass"),
        })
    }
}

impl Control {
    fn read(value: &Value) -> Option<Self> {
        let text = |name| Some(value.get(name)?.as_str()?.to_owned());
        Some(Self {
            from: text("from")?,
            iova: value.get("iova")?.as_u64()?,
            what: text("what")?,
            failed: text("failed"),
            observed: text("observed")?,
            afterwards: text("afterwards"),
        })
    }
}

fn removed(value: &Value) -> Option<(String, Option<String>)> {
    let text = |name| Some(value.get(name)?.as_str()?.to_owned());
    Some((text("function")?, text("others")))
}

/// What controls tried in one page.
#[derive(Debug, Clone, Copy)]
struct Tried {
    times: usize,
    /// Whether it was written to.
    write: bool,
    /// How many bytes, from the page's first.
    len: u64,
}

/// Whether the controls are exactly what was blocked. Each is a write of one page, or of an engine
/// that did not get at its own RAM the fetch of a command.
///
/// A transfer may be blocked in pieces of any one size, so what counts is that they make up the
/// page, and that each was blocked as often as controls were tried there. (QEMU's nvme first tries
/// whether it can have the page as a whole, which is one fault more at its first byte.)
fn explained(controls: &[Control], faults: &[DmarFault]) -> Result<(), String> {
    let mut tried: BTreeMap<(String, u64), Tried> = BTreeMap::new();
    for control in controls {
        let write = control.what != OWN_UNREGISTERED;
        let len = if write { PAGE } else { COMMAND };
        let page = (control.from.clone(), control.iova);
        let times = 0;
        let tried = tried.entry(page).or_insert(Tried { times, write, len });
        tried.times = tried.times.saturating_add(1);
    }
    // By page, how often each address in it was blocked.
    let mut blocked: BTreeMap<(String, u64), BTreeMap<u64, usize>> = BTreeMap::new();
    for fault in faults {
        let page = (fault.device.to_string(), fault.iova & !(PAGE - 1));
        if tried.get(&page).is_none_or(|it| it.write != fault.write) {
            return Err(format!("no control explains {fault}"));
        }
        let times = blocked.entry(page).or_default().entry(fault.iova);
        let times = times.or_default();
        *times = times.saturating_add(1);
    }
    for ((device, page), tried) in &tried {
        let Some(pieces) = blocked.get(&(device.clone(), *page)) else {
            return Err(format!("{device} was not blocked at {page:#x}"));
        };
        let Tried { times, len, .. } = *tried;
        let in_pieces = pieces.len() > 1;
        let as_often = |iova: u64, found: usize| {
            let first = in_pieces && iova == *page;
            found == times || (first && found == times.saturating_mul(2))
        };
        let mut counts = pieces.iter();
        if let Some((iova, found)) = counts.find(|(iova, found)| !as_often(**iova, **found)) {
            return Err(format!(
                "{device} was blocked {found} times at {iova:#x}, where {times} controls were tried"
            ));
        }
        let ends = pieces.keys().skip(1).copied();
        let ends = ends.chain([page.saturating_add(len)]);
        let mut sizes = pieces
            .keys()
            .zip(ends)
            .map(|(start, end)| end.saturating_sub(*start));
        let first = sizes.next();
        if !pieces.contains_key(page) || sizes.any(|size| Some(size) != first) {
            return Err(format!(
                "{device} was blocked in a part of what was tried at {page:#x} only"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dmar::RequesterId;

    fn control(iova: u64) -> Control {
        Control {
            from: "0000:00:05.0".into(),
            iova,
            what: String::new(),
            failed: None,
            observed: "blocked".into(),
            afterwards: None,
        }
    }

    fn fault(iova: u64) -> DmarFault {
        DmarFault {
            device: RequesterId::new(0, 5, 0).unwrap(),
            iova,
            write: true,
            reason: 5,
        }
    }

    #[test]
    fn faults_in_pieces_explain_controls() {
        let controls = [control(0x4000), control(0x8000), control(0x8000)];
        let pieces = [0x4000, 0x4800, 0x8000, 0x8000];
        explained(&controls, &pieces.map(fault)).unwrap();
    }

    #[test]
    fn a_page_that_is_tried_as_a_whole_first_is_one_control() {
        let pieces = [0x4000, 0x4000, 0x4800];
        explained(&[control(0x4000)], &pieces.map(fault)).unwrap();
        for pieces in [[0x4000, 0x4800, 0x4800], [0x4000; 3]] {
            explained(&[control(0x4000)], &pieces.map(fault)).unwrap_err();
        }
    }

    #[test]
    fn a_command_that_cannot_be_fetched_is_a_read() {
        let mut own = control(0x4000);
        own.what = OWN_UNREGISTERED.into();
        let reads = [0x4000, 0x4020].map(|iova| DmarFault {
            write: false,
            ..fault(iova)
        });
        explained(&[own.clone()], &reads).unwrap();
        explained(&[own.clone()], &reads[..1]).unwrap();
        explained(&[own.clone()], &reads.map(|read| fault(read.iova))).unwrap_err();
        explained(&[own], &reads[1..]).unwrap_err();
        explained(&[control(0x4000)], &reads).unwrap_err();
    }

    #[test]
    fn a_witness_that_saw_something_else_is_no_witness() {
        let controls = [control(0x4000)];
        let mut of_another_device = fault(0x4000);
        of_another_device.device = RequesterId::new(0, 6, 0).unwrap();
        let mut read = fault(0x4000);
        read.write = false;
        for faults in [
            vec![],
            vec![fault(0x4800)],
            vec![fault(0x4000), fault(0x4400), fault(0x4800)],
            vec![fault(0x4000), fault(0x4000)],
            vec![fault(0x4000), fault(0x9000)],
            vec![of_another_device],
            vec![fault(0x4000), of_another_device],
            vec![fault(0x4000), read],
        ] {
            assert!(explained(&controls, &faults).is_err(), "{faults:?}");
        }
    }
}
