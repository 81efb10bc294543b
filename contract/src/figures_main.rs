//! `iommufd-figures`: what iommufd costs on the kernel that this runs on.

use clap::Parser;
use contract::iommufd::{
    Figure, IommufdHost, MappingTime, RealHost, bar_events, mapping_times, ram_that_is_there,
    registration,
};
use memory_map::{Backing, GRANULE};
use serde::Serialize;
use vfio_sys::Bdf;

/// Counts the kernel calls of events and times them through the memory map and by hand, in turns;
/// and times the mapping of much RAM by its file and by its address. Of times it prints the median
/// and, in brackets, where the middle half of them lies.
///
/// Both functions must be bound to vfio-pci, and nobody else may use them. Needs Linux 6.19 or
/// newer.
#[derive(Debug, Parser)]
#[command(name = "iommufd-figures")]
struct Arguments {
    /// A function with a DMA engine: QEMU's edu, with dma_mask=0xffffffffffffffff.
    engine: Bdf,
    /// A function with a memory BAR of at least 64 KiB: QEMU's ivshmem-plain.
    memory: Bdf,
    /// How often each of a BAR's events happens in a turn.
    #[arg(long, default_value_t = 100)]
    events: u64,
    /// How many regions of RAM, of 4 KiB, there are when an address space is registered. May be
    /// repeated.
    #[arg(long, default_values_t = [100, 1000, 10_000])]
    regions: Vec<u64>,
    /// How much RAM is mapped as one, in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1024))]
    mib: u64,
    /// The same in huge pages of 2 MiB too, of which there must be enough.
    #[arg(long)]
    huge: bool,
    /// How many turns there are, of events, registrations and mappings.
    #[arg(long, default_value_t = 11)]
    turns: usize,
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    events: Vec<Figure>,
    mappings: Vec<MappingTime>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let host = RealHost::new(arguments.engine, arguments.memory);
    let failed = |complaint: contract::Complaint| anyhow::anyhow!("{complaint}");
    let turns = arguments.turns;
    let mut events = bar_events(&*host.bench()?, turns, arguments.events).map_err(failed)?;
    for regions in &arguments.regions {
        let size = regions.saturating_mul(GRANULE);
        events.push(registered(&host, size, GRANULE, turns)?);
    }
    let size = arguments.mib << 20;
    events.push(registered(&host, size, size, turns)?);
    let bench = host.bench()?;
    let mappings = mapping_times(&*bench, size, arguments.huge, turns);
    let report = Report {
        events,
        mappings: mappings.map_err(failed)?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    for figure in &report.events {
        let Figure {
            event,
            turns,
            in_a_turn,
            calls,
            with_the_map,
            bare,
        } = figure;
        let share = figure.share_of_the_map();
        println!(
            "{event}: {} calls ({} maps, {} unmaps); {}, by hand {}, the map's own share {}.{} % \
             ({turns} turns of {in_a_turn})",
            calls.total(),
            calls.maps,
            calls.unmaps,
            in_microseconds(with_the_map),
            in_microseconds(bare),
            share / 10,
            share % 10,
        );
    }
    for time in &report.mappings {
        let first = time.first;
        println!(
            "{} MiB, {}: first {}, later {}; unmapped in {}",
            time.bytes >> 20,
            time.way,
            in_microseconds(&[first]),
            in_microseconds(&time.later),
            in_microseconds(&time.unmaps),
        );
    }
    Ok(())
}

/// Registers `size` bytes of RAM that are there already, in regions of `each`.
fn registered(host: &RealHost, size: u64, each: u64, turns: usize) -> anyhow::Result<Figure> {
    let ram = ram_that_is_there(size)?;
    let figure = registration(&*host.bench()?, &Backing::new(ram), each, turns);
    figure.map_err(|complaint| anyhow::anyhow!("{complaint}"))
}

/// The median of sorted nanoseconds, and where the middle half of them lies if there are several.
fn in_microseconds(times: &[u64]) -> String {
    let shown = |nanos: u64| format!("{}.{}", nanos / 1000, nanos % 1000 / 100);
    let median = shown(Figure::median(times));
    let quarter = times.len() / 4;
    let (low, high) = (times.get(quarter), times.iter().rev().nth(quarter));
    match (low, high) {
        (Some(low), Some(high)) if times.len() > 3 => {
            format!("{median} us ({} to {})", shown(*low), shown(*high))
        }
        _ => format!("{median} us"),
    }
}
