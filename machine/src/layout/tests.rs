use super::*;
use assigned_pci::{BarIndex, BarKind};
use memory_map::Iova;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PREFETCHABLE: BarKind = BarKind::Memory {
    is_64_bit: true,
    prefetchable: true,
};
const WIDE: BarKind = BarKind::Memory {
    is_64_bit: true,
    prefetchable: false,
};
const NARROW: BarKind = BarKind::Memory {
    is_64_bit: false,
    prefetchable: false,
};
const NARROW_PREFETCHABLE: BarKind = BarKind::Memory {
    is_64_bit: false,
    prefetchable: true,
};

fn iova(start: u64, last: u64) -> IovaRange {
    IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap()
}

/// What an IOMMU of Intel's allows that translates `bits` bits.
fn intel(bits: u8) -> Vec<IovaRange> {
    vec![iova(0, 0xfedf_ffff), iova(0xfef0_0000, (1 << bits) - 1)]
}

fn wanted<'a>(ram: u64, allowed: &'a [IovaRange], functions: &'a [FunctionBars]) -> Wanted<'a> {
    Wanted {
        ram,
        allowed,
        address_bits: 48,
        functions,
    }
}

fn function(behind_port: bool, bars: &[(BarKind, u64)]) -> FunctionBars {
    let bars = BarIndex::ALL.into_iter().zip(bars);
    FunctionBars {
        behind_port,
        bars: bars
            .map(|(bar, (kind, size))| (bar, *kind, *size))
            .collect(),
    }
}

/// A function on the root bus.
fn on_root(bars: &[(BarKind, u64)]) -> FunctionBars {
    function(false, bars)
}

/// A function behind a port.
fn behind(bars: &[(BarKind, u64)]) -> FunctionBars {
    function(true, bars)
}

fn piece(start: u64, size: u64, offset: u64) -> RamPiece {
    RamPiece {
        range: GpaRange::new(Gpa::new(start), size).unwrap(),
        offset,
    }
}

#[test]
fn ram_leaves_the_hole_below_4_gib_free() {
    let small = Layout::choose(&wanted(512 * MIB, &[], &[])).unwrap();
    assert_eq!(small.ram(), [piece(0, 512 * MIB, 0)]);
    let large = Layout::choose(&wanted(5 * GIB, &[], &[])).unwrap();
    let pieces = [piece(0, 3 * GIB, 0), piece(4 * GIB, 2 * GIB, 3 * GIB)];
    assert_eq!(large.ram(), pieces);
    assert_eq!(large.ram_size(), 5 * GIB);
    let low = large.low_window();
    assert_eq!(
        (low.start(), low.size()),
        (Gpa::new(0xc000_0000), 0x2000_0000)
    );
    let high = large.high_window().unwrap();
    assert_eq!(high.start(), Gpa::new(6 * GIB));
    assert_eq!(high.last(), Gpa::new(HYPER_TRANSPORT.0 - 1));
}

#[test]
fn ram_goes_on_after_the_hyper_transport_hole() {
    let layout = Layout::choose(&wanted(1500 * GIB, &[], &[])).unwrap();
    let below = HYPER_TRANSPORT.0 - 4 * GIB;
    let last = 1500 * GIB - 3 * GIB - below;
    assert_eq!(
        layout.ram()[1..],
        [
            piece(4 * GIB, below, 3 * GIB),
            piece(1 << 40, last, 3 * GIB + below)
        ]
    );
    let high = layout.high_window().unwrap();
    assert_eq!(high.start().raw(), (1 << 40) + last);
    assert_eq!(high.last().raw(), (1 << 48) - 1);
}

#[test]
fn pieces_keep_their_offset_aligned_to_1_gib_where_there_is_room() {
    let allowed = [
        iova(0, 0xfedf_ffff),
        iova((4 * GIB) + 6 * MIB, (1 << 39) - 1),
    ];
    let layout = Layout::choose(&wanted(8 * GIB, &allowed, &[])).unwrap();
    assert_eq!(layout.ram()[1], piece(5 * GIB, 5 * GIB, 3 * GIB));
    // Where there is none, huge pages of 2 MiB remain.
    let tight = [allowed[0], iova((4 * GIB) + 6 * MIB, 9 * GIB + 6 * MIB - 1)];
    let layout = Layout::choose(&wanted(8 * GIB, &tight, &[])).unwrap();
    assert_eq!(layout.ram()[1], piece(4 * GIB + 6 * MIB, 5 * GIB, 3 * GIB));
    assert_eq!(layout.high_window(), None);
}

