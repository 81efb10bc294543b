//! Memory mapped into this process, as a value that owns the mapping.
//!
//! Whoever makes a [`Mapping`] owns the addresses; dropping it takes them away. An IOMMU mapping
//! made from them has to be gone by then, which is why the memory map keeps the guard for as long
//! as a target holds the mapping.
//!
//! Why this is sound: a mapping is placed by the kernel where nothing else is, is freed exactly
//! once, and no Rust reference into it is ever made. What devices, guests or other processes do
//! to the bytes therefore breaks no assumption of the compiler.
#![expect(
    unsafe_code,
    reason = "mmap, munmap, and copies that no Rust reference may stand for"
)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::{Arc, OnceLock};

use memory_map::{Access, GRANULE, HostMapping, HostVa};

use crate::HostMemoryError;

/// The size of a page of this process in bytes.
#[must_use]
pub fn page_size() -> u64 {
    static PAGE: OnceLock<u64> = OnceLock::new();
    *PAGE.get_or_init(|| {
        // SAFETY: sysconf takes a number and touches no memory of ours.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        // It cannot fail for this name; if it did, the smallest page there is would be the guess
        // that the kernel then checks.
        u64::try_from(page)
            .ok()
            .filter(|page| page.is_power_of_two())
            .unwrap_or(GRANULE)
    })
}

/// A shared mapping of a file, or of anonymous memory, that this value owns.
///
/// Of a file it keeps the file open as well, so that the device behind a BAR's mapping is not
/// given back while the mapping is there.
pub struct Mapping {
    address: NonNull<u8>,
    size: usize,
    access: Access,
    /// `None` for anonymous memory.
    file: Option<Arc<File>>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and munmap may be called from any.
unsafe impl Send for Mapping {}
// SAFETY: through a shared reference one gets the address, which is a number, and the crate's own
// `read` and `write`, which use volatile accesses to memory that is shared by nature; no reference
// into it exists that such an access could conflict with.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes of `file` from `offset`, shared (`MAP_SHARED`), so that everyone who
    /// maps the same file sees the same bytes. Offset and size are in bytes and must be multiples
    /// of [`page_size`] (of the huge page, for a file made of those).
    ///
    /// # Errors
    /// [`HostMemoryError`]: for numbers that no mapping can have, and where the kernel refuses.
    pub fn of_file(
        file: Arc<File>,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<Self, HostMemoryError> {
        let page = page_size();
        if !offset.is_multiple_of(page) {
            return Err(HostMemoryError::OffsetMisaligned { offset, page });
        }
        Self::new(Some(file), offset, size, access)
    }

    /// Maps `size` bytes of fresh, zeroed memory; a multiple of [`page_size`].
    ///
    /// The memory is shared even though nobody else can name it: of private memory, a fork or a
    /// write after a read-only pin would give the process another copy than the device has.
    ///
    /// # Errors
    /// [`HostMemoryError`]: for a size that no mapping can have, and where the kernel refuses.
    pub fn anonymous(size: u64) -> Result<Self, HostMemoryError> {
        Self::new(None, 0, size, Access::ReadWrite)
    }

    fn new(
        file: Option<Arc<File>>,
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
        let too_large = || HostMemoryError::TooLarge { offset, size };
        let length = usize::try_from(size).map_err(|_| too_large())?;
        let file_offset = libc::off_t::try_from(offset).map_err(|_| too_large())?;
        offset
            .checked_add(size)
            .and_then(|end| libc::off_t::try_from(end).ok())
            .ok_or_else(too_large)?;
        let protection = match access {
            Access::ReadOnly => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let (flags, fd) = match &file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: without MAP_FIXED and with no wish for an address, the kernel puts the mapping
        // where nothing else is, so no memory that Rust knows of changes. The fd, if any, is open
        // for the length of the call.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, file_offset) };
        if address == libc::MAP_FAILED {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::ENOMEM) => HostMemoryError::OutOfMemory { size, source },
                _ => HostMemoryError::Kernel {
                    call: "mmap",
                    size,
                    source,
                },
            });
        }
        let Some(address) = NonNull::new(address.cast::<u8>()) else {
            // The kernel puts nothing at zero unless it is told to.
            return Err(HostMemoryError::Kernel {
                call: "mmap",
                size,
                source: io::Error::from_raw_os_error(libc::EFAULT),
            });
        };
        Ok(Self {
            address,
            size: length,
            access,
            file,
        })
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size as u64
    }

    /// What the mapping allows.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// The first byte, for the embedder's own raw accesses: valid for [`size`](Self::size) bytes
    /// for as long as this value lives. Never make a reference from it; and of a device's
    /// mapping, expect SIGBUS when the device stops decoding.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// The file it is a mapping of, if any.
    #[must_use]
    pub const fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// Asks the kernel to join pages to huge ones. A kernel that cannot leaves them as they are.
    pub(crate) fn advise_huge_pages(&self) {
        // SAFETY: the address and the size are those of this mapping, and the advice changes no
        // byte of it.
        let _advice =
            unsafe { libc::madvise(self.as_ptr().cast(), self.size, libc::MADV_HUGEPAGE) };
    }

    /// Where `length` bytes at `offset` lie, if all of them lie in the mapping.
    fn at(&self, offset: u64, length: usize) -> Result<*mut u8, HostMemoryError> {
        let out_of_bounds = || HostMemoryError::OutOfBounds {
            offset,
            length: length as u64,
            size: self.size(),
        };
        let start = usize::try_from(offset).map_err(|_| out_of_bounds())?;
        match start.checked_add(length) {
            Some(end) if end <= self.size => Ok(self.as_ptr().wrapping_add(start)),
            _ => Err(out_of_bounds()),
        }
    }

    /// Copies bytes out. For RAM only: a device's mapping may answer with SIGBUS.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), HostMemoryError> {
        let mut from = self.at(offset, data.len())?.cast_const();
        let misaligned = from.align_offset(WORD).min(data.len());
        let (head, rest) = data.split_at_mut(misaligned);
        let (words, tail) = rest.as_chunks_mut::<WORD>();
        for byte in head {
            // SAFETY: `at` has seen to it that every byte of the copy lies in the mapping, which
            // lives as long as `self`, and RAM can be read.
            *byte = unsafe { from.read_volatile() };
            from = from.wrapping_add(1);
        }
        for word in words {
            // SAFETY: as above; and the head ended on a word's boundary.
            *word = unsafe { from.cast::<u64>().read_volatile() }.to_ne_bytes();
            from = from.wrapping_add(WORD);
        }
        for byte in tail {
            // SAFETY: as for the head.
            *byte = unsafe { from.read_volatile() };
            from = from.wrapping_add(1);
        }
        Ok(())
    }

    /// Copies bytes in. For RAM only, and for mappings that can be written.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), HostMemoryError> {
        if self.access == Access::ReadOnly {
            return Err(HostMemoryError::Kernel {
                call: "write to a read-only mapping",
                size: data.len() as u64,
                source: io::Error::from_raw_os_error(libc::EACCES),
            });
        }
        let mut to = self.at(offset, data.len())?;
        let misaligned = to.align_offset(WORD).min(data.len());
        let (head, rest) = data.split_at(misaligned);
        let (words, tail) = rest.as_chunks::<WORD>();
        for byte in head {
            // SAFETY: `at` has seen to it that every byte of the copy lies in the mapping, which
            // lives as long as `self`; it can be written, as was checked first.
            unsafe { to.write_volatile(*byte) };
            to = to.wrapping_add(1);
        }
        for word in words {
            // SAFETY: as above; and the head ended on a word's boundary.
            unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
            to = to.wrapping_add(WORD);
        }
        for byte in tail {
            // SAFETY: as for the head.
            unsafe { to.write_volatile(*byte) };
            to = to.wrapping_add(1);
        }
        Ok(())
    }
}

