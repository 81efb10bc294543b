//! Guest RAM: memfd, huge pages, anonymous memory, or a file that was handed in.
//!
//! The embedder makes a [`Ram`] and gives it to a backing, which owns it; the memory is freed
//! with the last region, the last IOMMU mapping and the last handle that uses it.
#![expect(unsafe_code, reason = "memfd_create, fcntl and fstatfs")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use memory_map::{Access, BackingFile, BackingObject, Errno, HostMapping, HostVa, NoFile};

use crate::{HostMemoryError, HugePage, Mapping, NotWritable, page_size};

/// Memory that a guest may have as RAM.
#[derive(Debug)]
pub struct Ram {
    size: u64,
    pages: Pages,
}

#[derive(Debug)]
enum Pages {
    /// A file with ordinary pages, read and written as a file.
    File(Arc<File>),
    /// The same, of which the kernel is asked to join pages where it is mapped.
    Transparent(Arc<File>),
    /// A file of huge pages, which cannot be written as a file. It stays mapped, which also keeps
    /// the pages reserved.
    Huge(Arc<File>, Arc<Mapping>),
    /// Memory that exists only as long as it is mapped.
    Anonymous(Arc<Mapping>),
}

/// A host address that is there anyway; the guard keeps it so.
#[derive(Debug)]
struct Lasting(Arc<Mapping>);

impl HostMapping for Lasting {
    fn address(&self) -> HostVa {
        self.0.address()
    }
}

impl Ram {
    /// `size` bytes of zeroed memory behind a memfd, which other processes can be given; a
    /// multiple of the page size. It can neither shrink nor grow (`F_SEAL_SHRINK`,
    /// `F_SEAL_GROW`), whoever holds it. `name` shows up in `/proc/*/maps`. Linux 3.17,
    /// `linux/memfd.h`.
    ///
    /// # Errors
    /// [`HostMemoryError`]: for a size of zero or one that is not made of pages, and where the
    /// kernel refuses.
    pub fn memfd(name: &CStr, size: u64) -> Result<Self, HostMemoryError> {
        check_size(size, page_size())?;
        let file = create_memfd(name, 0).map_err(|source| HostMemoryError::Kernel {
            call: "memfd_create",
            size,
            source,
        })?;
        set_size(&file, size)?;
        seal(&file).map_err(|source| HostMemoryError::Kernel {
            call: "sealing",
            size,
            source,
        })?;
        Ok(Self {
            size,
            pages: Pages::File(Arc::new(file)),
        })
    }