#[test]
fn ram_goes_around_what_an_iommu_reserves_below_4_gib() {
    let allowed = [iova(0, 0x1fff_ffff), iova(0x2010_0000, (1 << 39) - 1)];
    let layout = Layout::choose(&wanted(GIB, &allowed, &[])).unwrap();
    let pieces = [
        piece(0, 512 * MIB, 0),
        piece(514 * MIB, 512 * MIB, 512 * MIB),
    ];
    assert_eq!(layout.ram(), pieces);
}

#[test]
fn a_window_is_aligned_for_the_largest_bar() {
    let bars = [on_root(&[
        (PREFETCHABLE, 32 * GIB),
        (PREFETCHABLE, 32 * MIB),
    ])];
    let allowed = intel(39);
    let layout = Layout::choose(&wanted(16 * GIB, &allowed, &bars)).unwrap();
    let high = layout.high_window().unwrap();
    assert_eq!(high.start(), Gpa::new(32 * GIB));
    assert_eq!(high.last(), Gpa::new((1 << 39) - 1));
}

#[test]
fn a_window_skips_a_stretch_that_is_too_small() {
    let bars = [on_root(&[(PREFETCHABLE, 128 * GIB)])];
    let allowed = [iova(0, 200 * GIB - 1), iova(300 * GIB, (1 << 46) - 1)];
    let layout = Layout::choose(&wanted(4 * GIB, &allowed, &bars)).unwrap();
    let high = layout.high_window().unwrap();
    assert_eq!(high.start(), Gpa::new(384 * GIB));
}

#[test]
fn small_64_bit_bars_do_without_a_high_window() {
    let allowed = intel(32);
    let bars = [on_root(&[(PREFETCHABLE, 256 * MIB), (NARROW, MIB)])];
    let layout = Layout::choose(&wanted(2 * GIB, &allowed, &bars)).unwrap();
    assert_eq!(layout.high_window(), None);
}

#[test]
fn a_function_s_bars_are_where_the_machine_puts_it() {
    let host = sim_host::SimHost::default();
    let bars = |spec: sim_host::FunctionSpec| {
        let function = host.add_function(spec.with_bar(
            BarIndex::ALL[4],
            sim_host::BarSpec::new(sim_host::BarKind::Memory64, 0x4000),
        ));
        let map = memory_map::RegionManager::new();
        let options = assigned_pci::FunctionOptions::default();
        let function = assigned_pci::AssignedFunction::new(function.unwrap(), map, &options);
        FunctionBars::of(&function.unwrap())
    };
    let plain = sim_host::FunctionSpec::new("plain", 0x1234, 1);
    let express = sim_host::FunctionSpec::new("express", 0x1234, 2).with_express_flr();
    let expected = vec![(BarIndex::ALL[4], WIDE, 0x4000)];
    for (spec, behind_port) in [(plain, false), (express, true)] {
        let found = bars(spec);
        assert_eq!(
            (found.behind_port, found.bars),
            (behind_port, expected.clone())
        );
    }
}

#[test]
fn a_port_passes_on_above_4_gib_only_what_is_prefetchable() {
    let functions = [
        behind(&[(WIDE, 16 << 10), (PREFETCHABLE, 256 * MIB)]),
        behind(&[(NARROW, 4096), (WIDE, 32 * MIB), (NARROW_PREFETCHABLE, MIB)]),
        on_root(&[(WIDE, 64 * MIB), (NARROW, 0x100), (BarKind::Io, 0x40)]),
    ];
    let layout = Layout::choose(&wanted(GIB, &[], &functions)).unwrap();
    let high = layout.high_window().unwrap().start().raw();
    let places: Vec<Vec<_>> = layout
        .bars()
        .iter()
        .map(|places| {
            let places = places.iter();
            places
                .map(|place| (place.bar.get(), place.range.start().raw()))
                .collect()
        })
        .collect();
    let low = platform::LOW_HOLE.raw();
    assert_eq!(
        places,
        [
            // A window of 1 MiB behind the other port's.
            vec![(0, low + 64 * MIB), (1, high)],
            // One window, aligned for its largest.
            vec![(1, low), (2, low + 32 * MIB), (0, low + 33 * MIB)],
            vec![(1, low + 65 * MIB), (0, high + 256 * MIB)],
        ]
    );
}

