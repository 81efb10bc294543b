//! Config space: where its registers lie, and the host's copy of it, read while a function is
//! made.
//!
//! Offsets are in bytes. The layout is the type 0 header of PCI Local Bus 3.0, 6.1.

use memory_map::Errno;

use crate::{FunctionError, HostFunction};

/// Vendor and device id, 16 bits each.
pub(crate) const VENDOR_DEVICE: u16 = 0x00;
/// The command register, 16 bits (6.2.2).
pub(crate) const COMMAND: u16 = 0x04;
/// The status register, 16 bits (6.2.3). Its bits are cleared by writing ones.
pub(crate) const STATUS: u16 = 0x06;
/// The header type, 8 bits.
pub(crate) const HEADER_TYPE: u16 = 0x0e;
/// The first of six base address registers, 32 bits each (6.2.5.1).
pub(crate) const BARS: u16 = 0x10;
/// Past the last of them.
pub(crate) const BARS_END: u16 = 0x28;
/// The expansion ROM's base address register, 32 bits (6.2.5.2).
pub(crate) const ROM: u16 = 0x30;
/// Past it.
pub(crate) const ROM_END: u16 = 0x34;
/// The pointer to the first capability, 8 bits (6.7).
pub(crate) const CAPABILITIES: u16 = 0x34;
/// Where the header ends, and capabilities may begin.
pub(crate) const HEADER_END: u16 = 0x40;
/// Size of a conventional function's config space.
pub(crate) const CONVENTIONAL_SIZE: u16 = 0x100;
/// Size of a PCI Express function's config space.
pub(crate) const EXPRESS_SIZE: u16 = 0x1000;

/// Whether hardware takes an access of `length` bytes at `offset`: 1, 2 or 4 bytes on a multiple
/// of their number, so that it stays in one 32-bit register.
pub(crate) fn is_access(offset: u16, length: usize, config_size: u16) -> bool {
    let Ok(length) = u16::try_from(length) else {
        return false;
    };
    matches!(length, 1 | 2 | 4)
        && offset.is_multiple_of(length)
        && offset
            .checked_add(length)
            .is_some_and(|end| end <= config_size)
}

/// Reads the host's config space while a function is made.
pub(crate) struct ConfigReader<'h> {
    pub(crate) host: &'h dyn HostFunction,
    pub(crate) function: &'h str,
}

impl ConfigReader<'_> {
    fn read<const N: usize>(&self, offset: u16) -> Result<[u8; N], FunctionError> {
        let mut bytes = [0; N];
        match self.host.config_read(offset, &mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(FunctionError::ConfigRead {
                function: self.function.to_owned(),
                offset,
                errno: Errno::from(error),
            }),
        }
    }

    pub(crate) fn u8(&self, offset: u16) -> Result<u8, FunctionError> {
        self.read(offset).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&self, offset: u16) -> Result<u16, FunctionError> {
        self.read(offset).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&self, offset: u16) -> Result<u32, FunctionError> {
        self.read(offset).map(u32::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_takes_aligned_bytes_words_and_dwords_only() {
        for offset in 0..16 {
            assert!(is_access(offset, 1, 256));
            assert_eq!(is_access(offset, 2, 256), offset % 2 == 0);
            assert_eq!(is_access(offset, 4, 256), offset % 4 == 0);
            for length in [0, 3, 5, 8, 65536, 65537] {
                assert!(!is_access(offset, length, 256));
            }
        }
        assert!(is_access(255, 1, 256));
        assert!(!is_access(256, 1, 256));
        assert!(!is_access(u16::MAX, 1, 4096));
        assert!(!is_access(u16::MAX - 1, 2, 4096));
    }
}
