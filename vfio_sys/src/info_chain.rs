//! Structs that the kernel fills in and follows with a chain of capabilities.
//!
//! ```text
//!  0        fixed size                                    argsz
//!  ┌────────┬──────────────┬──────────────┬───────────────┐
//!  │ struct │ id ver next ─┼▶id ver next ─┼▶id ver next=0 │
//!  └─┬──────┴──────────────┴──────────────┴───────────────┘
//!    └ cap_offset ▲           every offset counts from the struct's first byte
//! ```
//!
//! The chain comes from the kernel, but from as far away as a device's driver, so it is taken
//! for what it says only as far as it makes sense: a chain that leaves the buffer, points into
//! the middle of nowhere or comes back to itself is an error.

use std::collections::BTreeSet;
use std::ffi::c_void;
use std::io;

use vfio_bindings::bindings::vfio::vfio_info_cap_header;

/// The header of a capability in bytes: id, version, offset of the next.
const HEADER: usize = size_of::<vfio_info_cap_header>();

/// The longest answer that is believed, in bytes. The longest known (a sparse BAR of as many
/// areas as it has pages would be longer, but no driver makes one) have a few kilobytes.
const LONGEST: usize = 1 << 20;

/// How often the kernel may ask for a longer buffer. The allowed IOVA ranges can grow between
/// two calls, when a group joins.
const ATTEMPTS: usize = 8;

/// What is wrong with a capability chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A capability starts or ends beyond what the kernel filled in.
    #[error("the capability at {offset:#x} reaches past the end of the answer, {length:#x} bytes")]
    Truncated {
        /// Where it starts, in bytes from the struct's first.
        offset: u64,
        /// The answer's length in bytes.
        length: u64,
    },
    /// A capability is said to lie in the fixed struct.
    #[error("a capability at {offset:#x} would lie in the struct, which has {fixed:#x} bytes")]
    InsideStruct {
        /// Where it starts.
        offset: u64,
        /// The fixed struct's size in bytes.
        fixed: u64,
    },
    /// A capability does not start on a multiple of four bytes.
    #[error("a capability at {offset:#x} is misaligned")]
    Misaligned {
        /// Where it starts.
        offset: u64,
    },
    /// The chain comes back to a capability that it has visited.
    #[error("the capability chain comes back to {offset:#x}")]
    Cyclic {
        /// Where that one starts.
        offset: u64,
    },
    /// A capability that is understood has a version that is not.
    #[error("capability {id} has version {version}, which this program does not know")]
    UnknownVersion {
        /// Which capability.
        id: u16,
        /// Its version.
        version: u16,
    },
    /// A capability holds a range that cannot be.
    #[error("capability {id} holds the impossible range {start:#x}, {end_or_size:#x}")]
    ImpossibleRange {
        /// Which capability.
        id: u16,
        /// The range's first number.
        start: u64,
        /// Its second: the last address of an IOVA range, the size of an area.
        end_or_size: u64,
    },
}

/// Why the kernel could not be asked for an info struct.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InfoError {
    /// The kernel refused.
    #[error("the kernel refused to tell")]
    Kernel(#[from] io::Error),
    /// It wants a buffer beyond all reason, or a longer one each time.
    #[error("the kernel wants a buffer of {wanted:#x} bytes, after {attempts} attempts")]
    TooLong {
        /// That many bytes.
        wanted: u64,
        /// How often it was asked.
        attempts: usize,
    },
    /// What it told does not make sense.
    #[error("the kernel's answer is malformed")]
    Chain(#[from] ChainError),
}

impl From<InfoError> for io::Error {
    /// The kernel's errno where there is one; else an error without, which counts as `EIO`.
    fn from(error: InfoError) -> Self {
        match error {
            InfoError::Kernel(error) => error,
            other => Self::new(io::ErrorKind::InvalidData, other),
        }
    }
}

/// The bytes of an info struct and whatever follows it.
#[derive(Debug)]
pub(crate) struct InfoBuffer {
    bytes: Vec<u8>,
}

/// Where the fields of an info struct are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InfoLayout {
    /// The fixed struct's size in bytes.
    pub(crate) fixed: usize,
    /// The bit of `flags`, which is always the second `u32`, that announces a chain.
    pub(crate) chain_flag: u32,
    /// The offset of `cap_offset`.
    pub(crate) cap_offset: usize,
}

const FLAGS: usize = 4;

impl InfoBuffer {
    /// Zeroed, `length` bytes and at least as many as `argsz` and `flags` take.
    fn zeroed(length: usize) -> Self {
        Self {
            bytes: vec![0; length.max(FLAGS + 4)],
        }
    }

