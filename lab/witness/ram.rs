//! Where the pages of another process's RAM are in memory.
#![expect(unsafe_code, reason = "mmap, so that there are page tables to look at")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use lab::witness::PAGE;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// An entry of `pagemap` (`Documentation/admin-guide/mm/pagemap.rst`): the page is there, and its
/// number.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// How many entries are read at once.
const ENTRIES: u64 = 4096;

/// The physical address of each page of the file of that name in memory which the process has open.
///
/// The other's own page tables need not have all of them: what only an IOMMU knows is in none. So
/// this program maps the file itself, and looks at its own.
pub fn physical_addresses(pid: u32, name: &str) -> io::Result<Vec<u64>> {
    let file = open(pid, name)?;
    let size = file.metadata()?.len();
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
    let length = usize::try_from(size).map_err(invalid)?;
    let flags = MapFlags::SHARED | MapFlags::POPULATE;
    // SAFETY: a new mapping, at a place that the kernel chooses. Nothing is read through it.
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ,
            flags,
            &file,
            0,
        )
    }?;
    let found = frames(u64::try_from(start.addr()).map_err(invalid)?, size);
    // SAFETY: it was mapped above, and nobody has a reference into it.
    unsafe { munmap(start, length) }?;
    found
}

fn open(pid: u32, name: &str) -> io::Result<File> {
    let wanted = format!("/memfd:{name}");
    let gone = |error| io::Error::other(format!("there is no process {pid}: {error}"));
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(gone)? {
        let path = entry?.path();
        let is_it =
            fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().starts_with(&wanted));
        if is_it {
            return File::open(path);
        }
    }
    let missing = format!("process {pid} has no file {wanted}");
    Err(io::Error::new(io::ErrorKind::NotFound, missing))
}

fn frames(start: u64, size: u64) -> io::Result<Vec<u64>> {
    let map = File::open("/proc/self/pagemap")?;
    let mut found = Vec::new();
    let (mut next, end) = (start / PAGE, start.saturating_add(size) / PAGE);
    while next < end {
        let count = ENTRIES.min(end - next);
        let mut bytes = vec![0; usize::try_from(8 * count).unwrap_or(usize::MAX)];
        map.read_exact_at(&mut bytes, 8 * next)?;
        for entry in bytes.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            let frame = entry & FRAME;
            if entry & PRESENT == 0 || frame == 0 {
                let missing = "a page of the RAM is not there, or its number is kept secret";
                return Err(io::Error::other(missing));
            }
            found.push(frame * PAGE);
        }
        next += count;
    }
    Ok(found)
}
