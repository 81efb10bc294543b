//! Pages: the granule of memory, of host mappings and of translations.

/// The size of a page in bytes.
pub(crate) const PAGE: u64 = 0x1000;
/// The same as a length.
pub(crate) const PAGE_LEN: usize = 0x1000;

/// A run of bytes that lies within one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it starts in the address space that was cut up.
    pub address: u64,
    /// Where it starts in the caller's data.
    pub at: usize,
    /// How many bytes it has; never zero.
    pub len: usize,
}

impl Piece {
    /// The page it lies in.
    pub fn page(&self) -> u64 {
        self.address / PAGE
    }

    /// Where in that page it starts.
    pub fn in_page(&self) -> usize {
        in_page(self.address)
    }
}

fn in_page(address: u64) -> usize {
    // Below PAGE, so that the fallback is never taken.
    usize::try_from(address % PAGE).unwrap_or(0)
}

/// Cuts the `len` bytes from `address` at page boundaries. What would lie past the end of the
/// address space is left out.
pub(crate) fn pieces(address: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut next = Some(address);
    let mut at = 0usize;
    std::iter::from_fn(move || {
        let address = next?;
        let left = len.checked_sub(at).filter(|left| *left > 0)?;
        let piece = Piece {
            address,
            at,
            len: left.min(PAGE_LEN - in_page(address)),
        };
        at += piece.len;
        next = u64::try_from(piece.len)
            .ok()
            .and_then(|len| address.checked_add(len));
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_pages() {
        let cut: Vec<_> = pieces(0x1ffe, 0x1005)
            .map(|p| (p.address, p.at, p.len))
            .collect();
        assert_eq!(
            cut,
            [(0x1ffe, 0, 2), (0x2000, 2, 0x1000), (0x3000, 0x1002, 3)]
        );
        assert_eq!(pieces(7, 0).count(), 0);
    }

    #[test]
    fn nothing_lies_past_the_end() {
        let cut: Vec<_> = pieces(u64::MAX - 1, 10).map(|p| p.len).collect();
        assert_eq!(cut, [2]);
    }
}
