//! What the user lends to NVMe controllers so that they serve as DMA engines: blocks of their
//! disks. And what they are lent besides: RAM of the guest, for their queues.

use std::io;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use dma_engine::{EngineMemory, Nvme, ScratchBlocks};
use memory_map::{Gpa, Iova, IovaRange};
use vfio_sys::Bdf;

use super::assembly::RAM;
use crate::ram::GuestRam;

/// One value of `--nvme-scratch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NvmeScratch {
    /// The controller.
    pub function: Bdf,
    /// What may be overwritten of its disk.
    pub blocks: ScratchBlocks,
}

impl FromStr for NvmeScratch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A BDF has colons too; blocks have none.
        let (function, blocks) = text.rsplit_once(':').ok_or_else(|| {
            format!("{text:?} is not BDF:FIRST..END, such as 0000:01:00.0:2048..2056")
        })?;
        Ok(Self {
            function: function.parse().map_err(said)?,
            blocks: blocks.parse().map_err(said)?,
        })
    }
}

fn said(error: impl std::error::Error) -> String {
    error.to_string()
}

/// Refuses what makes no sense with these functions.
pub fn check(lent: &[NvmeScratch], functions: &[Bdf]) -> Result<()> {
    for (place, scratch) in lent.iter().enumerate() {
        let function = scratch.function;
        if !functions.contains(&function) {
            bail!(
                "--nvme-scratch lends blocks of {function}, but it is none of the functions to be \
                 opened: name it among them too"
            );
        }
        let mut before = lent.iter().take(place);
        if before.any(|other| other.function == function) {
            bail!("--nvme-scratch names {function} twice: give all its blocks as one range");
        }
    }
    Ok(())
}

/// The first byte of RAM that is lent; what is below is for the data that are moved.
const FIRST: u64 = RAM.raw() + 0x4_0000;

/// A piece of the guest's RAM, lent to one controller's driver.
pub struct LentRam {
    ram: GuestRam,
    range: IovaRange,
}

impl LentRam {
    /// The piece with this number.
    pub fn of(ram: &GuestRam, number: usize) -> Result<Self> {
        let offset = u64::try_from(number)?.saturating_mul(Nvme::MEMORY);
        let start = Iova::new(FIRST.saturating_add(offset));
        let range = IovaRange::new(start, Nvme::MEMORY).context("no such RAM")?;
        ensure!(
            ram.range().covers(&range.to_gpa()),
            "RAM is too small to lend a piece to each NVMe controller: give more of it (--memory)"
        );
        let ram = ram.clone();
        Ok(Self { ram, range })
    }

    /// Where it begins.
    pub fn start(&self) -> Gpa {
        self.range.to_gpa().start()
    }

    fn at(&self, offset: u64, len: usize) -> io::Result<Gpa> {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.range.size()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Gpa::new(self.start().raw().saturating_add(offset)))
    }
}

impl EngineMemory for LentRam {
    fn iova(&self) -> IovaRange {
        self.range
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.at(offset, data.len())?;
        let found = self.ram.read(at, data.len()).map_err(io::Error::other)?;
        data.copy_from_slice(&found);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.at(offset, data.len())?;
        self.ram.write(at, data).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use memory_map::{Backing, RegionManager};
    use sim_host::SimHost;

    use super::*;
    use crate::p2p::exercise::{LEN, MAILBOX};

    fn scratch(text: &str) -> NvmeScratch {
        text.parse().unwrap()
    }

    #[test]
    fn values_are_read_and_what_is_wrong_with_them_is_told() {
        let full = scratch("0000:01:00.0:2048..2056");
        assert_eq!(full.function.to_string(), "0000:01:00.0");
        assert_eq!(full.blocks.to_string(), "2048..2056");
        assert_eq!(scratch("01:00.0:2048..2056"), full);
        for (wrong, said) in [
            ("", "BDF:FIRST..END"),
            ("2048..2056", "BDF:FIRST..END"),
            ("nonsense:1..2", "no PCI address"),
            ("0000:01:00.0", "no PCI address"),
            ("0000:01:00.0:", "names no blocks"),
            ("0000:01:00.0:5..5", "names no blocks"),
        ] {
            let error = wrong.parse::<NvmeScratch>().unwrap_err();
            assert!(error.contains(said), "{wrong}: {error}");
        }
    }

    #[test]
    fn blocks_of_functions_that_are_not_opened_or_named_twice_are_refused() {
        let named = ["0000:01:00.0".parse().unwrap()];
        let one = scratch("01:00.0:1..9");
        check(&[], &named).unwrap();
        check(&[one], &named).unwrap();
        for (lent, said) in [
            (&[one, scratch("02:00.0:1..9")][..], "0000:02:00.0"),
            (&[one, scratch("01:00.0:20..29")], "twice"),
        ] {
            let error = check(lent, &named).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn pieces_are_pages_of_their_own_and_end_with_ram() {
        let map = RegionManager::new();
        let host = SimHost::default();
        let backing = Backing::new(host.ram(1 << 20).unwrap());
        let ram = GuestRam::add(&map, "ram", backing, RAM).unwrap();
        let one = LentRam::of(&ram, 0).unwrap();
        let two = LentRam::of(&ram, 1).unwrap();
        assert!(one.iova().start().is_aligned(0x1000) && two.iova().start().is_aligned(0x1000));
        assert!(!one.iova().overlaps(&two.iova()));
        assert!(one.start().raw() >= MAILBOX.raw() + u64::try_from(LEN).unwrap());
        one.write(Nvme::MEMORY - 4, b"lent").unwrap();
        let mut found = [0; 4];
        one.read(Nvme::MEMORY - 4, &mut found).unwrap();
        assert_eq!(found, *b"lent");
        assert!(one.write(Nvme::MEMORY - 3, b"lent").is_err());
        assert!(one.read(u64::MAX, &mut found).is_err());
        let most = (0..).find(|&number| LentRam::of(&ram, number).is_err());
        assert_eq!(most, Some((0xc_0000 / Nvme::MEMORY).try_into().unwrap()));
    }
}
