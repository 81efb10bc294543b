//! What the devices may still do while the machine is reset or ends, and one that is found dead.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use assigned_pci::{HostFunction as _, put_bars};
use machine::Board as _;
use memory_map::Gpa;
use sim_host::{Call, CallPoint, SimFunction};

use crate::rig::{PEER, Rig};

/// Where the abused functions' BARs are put, 1 MiB apart: none is larger.
const BARS: u64 = 0xc100_0000;
/// The abused function that is found dead.
const SHARED: usize = 1;
const COMMAND: u16 = 0x04;

/// As drivers leave the abused functions: their BARs placed, decoded, and masters of the bus.
fn bring_up(rig: &Rig) -> Vec<Arc<SimFunction>> {
    let mut places = (BARS..).step_by(0x10_0000).map(Gpa::new);
    let wanted: Vec<_> = rig
        .abused
        .iter()
        .map(|abused| {
            let bars = abused.function.bars().into_iter();
            let bars = bars.filter(|bar| bar.region.is_some());
            let bars = bars.map(|bar| (bar.index, places.next().unwrap()));
            (&*abused.function, bars.collect())
        })
        .collect();
    assert!(put_bars(&wanted).unwrap().is_ok());
    let hosts = rig.abused.iter().map(|abused| abused.host.clone());
    hosts.collect()
}

#[test]
fn no_bar_leaves_an_iommu_while_a_peer_masters_the_bus() {
    let rig = Rig::new(|target| target);
    let hosts = bring_up(&rig);
    for host in &hosts {
        assert!(host.masters_bus() && host.decodes_memory());
    }
    // Negative control: the pair's BARs, which go first, are there to be unmapped.
    assert!(rig.map.lookup(Gpa::new(PEER)).is_some());
    let unmaps = Arc::new(Mutex::new(Vec::new()));
    let seen = unmaps.clone();
    rig.host.set_hook(Some(Arc::new(move |point| {
        if let CallPoint::Before(Call::UnmapDma | Call::IoasUnmap) = point {
            let masters = hosts.iter().filter(|host| host.masters_bus());
            seen.lock().unwrap().push(masters.count());
        }
    })));
    rig.board.reset();
    rig.host.set_hook(None);
    let unmaps = unmaps.lock().unwrap();
    // Of each BAR that can be mapped, in two address spaces.
    assert!(unmaps.len() > 2 * rig.abused.len(), "{unmaps:?}");
    assert!(unmaps.iter().all(|masters| *masters == 0), "{unmaps:?}");
    assert_eq!(rig.map.lookup(Gpa::new(PEER)), None);
    assert_eq!(rig.host.violations(), []);
}

#[test]
fn a_function_that_was_taken_for_dead_comes_back_when_it_decodes_again() {
    let rig = Rig::new(|target| target);
    bring_up(&rig);
    let abused = &rig.abused[SHARED];
    let bars = abused.function.bars();
    let memory = Gpa::new(bars.last().unwrap().address);
    assert!(rig.map.lookup(memory).is_some());
    // A processor has found no memory behind a slot three times, and nobody has looked again.
    abused.host.config_write(COMMAND, &[4, 0]).unwrap();
    assert!(rig.board.memory_fault(3));
    assert_eq!(rig.map.lookup(memory), None);
    assert!(abused.function.bars().iter().all(|bar| !bar.enabled));
    assert_eq!(rig.lines.load(Ordering::Relaxed), 1, "it is told");
    // The others are not touched, and it is said once.
    assert!(rig.map.lookup(Gpa::new(PEER)).is_some());
    assert!(rig.board.memory_fault(3));
    assert_eq!(rig.lines.load(Ordering::Relaxed), 1);
    let _ = abused.function.config_write(COMMAND, &[6, 0]);
    assert!(rig.map.lookup(memory).is_some(), "hidden for good");
}