#[test]
fn a_port_s_window_counts_as_large_as_a_kernel_may_make_it() {
    let choose = |functions: &[FunctionBars]| Layout::choose(&wanted(GIB, &[], functions));
    let nvme = behind(&[(WIDE, 16 << 10)]);
    assert!(choose(&vec![nvme.clone(); 512]).is_ok());
    let LayoutError::LowWindow { needed, fits, .. } = choose(&vec![nvme; 513]).unwrap_err() else {
        panic!("more windows than MiB");
    };
    assert_eq!((needed, fits), (513 * MIB, 512 * MIB));
    // With anything beside it the window is twice as large.
    let card = behind(&[(WIDE, 256 * MIB), (NARROW, 4096)]);
    assert!(choose(std::slice::from_ref(&card)).is_ok());
    assert!(choose(&[card, on_root(&[(NARROW, 4096)])]).is_err());
    // And a prefetchable one has to be in whole MiB as well.
    let small = behind(&[(PREFETCHABLE, 4096)]);
    let layout = choose(&[small.clone(), small]).unwrap();
    let starts = layout
        .bars()
        .iter()
        .flatten()
        .map(|place| place.range.start().raw());
    assert_eq!(starts.collect::<Vec<_>>(), [4 * GIB, 4 * GIB + MIB]);
}

#[test]
fn what_does_not_fit_is_an_error_that_says_what_to_do() {
    let error = |wanted: &Wanted<'_>| Layout::choose(wanted).unwrap_err();
    let allowed = intel(32);
    let narrow = error(&wanted(4 * GIB, &allowed, &[]));
    assert_eq!(
        narrow.to_string(),
        "4 GiB of RAM do not fit: the limit is the host's IOMMU, which allows no address above \
         0xffffffff; there is room for 3 GiB; ask for no more than that, or leave out the devices \
         behind that limit"
    );
    let bars = [on_root(&[(PREFETCHABLE, GIB)])];
    assert_eq!(
        error(&wanted(GIB, &allowed, &bars)).to_string(),
        "the 64-bit BARs need 1 GiB above 0x100000000, and 0 bytes are free there: the limit is \
         the host's IOMMU, which allows no address above 0xffffffff; ask for less RAM, or assign \
         fewer devices"
    );
    let bits = Wanted {
        address_bits: 36,
        ..wanted(100 * GIB, &[], &[])
    };
    assert_eq!(
        error(&bits),
        LayoutError::Ram {
            wanted: 100 * GIB,
            fits: 63 * GIB,
            bound: Bound::AddressBits { bits: 36 },
        }
    );
    let many = [on_root(&[(NARROW, 512 * MIB), (NARROW, 4096)])];
    assert_eq!(
        error(&wanted(GIB, &[], &many)).to_string(),
        "the 32-bit BARs and, behind root ports, those that are not prefetchable need 524292 KiB \
         below 4 GiB, and there is room for 512 MiB: the limit is the machine, which has \
         0xc0000000-0xdfffffff for them; assign fewer devices"
    );
    let wide = [behind(&[(WIDE, 256 * MIB)])];
    let reserved = [iova(0, 0xc00f_ffff), iova(0xc020_0000, 0xfedf_ffff)];
    assert_eq!(
        error(&wanted(GIB, &reserved, &[wide[0].clone(), wide[0].clone()])).to_string(),
        "the 32-bit BARs and, behind root ports, those that are not prefetchable need 512 MiB \
         below 4 GiB, and there is room for 256 MiB: the limit is the host's IOMMU, which leaves \
         0xc0200000-0xdfffffff of what the machine has for them; assign fewer devices"
    );
    let odd = error(&wanted(3 * MIB, &[], &[]));
    assert_eq!(
        odd.to_string(),
        "3 MiB of RAM cannot be had: ask for a multiple of 2 MiB, such as 4 MiB"
    );
    assert_eq!(error(&wanted(0, &[], &[])), LayoutError::RamUnit { ram: 0 });
    let max = error(&wanted(u64::MAX, &[], &[]));
    assert!(max.to_string().contains("a multiple of 2 MiB"), "{max}");
    let high = [iova(16 * MIB, (1 << 39) - 1)];
    assert_eq!(error(&wanted(GIB, &high, &[])), LayoutError::NoFirstRam);
    let hole = [iova(0, 0xbfff_ffff), iova(4 * GIB, (1 << 39) - 1)];
    assert_eq!(error(&wanted(GIB, &hole, &[])), LayoutError::NoLowWindow);
    let bits = Wanted {
        address_bits: 31,
        ..wanted(GIB, &[], &[])
    };
    assert_eq!(error(&bits), LayoutError::AddressBits { bits: 31 });
}

