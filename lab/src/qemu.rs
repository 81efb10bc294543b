//! QEMU, built here with the lab's patch, and started from the cache.
//!
//! The release's own QEMU may be too old, a system may have none, and none delivers a guest's
//! interrupts well enough (`lab/qemu/guest-interrupts.patch`): the lab builds it from Debian's source.
//! The firmware and the libraries are those of Debian's package in the release's `-backports` suite,
//! unpacked with everything it depends on; the emulator is started through the dynamic loader that is
//! among them. Nothing is installed, and nothing of this machine's libraries is used.

mod built;

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Apt, Packages};
use crate::build::BuildError;
use crate::cache::EntryName;
use crate::package::{Package, PackageError};

const PACKAGE: &str = "qemu-system-x86";
/// The series that serves: the patch is for it, and the lab's facts were measured with it.
const MAJOR: &str = "10";

/// A QEMU that can be started.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The folder of Debian's package and what it depends on.
    root: PathBuf,
    program: PathBuf,
    /// Its package's version.
    pub version: String,
}

impl Qemu {
    /// QEMU, fetched and built if need be. One that is in the cache is used without asking the
    /// mirror.
    ///
    /// # Errors
    /// When its packages cannot be had, or it cannot be built.
    pub fn obtain(packages: &mut Packages<'_>) -> Result<Self, BuildError> {
        let cache = packages.cache();
        let mut cached = cache.versions_of(&built::subject())?;
        while let Some((version, folder)) = cached.pop() {
            let version = version.replace("%3a", ":");
            if let Some(root) = cache.get(&EntryName::new(PACKAGE, &version)) {
                return Ok(Self::from_entries(root, &folder, version));
            }
        }
        let apt = packages.apt()?;
        let suite = apt.backports();
        let package = choose(apt, &suite)?;
        let name = EntryName::new(&package.name, &package.version);
        let root = cache.entry(&name, |folder| apt.unpack_closure(&package, &suite, folder))?;
        let folder = built::obtain(packages, &package.version)?;
        Ok(Self::from_entries(root, &folder, package.version))
    }

    fn from_entries(root: PathBuf, built: &Path, version: String) -> Self {
        Self {
            root,
            program: built.join(built::PROGRAM),
            version,
        }
    }

    /// The command that starts the emulator, without arguments but those that tell it where its
    /// own files are.
    ///
    /// QEMU ends with the thread that starts it, if `setpriv` (util-linux) is there: a killed
    /// `xtask` leaves no machine behind.
    #[must_use]
    pub fn command(&self) -> Command {
        let inside = |path: &str| self.root.join(path);
        let loader = inside("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
        let loader = if loader.is_file() {
            loader
        } else {
            inside("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
        };
        let mut libraries = inside("lib/x86_64-linux-gnu").into_os_string();
        libraries.push(":");
        libraries.push(inside("usr/lib/x86_64-linux-gnu"));

        let mut command = match setpriv() {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--"]).arg(loader);
                command
            }
            None => Command::new(loader),
        };
        command
            .arg("--library-path")
            .arg(libraries)
            .arg(&self.program);
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(inside(firmware));
        }
        command
            .env_remove("LD_LIBRARY_PATH")
            .env_remove("LD_PRELOAD");
        command
    }
}

/// The program that ends another one with us, if it is here.
pub(crate) fn setpriv() -> Option<&'static Path> {
    ["/usr/bin/setpriv", "/bin/setpriv"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.is_file())
}

/// The newest in the suite, if it serves; else the newest that serves from anywhere.
fn choose(apt: &Apt, suite: &str) -> Result<Package, PackageError> {
    let newest_first = [
        apt.versions(&[PACKAGE], Some(suite))?,
        apt.versions(&[PACKAGE], None)?,
    ];
    newest_first
        .iter()
        .flatten()
        .find(|package| serves(&package.version))
        .cloned()
        .ok_or_else(|| {
            let advice = format!(
                "use a mirror that carries {suite}: the one of this machine's own apt sources was asked"
            );
            let wanted = format!("{PACKAGE} {MAJOR}, from {suite}");
            apt.missing(&wanted, &newest_first[1], &advice)
        })
}

/// Whether a version is of the series.
fn serves(version: &str) -> bool {
    let upstream = version
        .split_once(':')
        .map_or(version, |(_, upstream)| upstream);
    upstream.split('.').next() == Some(MAJOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_series_do_not_serve() {
        assert!(serves("1:10.0.2+ds-2+deb13u1~bpo12+1"));
        assert!(serves("10.0.13+ds-0+deb13u1"));
        assert!(!serves("1:11.1.3+ds-1~bpo13+1"));
        assert!(!serves("1:7.2+dfsg-7+deb12u18+b3"));
        assert!(!serves("nonsense"));
    }
}