    /// Like [`memfd`](Self::memfd), of ordinary pages that the kernel is asked to join to huge ones
    /// where they are mapped (`MADV_HUGEPAGE`). It does so as far as
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` lets it: with `within_size` or `always`.
    /// `advise` is enough only for pages that are first touched through the mapping, not for those that
    /// the kernel fills by the file, as iommufd has it do.
    ///
    /// # Errors
    /// As for [`memfd`](Self::memfd).
    pub fn memfd_transparent(name: &CStr, size: u64) -> Result<Self, HostMemoryError> {
        let mut ram = Self::memfd(name, size)?;
        if let Pages::File(file) = ram.pages {
            ram.pages = Pages::Transparent(file);
        }
        Ok(ram)
    }

    /// Like [`memfd`](Self::memfd), made of huge pages, which are reserved at once. `size` is a
    /// multiple of the huge page. Linux 4.14.
    ///
    /// # Errors
    /// [`HostMemoryError::HugePagesUnavailable`] where there are not enough, or none of that
    /// size; it says how to reserve them. Else as for [`memfd`](Self::memfd).
    pub fn memfd_huge(name: &CStr, size: u64, page: HugePage) -> Result<Self, HostMemoryError> {
        check_size(size, page.bytes())?;
        let unavailable = |source| HostMemoryError::HugePagesUnavailable {
            page,
            pages: size / page.bytes(),
            source,
        };
        let file = create_memfd(name, page.memfd_flags()).map_err(unavailable)?;
        set_size(&file, size)?;
        seal(&file).map_err(|source| HostMemoryError::Kernel {
            call: "sealing",
            size,
            source,
        })?;
        let file = Arc::new(file);
        // The pages are reserved when the file is mapped, not before.
        let mapping = match Mapping::of_file(file.clone(), 0, size, Access::ReadWrite) {
            Err(HostMemoryError::OutOfMemory { source, .. }) => return Err(unavailable(source)),
            other => other?,
        };
        Ok(Self {
            size,
            pages: Pages::Huge(file, Arc::new(mapping)),
        })
    }

    /// `size` bytes of zeroed memory that only this process has; a multiple of the page size.
    ///
    /// # Errors
    /// [`HostMemoryError`]: for a size of zero or one that is not made of pages, and where the
    /// kernel refuses.
    pub fn anonymous(size: u64) -> Result<Self, HostMemoryError> {
        check_size(size, page_size())?;
        Ok(Self {
            size,
            pages: Pages::Anonymous(Arc::new(Mapping::anonymous(size)?)),
        })
    }

    /// The first `size` bytes of a file that was handed in: a memfd, or a file on tmpfs or
    /// hugetlbfs, open for reading and writing. A multiple of its page size.
    ///
    /// A memfd that can still be sealed is sealed against shrinking. Of any other file it is for
    /// whoever handed it in not to shrink it: the guest would lose its memory, and a huge page
    /// that is gone would answer this process with SIGBUS.
    ///
    /// # Errors
    /// [`HostMemoryError::FileTooSmall`], [`HostMemoryError::NotWritable`], and as for
    /// [`memfd`](Self::memfd).
    pub fn from_fd(fd: OwnedFd, size: u64) -> Result<Self, HostMemoryError> {
        let kernel = |call| move |source| HostMemoryError::Kernel { call, size, source };
        let file = File::from(fd);
        if let Some(why) = not_writable(&file).map_err(kernel("fcntl"))? {
            return Err(HostMemoryError::NotWritable(why));
        }
        let metadata = file.metadata().map_err(kernel("fstat"))?;
        let huge = is_hugetlbfs(&file).map_err(kernel("fstatfs"))?;
        let page = if huge {
            metadata.blksize()
        } else {
            page_size()
        };
        check_size(size, page)?;
        // Sealing comes before the look at the size: what is seen then stays.
        let sealed = add_seals(&file, libc::F_SEAL_SHRINK);
        let length = file.metadata().map_err(kernel("fstat"))?.len();
        if length < size {
            return Err(HostMemoryError::FileTooSmall {
                file: length,
                wanted: size,
            });
        }
        match sealed {
            Ok(()) => {}
            // Sealed already, or not a memfd: see above.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EPERM | libc::EINVAL | libc::EBADF)
                ) => {}
            Err(error) => return Err(kernel("sealing")(error)),
        }
        let file = Arc::new(file);
        let pages = if huge {
            let mapping = Mapping::of_file(file.clone(), 0, size, Access::ReadWrite)?;
            Pages::Huge(file, Arc::new(mapping))
        } else {
            Pages::File(file)
        };
        Ok(Self { size, pages })
    }

    /// The file behind it, to be shared with another process; anonymous memory has none.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.pages {
            Pages::File(file) | Pages::Transparent(file) | Pages::Huge(file, _) => {
                Some(file.as_fd())
            }
            Pages::Anonymous(_) => None,
        }
    }

    /// Reads `data.len()` bytes at `offset`. What a device writes meanwhile may be seen in part.
    ///
    /// # Errors
    /// [`HostMemoryError::OutOfBounds`], and where the kernel refuses.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), HostMemoryError> {
        self.check_bounds(offset, data.len())?;
        match &self.pages {
            Pages::File(file) | Pages::Transparent(file) => file
                .read_exact_at(data, offset)
                .map_err(|source| HostMemoryError::Kernel {
                    call: "pread",
                    size: data.len() as u64,
                    source,
                }),
            Pages::Huge(_, mapping) | Pages::Anonymous(mapping) => mapping.read(offset, data),
        }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`HostMemoryError::OutOfBounds`], and where the kernel refuses.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), HostMemoryError> {
        self.check_bounds(offset, data.len())?;
        match &self.pages {
            Pages::File(file) | Pages::Transparent(file) => file
                .write_all_at(data, offset)
                .map_err(|source| HostMemoryError::Kernel {
                    call: "pwrite",
                    size: data.len() as u64,
                    source,
                }),
            Pages::Huge(_, mapping) | Pages::Anonymous(mapping) => mapping.write(offset, data),
        }
    }

    fn check_bounds(&self, offset: u64, length: usize) -> Result<(), HostMemoryError> {
        let length = length as u64;
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(HostMemoryError::OutOfBounds {
                offset,
                length,
                size: self.size,
            }),
        }
    }
}

impl BackingObject for Ram {
    fn size(&self) -> u64 {
        self.size
    }

    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        match &self.pages {
            Pages::File(file) | Pages::Transparent(file) => {
                match Mapping::of_file(file.clone(), 0, self.size, Access::ReadWrite) {
                    Ok(mapping) => {
                        if matches!(self.pages, Pages::Transparent(_)) {
                            mapping.advise_huge_pages();
                        }
                        Ok(Box::new(mapping))
                    }
                    Err(error) => Err(error.errno()),
                }
            }
            Pages::Huge(_, mapping) | Pages::Anonymous(mapping) => {
                Ok(Box::new(Lasting(mapping.clone())))
            }
        }
    }

    fn file(&self) -> Result<BackingFile<'_>, NoFile> {
        let fd = Self::file(self).ok_or(NoFile::Anonymous)?;
        Ok(BackingFile { fd, offset: 0 })
    }
}

fn check_size(size: u64, page: u64) -> Result<(), HostMemoryError> {
    if size == 0 {
        return Err(HostMemoryError::Empty);
    }
    if !size.is_multiple_of(page) {
        return Err(HostMemoryError::SizeMisaligned { size, page });
    }
    Ok(())
}

fn set_size(file: &File, size: u64) -> Result<(), HostMemoryError> {
    file.set_len(size)
        .map_err(|source| match source.raw_os_error() {
            // Past what off_t holds, the standard library says EINVAL or "invalid input".
            Some(libc::EFBIG) | None => HostMemoryError::TooLarge { offset: 0, size },
            Some(libc::ENOMEM | libc::ENOSPC) => HostMemoryError::OutOfMemory { size, source },
            _ => HostMemoryError::Kernel {
                call: "ftruncate",
                size,
                source,
            },
        })
}

fn create_memfd(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string that lives through the call; the kernel copies it.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this fd for us, and nobody else knows it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Fixes the size for good.
fn seal(file: &File) -> io::Result<()> {
    add_seals(
        file,
        libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
    )
}

/// Why the file cannot be written, if so. The kernel looks at neither when it maps a file for
/// DMA: devices would write where the processor may not.
fn not_writable(file: &File) -> io::Result<Option<NotWritable>> {
    // SAFETY: the fd is open for the length of the call, and there is no argument.
    let mode = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if mode < 0 {
        return Err(io::Error::last_os_error());
    }
    if mode & libc::O_ACCMODE != libc::O_RDWR {
        return Ok(Some(NotWritable::Mode));
    }
    // SAFETY: as above.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    // What has no seals answers with an error.
    let sealed = seals > 0 && seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0;
    Ok(sealed.then_some(NotWritable::Sealed))
}

fn add_seals(file: &File, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: the fd is open for the length of the call, and the argument is a number.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn is_hugetlbfs(file: &File) -> io::Result<bool> {
    let mut state = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills in the struct, which is ours and as large as it expects; the fd is
    // open for the length of the call.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), state.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: numbers only, all of which were zeroed and then filled in.
    let state = unsafe { state.assume_init() };
    Ok(state.f_type == libc::HUGETLBFS_MAGIC)
}

#[cfg(test)]
#[path = "ram_tests.rs"]
mod tests;
