//! Addresses and ranges of them: guest-physical, I/O virtual, host virtual.

use std::fmt;
use std::marker::PhantomData;

mod sealed {
    pub trait Sealed {}
}

/// An address in one of the address spaces that this crate tells apart.
pub trait Address:
    sealed::Sealed + Copy + Ord + std::hash::Hash + fmt::Debug + fmt::Display
{
    /// The address as a number of bytes from zero.
    fn raw(self) -> u64;
    /// The address that lies `raw` bytes from zero.
    fn from_raw(raw: u64) -> Self;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The address that lies `raw` bytes from zero.
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The address as a number of bytes from zero.
            #[must_use]
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on, or `None` past the end of the space.
            #[must_use]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// Whether the address is a multiple of `alignment` bytes (a power of two).
            #[must_use]
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.0 & alignment.wrapping_sub(1) == 0
            }
        }

        impl sealed::Sealed for $name {}

        impl Address for $name {
            fn raw(self) -> u64 {
                self.0
            }
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address!(
    /// A guest-physical address.
    Gpa
);
address!(
    /// An I/O virtual address: what a device puts on the bus. For an assigned device it equals
    /// the guest-physical address that the guest's driver gave the device.
    Iova
);
address!(
    /// An address in this process, as the kernel's mapping calls take it. It is a number, not a
    /// pointer: nothing in this crate reads or writes through it.
    HostVa
);

/// A non-empty run of bytes that does not wrap: its end is written down inclusively, so that it
/// can reach the very last byte of the address space.
#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange<A> {
    start: u64,
    last: u64,
    space: PhantomData<A>,
}

impl<A> Clone for AddressRange<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for AddressRange<A> {}

/// A range of guest-physical addresses.
pub type GpaRange = AddressRange<Gpa>;
/// A range of I/O virtual addresses.
pub type IovaRange = AddressRange<Iova>;

/// Why two numbers do not make a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// No bytes at all.
    #[error("a range at {start:#x} must not be empty")]
    Empty {
        /// Where the range was to start.
        start: u64,
    },
    /// The end lies past the last address.
    #[error("{size:#x} bytes at {start:#x} wrap past the end of the address space")]
    Wraps {
        /// Where the range was to start.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// All 2^64 bytes, whose number does not fit a `u64`.
    #[error("a range must not cover the whole 64-bit address space")]
    WholeSpace,
}

impl<A: Address> AddressRange<A> {
    /// The `size` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError`] where that is empty or wraps.
    pub fn new(start: A, size: u64) -> Result<Self, RangeError> {
        let start = start.raw();
        let Some(more) = size.checked_sub(1) else {
            return Err(RangeError::Empty { start });
        };
        let last = start
            .checked_add(more)
            .ok_or(RangeError::Wraps { start, size })?;
        Ok(Self::of(start, last))
    }

    /// The bytes from `start` to `last`, both included.
    ///
    /// # Errors
    /// [`RangeError`] where `last` comes before `start`, and for the whole 64-bit space.
    pub fn from_inclusive(start: A, last: A) -> Result<Self, RangeError> {
        let (start, last) = (start.raw(), last.raw());
        if last < start {
            return Err(RangeError::Empty { start });
        }
        if start == 0 && last == u64::MAX {
            return Err(RangeError::WholeSpace);
        }
        Ok(Self::of(start, last))
    }

    /// The caller has seen to `start <= last` and that not the whole space is meant.
    pub(crate) const fn of(start: u64, last: u64) -> Self {
        Self {
            start,
            last,
            space: PhantomData,
        }
    }

    /// The first address.
    #[must_use]
    pub fn start(&self) -> A {
        A::from_raw(self.start)
    }

    /// The last address, which still belongs to the range.
    #[must_use]
    pub fn last(&self) -> A {
        A::from_raw(self.last)
    }

