//! An eventfd, by which an interrupt is signalled, and waiting for several files at once.
//!
//! Whoever wants to be signalled makes one and has the device signal it
//! ([`Device::enable_irqs`](crate::Device::enable_irqs)); the kernel holds its own reference.
#![expect(unsafe_code, reason = "system calls")]

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::ioctls::checked;

/// An eventfd (`eventfd(2)`), not blocking.
#[derive(Debug)]
pub struct EventFd(File);

impl EventFd {
    /// One that has not been signalled.
    ///
    /// # Errors
    /// The kernel's errno: `EMFILE` and the like.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the call has no pointers.
        let fd = checked(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: the kernel has just made this fd for us, and nobody else knows it.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// How often it was signalled since it was last asked.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn take(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        match (&self.0).read(&mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of these files can be read without blocking, has ended or has failed, and tells
/// the places of all that can (`poll(2)`).
///
/// # Errors
/// The kernel's errno.
pub fn wait_for_any(files: &[BorrowedFd<'_>]) -> io::Result<Vec<usize>> {
    let polled = |file: &BorrowedFd<'_>| libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polled: Vec<libc::pollfd> = files.iter().map(polled).collect();
    let count = libc::nfds_t::try_from(polled.len())
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    loop {
        // SAFETY: the kernel reads and writes `count` structs, which is how many there are, in a
        // vector that is ours.
        match checked(unsafe { libc::poll(polled.as_mut_ptr(), count, -1) }) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    let ready = polled.iter().enumerate();
    let ready = ready.filter(|(_, polled)| polled.revents != 0);
    Ok(ready.map(|(place, _)| place).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn signal(event: &EventFd) {
        (&event.0).write_all(&1_u64.to_ne_bytes()).unwrap();
    }

    #[test]
    fn signals_are_counted_until_they_are_taken() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.take().unwrap(), 0);
        signal(&event);
        signal(&event);
        assert_eq!(event.take().unwrap(), 2);
        assert_eq!(event.take().unwrap(), 0);
    }

    #[test]
    fn the_files_that_can_be_read_are_told() {
        let events = [(); 3].map(|()| EventFd::new().unwrap());
        signal(&events[1]);
        let files = events.each_ref().map(AsFd::as_fd);
        assert_eq!(wait_for_any(&files).unwrap(), [1]);
        signal(&events[2]);
        assert_eq!(wait_for_any(&files).unwrap(), [1, 2]);
        let end = File::open("/dev/null").unwrap();
        assert_eq!(wait_for_any(&[files[0], end.as_fd()]).unwrap(), [1]);
    }
}
