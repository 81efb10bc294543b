//! A device's BAR, or a part of one, as a backing.
//!
//! The function that lends the BAR out makes it once, when the function is opened. It shares the
//! device's file, so the device is given back only when the last region, the last mapping and the
//! last handle are gone.

use std::fs::File;
use std::sync::Arc;

use memory_map::{Access, BackingObject, Errno, HostMapping};

use crate::{HostMemoryError, Mapping, page_size};

/// A part of a device's file that can be mapped: one mappable area of a BAR.
///
/// Nobody reads or writes the device through the addresses it gives: they are for the kernel's
/// mapping calls. The region's read and write are for the rest.
#[derive(Debug)]
pub struct DeviceBar {
    file: Arc<File>,
    offset: u64,
    size: u64,
    access: Access,
}

impl DeviceBar {
    /// The `size` bytes of `file` from `offset`, both in bytes and multiples of
    /// [`page_size`](crate::page_size). Nothing is mapped yet.
    ///
    /// # Errors
    /// [`HostMemoryError`] for numbers that no mapping can have.
    pub fn new(
        file: Arc<File>,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<Self, HostMemoryError> {
        let page = page_size();
        if size == 0 {
            return Err(HostMemoryError::Empty);
        }
        if !size.is_multiple_of(page) {
            return Err(HostMemoryError::SizeMisaligned { size, page });
        }
        if !offset.is_multiple_of(page) {
            return Err(HostMemoryError::OffsetMisaligned { offset, page });
        }
        if offset.checked_add(size).is_none() {
            return Err(HostMemoryError::TooLarge { offset, size });
        }
        Ok(Self {
            file,
            offset,
            size,
            access,
        })
    }

    /// The device's file.
    #[must_use]
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where in the file it starts, in bytes.
    #[must_use]
    pub const fn file_offset(&self) -> u64 {
        self.offset
    }

    /// What its mappings allow.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// Maps it.
    ///
    /// # Errors
    /// [`HostMemoryError`] where the kernel refuses.
    pub fn map(&self) -> Result<Mapping, HostMemoryError> {
        Mapping::of_file(self.file.clone(), self.offset, self.size, self.access)
    }
}

impl BackingObject for DeviceBar {
    fn size(&self) -> u64 {
        self.size
    }

    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        match self.map() {
            Ok(mapping) => Ok(Box::new(mapping)),
            Err(error) => Err(error.errno()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::Ram;

    /// A file that stands for a device: what is written to it is to be seen through the mapping.
    fn file(size: u64) -> Arc<File> {
        let ram = Ram::memfd(c"bar", size).unwrap();
        Arc::new(File::from(
            ram.file().unwrap().try_clone_to_owned().unwrap(),
        ))
    }

    #[test]
    fn the_mapping_starts_at_the_files_offset() {
        let page = page_size();
        let file = file(4 * page);
        file.write_all_at(b"peer", 2 * page).unwrap();
        let bar = DeviceBar::new(file, 2 * page, page, Access::ReadOnly).unwrap();
        let mapping = bar.map().unwrap();
        let mut seen = [0; 4];
        mapping.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"peer");
        assert!(mapping.write(0, b"x").is_err());
        assert_eq!(bar.size(), page);
        drop(bar);
        mapping.read(0, &mut seen).unwrap();
    }

    #[test]
    fn a_bar_smaller_than_a_page_is_refused() {
        let file = file(page_size());
        assert!(matches!(
            DeviceBar::new(file.clone(), 0, 256, Access::ReadWrite),
            Err(HostMemoryError::SizeMisaligned { size: 256, .. })
        ));
        assert!(matches!(
            DeviceBar::new(file.clone(), 256, page_size(), Access::ReadWrite),
            Err(HostMemoryError::OffsetMisaligned { offset: 256, .. })
        ));
        assert!(matches!(
            DeviceBar::new(file, 0, 0, Access::ReadWrite),
            Err(HostMemoryError::Empty)
        ));
    }
}
