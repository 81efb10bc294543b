//! How long a BAR's move takes, with nothing else at work.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use assigned_pci::HostFunction;
use dma_engine::Edu;
use serde_json::{Value, json};

use super::found;
use crate::function::{Bar, COMMAND, Function, MEMORY};
use crate::mapping::Mapping;
use crate::place::free_places;
use crate::report::Findings;

/// What an edu's first register reads.
const IDENTIFICATION: u32 = 0x0100_00ed;

/// A place for the BAR that moves, and its registers when it is there.
struct Place {
    address: u64,
    registers: Mapping,
}

/// The edu's registers, 1 MiB below 4 GiB, are moved to and fro, `rounds` times with decoding on all
/// the while, and as often as Linux does it, with decoding turned off before and on after. Each time
/// is from the first write of config space until its first register has been read at the new place.
pub fn moves_alone(rounds: u64) -> anyhow::Result<Findings> {
    ensure!(rounds > 0, "nothing is moved in no rounds");
    let functions = Function::all()?;
    let edu = functions
        .iter()
        .find(|function| function.id() == (Edu::VENDOR, Edu::DEVICE))
        .context("there is no edu (1234:11e8) among the PCI functions")?;
    let bar = *edu.bars().first().context("the edu has no BAR")?;
    edu.enable()?;
    let home = edu.address(bar)?;
    let free = free_places(edu, bar, &functions, &[])?;
    let away = *free.first().context("no other place is free")?;
    let place = |address| -> anyhow::Result<Place> {
        let registers = Mapping::physical(address, bar.size)?;
        Ok(Place { address, registers })
    };
    let places = [place(away)?, place(home)?];
    let (mut decoding, mut off_and_on) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for place in &places {
            decoding.push(time_move(edu, bar, place, true)?);
        }
        for place in &places {
            off_and_on.push(time_move(edu, bar, place, false)?);
        }
    }
    Ok(found([
        ("bar", json!(format!("{} {}", edu.name(), bar.index))),
        ("places", json!([home, away])),
        ("decoding", told(decoding)),
        ("off and on", told(off_and_on)),
    ]))
}

fn time_move(edu: &Function, bar: Bar, to: &Place, decoding: bool) -> anyhow::Result<Duration> {
    let on = edu.command()? | MEMORY;
    let mut first = [0; 4];
    let start = Instant::now();
    if !decoding {
        edu.write(COMMAND, &(on & !MEMORY).to_le_bytes())?;
    }
    edu.set_address(bar, to.address)?;
    if !decoding {
        edu.write(COMMAND, &on.to_le_bytes())?;
    }
    to.registers.read(0, &mut first)?;
    let took = start.elapsed();
    let first = u32::from_le_bytes(first);
    ensure!(
        first == IDENTIFICATION,
        "{} was moved to {:#x}, where {first:#x} is read",
        edu.name(),
        to.address
    );
    Ok(took)
}

/// How often, and the median, the shortest and the longest in microseconds.
fn told(mut took: Vec<Duration>) -> Value {
    took.sort_unstable();
    let microseconds = |time: Option<&Duration>| time.map(|time| time.as_secs_f64() * 1e6);
    json!({
        "moves": took.len(),
        "median microseconds": microseconds(took.get(took.len() / 2)),
        "shortest microseconds": microseconds(took.first()),
        "longest microseconds": microseconds(took.last()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_both_ends_are_told() {
        let took = [5, 1, 9].map(Duration::from_micros).into();
        let told = told(took);
        let of = |name: &str| told[name].as_f64().map(f64::round);
        assert_eq!(told["moves"], 3);
        assert_eq!(of("median microseconds"), Some(5.0));
        assert_eq!(of("shortest microseconds"), Some(1.0));
        assert_eq!(of("longest microseconds"), Some(9.0));
    }
}