    /// Size in bytes; never zero.
    #[must_use]
    pub const fn size(&self) -> u64 {
        // Neither empty nor the whole space, so this neither underflows nor wraps.
        (self.last - self.start).wrapping_add(1)
    }

    /// Whether `address` lies in the range.
    #[must_use]
    pub fn contains(&self, address: A) -> bool {
        (self.start..=self.last).contains(&address.raw())
    }

    /// Whether all of `other` lies in this range.
    #[must_use]
    pub const fn covers(&self, other: &Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether the two share at least one byte.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// What the two share.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        self.overlaps(other)
            .then(|| Self::of(self.start.max(other.start), self.last.min(other.last)))
    }

    /// The largest part of the range that starts and ends on multiples of `alignment` (a power
    /// of two), if there is one.
    #[must_use]
    pub fn shrink_to(&self, alignment: u64) -> Option<Self> {
        let mask = alignment.checked_sub(1)?;
        let start = self.start.checked_add(mask)? & !mask;
        // One past the end, rounded down; an end at 2^64 is a multiple of every alignment.
        let last = match self.last.checked_add(1) {
            Some(end) => (end & !mask).checked_sub(1)?,
            None => u64::MAX,
        };
        (start <= last).then(|| Self::of(start, last))
    }

    /// Whether both ends lie on multiples of `alignment` bytes (a power of two).
    #[must_use]
    pub fn is_aligned(&self, alignment: u64) -> bool {
        self.shrink_to(alignment) == Some(*self)
    }
}

impl GpaRange {
    /// The same numbers as I/O virtual addresses: an assigned device uses guest-physical ones.
    #[must_use]
    pub const fn to_iova(self) -> IovaRange {
        IovaRange::of(self.start, self.last)
    }
}

impl IovaRange {
    /// The same numbers as guest-physical addresses.
    #[must_use]
    pub const fn to_gpa(self) -> GpaRange {
        GpaRange::of(self.start, self.last)
    }
}

impl<A> fmt::Display for AddressRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last)
    }
}

impl<A> fmt::Debug for AddressRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, size: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start), size).unwrap()
    }

    #[test]
    fn a_range_cannot_be_empty_wrapped_or_everything() {
        assert_eq!(
            GpaRange::new(Gpa::new(16), 0),
            Err(RangeError::Empty { start: 16 })
        );
        assert!(matches!(
            GpaRange::new(Gpa::new(u64::MAX), 2),
            Err(RangeError::Wraps { .. })
        ));
        assert_eq!(range(u64::MAX, 1).last(), Gpa::new(u64::MAX));
        assert_eq!(
            GpaRange::from_inclusive(Gpa::new(0), Gpa::new(u64::MAX)),
            Err(RangeError::WholeSpace)
        );
        assert_eq!(range(0, u64::MAX).size(), u64::MAX);
    }

    #[test]
    fn shrinking_keeps_whole_pages_only() {
        assert_eq!(
            range(0x1001, 0x2fff).shrink_to(0x1000),
            Some(range(0x2000, 0x2000))
        );
        assert_eq!(range(0x1100, 0x100).shrink_to(0x1000), None);
        assert_eq!(range(0x1fff, 2).shrink_to(0x1000), None);
        let top = range(u64::MAX - 0xfff, 0x1000);
        assert_eq!(top.shrink_to(0x1000), Some(top));
        assert!(top.is_aligned(0x1000));
        assert_eq!(range(u64::MAX, 1).shrink_to(0x1000), None);
        assert_eq!(range(0, 0xfff).shrink_to(0x1000), None);
    }

    #[test]
    fn intersections() {
        assert_eq!(
            range(0, 0x10).intersection(&range(8, 0x10)),
            Some(range(8, 8))
        );
        assert_eq!(range(0, 8).intersection(&range(8, 8)), None);
        assert!(range(0, 16).covers(&range(8, 8)));
        assert!(!range(8, 8).covers(&range(0, 16)));
    }
}
