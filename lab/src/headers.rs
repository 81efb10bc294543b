//! The C headers of a newer kernel than the machine's own, to hold the Rust side of the ABI
//! against: Debian's `linux-libc-dev` of the newer suite.

use std::path::{Path, PathBuf};

use crate::apt::Packages;
use crate::cache::EntryName;
use crate::package::PackageError;

const PACKAGE: &str = "linux-libc-dev";

/// The folder to give to the C compiler's `-I`, with `linux/iommufd.h` in it; fetched if need be.
///
/// # Errors
/// When the package cannot be had, or is none that knows of iommufd.
pub fn obtain(packages: &mut Packages<'_>) -> Result<PathBuf, PackageError> {
    let cache = packages.cache();
    if let Some((_, folder)) = cache.versions_of(PACKAGE)?.pop()
        && let Some(headers) = headers_in(&folder)
    {
        return Ok(headers);
    }
    let apt = packages.apt()?;
    // Newest first.
    let offered = apt.versions(&[PACKAGE], None)?;
    let missing = || {
        let advice = format!("use a mirror that carries {}", crate::apt::NEWER_SUITE);
        apt.missing(PACKAGE, &offered, &advice)
    };
    let package = offered.first().ok_or_else(missing)?;
    let name = EntryName::new(&package.name, &package.version);
    let folder = cache.entry(&name, |folder| {
        apt.unpack(std::slice::from_ref(package), folder)
    })?;
    headers_in(&folder).ok_or_else(missing)
}

/// Older releases have them where the compiler looks, later ones in a folder for each architecture.
fn headers_in(folder: &Path) -> Option<PathBuf> {
    ["usr/include", "usr/lib/linux/uapi/x86"]
        .into_iter()
        .map(|place| folder.join(place))
        .find(|place| place.join("linux/iommufd.h").is_file())
}
