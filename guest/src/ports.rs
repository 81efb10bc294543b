//! I/O ports.
#![expect(unsafe_code, reason = "iopl, and the instructions that access ports")]

use std::io;

/// The right of one thread to access every port.
#[derive(Debug)]
pub struct Ports {
    /// The right is the thread's that asked for it.
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

impl Ports {
    /// Asks the kernel for it.
    ///
    /// # Errors
    /// `EPERM` without privileges, `ENOSYS` where the kernel was built without it.
    pub fn open() -> io::Result<Self> {
        // SAFETY: it changes what this thread may do, and nothing else.
        if unsafe { libc::iopl(3) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            _of_this_thread: std::marker::PhantomData,
        })
    }

    /// Reads one byte.
    pub fn read8(&self, port: u16) -> u8 {
        let value: u8;
        // SAFETY: the thread may access every port, and no port of a PC reaches memory.
        unsafe {
            std::arch::asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem));
        }
        value
    }

    /// Writes one byte.
    pub fn write8(&self, port: u16, value: u8) {
        // SAFETY: as for `read8`.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem));
        }
    }

    /// Reads two bytes.
    pub fn read16(&self, port: u16) -> u16 {
        let value: u16;
        // SAFETY: as for `read8`.
        unsafe {
            std::arch::asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, nomem));
        }
        value
    }

    /// Writes two bytes.
    pub fn write16(&self, port: u16, value: u16) {
        // SAFETY: as for `read8`.
        unsafe {
            std::arch::asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, nomem));
        }
    }

    /// Reads four bytes.
    pub fn read32(&self, port: u16) -> u32 {
        let value: u32;
        // SAFETY: as for `read8`.
        unsafe {
            std::arch::asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, nomem));
        }
        value
    }

    /// Writes four bytes.
    pub fn write32(&self, port: u16, value: u32) {
        // SAFETY: as for `read8`.
        unsafe {
            std::arch::asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, nomem));
        }
    }
}