    /// Its address for the kernel. The first word, `argsz`, is set to the buffer's length first,
    /// so that the kernel writes no further than that.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut c_void {
        // Lengths are capped far below 4 GiB; if one were not, the kernel would be told of a
        // shorter buffer, which is safe.
        let argsz = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.set_u32(0, argsz);
        self.bytes.as_mut_ptr().cast()
    }

    fn set_u32(&mut self, offset: usize, value: u32) {
        if let Some(place) = offset
            .checked_add(4)
            .and_then(|end| self.bytes.get_mut(offset..end))
        {
            place.copy_from_slice(&value.to_ne_bytes());
        }
    }

    /// The `u32` at `offset`; zero past the end, as if the kernel had not filled it in.
    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32_at(&self.bytes, offset).unwrap_or(0)
    }

    /// The `u64` at `offset`; zero past the end, as if the kernel had not filled it in.
    pub(crate) fn u64(&self, offset: usize) -> u64 {
        u64_at(&self.bytes, offset).unwrap_or(0)
    }

    /// `flags`.
    pub(crate) fn flags(&self) -> u32 {
        self.u32(FLAGS)
    }

    /// Asks the kernel, by `ask`, for a struct and all that follows it. `index` is an offset and
    /// a value to be put there beforehand.
    pub(crate) fn fetch(
        layout: InfoLayout,
        index: Option<(usize, u32)>,
        mut ask: impl FnMut(&mut Self) -> io::Result<()>,
    ) -> Result<Self, InfoError> {
        let mut length = layout.fixed;
        for _ in 0..ATTEMPTS {
            let mut buffer = Self::zeroed(length);
            if let Some((offset, value)) = index {
                buffer.set_u32(offset, value);
            }
            ask(&mut buffer)?;
            let wanted = usize::try_from(buffer.u32(0)).unwrap_or(usize::MAX);
            if buffer.flags() & layout.chain_flag == 0 || wanted <= length {
                return Ok(buffer);
            }
            length = wanted;
            if length > LONGEST {
                break;
            }
        }
        Err(InfoError::TooLong {
            wanted: length as u64,
            attempts: ATTEMPTS,
        })
    }

    /// The capabilities in the order of their chain; none if the struct announces none.
    ///
    /// # Errors
    /// For a chain that cannot be followed to its end.
    pub(crate) fn capabilities(
        &self,
        layout: InfoLayout,
    ) -> Result<Vec<Capability<'_>>, ChainError> {
        let mut found = Vec::new();
        if self.flags() & layout.chain_flag == 0 {
            return Ok(found);
        }
        let mut visited = BTreeSet::new();
        let mut offset = self.u32(layout.cap_offset);
        while offset != 0 {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let offset_64 = u64::from(offset);
            if start < layout.fixed {
                return Err(ChainError::InsideStruct {
                    offset: offset_64,
                    fixed: layout.fixed as u64,
                });
            }
            if !start.is_multiple_of(4) {
                return Err(ChainError::Misaligned { offset: offset_64 });
            }
            if !visited.insert(start) {
                return Err(ChainError::Cyclic { offset: offset_64 });
            }
            let capability = Capability::at(&self.bytes, offset)?;
            offset = capability.next;
            found.push(capability);
        }
        Ok(found)
    }

    #[cfg(test)]
    pub(crate) fn of_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }
}

/// One capability of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capability<'a> {
    pub(crate) id: u16,
    version: u16,
    next: u32,
    offset: u32,
    /// From its header to the end of the answer: its own length is written nowhere.
    bytes: &'a [u8],
    length: usize,
}

impl<'a> Capability<'a> {
    fn at(bytes: &'a [u8], offset: u32) -> Result<Self, ChainError> {
        let truncated = ChainError::Truncated {
            offset: offset.into(),
            length: bytes.len() as u64,
        };
        let start = usize::try_from(offset).map_err(|_| truncated)?;
        let rest = bytes.get(start..).ok_or(truncated)?;
        let header: &[u8; HEADER] = rest.first_chunk().ok_or(truncated)?;
        let [id_0, id_1, version_0, version_1, next @ ..] = *header;
        Ok(Self {
            id: u16::from_ne_bytes([id_0, id_1]),
            version: u16::from_ne_bytes([version_0, version_1]),
            next: u32::from_ne_bytes(next),
            offset,
            bytes: rest,
            length: bytes.len(),
        })
    }

    /// Insists on version 1, the only one there has been of any capability.
    pub(crate) fn check_version(&self) -> Result<(), ChainError> {
        if self.version != 1 {
            return Err(ChainError::UnknownVersion {
                id: self.id,
                version: self.version,
            });
        }
        Ok(())
    }

    fn truncated(&self) -> ChainError {
        ChainError::Truncated {
            offset: self.offset.into(),
            length: self.length as u64,
        }
    }

    /// The `u32` at `offset` from the capability's header.
    pub(crate) fn u32(&self, offset: usize) -> Result<u32, ChainError> {
        u32_at(self.bytes, offset).ok_or_else(|| self.truncated())
    }

    /// `count` pairs of `u64` from `offset` on.
    pub(crate) fn pairs(
        &self,
        offset: usize,
        count: u32,
    ) -> Result<impl Iterator<Item = (u64, u64)> + use<'a>, ChainError> {
        let truncated = self.truncated();
        let length = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(PAIR))
            .ok_or(truncated)?;
        let (pairs, _) = self
            .bytes
            .get(offset..)
            .and_then(|rest| rest.get(..length))
            .ok_or(truncated)?
            .as_chunks::<PAIR>();
        Ok(pairs.iter().map(|pair| {
            let [a0, a1, a2, a3, a4, a5, a6, a7, second @ ..] = *pair;
            (
                u64::from_ne_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
                u64::from_ne_bytes(second),
            )
        }))
    }
}

const PAIR: usize = 2 * size_of::<u64>();

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
#[path = "info_chain_tests.rs"]
mod tests;