const WORD: usize = size_of::<u64>();

impl HostMapping for Mapping {
    fn address(&self) -> HostVa {
        // Whoever turns the number back into a pointer (the kernel) may do so.
        HostVa::new(self.address.as_ptr().expose_provenance() as u64)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what mmap returned, unmapped once, as nothing else unmaps it. Nobody
        // holds a reference into it, as none was ever made.
        //
        // It fails where the kernel had merged the mapping with a neighbour and the process has
        // too many mappings to split them again. Then the memory stays mapped, which is safe.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.size) };
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Mapping({:#x} bytes at {}, {})",
            self.size,
            self.address(),
            self.access
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_every_length_and_alignment() {
        let mapping = Mapping::anonymous(page_size()).unwrap();
        let pattern: Vec<u8> = (0..40).collect();
        for offset in 0..17u64 {
            for length in 0..34usize {
                mapping.write(0, &[0xee; 64]).unwrap();
                mapping.write(offset, &pattern[..length]).unwrap();
                let mut all = [0; 64];
                mapping.read(0, &mut all).unwrap();
                let start = usize::try_from(offset).unwrap();
                assert_eq!(&all[start..start + length], &pattern[..length]);
                assert!(all[..start].iter().all(|byte| *byte == 0xee));
                assert!(all[start + length..].iter().all(|byte| *byte == 0xee));
                let mut part = vec![0; length];
                mapping.read(offset, &mut part).unwrap();
                assert_eq!(part, &pattern[..length]);
            }
        }
    }

    #[test]
    fn bounds_are_kept() {
        let size = page_size();
        let mapping = Mapping::anonymous(size).unwrap();
        for (offset, length) in [(size - 1, 2), (size, 1), (u64::MAX, 1), (size + 1, 0)] {
            assert!(matches!(
                mapping.read(offset, &mut vec![0; length]),
                Err(HostMemoryError::OutOfBounds { .. })
            ));
            assert!(matches!(
                mapping.write(offset, &vec![0; length]),
                Err(HostMemoryError::OutOfBounds { .. })
            ));
        }
        mapping.read(size, &mut []).unwrap();
    }

    #[test]
    fn sizes_that_no_mapping_can_have() {
        assert!(matches!(Mapping::anonymous(0), Err(HostMemoryError::Empty)));
        assert!(matches!(
            Mapping::anonymous(page_size() + 1),
            Err(HostMemoryError::SizeMisaligned { .. })
        ));
        assert!(matches!(
            Mapping::anonymous(0u64.wrapping_sub(page_size())),
            Err(HostMemoryError::TooLarge { .. })
        ));
        let error = Mapping::anonymous(1 << 62).unwrap_err();
        assert!(matches!(error, HostMemoryError::OutOfMemory { .. }));
        assert_eq!(error.errno().raw(), libc::ENOMEM);
    }

    #[test]
    fn a_dropped_mapping_is_gone() {
        let ram = crate::Ram::memfd(c"dropped-mapping", page_size()).unwrap();
        let file = File::from(ram.file().unwrap().try_clone_to_owned().unwrap());
        let mapped = || {
            std::fs::read_to_string("/proc/self/maps")
                .unwrap()
                .contains("dropped-mapping")
        };
        let mapping = Mapping::of_file(Arc::new(file), 0, page_size(), Access::ReadWrite).unwrap();
        assert!(mapped());
        drop(mapping);
        assert!(!mapped());
    }
}
