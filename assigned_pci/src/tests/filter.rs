//! What the guest finds when it walks the capability lists, and what it finds where a capability is
//! hidden.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::fake::*;
use crate::{AssignedFunction, CapabilityList, CapabilityRule, Treatment};

fn read(function: &AssignedFunction, offset: u16) -> u32 {
    let mut bytes = [0; 4];
    assert_eq!(function.config_read(offset, &mut bytes), None);
    u32::from_le_bytes(bytes)
}

/// Walks both lists as a guest does, without ever giving up.
fn walk(function: &AssignedFunction, extended: bool) -> Vec<(CapabilityList, u16, u16)> {
    let mut found = Vec::new();
    let mut visited = BTreeSet::new();
    let mut at = match read(function, 4) >> 20 & 1 {
        1 => u16::try_from(read(function, 0x34) & 0xff).unwrap(),
        _ => 0,
    };
    while at != 0 {
        assert!(visited.insert(at), "the list comes back to {at:#x}");
        let header = read(function, at);
        let id = u16::try_from(header & 0xff).unwrap();
        found.push((CapabilityList::Standard, id, at));
        at = u16::try_from(header >> 8 & 0xff).unwrap();
    }
    at = if extended { 0x100 } else { 0 };
    while at != 0 {
        assert!(visited.insert(at), "the list comes back to {at:#x}");
        let header = read(function, at);
        let id = u16::try_from(header & 0xffff).unwrap();
        if id != 0 && header != u32::MAX {
            found.push((CapabilityList::Extended, id, at));
        }
        at = match header {
            u32::MAX => 0,
            _ => u16::try_from(header >> 20).unwrap(),
        };
    }
    found
}

#[test]
fn hidden_capabilities_are_not_in_the_lists_and_read_zero() {
    // Power management, slot identification, an unknown one, AGP; virtual functions first, then
    // one of a vendor, page requests, a serial number, an unknown one.
    let host = FakeHost::new()
        .extended()
        .capabilities(
            0x50,
            &[
                (0x50, 0x0004),
                (0x40, 0x5c01),
                (0x5c, 0x60fe),
                (0x60, 0x0002),
            ],
        )
        .set_dword(0x50, 0x4004)
        .set_dword(0x68, 0x1234_5678)
        .set_dword(0x100, 0x1601_0010)
        .set_dword(0x108, 0xffff_ffff)
        .set_dword(0x160, 0x1701_000b)
        .set_dword(0x164, 0x0101_0001)
        .set_dword(0x168, 0x5555_5555)
        .set_dword(0x170, 0x1801_0013)
        .set_dword(0x178, 0x7)
        .set_dword(0x180, 0x1901_0003)
        .set_dword(0x190, 0x0001_7777);
    let bench = Bench::new(host);
    assert_eq!(
        walk(&bench.function, true),
        [
            (CapabilityList::Standard, 0x01, 0x40),
            (CapabilityList::Standard, 0xfe, 0x5c),
            (CapabilityList::Extended, 0x0b, 0x160),
            (CapabilityList::Extended, 0x03, 0x180),
            (CapabilityList::Extended, 0x7777, 0x190),
        ]
    );
    for hidden in [0x50, 0x60, 0x68, 0x104, 0x108, 0x13c, 0x170, 0x178] {
        assert_eq!(bench.read(hidden), 0, "{hidden:#x}");
        let _ = bench.function.config_write(hidden, &[0xff; 4]);
    }
    assert_eq!(bench.read(0x100), 0x1600_0000);
    assert_eq!(bench.read(0x168), 0x5555_5555);
    assert_eq!(bench.events(), [], "what is written there reaches nobody");
    // The byte after the last hidden one.
    let _ = bench.function.config_write(0x140, &[0xff; 4]);
    assert_eq!(bench.events(), [Event::ConfigWrite(0x140, vec![0xff; 4])]);
    let hidden = bench.function.capabilities().iter();
    let hidden = hidden.filter(|c| bench.function.treatment(c) == Treatment::Hidden);
    assert_eq!(hidden.count(), 4);
}

#[test]
fn lists_of_hidden_ones_alone_are_no_lists() {
    let host = FakeHost::new()
        .extended()
        .capabilities(0x40, &[(0x40, 0x0004)])
        .set_dword(0x100, 0x1401_000f)
        .set_dword(0x140, 0x0001_0010);
    let bench = Bench::new(host);
    assert_eq!(walk(&bench.function, true), []);
    assert_eq!((bench.read(0x34), bench.read(0x100)), (0, 0));
}

