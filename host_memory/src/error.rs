//! What can go wrong with memory.

use std::io;

use memory_map::Errno;

use crate::HugePage;

/// Why a file cannot be written. Each message says what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotWritable {
    /// It was opened for one of the two only.
    #[error("it is not open for both reading and writing (O_RDWR)")]
    Mode,
    /// It is sealed (`F_SEAL_WRITE`, `F_SEAL_FUTURE_WRITE`).
    #[error(
        "it is sealed against writing: leave out F_SEAL_WRITE and F_SEAL_FUTURE_WRITE, and seal its \
         size only (F_SEAL_SHRINK, F_SEAL_GROW)"
    )]
    Sealed,
}

/// Why memory could not be had, mapped, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostMemoryError {
    /// No bytes at all were asked for.
    #[error("memory of zero bytes was asked for")]
    Empty,
    /// The size is not made of whole pages.
    #[error("the size {size:#x} is not a multiple of the page size {page:#x}")]
    SizeMisaligned {
        /// The size in bytes.
        size: u64,
        /// The page in bytes.
        page: u64,
    },
    /// The offset into the file is not on a page.
    #[error("the file offset {offset:#x} is not a multiple of the page size {page:#x}")]
    OffsetMisaligned {
        /// The offset in bytes.
        offset: u64,
        /// The page in bytes.
        page: u64,
    },
    /// The numbers do not fit this process's address space.
    #[error("{size:#x} bytes at file offset {offset:#x} do not fit the address space")]
    TooLarge {
        /// The offset in bytes.
        offset: u64,
        /// The size in bytes.
        size: u64,
    },
    /// The file that was handed in is smaller than the memory it is to back.
    #[error("the file holds {file:#x} bytes, but {wanted:#x} are to be backed by it")]
    FileTooSmall {
        /// The file's size in bytes.
        file: u64,
        /// What was asked for, in bytes.
        wanted: u64,
    },
    /// The file that was handed in cannot be written, as RAM must be. The kernel would let
    /// devices write to it all the same.
    #[error("the file that was handed in cannot be RAM: {0}")]
    NotWritable(NotWritable),
    /// There are not enough free huge pages of that size, or the processor has none.
    #[error("{pages} huge pages of {page} are not to be had: {}", page.how_to_reserve(*pages))]
    HugePagesUnavailable {
        /// The size of page.
        page: HugePage,
        /// How many were needed.
        pages: u64,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The kernel has no memory, or no address space, for it.
    #[error(
        "no room for {size:#x} bytes: use less, add memory or swap, or see vm.overcommit_memory \
         and `ulimit -v`"
    )]
    OutOfMemory {
        /// The size in bytes.
        size: u64,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// A read or a write reaches past the end.
    #[error("{length:#x} bytes at {offset:#x} reach past the end of {size:#x} bytes of memory")]
    OutOfBounds {
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        length: u64,
        /// The memory's size in bytes.
        size: u64,
    },
    /// The kernel refused something else.
    #[error("{call} of {size:#x} bytes failed")]
    Kernel {
        /// The system call.
        call: &'static str,
        /// For how many bytes.
        size: u64,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

impl HostMemoryError {
    /// The error number that comes closest: the kernel's, where it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Empty
            | Self::SizeMisaligned { .. }
            | Self::OffsetMisaligned { .. }
            | Self::FileTooSmall { .. }
            | Self::OutOfBounds { .. } => Errno::new(libc::EINVAL),
            Self::NotWritable(_) => Errno::new(libc::EPERM),
            Self::TooLarge { .. } => Errno::new(libc::EOVERFLOW),
            Self::HugePagesUnavailable { source, .. }
            | Self::OutOfMemory { source, .. }
            | Self::Kernel { source, .. } => source.into(),
        }
    }
}
