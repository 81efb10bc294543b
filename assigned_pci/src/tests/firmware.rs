//! Placing BARs as a guest does.

use std::sync::Arc;

use memory_map::{Gpa, GpaRange, RegionManager};

use super::fake::*;
use crate::{
    AssignedFunction, BarIndex, FunctionOptions, PlaceError, Windows, place_bars, put_bars,
};

fn windows(low: u64, high: u64) -> Windows {
    Windows {
        low: GpaRange::new(Gpa::new(0xc000_0000), low).unwrap(),
        high: GpaRange::new(Gpa::new(0x10_0000_1000), high).unwrap(),
    }
}

fn two_functions() -> (RegionManager, Vec<Arc<FakeHost>>, Vec<AssignedFunction>) {
    let map = RegionManager::new();
    let hosts: Vec<_> = [
        FakeHost::new()
            .named("a")
            .bar(0, MEMORY_32, 0x100, &[])
            .bar(1, IO, 0x20, &[])
            .whole_bar(2, MEMORY_64_PREFETCHABLE, 0x40_0000),
        FakeHost::new()
            .named("b")
            .whole_bar(0, MEMORY_64, 0x4000)
            .whole_bar(5, MEMORY_32, 0x10_0000),
    ]
    .into_iter()
    .map(Arc::new)
    .collect();
    let options = FunctionOptions::default();
    let functions = hosts
        .iter()
        .map(|host| AssignedFunction::new(host.clone(), map.clone(), &options).unwrap())
        .collect();
    (map, hosts, functions)
}

#[test]
fn every_bar_gets_its_own_aligned_place() {
    let (map, hosts, functions) = two_functions();
    let functions: Vec<_> = functions.iter().collect();
    let placed = place_bars(&functions, windows(0x1000_0000, 0x1000_0000)).unwrap();
    assert!(placed.outcome.is_ok());
    let found: Vec<_> = placed
        .placements
        .iter()
        .map(|p| {
            (
                p.function.as_str(),
                p.bar.get(),
                p.range.start().raw(),
                p.range.size(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            ("a", 0, 0xc010_0000, 0x100),
            ("a", 2, 0x10_0040_0000, 0x40_0000),
            ("b", 0, 0x10_0080_0000, 0x4000),
            ("b", 5, 0xc000_0000, 0x10_0000),
        ]
    );
    for host in &hosts {
        assert_eq!(host.command(), ON);
    }
    let mut view: Vec<_> = map.view().iter().map(|s| s.range).collect();
    view.sort();
    let mut ranges: Vec<_> = placed.placements.iter().map(|p| p.range).collect();
    ranges.sort();
    assert_eq!(view, ranges);
    // Again, and everything is where it was.
    let again = place_bars(&functions, windows(0x1000_0000, 0x1000_0000)).unwrap();
    assert_eq!(again.placements, placed.placements);
}

#[test]
fn a_64_bit_bar_falls_back_to_the_low_window() {
    let (_map, _hosts, functions) = two_functions();
    let functions: Vec<_> = functions.iter().collect();
    let placed = place_bars(&functions, windows(0x1000_0000, 0x1000)).unwrap();
    assert!(
        placed
            .placements
            .iter()
            .all(|p| p.range.last().raw() >> 32 == 0)
    );
}

#[test]
fn an_exhausted_window_is_an_error_and_changes_nothing() {
    let (map, hosts, functions) = two_functions();
    let functions: Vec<_> = functions.iter().collect();
    let error = place_bars(&functions, windows(0x1000, 0x1000_0000)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("no room for b BAR5, which needs 0x100000"),
        "{text}"
    );
    assert_eq!(map.view(), []);
    assert!(hosts.iter().all(|host| host.command() == 0));
    assert!(
        functions
            .iter()
            .all(|f| f.bars().iter().all(|b| b.address == 0))
    );

    // Also where they had been placed before.
    let placed = place_bars(&functions, windows(0x1000_0000, 0x1000_0000)).unwrap();
    let before = map.view();
    let error = place_bars(&functions, windows(0x1000, 0x1000_0000)).unwrap_err();
    assert!(matches!(error, PlaceError::WindowExhausted { .. }));
    assert_eq!(map.view(), before);
    assert_eq!(placed.placements.len(), 4);
}

#[test]
fn a_function_that_does_not_turn_on_is_an_error() {
    let (_map, hosts, functions) = two_functions();
    let functions: Vec<_> = functions.iter().collect();
    hosts[1].refuse.lock().config_write = true;
    let error = place_bars(&functions, windows(0x1000_0000, 0x1000_0000)).unwrap_err();
    assert_eq!(error.to_string(), "b does not turn memory decoding on");
}

#[test]
fn bars_are_put_where_it_is_said_and_nowhere_else() {
    let (map, hosts, functions) = two_functions();
    let [a, b] = [&functions[0], &functions[1]];
    let [first, third] = [BarIndex::ALL[0], BarIndex::ALL[2]];
    let places = |number: usize| {
        let spots = [(first, 0xc000_1000), (third, 0x20_0000_0000)];
        let spots = spots.into_iter().take(number);
        spots.map(|(bar, address)| (bar, Gpa::new(address)))
    };
    let put = [
        (a, places(2).collect()),
        (b, vec![(first, Gpa::new(0x10_0000_0000))]),
    ];
    assert!(put_bars(&put).unwrap().is_ok());
    assert!(hosts.iter().all(|host| host.command() == ON));
    let starts: Vec<_> = map.view().iter().map(|s| s.range.start().raw()).collect();
    let last = 0; // b's BAR5, which is not named.
    for start in [0xc000_1000, 0x20_0000_0000, 0x10_0000_0000, last] {
        assert!(starts.contains(&start), "{starts:x?}");
    }

    let before = map.view();
    let error = put_bars(&[(a, places(1).collect()), (b, places(2).collect())]).unwrap_err();
    assert_eq!(error.to_string(), "b has no BAR2");
    assert_eq!(map.view(), before);
}
