//! A device's BAR, or a part of one, as a backing.
//!
//! The function that lends the BAR out makes it once, when the function is opened. It shares the
//! device's file, so the device is given back only when the last region, the last mapping and the
//! last handle are gone. So does its dma-buf, if one was wanted: it is exported when it is first
//! asked for, and stays open for as long as the BAR lives, so that every address space maps the
//! same one.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use memory_map::{Access, BackingFile, BackingObject, Errno, HostMapping, NoFile};

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
    export: Option<Export>,
}

/// Exports a part of a BAR as a dma-buf of its size, or says why that cannot be, in words that a
/// person can act on.
pub type ExportDmaBuf = dyn Fn() -> Result<OwnedFd, Arc<str>> + Send + Sync;

/// A dma-buf, once it has been asked for.
struct Export {
    export: Box<ExportDmaBuf>,
    exported: OnceLock<OwnedFd>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Export").field(&self.exported.get()).finish()
    }
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
            export: None,
        })
    }

    /// The same with a way to export it as a dma-buf, which is asked until it succeeds once. What
    /// the dma-buf holds is the BAR's part from its first byte on.
    #[must_use]
    pub fn with_dma_buf(
        mut self,
        export: impl Fn() -> Result<OwnedFd, Arc<str>> + Send + Sync + 'static,
    ) -> Self {
        self.export = Some(Export {
            export: Box::new(export),
            exported: OnceLock::new(),
        });
        self
    }

    /// The device's file.
    #[must_use]
    pub const fn device_file(&self) -> &Arc<File> {
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

    fn file(&self) -> Result<BackingFile<'_>, NoFile> {
        let Some(Export { export, exported }) = &self.export else {
            return Err(NoFile::NotExported(
                "whoever opened the device gave no way to export it".into(),
            ));
        };
        let fd = match exported.get() {
            Some(fd) => fd,
            // A refusal is not kept: it may have been for want of file descriptors. If another
            // thread was faster, its dma-buf is taken and this one closed.
            None => {
                let fd = export().map_err(NoFile::NotExported)?;
                exported.get_or_init(|| fd)
            }
        };
        Ok(BackingFile {
            fd: fd.as_fd(),
            offset: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicU32, Ordering};

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

    #[test]
    fn a_dma_buf_is_exported_once_and_a_refusal_is_asked_again() {
        let page = page_size();
        let source = file(page);
        let asked = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&asked);
        let bar = DeviceBar::new(source.clone(), 0, page, Access::ReadWrite).unwrap();
        let bar = bar.with_dma_buf(move || match count.fetch_add(1, Ordering::Relaxed) {
            0 => Err("too many open files".into()),
            _ => Ok(source.as_fd().try_clone_to_owned().unwrap()),
        });
        assert_eq!(asked.load(Ordering::Relaxed), 0, "not before it is wanted");
        let refused = NoFile::NotExported("too many open files".into());
        assert_eq!(bar.file().unwrap_err(), refused);
        let first = bar.file().unwrap();
        let again = bar.file().unwrap();
        assert_eq!(first.fd.as_raw_fd(), again.fd.as_raw_fd());
        assert_eq!(again.offset, 0);
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_bar_without_an_exporter_has_no_file() {
        let bar = DeviceBar::new(file(page_size()), 0, page_size(), Access::ReadWrite).unwrap();
        assert!(matches!(bar.file(), Err(NoFile::NotExported(_))));
    }
}
