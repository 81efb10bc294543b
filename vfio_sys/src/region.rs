//! A region of a device: a BAR, the ROM, config space.
//!
//! [`Device::region`](crate::Device::region) makes a [`Region`], which shares the device's file;
//! whoever holds one keeps the device open.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use host_memory::{HostMemoryError, Mapping};
use memory_map::Access;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ROM_REGION_INDEX, VFIO_PCI_VGA_REGION_INDEX, VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    vfio_region_info, vfio_region_info_cap_sparse_mmap, vfio_region_info_cap_type,
};

use crate::info_chain::{ChainError, InfoBuffer, InfoLayout};

/// Which region of a PCI device. Those past the fixed ones are described by their
/// [`RegionType`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(pub u32);

impl RegionIndex {
    /// The expansion ROM.
    pub const ROM: Self = Self(VFIO_PCI_ROM_REGION_INDEX);
    /// Config space.
    pub const CONFIG: Self = Self(VFIO_PCI_CONFIG_REGION_INDEX);
    /// The legacy VGA ranges.
    pub const VGA: Self = Self(VFIO_PCI_VGA_REGION_INDEX);

    /// The base address register numbered `bar`, 0 to 5.
    #[must_use]
    pub const fn bar(bar: u8) -> Option<Self> {
        let index = VFIO_PCI_BAR0_REGION_INDEX + bar as u32;
        if index > VFIO_PCI_BAR5_REGION_INDEX {
            return None;
        }
        Some(Self(index))
    }
}

/// A part of a region, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionArea {
    /// Where it starts.
    pub offset: u64,
    /// Its size; not zero.
    pub size: u64,
}

/// What a device-specific region holds (`VFIO_REGION_INFO_CAP_TYPE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionType {
    /// `VFIO_REGION_TYPE_*`, or a PCI vendor.
    pub kind: u32,
    /// `VFIO_REGION_SUBTYPE_*`.
    pub subtype: u32,
}

/// What the kernel tells of a region (`VFIO_DEVICE_GET_REGION_INFO` and its capability chain).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionInfo {
    /// Which region.
    pub index: RegionIndex,
    /// Its size in bytes; zero where the device has none of that index.
    pub size: u64,
    /// Where in the device's file it starts, in bytes.
    pub file_offset: u64,
    /// The only parts that may be mapped, sorted, if the kernel names parts
    /// (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`, Linux 4.5).
    pub sparse: Option<Vec<RegionArea>>,
    /// Whether even the page with the MSI-X table may be mapped
    /// (`VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`, Linux 4.16).
    pub msix_mappable: bool,
    /// What it holds, if that is device-specific.
    pub kind: Option<RegionType>,
    /// The ids of capabilities that this program does not know.
    pub unknown_capabilities: Vec<u16>,
    flags: u32,
}

pub(crate) const LAYOUT: InfoLayout = InfoLayout {
    fixed: size_of::<vfio_region_info>(),
    chain_flag: VFIO_REGION_INFO_FLAG_CAPS,
    cap_offset: std::mem::offset_of!(vfio_region_info, cap_offset),
};
pub(crate) const INDEX: usize = std::mem::offset_of!(vfio_region_info, index);

const SIZE: usize = std::mem::offset_of!(vfio_region_info, size);
const OFFSET: usize = std::mem::offset_of!(vfio_region_info, offset);
const AREAS: usize = std::mem::offset_of!(vfio_region_info_cap_sparse_mmap, areas);
const AREA_COUNT: usize = std::mem::offset_of!(vfio_region_info_cap_sparse_mmap, nr_areas);
const TYPE: usize = std::mem::offset_of!(vfio_region_info_cap_type, type_);
const SUBTYPE: usize = std::mem::offset_of!(vfio_region_info_cap_type, subtype);

impl RegionInfo {
    /// A region without any capability. `flags` are `VFIO_REGION_INFO_FLAG_*`; `size` and
    /// `file_offset` are in bytes.
    #[must_use]
    pub const fn new(index: RegionIndex, flags: u32, size: u64, file_offset: u64) -> Self {
        Self {
            index,
            size,
            file_offset,
            sparse: None,
            msix_mappable: false,
            kind: None,
            unknown_capabilities: Vec::new(),
            flags,
        }
    }

    /// Reads the kernel's answer.
    pub(crate) fn parse(buffer: &InfoBuffer) -> Result<Self, ChainError> {
        let mut info = Self::new(
            RegionIndex(buffer.u32(INDEX)),
            buffer.flags(),
            buffer.u64(SIZE),
            buffer.u64(OFFSET),
        );
        for capability in buffer.capabilities(LAYOUT)? {
            match u32::from(capability.id) {
                VFIO_REGION_INFO_CAP_SPARSE_MMAP => {
                    capability.check_version()?;
                    let areas = info.sparse.get_or_insert_default();
                    let count = capability.u32(AREA_COUNT)?;
                    for (offset, size) in capability.pairs(AREAS, count)? {
                        match offset.checked_add(size) {
                            Some(end) if end <= info.size => {}
                            _ => {
                                return Err(ChainError::ImpossibleRange {
                                    id: capability.id,
                                    start: offset,
                                    end_or_size: size,
                                });
                            }
                        }
                        // Old kernels name an empty area where the MSI-X table leaves nothing.
                        if size != 0 {
                            areas.push(RegionArea { offset, size });
                        }
                    }
                    areas.sort_unstable();
                    // None of them wraps: each was seen to end inside the region.
                    let overlap = areas
                        .array_windows()
                        .find(|[lower, upper]| upper.offset - lower.offset < lower.size);
                    if let Some([_, area]) = overlap {
                        return Err(ChainError::ImpossibleRange {
                            id: capability.id,
                            start: area.offset,
                            end_or_size: area.size,
                        });
                    }
                }
                VFIO_REGION_INFO_CAP_TYPE => {
                    capability.check_version()?;
                    info.kind = Some(RegionType {
                        kind: capability.u32(TYPE)?,
                        subtype: capability.u32(SUBTYPE)?,
                    });
                }
                VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => info.msix_mappable = true,
                _ => info.unknown_capabilities.push(capability.id),
            }
        }
        Ok(info)
    }