#[test]
fn no_self_test() {
    let bench = Bench::new(FakeHost::new().set_dword(0x0c, 0x8000_2010));
    assert_eq!(bench.read(0x0c), 0x0000_2010);
    let _ = bench.function.config_write(0x0c, &[0x08, 0x40, 0, 0x40]);
    assert_eq!(
        bench.events(),
        [
            Event::ConfigWrite(0x0c, vec![0x08]),
            Event::ConfigWrite(0x0d, vec![0x40]),
            Event::ConfigWrite(0x0e, vec![0]),
        ]
    );
    let _ = bench.function.config_write(0x0f, &[0x40]);
    assert_eq!(bench.events(), []);
}

#[test]
fn resizable_bars_hide_as_much_as_there_are() {
    let host = FakeHost::new()
        .extended()
        .set_dword(0x100, 0x0001_0015)
        // Two of them.
        .set_dword(0x108, 0x40)
        .set_dword(0x110, 0x77)
        .set_dword(0x114, 0x88);
    let bench = Bench::new(host);
    assert_eq!((bench.read(0x108), bench.read(0x110)), (0, 0));
    assert_eq!(bench.read(0x114), 0x88, "behind it");
}

/// What the table says that a guest without interrupts is to see.
fn is_shown(list: CapabilityList, id: u16) -> bool {
    let mut rules = CapabilityRule::all().iter();
    let rule = rules.find(|rule| rule.list == list && rule.id == id);
    rule.is_none_or(|rule| rule.treatment == Treatment::Shown)
}

proptest! {
    /// Lists in any order, with any ids and any contents, overlapping as they like: the guest's walk
    /// finds those that the table shows, in their order, and no others.
    #[test]
    fn the_guests_walk_finds_what_the_table_shows(
        standard in prop::collection::vec((0_u8..0x18, 0x10_u8..0x3d), 0..8),
        extended in prop::collection::vec((1_u16..0x3a, 0x41_u16..0x3f0), 0..12),
        noise in any::<u32>(),
    ) {
        let mut host = FakeHost::new().extended();
        for at in (0x40_u16..0x1000).step_by(4) {
            host = host.set_dword(at, noise.rotate_left(u32::from(at)) & 0x00ff_ffff);
        }
        let mut used = BTreeSet::new();
        let standard: Vec<(u16, u16)> = standard
            .into_iter()
            .map(|(id, slot)| (u16::from(id), u16::from(slot) * 4))
            // MSI-X must make sense, and a vendor's says its length itself.
            .filter(|(id, at)| !matches!(id, 0x11 | 0x09) && *at <= 0xc0 && used.insert(*at))
            .collect();
        let extended: Vec<(u16, u16)> = extended
            .into_iter()
            .filter(|(id, _)| !matches!(id, 0x0b | 0x23))
            .enumerate()
            .map(|(index, (id, slot))| (id, if index == 0 { 0x100 } else { slot * 4 }))
            .filter(|(_, at)| *at <= 0xf00 && used.insert(*at))
            .collect();
        let next = |list: &[(u16, u16)], index: usize| {
            list.get(index + 1).map_or(0, |(_, at)| *at)
        };
        let mut expected = Vec::new();
        for (index, (id, at)) in standard.iter().enumerate() {
            let header = u32::from(*id) | u32::from(next(&standard, index)) << 8;
            host = host.set_dword(*at, header);
            if is_shown(CapabilityList::Standard, *id) {
                expected.push((CapabilityList::Standard, *id, *at));
            }
        }
        host = host.set_dword(0x100, 0);
        for (index, (id, at)) in extended.iter().enumerate() {
            let header = u32::from(*id) | 1 << 16 | u32::from(next(&extended, index)) << 20;
            host = host.set_dword(*at, header);
            if is_shown(CapabilityList::Extended, *id) {
                expected.push((CapabilityList::Extended, *id, *at));
            }
        }
        if let Some((_, first)) = standard.first() {
            host = host.set_dword(0x04, 0x0010_0000).set_dword(0x34, u32::from(*first));
        }
        // A length that leads past the end of the space is refused, which is another test's.
        if let Ok(function) = host.assign() {
            prop_assert_eq!(walk(&function, true), expected);
        }
    }
}
