//! Memory that takes up no more room than what was written to it.

use std::collections::BTreeMap;
use std::fmt;

use parking_lot::Mutex;

use crate::page::{PAGE_LEN, pieces};

/// An access that does not lie within its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {offset:#x} do not lie within {size:#x} bytes of memory")]
pub struct OutOfBounds {
    /// Where the access was to start.
    pub offset: u64,
    /// How many bytes it had.
    pub len: usize,
    /// How large the memory is.
    pub size: u64,
}

/// Zeroes until written.
pub(crate) struct SparseMemory {
    size: u64,
    pages: Mutex<BTreeMap<u64, Box<[u8; PAGE_LEN]>>>,
}

impl SparseMemory {
    pub fn new(size: u64) -> Self {
        Self {
            size,
            pages: Mutex::default(),
        }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn check(&self, offset: u64, len: usize) -> Result<(), OutOfBounds> {
        let fits = u64::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len))
            .is_some_and(|end| end <= self.size);
        if fits {
            Ok(())
        } else {
            Err(OutOfBounds {
                offset,
                len,
                size: self.size,
            })
        }
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        self.check(offset, data.len())?;
        let pages = self.pages.lock();
        for piece in pieces(offset, data.len()) {
            let into = data.iter_mut().skip(piece.at).take(piece.len);
            match pages.get(&piece.page()) {
                Some(page) => {
                    for (byte, from) in into.zip(page.iter().skip(piece.in_page())) {
                        *byte = *from;
                    }
                }
                None => into.for_each(|byte| *byte = 0),
            }
        }
        Ok(())
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        self.check(offset, data.len())?;
        let mut pages = self.pages.lock();
        for piece in pieces(offset, data.len()) {
            let page = pages
                .entry(piece.page())
                .or_insert_with(|| Box::new([0; PAGE_LEN]));
            let from = data.iter().skip(piece.at).take(piece.len);
            for (byte, from) in page.iter_mut().skip(piece.in_page()).zip(from) {
                *byte = *from;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for SparseMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SparseMemory")
            .field("size", &self.size)
            .field("pages_written", &self.pages.lock().len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_is_written_across_pages() {
        let memory = SparseMemory::new(0x10_0000_0000);
        let text: Vec<u8> = (0..=255).cycle().take(0x2345).collect();
        memory.write(0x8_0000_0ffd, &text).unwrap();
        let mut back = vec![0; text.len()];
        memory.read(0x8_0000_0ffd, &mut back).unwrap();
        assert_eq!(back, text);
        memory.read(0x1_0000, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn refuses_what_lies_outside() {
        let memory = SparseMemory::new(0x1000);
        assert!(memory.write(0xfff, &[1]).is_ok());
        assert_eq!(
            memory.write(0xfff, &[1, 2]),
            Err(OutOfBounds {
                offset: 0xfff,
                len: 2,
                size: 0x1000
            })
        );
        assert!(memory.read(u64::MAX, &mut [0, 0]).is_err());
    }
}
