//! RAM whose bus address is known: a huge page.
//!
//! A guest without an IOMMU of its own has bus addresses that are its physical ones.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Context, ensure};
use dma_engine::EngineMemory;
use memory_map::{Iova, IovaRange};

use crate::mapping::{HUGE_PAGE, Mapping};
use crate::pattern;

const PAGE: u64 = 0x1000;
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// In `/proc/self/pagemap`: the page is present, and its number.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// A part of the page.
#[derive(Debug, Clone)]
pub struct DmaMemory {
    mapping: Arc<Mapping>,
    offset: u64,
    range: IovaRange,
}

impl DmaMemory {
    /// A huge page of its own: 2 MiB.
    pub fn new() -> anyhow::Result<Self> {
        let free = fs::read_to_string(POOL).with_context(|| format!("reading {POOL}"))?;
        let more = free.trim().parse::<u64>().unwrap_or(0).saturating_add(1);
        fs::write(POOL, more.to_string()).with_context(|| format!("writing {POOL}"))?;
        let mapping = Mapping::huge_page().context("mapping a huge page")?;
        let frame = frame(mapping.address()).context("asking where a huge page is")?;
        let size = u64::try_from(HUGE_PAGE)?;
        ensure!(
            frame.is_multiple_of(size / PAGE),
            "a huge page begins at page {frame:#x}"
        );
        Ok(Self {
            mapping: Arc::new(mapping),
            offset: 0,
            range: IovaRange::new(Iova::new(frame.saturating_mul(PAGE)), size)?,
        })
    }

    /// A part of it.
    pub fn part(&self, offset: u64, size: u64) -> anyhow::Result<Self> {
        let end = offset.checked_add(size);
        ensure!(
            end.is_some_and(|end| end <= self.range.size()),
            "{size:#x} bytes at {offset:#x} are not in {}",
            self.range
        );
        let start = self.range.start().checked_add(offset);
        Ok(Self {
            mapping: Arc::clone(&self.mapping),
            offset: self.offset.saturating_add(offset),
            range: IovaRange::new(start.context("no such address")?, size)?,
        })
    }

    /// Where devices see it.
    pub fn start(&self) -> Iova {
        self.range.start()
    }

    /// Fills it with a pattern.
    pub fn fill(&self, seed: u64) -> io::Result<()> {
        for at in (0..self.range.size()).step_by(8) {
            self.mapping
                .set_word(self.offset.saturating_add(at), pattern::word(seed, at))?;
        }
        Ok(())
    }

    /// How many of its words are the pattern's.
    pub fn matching(&self, seed: u64) -> io::Result<u64> {
        let mut matching = 0;
        for at in (0..self.range.size()).step_by(8) {
            if self.word(at)? == pattern::word(seed, at) {
                matching += 1;
            }
        }
        Ok(matching)
    }

    /// Its word at an offset.
    pub fn word(&self, offset: u64) -> io::Result<u64> {
        self.mapping.word(self.offset.saturating_add(offset))
    }
}

impl EngineMemory for DmaMemory {
    fn iova(&self) -> IovaRange {
        self.range
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.check(offset, data.len())?;
        let size = access(at, data.len());
        for (piece, at) in data.chunks_mut(size).zip((at..).step_by(size)) {
            self.mapping.read(at, piece)?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.check(offset, data.len())?;
        let size = access(at, data.len());
        for (piece, at) in data.chunks(size).zip((at..).step_by(size)) {
            self.mapping.write(at, piece)?;
        }
        Ok(())
    }
}

impl DmaMemory {
    /// Where in the mapping an access begins that must lie in this part.
    fn check(&self, offset: u64, len: usize) -> io::Result<u64> {
        let end = u64::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len));
        if end.is_some_and(|end| end <= self.range.size()) {
            Ok(self.offset.saturating_add(offset))
        } else {
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        }
    }
}

/// The size of single accesses: four bytes, so that a word that a device writes is seen whole, or one.
fn access(at: u64, len: usize) -> usize {
    if at.is_multiple_of(4) && len.is_multiple_of(4) {
        4
    } else {
        1
    }
}

/// The number of the physical page behind an address of this process.
fn frame(address: usize) -> anyhow::Result<u64> {
    let page = u64::try_from(address)? / PAGE;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page.saturating_mul(8))?;
    let entry = u64::from_le_bytes(entry);
    ensure!(entry & PRESENT != 0, "it is not in RAM");
    let frame = entry & FRAME;
    // To those without privileges the kernel says zero.
    ensure!(frame != 0, "the kernel does not say where it is");
    Ok(frame)
}
