//! NVMe controllers as DMA engines, and as peers.

use sim_host::{SimBus, SimDisk};

use super::*;

const NVME: &str = "0000:00:08.0";
const SECOND: &str = "0000:00:09.0";
const BLOCKS: u64 = 1024;
const BLOCK: u64 = 512;
/// What the tests lend of a disk.
const LENT: std::ops::Range<u64> = 100..108;

/// An edu, shared memory that can sleep and be reset, and two controllers with memory buffers that
/// can, too; with their disks.
struct Rig {
    host: SimHost,
    disks: [SimDisk; 2],
    functions: Vec<Arc<SimFunction>>,
}

impl Rig {
    fn new() -> Self {
        let host = SimHost::default();
        let disks = [disk(0x11), disk(0x22)];
        let [one, two] = &disks;
        let nvme = |name, disk: &SimDisk| {
            FunctionSpec::nvme(name, disk.clone())
                .with_controller_memory_buffer(1 << 20)
                .with_power_management(PowerManagement::SoftReset)
                .with_express_flr()
        };
        let functions = [
            FunctionSpec::edu(EDU),
            FunctionSpec::shared_memory(PEER, 4 << 20).with_express_flr(),
            nvme(NVME, one),
            nvme(SECOND, two),
        ];
        let functions = functions.map(|spec| host.add_function(spec).unwrap());
        Self {
            host,
            disks,
            functions: functions.into(),
        }
    }

    fn assembly(&self, kind: Kind, choices: &[&str], lent: &[&str]) -> Assembly {
        let choices: Vec<_> = choices.iter().map(|text| text.parse().unwrap()).collect();
        let named = [EDU, PEER, NVME, SECOND].map(bdf);
        let policy = Policy::new(&choices, &named).unwrap();
        let parts = spaces(&self.host, kind, &self.functions, &policy);
        let scratch = lent
            .iter()
            .map(|name| format!("{name}:{}..{}", LENT.start, LENT.end));
        let scratch = scratch.map(|text| text.parse().unwrap()).collect();
        assemble_with(&self.host, parts, scratch, Vec::new())
    }

    fn contents(&self) -> [Vec<u8>; 2] {
        self.disks.each_ref().map(contents)
    }
}

fn disk(seed: u8) -> SimDisk {
    let disk = SimDisk::new(BLOCKS);
    let text: Vec<u8> = (0..BLOCKS * BLOCK)
        .map(|at| (at % 253).to_le_bytes()[0] ^ seed)
        .collect();
    disk.write(0, &text).unwrap();
    disk
}

fn contents(disk: &SimDisk) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(BLOCKS * BLOCK).unwrap()];
    disk.read(0, &mut data).unwrap();
    data
}

#[test]
fn controllers_reach_their_peers_and_each_others_buffers_and_disks_are_as_before() {
    for kind in KINDS {
        let rig = Rig::new();
        let before = rig.contents();
        let mut assembly = rig.assembly(kind, &[], &[NVME, SECOND]);
        let report = report(&rig.host, &mut assembly);
        assert!(report.ok, "{report}");
        for from in [EDU, NVME, SECOND] {
            for to in [PEER, NVME, SECOND] {
                if from == to {
                    continue;
                }
                let bar2 = pair(&report, from, to, 2);
                let found = (bar2.reach, bar2.exercised, bar2.at.len());
                assert_eq!(found, ("mapped", Some(Exercised::Ok), 2), "{bar2:?}");
            }
            // A page of RAM, RAM at the end; of three peers or two the BAR2 off, reset with its
            // decoding on and off, and moved, those of controllers also asleep.
            let controls = report.controls.iter().filter(|it| it.from == from);
            let peers = if from == EDU { (3, 2) } else { (2, 1) };
            assert_eq!(controls.count(), 2 + 4 * peers.0 + peers.1, "{report}");
        }
        for control in &report.controls {
            assert_eq!(control.observed, Observed::Blocked, "{control:?}");
            assert_ne!(control.afterwards, Some(Exercised::Mismatch), "{control:?}");
            assert!(control.witness.contains("DMA"), "{control:?}");
        }
        // A register of four bytes is less than a block.
        let register = pair(&report, NVME, EDU, 0);
        assert_eq!((register.reach, register.exercised), ("mapped", None));
        let note = register.note.as_ref().unwrap();
        assert!(note.contains("multiples of 0x200"), "{note}");
        // Put back before RAM was taken away, not only at the end.
        assert_eq!(rig.contents(), before);
        drop(assembly);
        assert_eq!(rig.contents(), before);
        ensure_clean(&rig.host);
    }
}

