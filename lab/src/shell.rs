//! The nested machine's shell: Debian's `busybox-static`.

use std::path::PathBuf;

use crate::apt::Packages;
use crate::cache::EntryName;
use crate::package::PackageError;

const PACKAGE: &str = "busybox-static";

/// The path of a static busybox, fetched if need be.
///
/// Any version serves; one that is in the cache is used without asking the mirror.
///
/// # Errors
/// When its package cannot be had.
pub fn obtain(packages: &mut Packages<'_>) -> Result<PathBuf, PackageError> {
    let cache = packages.cache();
    let cached = cache.versions_of(PACKAGE)?;
    if let Some((_, folder)) = cached.last() {
        return Ok(program(folder));
    }
    let apt = packages.apt()?;
    let offered = apt.versions(&[PACKAGE], None)?;
    let package = offered.first().ok_or_else(|| {
        apt.missing(
            PACKAGE,
            &offered,
            "give the machine apt sources that carry the whole release",
        )
    })?;
    let name = EntryName::new(&package.name, &package.version);
    let folder = cache.entry(&name, |folder| {
        apt.unpack(std::slice::from_ref(package), folder)
    })?;
    Ok(program(&folder))
}

/// Debian 12 has /bin/busybox, later releases have /usr/bin/busybox.
fn program(folder: &std::path::Path) -> PathBuf {
    let older = folder.join("bin/busybox");
    if older.is_file() {
        older
    } else {
        folder.join("usr/bin/busybox")
    }
}
