//! RAM that is in one address space is pinned once, however many it is in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use iommu::{IoasTarget, RamCopies};
use memory_map::{Access, Backing, DmaTarget, Iova, IovaRange, MapRequest, RegionKind};
use sim_host::{Call, CallPoint, SimHost, SimIoas, SimRam};

use crate::rig::{BAR_AT, RAM_SIZE, Rig};

const SIZE: u64 = 0x4000;

#[test]
fn ram_is_pinned_once_for_both_and_bars_are_mapped_twice() {
    let rig = Rig::new();
    let first = rig.register(0);
    rig.enable();
    let host_mappings = rig.host.host_mappings();
    let before = rig.host.count(Call::MapFile);
    let second = rig.register(1);
    assert_eq!(rig.host.count(Call::IoasCopy), 1, "the RAM");
    assert_eq!(rig.host.count(Call::MapFile), before + 1, "the BAR");
    assert_eq!(rig.host.count(Call::ExportDmaBuf), 1, "exported once");
    assert_eq!(rig.host.iommufd_locked_bytes(), RAM_SIZE);
    assert_eq!(rig.host.host_mappings(), host_mappings, "no host address");
    assert_eq!(host_mappings, 0);
    for (writer, target) in [(0, &first), (1, &second)] {
        assert!(rig.is_mapped(target));
        assert!(rig.arrives(writer, BAR_AT));
        rig.writers[writer].dma_write(Iova::new(0x2000), b"to RAM");
        let mut seen = [0; 6];
        rig.ram.read(0x2000, &mut seen).unwrap();
        assert_eq!(&seen, b"to RAM");
        rig.ram.write(0x2000, &[0; 6]).unwrap();
    }
    // The one that was mapped goes; the copy stays, and is pinned.
    drop(first);
    assert_eq!(rig.host.iommufd_locked_bytes(), RAM_SIZE);
    rig.writers[1].dma_write(Iova::new(0x2000), b"again");
    let mut seen = [0; 5];
    rig.ram.read(0x2000, &mut seen).unwrap();
    assert_eq!(&seen, b"again");
    drop(second);
    assert_eq!(rig.host.iommufd_locked_bytes(), 0);
    assert_eq!(rig.host.ioas_mappings(), []);
    assert_eq!(rig.copies.offers(), 0);
}

/// The negative control: without copying, the same RAM counts twice.
#[test]
fn without_copies_ram_is_pinned_twice() {
    let rig = Rig::new();
    rig.host.fail_from_now(Call::IoasCopy, libc::ENOENT);
    let _targets = [rig.register(0), rig.register(1)];
    assert_eq!(rig.host.iommufd_locked_bytes(), 2 * RAM_SIZE);
}

#[test]
fn a_limit_that_holds_the_ram_once_is_enough_for_both() {
    let rig = Rig::new();
    rig.host.set_locked_limit(Some(RAM_SIZE));
    let _targets = [rig.register(0), rig.register(1)];
    assert_eq!(rig.host.iommufd_locked_bytes(), RAM_SIZE);
}

/// Says that it is over.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One target maps two pieces of memory in turn at one address, while another copies the first
/// of them whenever it is offered: it must never get the second one.
#[test]
fn what_is_copied_is_what_was_offered() {
    const ROUNDS: u32 = 100;
    let host = SimHost::default();
    let iommufd = host.open_iommufd();
    let copies = RamCopies::new();
    let memory = [0, 1].map(|_| Backing::new(host.ram(SIZE).unwrap()));
    let wanted = memory[0]
        .downcast_ref::<SimRam>()
        .unwrap()
        .label()
        .to_owned();
    let request = |which: usize, at: u64| MapRequest {
        iova: IovaRange::new(Iova::new(at), SIZE).unwrap(),
        access: Access::ReadWrite,
        kind: RegionKind::Ram,
        backing: memory[which].clone(),
        offset: 0,
        host: None,
    };
    // Between the decision to copy and the copy, others may do what they like.
    host.set_hook(Some(Arc::new(|point| {
        if point == CallPoint::Before(Call::IoasCopy) {
            thread::sleep(Duration::from_micros(300));
        }
    })));
    let target = |space: &Arc<SimIoas>| {
        #[expect(
            unsafe_code,
            reason = "the simulated host's addresses are only numbers"
        )]
        // SAFETY: no memory lies behind a simulated host's address, and its files are never read.
        unsafe {
            IoasTarget::new(space.clone(), copies.clone())
        }
    };
    let spaces = [0, 1].map(|_| Arc::new(iommufd.ioas()));
    let (offered, over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut target = target(&spaces[0]);
            for which in (0..2).cycle() {
                let request = request(which, 0x10_0000);
                target.map(&request).unwrap();
                offered.store(which == 0, Ordering::SeqCst);
                thread::sleep(Duration::from_micros(100));
                target.unmap(request.iova).unwrap();
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        // Also when this thread panics, so that the other one ends.
        let _over = Over(&over);
        let mut target = target(&spaces[1]);
        let request = request(0, 0x20_0000);
        for round in 0..ROUNDS {
            while !offered.swap(false, Ordering::SeqCst) {
                thread::yield_now();
            }
            target.map(&request).unwrap();
            let seen = spaces[1].mappings();
            assert_eq!(*seen[0].object, *wanted, "in round {round}");
            target.unmap(request.iova).unwrap();
        }
    });
    let copied = host.calls();
    let copied = copied
        .iter()
        .filter(|it| it.call == Call::IoasCopy && it.result.is_ok());
    assert!(
        copied.count() > 0,
        "nothing was copied, so nothing is shown"
    );
    assert_eq!(host.ioas_mappings(), []);
}
