//! Capability lists: whole ones are read, broken ones are refused, none is followed for ever.

use super::fake::*;
use crate::CapabilityList;

/// A function with these standard capabilities, each with the low half of its header.
fn standard(first: u8, list: &[(u16, u32)]) -> FakeHost {
    FakeHost::new().capabilities(first, list)
}

/// A function with these extended capabilities.
fn extended(list: &[(u16, u32)]) -> FakeHost {
    list.iter()
        .fold(FakeHost::new().extended(), |host, (offset, header)| {
            host.set_dword(*offset, *header)
        })
}

#[test]
fn both_lists_are_read_in_their_order() {
    let host = extended(&[
        (0x100, 0x2001_0001),
        (0x200, 0x1401_0003),
        (0x140, 0x1_000e),
    ])
    .capabilities(0x80, &[(0x80, 0x4001), (0x40, 0x00ff)]);
    let function = host.assign().unwrap();
    let found: Vec<_> = function
        .capabilities()
        .iter()
        .map(|c| (c.list, c.id, c.offset))
        .collect();
    assert_eq!(
        found,
        [
            (CapabilityList::Standard, 0x01, 0x80),
            (CapabilityList::Standard, 0xff, 0x40),
            (CapabilityList::Extended, 0x0001, 0x100),
            (CapabilityList::Extended, 0x0003, 0x200),
            (CapabilityList::Extended, 0x000e, 0x140),
        ]
    );
}

#[test]
fn no_list_at_all() {
    // Without the status bit the pointer counts for nothing.
    let host = FakeHost::new().set_dword(0x34, 0x13);
    assert_eq!(host.assign().unwrap().capabilities(), []);
    assert_eq!(extended(&[]).assign().unwrap().capabilities(), []);
    let host = extended(&[(0x100, u32::MAX)]);
    assert_eq!(host.assign().unwrap().capabilities(), []);
}

#[test]
fn a_first_extended_capability_that_the_host_hides_still_points_on() {
    let host = extended(&[(0x100, 0x1400_0000), (0x140, 0x1_000e)]);
    assert_eq!(host.assign().unwrap().capabilities().len(), 1);
}

#[test]
fn cyclic_capability_list_is_refused() {
    for (host, expected) in [
        (
            standard(0x40, &[(0x40, 0x4001)]),
            "fake: the standard capability list is broken at 0x40: the list comes back here",
        ),
        (
            standard(0x40, &[(0x40, 0x5001), (0x50, 0x6005), (0x60, 0x5009)]),
            "at 0x50: the list comes back here",
        ),
        (
            extended(&[(0x100, 0x1401_000e), (0x140, 0x1001_000f)]),
            "the extended capability list is broken at 0x100: the list comes back here",
        ),
    ] {
        let text = host.refusal();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn truncated_capability_list_is_refused() {
    for (host, expected) in [
        (
            standard(0xfc, &[(0xfc, 0x0001)]),
            "at 0xfc: the capability has 0x8 bytes and reaches past 0x100",
        ),
        (
            standard(0xf8, &[(0xf8, 0x0011)]),
            "at 0xf8: the capability has 0xc bytes",
        ),
        // A vendor's capability says its length itself.
        (standard(0xf0, &[(0xf0, 0x11_0009)]), "has 0x11 bytes"),
        (
            standard(0x20, &[]),
            "at 0x20: no capability can lie below 0x40",
        ),
        (
            standard(0x40, &[(0x40, 0x3405)]),
            "at 0x34: no capability can lie",
        ),
        (
            extended(&[(0x100, 0x0401_000e)]),
            "at 0x40: no capability can lie below 0x100",
        ),
        (
            extended(&[(0x100, 0xffc1_000e), (0xffc, 0x1_0001)]),
            "reaches past 0x1000",
        ),
        (
            extended(&[(0x100, 0xffc1_000e), (0xffc, 0x1_000b)]),
            "reaches past 0x1000",
        ),
        (
            extended(&[(0x100, 0x1_0023), (0x104, 0xf010_0000)]),
            "the capability has 0xf01 bytes and reaches past 0x1000",
        ),
    ] {
        let text = host.refusal();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn misaligned_capability_list_is_refused() {
    for (host, expected) in [
        (
            standard(0x41, &[]),
            "at 0x41: that is not a multiple of four",
        ),
        (standard(0x40, &[(0x40, 0x5201)]), "at 0x52"),
        (extended(&[(0x100, 0x1421_000e)]), "at 0x142"),
    ] {
        let text = host.refusal();
        assert!(text.contains(expected), "{text}");
    }
}
