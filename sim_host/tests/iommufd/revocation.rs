//! A revocation at every point of a scenario.
//!
//! The scenario registers two targets, shows the BAR, moves it, hides it and shows it again. It is
//! run anew for every two points that any of its calls reaches, with a revocation at each that
//! lasts for no time at all: nobody sees it but the kernel, and whoever caused it, who says so as soon as
//! they can. Whenever they have, nothing that is mapped may be dead, and what the map says of the
//! BAR must be what the devices find.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memory_map::TargetHandle;
use sim_host::{Call, CallPoint};

use crate::rig::{BAR_AT, Rig};

const ELSEWHERE: u64 = 0x5000_0000;

/// What whoever causes the revocation does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// Another thread of this process: the epoch advances before the map's call is over.
    AdvancesTheEpoch,
    /// A reset that this process hears of later.
    IsSilent,
}

/// Revokes at two points, or one.
struct Revoker {
    reached: AtomicU64,
    at: [u64; 2],
    done: AtomicBool,
}

/// Has the points of all calls with these numbers be ones of revocation, counted from 0.
fn revoke_at(rig: &Rig, at: [u64; 2], cause: Cause) -> Arc<Revoker> {
    let revoker = Arc::new(Revoker {
        reached: AtomicU64::new(0),
        at,
        done: AtomicBool::new(false),
    });
    let seen = Arc::clone(&revoker);
    let (host, peer) = (rig.host.clone(), Arc::downgrade(&rig.peer));
    let backing = rig.backing.clone();
    rig.host.set_hook(Some(Arc::new(move |_| {
        let nth = seen.reached.fetch_add(1, Ordering::SeqCst);
        let Some(peer) = peer.upgrade().filter(|_| seen.at.contains(&nth)) else {
            return;
        };
        host.revoke_dma_bufs(&peer);
        host.restore_dma_bufs(&peer);
        if cause == Cause::AdvancesTheEpoch {
            backing.advance_epoch();
        }
        seen.done.store(true, Ordering::SeqCst);
    })));
    revoker
}

/// After a step: repairs if there was a revocation, and checks that all is as the map says.
fn settle(rig: &Rig, revoker: &Revoker, targets: &[(usize, &TargetHandle)], at: u64) {
    // A repair may be revoked in turn.
    while revoker.done.swap(false, Ordering::SeqCst) {
        rig.repair();
    }
    let (mapped, dead) = rig.of_the_bar();
    assert_eq!(dead, 0, "a dead mapping is left");
    let said = targets.iter().filter(|(_, it)| rig.is_mapped(it)).count();
    assert_eq!(mapped, said, "the map says what is mapped");
    for (writer, target) in targets {
        assert_eq!(rig.arrives(*writer, at), rig.is_mapped(target));
    }
}

/// Runs the scenario; returns how many points it reached.
fn scenario(at: [u64; 2], cause: Cause) -> u64 {
    let rig = Rig::new();
    let revoker = revoke_at(&rig, at, cause);
    let first = rig.register(0);
    settle(&rig, &revoker, &[(0, &first)], BAR_AT);
    rig.enable();
    settle(&rig, &revoker, &[(0, &first)], BAR_AT);
    assert!(rig.is_mapped(&first));
    let second = rig.register(1);
    let both = [(0, &first), (1, &second)];
    settle(&rig, &revoker, &both, BAR_AT);
    rig.move_to(ELSEWHERE);
    settle(&rig, &revoker, &both, ELSEWHERE);
    assert!(both.iter().all(|(_, it)| rig.is_mapped(it)));
    rig.disable();
    settle(&rig, &revoker, &both, ELSEWHERE);
    rig.enable();
    settle(&rig, &revoker, &both, ELSEWHERE);
    assert!(both.iter().all(|(_, it)| rig.is_mapped(it)));
    drop(first);
    settle(&rig, &revoker, &[(1, &second)], ELSEWHERE);
    assert!(rig.arrives(1, ELSEWHERE));
    drop(second);
    rig.host.set_hook(None);
    assert_eq!(rig.host.ioas_mappings(), []);
    assert_eq!(rig.host.violations(), []);
    revoker.reached.load(Ordering::SeqCst)
}

#[test]
fn revocations_at_any_two_points_are_repaired() {
    for cause in [Cause::AdvancesTheEpoch, Cause::IsSilent] {
        let points = scenario([u64::MAX; 2], cause);
        assert!(points > 40, "{points} points are not what was meant");
        for first in 0..points {
            // The repair of the first one reaches points too.
            for second in first..points + 10 {
                scenario([first, second], cause);
            }
        }
    }
}

/// The negative control: of the same scenario without repair, some runs end with a mapping that
/// is dead and recorded as mapped.
#[test]
fn what_nobody_repairs_stays_dead() {
    let rig = Rig::new();
    let first = rig.register(0);
    rig.enable();
    assert!(rig.arrives(0, BAR_AT));
    rig.host.revoke_dma_bufs(&rig.peer);
    rig.host.restore_dma_bufs(&rig.peer);
    assert!(rig.is_mapped(&first), "nobody has told the map");
    assert!(!rig.arrives(0, BAR_AT));
    assert_eq!(rig.of_the_bar(), (1, 1));
    rig.repair();
    assert!(rig.arrives(0, BAR_AT));
    assert_eq!(rig.of_the_bar(), (1, 0));
}

/// The silent success, without anybody's later word: the epoch alone makes the map see it.
#[test]
fn a_map_during_which_the_epoch_advances_is_made_again() {
    let rig = Rig::new();
    let target = rig.register(0);
    let (host, peer) = (rig.host.clone(), Arc::downgrade(&rig.peer));
    let backing = rig.backing.clone();
    let once = AtomicBool::new(true);
    rig.host.set_hook(Some(Arc::new(move |point| {
        let midway = point == CallPoint::Midway(Call::MapFile);
        if let Some(peer) = peer.upgrade()
            && midway
            && once.swap(false, Ordering::SeqCst)
        {
            host.revoke_dma_bufs(&peer);
            host.restore_dma_bufs(&peer);
            backing.advance_epoch();
        }
    })));
    let before = rig.host.count(Call::MapFile);
    rig.enable();
    assert_eq!(rig.host.count(Call::MapFile), before + 2, "made twice");
    assert!(rig.is_mapped(&target));
    assert!(rig.arrives(0, BAR_AT));
    assert_eq!(rig.of_the_bar(), (1, 0));
}

/// While it is revoked for good, the BAR is unavailable and nothing is left of it; RAM stays.
#[test]
fn a_bar_that_stays_revoked_is_unavailable_until_it_can_be_mapped() {
    let rig = Rig::new();
    let targets = [rig.register(0), rig.register(1)];
    rig.enable();
    rig.host.revoke_dma_bufs(&rig.peer);
    rig.repair();
    assert_eq!(rig.of_the_bar(), (0, 0));
    assert!(!targets.iter().any(|target| rig.is_mapped(target)));
    rig.host.restore_dma_bufs(&rig.peer);
    rig.repair();
    assert!(targets.iter().all(|target| rig.is_mapped(target)));
    assert!(rig.arrives(0, BAR_AT) && rig.arrives(1, BAR_AT));
}
