//! How long it takes to map much RAM, by its file and by its address.
#![expect(
    unsafe_code,
    reason = "mapping memory by address for DMA is unsafe; the memory is this file's own"
)]

use std::io;
use std::time::{Duration, Instant};

use host_memory::{HugePage, Ram};
use memory_map::{Access, BackingObject, HostMapping};
use serde::Serialize;

use super::Bench;
use super::cases::Space;
use crate::real::told;
use crate::verdict::granted;
use crate::{Complaint, cases};

/// Where it is mapped: as well aligned as the largest page.
const AT: u64 = 1 << 32;
/// How much is written at once to have pages behind all of it.
const CHUNK: usize = 1 << 20;

/// How long one way of mapping takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MappingTime {
    /// What kind of memory, and how it is mapped.
    pub way: String,
    /// How much, in bytes.
    pub bytes: u64,
    /// How long the first map took, in nanoseconds: this process has not touched the address, if
    /// there is one.
    pub first: u64,
    /// How long each of the later ones took, sorted.
    pub later: Vec<u64>,
    /// How long each unmap took, sorted.
    pub unmaps: Vec<u64>,
}

/// RAM by a memfd, of `bytes`, whose pages are there.
///
/// # Errors
/// Where it cannot be had.
pub fn ram_that_is_there(bytes: u64) -> io::Result<Ram> {
    written(Ram::memfd(c"figures", bytes).map_err(|error| told(&error))?)
}

/// RAM that is written once, so that its pages are there.
fn written(ram: Ram) -> io::Result<Ram> {
    let zeroes = vec![0; CHUNK];
    let mut at = 0;
    while at < ram.size() {
        let left = usize::try_from(ram.size().saturating_sub(at)).unwrap_or(CHUNK);
        let chunk = zeroes.get(..left.min(CHUNK)).unwrap_or(&zeroes);
        ram.write(at, chunk).map_err(|error| told(&error))?;
        at = at.saturating_add(CHUNK as u64);
    }
    Ok(ram)
}

fn timed<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let start = Instant::now();
    let result = work();
    let nanos: Duration = start.elapsed();
    (u64::try_from(nanos.as_nanos()).unwrap_or(u64::MAX), result)
}

/// Maps and unmaps `ram` as often as `rounds` says, by its address if there is one, else by its
/// file.
fn one_way(
    ioas: &Space,
    way: &str,
    ram: &Ram,
    address: Option<Box<dyn HostMapping>>,
    rounds: usize,
) -> Result<MappingTime, Complaint> {
    let bytes = ram.size();
    let iova = cases::range(AT, bytes)?;
    let mut maps = Vec::new();
    let mut unmaps = Vec::new();
    for _ in 0..rounds {
        let (nanos, mapped) = match (&address, ram.file()) {
            (Some(mapping), _) => timed(|| {
                // SAFETY: the mapping is `ram`'s and as large, no reference is made into it, and
                // it goes only after the unmap below has succeeded.
                unsafe { ioas.map(iova, mapping.address(), Access::ReadWrite) }
            }),
            (None, Some(file)) => timed(|| ioas.map_file(iova, file, 0, Access::ReadWrite)),
            (None, None) => return Err(io::Error::other("neither a file nor an address").into()),
        };
        granted(mapped)?;
        maps.push(nanos);
        let (nanos, unmapped) = timed(|| ioas.unmap(iova));
        if unmapped.is_err() {
            // It may still be mapped: its address is never given back.
            std::mem::forget(address);
            granted(unmapped)?;
            break;
        }
        unmaps.push(nanos);
    }
    let first = maps.first().copied().unwrap_or(0);
    let mut later = maps.split_off(maps.len().min(1));
    later.sort_unstable();
    unmaps.sort_unstable();
    Ok(MappingTime {
        way: way.to_owned(),
        bytes,
        first,
        later,
        unmaps,
    })
}

/// `bytes` of RAM in ordinary pages and, if there are enough, in huge ones, `rounds` times each.
///
/// # Errors
/// Where memory cannot be had, or the kernel refuses to map it.
pub fn mapping_times(
    bench: &dyn Bench,
    bytes: u64,
    huge: bool,
    rounds: usize,
) -> Result<Vec<MappingTime>, Complaint> {
    let ioas = bench.ioas();
    let mut times = Vec::new();
    let mut both_ways = |what: &str, ram: Ram| -> Result<(), Complaint> {
        times.push(one_way(
            &ioas,
            &format!("{what}, by its file"),
            &ram,
            None,
            rounds,
        )?);
        let address = Some(ram.map_host().map_err(io::Error::from)?);
        let way = format!("{what}, by its address");
        times.push(one_way(&ioas, &way, &ram, address, rounds)?);
        Ok(())
    };
    both_ways("4 KiB pages", ram_that_is_there(bytes)?)?;
    if huge {
        let ram = Ram::memfd_huge(c"figures", bytes, HugePage::Size2M);
        let ram = ram.map_err(|error| told(&error))?;
        both_ways("2 MiB pages", written(ram)?)?;
    }
    Ok(times)
}
