//! Memory that is not the program's own: a device's, by its physical address, and pages for DMA.
#![expect(
    unsafe_code,
    reason = "mmap, and accesses to memory that devices change"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

const PAGE: u64 = 0x1000;
/// A huge page of x86-64.
pub const HUGE_PAGE: usize = 2 << 20;

/// A range of mapped memory, whose bytes anybody may change at any time: each access is one load or
/// store of its size, bounds and alignment are checked, and no reference to it is ever made.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// What was mapped, from the page on in which `start` lies.
    pages: (NonNull<u8>, usize),
}

// SAFETY: the mapping belongs to the value and stays until it is dropped, whichever thread it is
// accessed from; accesses are volatile ones of plain integers.
unsafe impl Send for Mapping {}
// SAFETY: as above. What two threads write at the same time is as with two devices.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The memory at a physical address, not cached.
    ///
    /// # Errors
    /// The kernel's, among them `EPERM` where it keeps `/dev/mem` from it.
    pub fn physical(address: u64, len: u64) -> io::Result<Self> {
        // Without O_SYNC, a device's memory could be cached.
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open("/dev/mem")?;
        Self::of_file(&memory, address, len)
    }

    fn of_file(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let before = offset % PAGE;
        let size = before.checked_add(len).filter(|_| len > 0);
        let pages = size.and_then(|size| usize::try_from(size).ok());
        let pages = pages.ok_or_else(invalid)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let mapped = unsafe {
            mmap(
                std::ptr::null_mut(),
                pages,
                protection,
                MapFlags::SHARED,
                file,
                offset - before,
            )
        }?;
        let first = NonNull::new(mapped.cast::<u8>()).ok_or_else(invalid)?;
        let before = usize::try_from(before).map_err(|_| invalid())?;
        // SAFETY: `before` is less than a page and `len` is not zero, so it lies in the mapping.
        let start = unsafe { first.add(before) };
        Ok(Self {
            start,
            len: pages.saturating_sub(before),
            pages: (first, pages),
        })
    }

    /// One huge page of RAM, all zeroes, that stays where it is.
    ///
    /// # Errors
    /// The kernel's, `ENOMEM` where no huge page is free.
    pub fn huge_page() -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB | MapFlags::POPULATE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), HUGE_PAGE, protection, flags) }?;
        let start = NonNull::new(mapped.cast::<u8>());
        let start = start.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Self {
            start,
            len: HUGE_PAGE,
            pages: (start, HUGE_PAGE),
        })
    }

    /// Where it is in this process.
    pub fn address(&self) -> usize {
        self.start.addr().get()
    }

    /// Reads 1, 2, 4 or 8 bytes, naturally aligned.
    ///
    /// # Errors
    /// `EINVAL` for anything else, and outside of the mapping.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.at(offset, data.len())?;
        // SAFETY: `at` is aligned to the length and lies, with as many bytes, in the mapping.
        unsafe {
            match data.len() {
                1 => data.copy_from_slice(&[at.read_volatile()]),
                2 => data.copy_from_slice(&at.cast::<u16>().read_volatile().to_ne_bytes()),
                4 => data.copy_from_slice(&at.cast::<u32>().read_volatile().to_ne_bytes()),
                _ => data.copy_from_slice(&at.cast::<u64>().read_volatile().to_ne_bytes()),
            }
        }
        Ok(())
    }

    /// Writes 1, 2, 4 or 8 bytes, naturally aligned.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.at(offset, data.len())?;
        // SAFETY: `at` is aligned to the length and lies, with as many bytes, in the mapping.
        unsafe {
            match *data {
                [a] => at.write_volatile(a),
                [a, b] => at.cast::<u16>().write_volatile(u16::from_ne_bytes([a, b])),
                [a, b, c, d] => {
                    let value = u32::from_ne_bytes([a, b, c, d]);
                    at.cast::<u32>().write_volatile(value);
                }
                [a, b, c, d, e, f, g, h] => {
                    let value = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                    at.cast::<u64>().write_volatile(value);
                }
                // `at` has refused other lengths.
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads eight bytes, little-endian, at a multiple of eight.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn word(&self, offset: u64) -> io::Result<u64> {
        let mut data = [0; 8];
        self.read(offset, &mut data)?;
        Ok(u64::from_le_bytes(data))
    }

    /// Writes eight bytes, little-endian, at a multiple of eight.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn set_word(&self, offset: u64, value: u64) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Reads four bytes wherever they begin, and by an instruction that a hypervisor has to take
    /// apart.
    ///
    /// # Errors
    /// `EINVAL` outside of the mapping.
    pub fn read_anywhere(&self, offset: u64) -> io::Result<u32> {
        let end = offset.checked_add(3);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let (first, _last) = (self.at(offset, 1)?, self.at(end, 1)?);
        let value: u32;
        // SAFETY: all four bytes lie in the mapping; x86 has no alignment to keep.
        unsafe {
            std::arch::asm!(
                "mov {value:e}, dword ptr [{at}]",
                at = in(reg) first.as_ptr(),
                value = out(reg) value,
                options(nostack, preserves_flags)
            );
        }
        Ok(value)
    }

    /// Writes four bytes wherever they begin.
    ///
    /// # Errors
    /// `EINVAL` outside of the mapping.
    pub fn write_anywhere(&self, offset: u64, value: u32) -> io::Result<()> {
        let end = offset.checked_add(3);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let (first, _last) = (self.at(offset, 1)?, self.at(end, 1)?);
        // SAFETY: all four bytes lie in the mapping; x86 has no alignment to keep.
        unsafe {
            std::arch::asm!(
                "mov dword ptr [{at}], {value:e}",
                at = in(reg) first.as_ptr(),
                value = in(reg) value,
                options(nostack, preserves_flags)
            );
        }
        Ok(())
    }

    fn at(&self, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let offset = usize::try_from(offset).map_err(|_| invalid())?;
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        let aligned = self
            .address()
            .wrapping_add(offset)
            .is_multiple_of(len.max(1));
        if end.is_none() || !matches!(len, 1 | 2 | 4 | 8) || !aligned {
            return Err(invalid());
        }
        // SAFETY: `offset` is less than the mapping's length.
        Ok(unsafe { self.start.add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (start, len) = self.pages;
        // SAFETY: this value mapped it, and nobody has a reference into it.
        let _ = unsafe { munmap(start.as_ptr().cast(), len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_a_file(len: u64) -> Mapping {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE * 3).unwrap();
        Mapping::of_file(&file, PAGE + 0x100, len).unwrap()
    }

    #[test]
    fn what_is_written_is_read_in_every_size() {
        let mapping = of_a_file(0x100);
        mapping.set_word(8, 0x1122_3344_5566_7788).unwrap();
        let mut bytes = [0; 2];
        mapping.read(10, &mut bytes).unwrap();
        assert_eq!(bytes, [0x66, 0x55]);
        mapping.write(12, &[1, 2, 3, 4]).unwrap();
        mapping.write(8, &[9]).unwrap();
        assert_eq!(mapping.word(8).unwrap(), 0x0403_0201_5566_7709);
    }

    #[test]
    fn four_bytes_are_accessed_wherever_they_begin() {
        let mapping = of_a_file(0x100);
        mapping.write_anywhere(5, 0x0403_0201).unwrap();
        assert_eq!(mapping.word(0).unwrap(), 0x0302_0100_0000_0000);
        assert_eq!(mapping.read_anywhere(5).unwrap(), 0x0403_0201);
        assert!(mapping.read_anywhere(0xfd).is_err());
        assert!(mapping.write_anywhere(u64::MAX, 0).is_err());
    }

    #[test]
    fn accesses_outside_or_not_aligned_are_refused() {
        let mapping = of_a_file(0x100);
        assert!(mapping.word(0xf8).is_ok());
        for (offset, len) in [(0x100, 1), (0xfc, 8), (4, 8), (0, 3), (0, 0), (u64::MAX, 1)] {
            let mut data = vec![0; len];
            assert!(
                mapping.read(offset, &mut data).is_err(),
                "{offset:#x}, {len}"
            );
            assert!(mapping.write(offset, &data).is_err(), "{offset:#x}, {len}");
        }
    }
}
