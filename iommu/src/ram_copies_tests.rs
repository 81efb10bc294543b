use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use host_memory::Ram;
use memory_map::{Backing, IovaRange, RegionKind};

use super::*;

fn request() -> MapRequest {
    MapRequest {
        iova: IovaRange::new(Iova::new(0x10_0000), 0x4000).unwrap(),
        access: Access::ReadWrite,
        kind: RegionKind::Ram,
        backing: Backing::new(Ram::memfd(c"ram", 0x4000).unwrap()),
        offset: 0,
        host: None,
    }
}

#[test]
fn an_offer_is_not_withdrawn_while_it_is_copied() {
    let copies = RamCopies::new();
    let iommufd = IommufdId::fresh();
    let request = request();
    let offer = copies.offer(iommufd, IoasId::new(1), &request);
    let (copying, withdrawn) = (Barrier::new(2), AtomicBool::new(false));
    thread::scope(|scope| {
        let withdrawing = scope.spawn(|| {
            copying.wait();
            drop(offer);
            withdrawn.store(true, Ordering::SeqCst);
        });
        let copied = copies.copy(iommufd, &request, |_, _| {
            copying.wait();
            // Until the offer has left the list, so that the other thread has begun to withdraw
            // it; it cannot end before this closure does.
            while copies.offers() != 0 {
                thread::yield_now();
            }
            assert!(!withdrawn.load(Ordering::SeqCst));
            Ok(())
        });
        assert!(copied);
        withdrawing.join().unwrap();
    });
    assert!(withdrawn.load(Ordering::SeqCst));
    assert!(!copies.copy(iommufd, &request, |_, _| panic!("nothing is offered")));
}

/// A copier that has found the offer before it was withdrawn, and gets to it only afterwards.
#[test]
fn an_offer_that_was_withdrawn_meanwhile_is_passed_over() {
    let copies = RamCopies::new();
    let iommufd = IommufdId::fresh();
    let request = request();
    let first = copies.offer(iommufd, IoasId::new(1), &request);
    let mut second = Some(copies.offer(iommufd, IoasId::new(2), &request));
    let mut tried = Vec::new();
    let copied = copies.copy(iommufd, &request, |ioas, _| {
        tried.push(ioas.raw());
        // The list has been looked at; now the other one goes.
        second = None;
        Err(io::Error::from_raw_os_error(libc::ENOENT))
    });
    assert!(!copied);
    assert_eq!(tried, [1]);
    drop(first);
    assert_eq!(copies.offers(), 0);
}

#[test]
fn the_next_offer_is_tried_where_one_has_a_gap() {
    let copies = RamCopies::new();
    let iommufd = IommufdId::fresh();
    let request = request();
    let _offers = [1, 2].map(|id| copies.offer(iommufd, IoasId::new(id), &request));
    let mut tried = Vec::new();
    let copied = copies.copy(iommufd, &request, |ioas, _| {
        tried.push(ioas.raw());
        match ioas.raw() {
            1 => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            _ => Ok(()),
        }
    });
    assert!(copied);
    assert_eq!(tried, [1, 2]);
}