#[test]
fn a_hot_reset_finds_the_siblings_engine_at_rest() {
    for kind in KINDS {
        let rig = Rig::new();
        let before = rig.contents();
        let policy = Policy::new(&[], &[EDU, PEER, NVME, SECOND].map(bdf)).unwrap();
        let parts = spaces(&rig.host, kind, &rig.functions, &policy);
        let scratch = format!("{NVME}:{}..{}", LENT.start, LENT.end);
        let bus = SimBus::new(rig.functions.iter().skip(1).take(2).cloned());
        let disk = rig.disks[0].clone();
        let reset_with = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = Arc::clone(&reset_with);
        let bus = Bus {
            members: vec![1, 2],
            reset: Arc::new(move || {
                seen.lock().unwrap().push(contents(&disk));
                bus.hot_reset()
            }),
        };
        let scratch = vec![scratch.parse().unwrap()];
        let mut assembly = assemble_with(&rig.host, parts, scratch, vec![bus]);
        let report = report(&rig.host, &mut assembly);
        assert!(report.ok, "{report}");
        // The peer's reset and the controller's, by the edu.
        let reset_with = reset_with.lock().unwrap();
        assert_eq!(reset_with.len(), 2, "{report}");
        assert!(reset_with.iter().all(|disk| *disk == before[0]));
        // The controller was an engine again afterwards, and not for its failure was it blocked.
        let mut its = report.controls.iter().filter(|it| it.from == NVME);
        assert!(its.clone().count() > 4, "{report}");
        assert!(
            its.all(|control| control.witness.contains("DMA")),
            "{report}"
        );
        drop(assembly);
        assert_eq!(rig.contents(), before);
        ensure_clean(&rig.host);
    }
}

#[test]
fn a_controller_of_which_nothing_is_lent_is_never_an_engine() {
    let rig = Rig::new();
    let before = rig.contents();
    let mut assembly = rig.assembly(Kind::Type1, &[], &[NVME]);
    let report = report(&rig.host, &mut assembly);
    assert!(report.ok, "{report}");
    let bar2 = pair(&report, SECOND, PEER, 2);
    assert_eq!((bar2.reach, bar2.exercised), ("mapped", None));
    let note = bar2.note.as_ref().unwrap();
    assert!(note.contains("--nvme-scratch"), "{note}");
    assert!(report.controls.iter().all(|control| control.from != SECOND));
    // Negative control: the other one was.
    let bar2 = pair(&report, NVME, PEER, 2);
    assert_eq!(bar2.exercised, Some(Exercised::Ok));
    drop(assembly);
    assert_eq!(rig.contents(), before);
}

#[test]
fn no_other_block_than_those_lent_is_written_even_if_they_cannot_be_put_back() {
    let rig = Rig::new();
    let [before, _] = rig.contents();
    let mut assembly = rig.assembly(Kind::Type1, &[], &[NVME]);
    let mut pairs = assembly.pairs().unwrap();
    super::super::exercise::all(&mut assembly, &mut pairs).unwrap();
    // Whatever the engine does at its end, it does without RAM.
    assembly.targets.clear();
    let error = assembly.rest().unwrap_err();
    assert!(error.to_string().contains(NVME), "{error:#}");
    drop(assembly);
    let [after, _] = rig.contents();
    let size = usize::try_from(BLOCK).unwrap();
    let blocks = before.chunks(size).zip(after.chunks(size));
    let differ: Vec<u64> = (0..)
        .zip(blocks)
        .filter(|(_, (before, after))| before != after)
        .map(|(number, _)| number)
        .collect();
    assert_eq!(differ, LENT.collect::<Vec<_>>());
}