#[test]
fn the_memory_map_says_what_is_there() {
    let layout = Layout::choose(&wanted(4 * GIB, &[], &[])).unwrap();
    let map: Vec<_> = layout
        .memory_map()
        .iter()
        .map(|entry| {
            let range = entry.range;
            (range.start().raw(), range.last().raw(), entry.kind)
        })
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_ffff, MemoryKind::Ram),
            (0xa_0000, 0xf_ffff, MemoryKind::Reserved),
            (0x10_0000, 0xbfff_ffff, MemoryKind::Ram),
            (0xe000_0000, 0xefff_ffff, MemoryKind::Reserved),
            (0xfffb_c000, 0xffff_ffff, MemoryKind::Reserved),
            (0x1_0000_0000, 0x1_3fff_ffff, MemoryKind::Ram),
        ]
    );
}

/// Allowed ranges: holes cut into a space of some width.
fn allowed() -> impl Strategy<Value = Vec<IovaRange>> {
    let hole = (0_u64..1 << 20, 1_u64..1 << 16);
    let holes = prop::collection::vec(hole, 0..6);
    (prop::option::weighted(0.8, 30_u8..50), holes, 12_u32..30).prop_map(|(bits, holes, scale)| {
        let Some(bits) = bits else { return vec![] };
        let mut ranges = intel(bits.max(33));
        for (start, pages) in holes {
            let (start, size) = (start << scale, pages << 12);
            let last = start + size - 1;
            let cut = ranges.iter().flat_map(|range| {
                let below = start.checked_sub(1).map(|last| iova(0, last));
                let above = iova(last + 1, u64::MAX);
                let below = below.and_then(|below| range.intersection(&below));
                [below, range.intersection(&above)].into_iter().flatten()
            });
            ranges = cut.collect();
        }
        ranges
    })
}

/// Functions, on the root bus and behind ports.
fn functions() -> impl Strategy<Value = Vec<FunctionBars>> {
    let bar = (0_u8..5, 4_u32..40).prop_map(|(kind, bits)| match kind {
        0 => (BarKind::Io, 1 << (bits % 8)),
        1 => (NARROW, 1 << bits.min(28)),
        2 => (NARROW_PREFETCHABLE, 1 << bits.min(26)),
        3 => (PREFETCHABLE, 1_u64 << bits),
        _ => (WIDE, 1_u64 << bits.min(28)),
    });
    let bars = prop::collection::vec(bar, 0..5);
    let function = (any::<bool>(), bars).prop_map(|(port, bars)| function(port, &bars));
    prop::collection::vec(function, 0..6)
}

/// Whether a BAR can only be below 4 GiB.
fn has_to_be_low(behind_port: bool, kind: BarKind) -> bool {
    match kind {
        BarKind::Io => false,
        BarKind::Memory {
            is_64_bit,
            prefetchable,
        } => !is_64_bit || (behind_port && !prefetchable),
    }
}

/// What a guest's kernel asks room for: for each function that is behind a port a window of what
/// is to be low and one of the rest, else each BAR. Windows are aligned by their largest BAR, by
/// half or by a quarter of it, and end on a multiple of that or of 1 MiB, as `choices` say.
fn asked_for(functions: &[FunctionBars], low: bool, mut choices: u32) -> Vec<(u64, u64)> {
    let mut choose = |of: u32| {
        choices = choices.rotate_left(2);
        choices % of
    };
    let mut found = Vec::new();
    for function in functions {
        let bars = function.bars.iter();
        let bars = bars.filter(|(_, kind, _)| kind.is_memory());
        let sizes: Vec<u64> = bars
            .filter(|(_, kind, _)| has_to_be_low(function.behind_port, *kind) == low)
            .map(|(.., size)| *size)
            .collect();
        if !function.behind_port {
            found.extend(sizes.iter().map(|size| (*size, *size)));
        } else if let Some(largest) = sizes.iter().max() {
            let alignment = (*largest >> choose(3)).max(WINDOW_UNIT);
            let end = [alignment, WINDOW_UNIT][choose(2) as usize];
            let sum: u64 = sizes.iter().sum();
            found.push((sum.next_multiple_of(end), alignment));
        }
    }
    found.sort_by_key(|(_, alignment)| std::cmp::Reverse(*alignment));
    found
}

/// Puts each where there is room first, or tells that there is none.
fn first_fit(window: GpaRange, asked: &[(u64, u64)]) -> bool {
    let mut taken: Vec<GpaRange> = Vec::new();
    asked.iter().all(|(size, alignment)| {
        let ends = taken.iter().map(|range| range.last().raw() + 1);
        let mut starts: Vec<u64> = ends.chain([window.start().raw()]).collect();
        starts.sort_unstable();
        let found = starts.into_iter().find_map(|start| {
            let start = start.checked_next_multiple_of(*alignment)?;
            let range = GpaRange::new(Gpa::new(start), *size).ok()?;
            let free = !taken.iter().any(|other| other.overlaps(&range));
            (free && window.covers(&range)).then_some(range)
        });
        taken.extend(found);
        found.is_some()
    })
}

