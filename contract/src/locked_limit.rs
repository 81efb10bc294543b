//! A limit on locked memory that holds for a while.
#![expect(unsafe_code, reason = "getrlimit, setrlimit, capget and capset")]

use std::io;
use std::mem::MaybeUninit;

/// Two sets of capabilities, as the kernel's third version has them (`linux/capability.h`).
type Capabilities = [CapabilitySet; 2];

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct CapabilitySet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

/// `_LINUX_CAPABILITY_VERSION_3`, of the calling thread.
const HEADER: CapabilityHeader = CapabilityHeader {
    version: 0x2008_0522,
    pid: 0,
};
/// `CAP_IPC_LOCK`, which would bypass the limit, as a bit of the first set.
const IPC_LOCK: u32 = 1 << 14;

/// While it lives, the process's soft `RLIMIT_MEMLOCK` is lower and the thread that made it does
/// without `CAP_IPC_LOCK`. Dropping it, on the same thread, puts both back.
#[derive(Debug)]
pub struct LockedLimit {
    limit: libc::rlimit,
    capabilities: Capabilities,
}

impl LockedLimit {
    /// Allows `bytes` to be locked.
    ///
    /// # Errors
    /// The kernel's errno; nothing has changed then.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let before = Self {
            limit: limit()?,
            capabilities: capabilities()?,
        };
        set_limit(&libc::rlimit {
            rlim_cur: bytes.min(before.limit.rlim_max),
            ..before.limit
        })?;
        let mut lower = before.capabilities;
        if let Some(set) = lower.first_mut() {
            set.effective &= !IPC_LOCK;
        }
        // Should this fail, dropping `before` takes the limit back.
        set_capabilities(&lower)?;
        Ok(before)
    }
}

impl Drop for LockedLimit {
    fn drop(&mut self) {
        // Both were allowed a moment ago, and going back to them needs no privilege.
        let _ = set_limit(&self.limit);
        let _ = set_capabilities(&self.capabilities);
    }
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn limit() -> io::Result<libc::rlimit> {
    let mut limit = MaybeUninit::zeroed();
    // SAFETY: the kernel fills in the struct, which is ours and of the size it expects.
    done(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, limit.as_mut_ptr()) }.into())?;
    // SAFETY: numbers only, all of which were zeroed and then filled in.
    Ok(unsafe { limit.assume_init() })
}

fn set_limit(limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: the kernel only reads the struct, which lives through the call.
    done(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, limit) }.into())
}

fn capabilities() -> io::Result<Capabilities> {
    let mut header = HEADER;
    let mut sets = Capabilities::default();
    // SAFETY: the kernel may write to the header and fills in two sets, as many as its third
    // version has; all are ours and live through the call.
    done(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) })?;
    Ok(sets)
}

fn set_capabilities(sets: &Capabilities) -> io::Result<()> {
    let mut header = HEADER;
    // SAFETY: the kernel may write to the header and reads two sets; all live through the call.
    done(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_lowered_and_put_back() {
        let before = limit().unwrap();
        let effective = capabilities().unwrap()[0].effective;
        let held = LockedLimit::new(4096).unwrap();
        assert_eq!(limit().unwrap().rlim_cur, before.rlim_max.min(4096));
        assert_eq!(limit().unwrap().rlim_max, before.rlim_max);
        assert_eq!(capabilities().unwrap()[0].effective, effective & !IPC_LOCK);
        drop(held);
        assert_eq!(limit().unwrap().rlim_cur, before.rlim_cur);
        assert_eq!(capabilities().unwrap()[0].effective, effective);
    }
}
