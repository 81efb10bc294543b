//! The guest's RAM, opened for the time in which it is filled.

use std::fs::File;
use std::io;

use host_memory::Ram;
use memory_map::{Backing, GpaRange};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout::RamPiece;

/// Why RAM cannot be filled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// It lies in no file.
    #[error("RAM that lies in no file cannot be filled: use a memfd")]
    NoFile,
    /// Its file cannot be had once more.
    #[error("opening RAM failed")]
    File(#[source] io::Error),
    /// A piece of it cannot be mapped.
    #[error("mapping RAM at {range} failed")]
    Map {
        /// Which piece.
        range: GpaRange,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// The pieces make no memory.
    #[error("RAM cannot be laid out")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// Maps `pieces` of `ram` where the guest sees them.
pub(crate) fn open(ram: &Backing, pieces: &[RamPiece]) -> Result<GuestMemoryMmap, GuestRamError> {
    let ram: &Ram = ram.downcast_ref().ok_or(GuestRamError::NoFile)?;
    let file = ram.file().ok_or(GuestRamError::NoFile)?;
    let mut regions = Vec::new();
    for piece in pieces {
        let file = file.try_clone_to_owned().map_err(GuestRamError::File)?;
        let offset = FileOffset::new(File::from(file), piece.offset);
        let range = piece.range;
        let map = |source| GuestRamError::Map { range, source };
        let size =
            usize::try_from(range.size()).map_err(|_| map(MmapRegionError::InvalidOffsetLength))?;
        let region = MmapRegion::from_file(offset, size).map_err(map)?;
        let at = GuestAddress(range.start().raw());
        let region = GuestRegionMmap::new(region, at);
        regions.push(region.ok_or_else(|| map(MmapRegionError::InvalidOffsetLength))?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(GuestRamError::Layout)
}