fn is_allowed(allowed: &[IovaRange], range: GpaRange) -> bool {
    allowed.is_empty() || allowed.iter().any(|a| a.covers(&range.to_iova()))
}

proptest! {
    #[test]
    fn whatever_is_wanted_lies_where_it_may(
        units in prop_oneof![1_u64..2048, 2048_u64..1 << 20],
        allowed in allowed(),
        functions in functions(),
        address_bits in 32_u8..=64,
        choices in any::<u32>(),
    ) {
        let ram = units * RAM_UNIT;
        let wanted = Wanted { ram, allowed: &allowed, address_bits, functions: &functions };
        let Ok(layout) = Layout::choose(&wanted) else { return Ok(()) };
        let fixed = GpaRange::from_inclusive(platform::LOW_HOLE, Gpa::new(FOUR_GIB - 1)).unwrap();
        let reserved = GpaRange::from_inclusive(
            Gpa::new(HYPER_TRANSPORT.0), Gpa::new(HYPER_TRANSPORT.1)
        ).unwrap();
        let last = if address_bits > 52 { (1 << 52) - 1 } else { (1_u64 << address_bits) - 1 };
        // All RAM is placed once, piece after piece.
        let mut placed = 0;
        let mut taken: Vec<GpaRange> = Vec::new();
        for piece in layout.ram() {
            prop_assert_eq!(piece.offset, placed);
            placed += piece.range.size();
            prop_assert!(piece.range.is_aligned(RAM_UNIT));
            prop_assert!(!piece.range.overlaps(&fixed));
            taken.push(piece.range);
        }
        prop_assert_eq!(placed, ram);
        prop_assert_eq!(layout.ram()[0].range.start().raw(), 0);
        let low = layout.low_window();
        prop_assert!(fixed.covers(&low) && !low.overlaps(&ecam().unwrap()));
        prop_assert!(low.is_aligned(WINDOW_UNIT));
        taken.push(low);
        let [below, anywhere] = [true, false].map(|low| asked_for(&functions, low, choices));
        if let Some(high) = layout.high_window() {
            let ram_last = layout.ram().last().unwrap().range.last();
            prop_assert!(high.start() > ram_last && high.start().raw() >= FOUR_GIB);
            let largest = anywhere.first().map_or(1, |(_, alignment)| *alignment);
            prop_assert!(high.start().is_aligned(largest));
            prop_assert!(first_fit(low, &below) && first_fit(high, &anywhere));
            taken.push(high);
        } else {
            let mut all = [below, anywhere].concat();
            all.sort_by_key(|(_, alignment)| std::cmp::Reverse(*alignment));
            prop_assert!(first_fit(low, &all));
        }
        // Every BAR has a place of its own, where it may be.
        let mut placed: Vec<GpaRange> = Vec::new();
        prop_assert_eq!(layout.bars().len(), functions.len());
        for (function, places) in functions.iter().zip(layout.bars()) {
            let bars = function.bars.iter().filter(|(_, kind, _)| kind.is_memory());
            prop_assert_eq!(bars.clone().count(), places.len());
            for (bar, kind, size) in bars {
                let range = places.iter().find(|place| place.bar == *bar).unwrap().range;
                prop_assert_eq!(range.size(), *size);
                prop_assert!(range.is_aligned(*size));
                prop_assert!(placed.iter().all(|other| !other.overlaps(&range)));
                let high = layout.high_window().filter(|_| {
                    !has_to_be_low(function.behind_port, *kind)
                });
                prop_assert!(high.unwrap_or(low).covers(&range));
                placed.push(range);
            }
        }
        for (index, range) in taken.iter().enumerate() {
            prop_assert!(is_allowed(&allowed, *range));
            prop_assert!(range.last().raw() <= last);
            prop_assert!(!range.overlaps(&reserved));
            prop_assert!(taken[..index].iter().all(|other| !other.overlaps(range)));
        }
        // The guest is told of all RAM but the PC's hole, in order.
        let map = layout.memory_map();
        prop_assert!(map.windows(2).all(|pair| pair[0].range.last() < pair[1].range.start()));
        let told = map.iter().filter(|entry| entry.kind == MemoryKind::Ram);
        let told: u64 = told.map(|entry| entry.range.size()).sum();
        prop_assert_eq!(told, ram - 0x6_0000);
    }
}
