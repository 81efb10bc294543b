//! The file systems that the steps read and write.

use std::fs;

use anyhow::Context;
use rustix::mount::{MountFlags, mount};

/// Mounts them. The kernel may have mounted `/dev` itself.
pub fn mount_all() -> anyhow::Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(place).with_context(|| format!("making {place}"))?;
        match mount(kind, place, kind, MountFlags::NOSUID, c"") {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error).with_context(|| format!("mounting {place}")),
        }
    }
    Ok(())
}
