//! Files that are loaded.

use std::io::{self, Read, Seek, SeekFrom};

use memory_map::GpaRange;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::error::{BootError, ImageKind};

/// A file, or bytes that stand in for one.
pub(super) trait Image: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Image for T {}

/// How much is read at a time: the kernel reads no more than 2 GiB at once, and may read less.
const CHUNK: usize = 64 << 20;

pub(super) enum Format {
    BzImage,
    Elf,
}

/// Where a bzImage has its magic number.
const HEADER_MAGIC: usize = 0x202;
const LOOKED_AT: usize = HEADER_MAGIC + 4;

/// Looks at the file's magic numbers.
pub(super) fn recognise<F: Image>(kernel: &mut F) -> Result<Format, BootError> {
    let mut head = Vec::new();
    let mut read = || {
        kernel.rewind()?;
        kernel
            .by_ref()
            .take(LOOKED_AT as u64)
            .read_to_end(&mut head)
    };
    read().map_err(|source| BootError::Read {
        image: ImageKind::Kernel,
        source,
    })?;
    if head.get(HEADER_MAGIC..) == Some(b"HdrS") {
        return Ok(Format::BzImage);
    }
    let what = match head.as_slice() {
        [0x7f, b'E', b'L', b'F', ..] => return Ok(Format::Elf),
        [] => "it is empty",
        [0x1f, 0x8b, ..] => "it is compressed by gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed by zstd",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed by xz",
        [b'M', b'Z', ..] => "but another EFI program",
        [b'0', b'7', b'0', b'7', ..] => "but an initrd",
        _ => "as its magic numbers say",
    };
    Err(BootError::NotAKernel { what })
}

/// A file's size in bytes.
pub(super) fn size_of<F: Image>(image: &mut F) -> io::Result<u64> {
    image.seek(SeekFrom::End(0))
}

/// Fills `bytes` from `offset` on, where a kernel has a header.
pub(super) fn read_header<F: Image>(
    kernel: &mut F,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), BootError> {
    let mut read = || {
        kernel.seek(SeekFrom::Start(offset))?;
        kernel.read_exact(bytes)
    };
    read().map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => BootError::Damaged {
            what: "it ends within its headers",
        },
        _ => BootError::Read {
            image: ImageKind::Kernel,
            source,
        },
    })
}

/// Fills `range`, which is RAM, from the beginning of the file on.
pub(super) fn read_into<M: GuestMemoryBackend, F: Image>(
    memory: &M,
    range: GpaRange,
    image: &mut F,
) -> io::Result<()> {
    image.rewind()?;
    let mut address = range.start().raw();
    let mut left = range.size();
    while left > 0 {
        let chunk = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let read = memory.read_volatile_from(GuestAddress(address), image, chunk);
        let read = read.map_err(io::Error::other)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A `usize` has at most 64 bits, and no more was read than is left.
        address += read as u64;
        left = left.saturating_sub(read as u64);
    }
    Ok(())
}