    /// The flags as the kernel gave them (`VFIO_REGION_INFO_FLAG_*`).
    #[must_use]
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// Whether it can be read.
    #[must_use]
    pub const fn readable(&self) -> bool {
        self.flags & VFIO_REGION_INFO_FLAG_READ != 0
    }

    /// Whether it can be written.
    #[must_use]
    pub const fn writable(&self) -> bool {
        self.flags & VFIO_REGION_INFO_FLAG_WRITE != 0
    }

    /// What a mapping of it may allow.
    #[must_use]
    pub const fn access(&self) -> Access {
        if self.writable() {
            Access::ReadWrite
        } else {
            Access::ReadOnly
        }
    }

    /// The parts that may be mapped, sorted by offset: the sparse areas; without those, all of
    /// it; nothing, where the kernel maps none of it. They are what the kernel names, so they
    /// may be smaller than a page.
    #[must_use]
    pub fn mappable(&self) -> Vec<RegionArea> {
        if self.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 || self.size == 0 {
            return Vec::new();
        }
        match &self.sparse {
            Some(areas) => areas.clone(),
            None => vec![RegionArea {
                offset: 0,
                size: self.size,
            }],
        }
    }
}

/// A region that can be read, written and mapped.
#[derive(Debug, Clone)]
pub struct Region {
    file: Arc<File>,
    info: RegionInfo,
}

impl Region {
    /// A region of `file`, for those who know what there is by other means than
    /// [`Device::region`](crate::Device::region): a file that stands for a device, in a test.
    #[must_use]
    pub const fn new(file: Arc<File>, info: RegionInfo) -> Self {
        Self { file, info }
    }

    /// What the kernel tells of it.
    #[must_use]
    pub const fn info(&self) -> &RegionInfo {
        &self.info
    }

    /// The device's file. The region's bytes start there at [`RegionInfo::file_offset`].
    #[must_use]
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where `length` bytes at `offset` lie in the device's file.
    fn at(&self, offset: u64, length: usize) -> io::Result<u64> {
        let end = offset.checked_add(length as u64);
        let inside = end.is_some_and(|end| end <= self.info.size);
        self.info
            .file_offset
            .checked_add(offset)
            .filter(|_| inside)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    fn short(&self, what: &str, offset: u64, wanted: usize, done: usize) -> io::Error {
        let index = self.info.index.0;
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{what} of {wanted} bytes at {offset:#x} of region {index} ended after {done}"),
        )
    }

    /// Reads `data.len()` bytes at `offset`, in one `pread`, so that the kernel makes naturally
    /// aligned accesses of 1, 2, 4 or (where it has them) 8 bytes of it.
    ///
    /// # Errors
    /// `EINVAL` past the region's end; the kernel's errno, such as `EIO` of a BAR that does not
    /// decode; an error without errno if only a part was read.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.at(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let done = retry(|| self.file.read_at(data, at))?;
        if done != data.len() {
            return Err(self.short("a read", offset, data.len(), done));
        }
        Ok(())
    }

    /// Writes `data` at `offset`, in one `pwrite`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.at(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let done = retry(|| self.file.write_at(data, at))?;
        if done != data.len() {
            return Err(self.short("a write", offset, data.len(), done));
        }
        Ok(())
    }

    /// Reads the little-endian 16-bit number at `offset`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn read_u16(&self, offset: u64) -> io::Result<u16> {
        let mut data = [0; 2];
        self.read(offset, &mut data)?;
        Ok(u16::from_le_bytes(data))
    }

    /// Reads the little-endian 32-bit number at `offset`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn read_u32(&self, offset: u64) -> io::Result<u32> {
        let mut data = [0; 4];
        self.read(offset, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    /// Writes a little-endian 16-bit number at `offset`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write_u16(&self, offset: u64, value: u16) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Writes a little-endian 32-bit number at `offset`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write_u32(&self, offset: u64, value: u32) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Maps a part of it that is [mappable](RegionInfo::mappable), in whole pages. The mapping
    /// keeps the device open.
    ///
    /// # Errors
    /// [`HostMemoryError`]: `EINVAL` for an area outside the region; the kernel's refusal.
    pub fn map(&self, area: RegionArea) -> Result<Mapping, HostMemoryError> {
        let inside = area
            .offset
            .checked_add(area.size)
            .is_some_and(|end| end <= self.info.size);
        let at = self
            .info
            .file_offset
            .checked_add(area.offset)
            .filter(|_| inside)
            .ok_or(HostMemoryError::OutOfBounds {
                offset: area.offset,
                length: area.size,
                size: self.info.size,
            })?;
        Mapping::of_file(self.file.clone(), at, area.size, self.info.access())
    }
}

/// Does it again where a signal came in between, before anything was done.
fn retry(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
#[path = "region_tests.rs"]
mod tests;