#[test]
fn policy_keeps_a_controller_from_every_bar_but_not_from_its_work() {
    for kind in KINDS {
        let rig = Rig::new();
        let before = rig.contents();
        let mut assembly = rig.assembly(kind, &["none"], &[NVME]);
        let report = report(&rig.host, &mut assembly);
        assert!(report.ok, "{report}");
        let kept_out = report.controls.iter();
        let kept_out = kept_out.filter(|control| {
            control.from == NVME && control.what == "a BAR that policy keeps out"
        });
        // The peer's, and the other controller's buffer.
        assert_eq!(kept_out.count(), 2, "{report}");
        assert_eq!(pair(&report, NVME, PEER, 2).exercised, None);
        drop(assembly);
        assert_eq!(rig.contents(), before);
    }
}

#[test]
fn a_peer_that_is_not_mapped_is_a_mismatch_and_no_failure_of_the_run() {
    let rig = Rig::new();
    let mut assembly = rig.assembly(Kind::Type1, &[], &[NVME]);
    let mut pairs = assembly.pairs().unwrap();
    // The map says that it is mapped, and the IOMMU does not have it.
    let member = assembly
        .members
        .iter()
        .find(|it| *it.function.name() == *PEER);
    let bar = member.unwrap().bar(assigned_pci::BarIndex::ALL[2]).unwrap();
    let mut change = assembly.map.change();
    change.disable(bar.region, memory_map::DisabledBecause::Owner);
    change.commit().unwrap();
    super::super::exercise::all(&mut assembly, &mut pairs).unwrap();
    let report = P2pReport::new(choice(), pairs, Vec::new());
    let bar2 = pair(&report, NVME, PEER, 2);
    assert_eq!(bar2.exercised, Some(Exercised::Mismatch));
    assert!(bar2.note.as_ref().unwrap().contains("Data Transfer Error"));
}

#[test]
fn what_is_no_controller_is_lent_nothing() {
    let rig = Rig::new();
    let policy = Policy::new(&[], &[EDU, PEER, NVME, SECOND].map(bdf)).unwrap();
    let (spaces, functions) = spaces(&rig.host, Kind::Type1, &rig.functions, &policy);
    let parts = Parts {
        spaces,
        functions,
        bypasses: BTreeMap::new(),
        buses: Vec::new(),
        ram: Backing::new(rig.host.ram(16 << 20).unwrap()),
        page: Backing::new(rig.host.ram(0x1000).unwrap()),
        scratch: vec![format!("{PEER}:1..9").parse().unwrap()],
    };
    let error = Assembly::new(parts).err().unwrap();
    assert!(
        error.to_string().contains("no NVMe controller"),
        "{error:#}"
    );
}

#[test]
fn blocks_that_the_disk_does_not_have_are_an_error_that_names_them() {
    let rig = Rig::new();
    let policy = Policy::new(&[], &[EDU, PEER, NVME, SECOND].map(bdf)).unwrap();
    let parts = spaces(&rig.host, Kind::Type1, &rig.functions, &policy);
    let scratch = format!("{NVME}:1020..1025").parse().unwrap();
    let mut assembly = assemble_with(&rig.host, parts, vec![scratch], Vec::new());
    let mut pairs = assembly.pairs().unwrap();
    let error = super::super::exercise::all(&mut assembly, &mut pairs).unwrap_err();
    assert!(error.to_string().contains("0x400 blocks"), "{error:#}");
}
