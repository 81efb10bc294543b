//! The file systems programs expect.

use std::fs;

use rustix::mount::{MountFlags, mount};

use crate::Problems;

/// Type, place, options, and whether every kernel must have it.
const FILE_SYSTEMS: [(&str, &str, &std::ffi::CStr, bool); 9] = [
    ("proc", "/proc", c"", true),
    ("sysfs", "/sys", c"", true),
    ("devtmpfs", "/dev", c"mode=0755", true),
    ("tmpfs", "/tmp", c"mode=1777", true),
    ("tmpfs", "/run", c"mode=0755", true),
    ("devpts", "/dev/pts", c"mode=0620,ptmxmode=0666", false),
    ("tmpfs", "/dev/shm", c"mode=1777", true),
    ("hugetlbfs", "/dev/hugepages", c"", false),
    ("debugfs", "/sys/kernel/debug", c"", false),
];

/// Mounts them all.
pub fn mount_all(problems: &mut Problems) {
    for (kind, place, options, required) in FILE_SYSTEMS {
        let mounted = fs::create_dir_all(place).and_then(|()| {
            mount(kind, place, kind, MountFlags::NOSUID, options).map_err(Into::into)
        });
        if required {
            problems.check(&format!("mounting {kind} on {place}"), mounted);
        }
    }
}
