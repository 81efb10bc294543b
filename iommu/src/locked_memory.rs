//! How much memory this process may lock, and has locked.
//!
//! VFIO pins guest RAM and counts it as locked. A type1 container counts per process, and each
//! container anew; iommufd counts per user, over all of the user's processes, and what is copied
//! from one address space to another once. A process with `CAP_IPC_LOCK` is not held to the limit
//! by either.
#![expect(unsafe_code, reason = "getrlimit")]

use std::fs;
use std::io;
use std::mem::MaybeUninit;

/// What the kernel says of this process's locked memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockedMemory {
    /// The soft limit (`RLIMIT_MEMLOCK`); `None` for no limit, or where it does not count
    /// because the process has `CAP_IPC_LOCK`.
    pub limit: Option<u64>,
    /// What is locked now (`VmLck` of `/proc/self/status`), if that can be told.
    pub locked: Option<u64>,
}

const NOT_THE_CAUSE: &str = "the host has no memory left for it: RLIMIT_MEMLOCK is not the cause";

/// `linux/capability.h`.
const CAP_IPC_LOCK: u32 = 14;

impl LockedMemory {
    /// Asks the kernel.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn of_this_process() -> io::Result<Self> {
        let mut limit = MaybeUninit::<libc::rlimit>::zeroed();
        // SAFETY: the kernel fills in the struct, which is ours and of the size it expects.
        if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, limit.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: numbers only, all of which were zeroed and then filled in.
        let soft = unsafe { limit.assume_init() }.rlim_cur;
        // Without /proc the limit is still worth telling.
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let limited = soft != libc::RLIM_INFINITY && !has_cap_ipc_lock(&status);
        Ok(Self {
            limit: limited.then_some(soft),
            locked: locked_bytes(&status),
        })
    }

    /// What to do where iommufd had no memory (`ENOMEM`) for `need` more bytes of RAM.
    #[must_use]
    pub fn hint_per_user(&self, need: u64) -> String {
        let Some(limit) = self.limit else {
            return NOT_THE_CAUSE.to_owned();
        };
        let kib = need.div_ceil(1024);
        format!(
            "RLIMIT_MEMLOCK allows {limit} bytes of locked memory and this mapping needs {need} \
             more. iommufd counts what all processes of this user have pinned, other virtual \
             machines' too, so raise it in each of them to the sum of all their RAM, here to at \
             least {need} on top of that, with `ulimit -l` ({kib} more, in KiB, as root), with \
             LimitMEMLOCK= in the systemd unit, or run each as a user of its own, or give the \
             program CAP_IPC_LOCK"
        )
    }

    /// What to do where a type1 container had no memory (`ENOMEM`) for `need` more bytes of RAM.
    #[must_use]
    pub fn hint(&self, need: u64) -> String {
        let Some(limit) = self.limit else {
            return NOT_THE_CAUSE.to_owned();
        };
        let locked = self.locked.unwrap_or(0);
        let total = locked.saturating_add(need);
        let kib = total.div_ceil(1024);
        format!(
            "RLIMIT_MEMLOCK allows {limit} bytes of locked memory, {locked} are locked and this \
             mapping needs {need} more: raise it to at least {total} with `ulimit -l {kib}` (in \
             KiB, as root), with LimitMEMLOCK={total} in the systemd unit, or give the program \
             CAP_IPC_LOCK"
        )
    }
}

/// The value of a line `name:<tab>value` of `/proc/self/status`.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

fn locked_bytes(status: &str) -> Option<u64> {
    let kib: u64 = field(status, "VmLck")?
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()?;
    kib.checked_mul(1024)
}

fn has_cap_ipc_lock(status: &str) -> bool {
    field(status, "CapEff")
        .and_then(|mask| u64::from_str_radix(mask, 16).ok())
        .is_some_and(|mask| mask & 1 << CAP_IPC_LOCK != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\nVmLck:\t    2048 kB\nCapEff:\t0000000000004000\nThreads:\t1\n";

    #[test]
    fn the_status_file_is_understood() {
        assert_eq!(locked_bytes(STATUS), Some(2 << 20));
        assert!(has_cap_ipc_lock(STATUS));
        assert!(!has_cap_ipc_lock("CapEff:\t00000000a80425fb\n"));
        assert!(!has_cap_ipc_lock(""));
        assert_eq!(locked_bytes("VmLck:\tlots\n"), None);
        assert_eq!(locked_bytes(""), None);
    }

    #[test]
    fn this_process_can_be_asked() {
        let memory = LockedMemory::of_this_process().unwrap();
        assert!(memory.locked.is_some());
    }

    #[test]
    fn the_hint_says_the_limit_the_need_and_how_to_raise_it() {
        let hint = LockedMemory {
            limit: Some(8 << 20),
            locked: Some(4096),
        }
        .hint(1 << 30);
        for text in [
            "8388608",
            "1073741824 more",
            "at least 1073745920",
            "ulimit -l 1048580",
            "LimitMEMLOCK=1073745920",
            "CAP_IPC_LOCK",
        ] {
            assert!(hint.contains(text), "{text}: {hint}");
        }
    }

    #[test]
    fn without_a_limit_it_is_the_host_that_has_no_memory() {
        let unlimited = LockedMemory {
            limit: None,
            locked: None,
        };
        for hint in [unlimited.hint(4096), unlimited.hint_per_user(4096)] {
            assert!(hint.contains("not the cause"), "{hint}");
        }
    }

    #[test]
    fn the_hint_for_iommufd_says_that_it_counts_per_user() {
        let hint = LockedMemory {
            limit: Some(8 << 20),
            locked: Some(4096),
        }
        .hint_per_user(1 << 30);
        for text in [
            "8388608",
            "1073741824 more",
            "all processes of this user",
            "1048576 more, in KiB",
            "LimitMEMLOCK=",
            "CAP_IPC_LOCK",
        ] {
            assert!(hint.contains(text), "{text}: {hint}");
        }
    }
}
