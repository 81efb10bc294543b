//! QEMU, unpacked into the cache and started from there.
//!
//! Debian's own QEMU may be too old, and a system may have none: the lab takes it from the
//! release's `-backports` suite with everything it depends on, and starts it through the dynamic
//! loader that was unpacked with it. Nothing is installed, and nothing of this machine's libraries
//! is used.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Apt, Packages};
use crate::cache::EntryName;
use crate::package::{Package, PackageError};

const PACKAGE: &str = "qemu-system-x86";
/// The oldest that serves. The lab's facts were measured with 10.0.
const OLDEST_MAJOR: u32 = 10;

/// An unpacked QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    root: PathBuf,
    /// Its package's version.
    pub version: String,
}

impl Qemu {
    /// QEMU, fetched if need be. One that is in the cache is used without asking the mirror.
    ///
    /// # Errors
    /// When its packages cannot be had.
    pub fn obtain(packages: &mut Packages<'_>) -> Result<Self, PackageError> {
        let cache = packages.cache();
        let mut cached = cache.versions_of(PACKAGE)?;
        cached.retain(|(version, _)| serves(version));
        if let Some((version, root)) = cached.pop() {
            let version = version.replace("%3a", ":");
            return Ok(Self { root, version });
        }
        let apt = packages.apt()?;
        let suite = apt.backports();
        let package = choose(apt, &suite)?;
        let name = EntryName::new(&package.name, &package.version);
        let root = cache.entry(&name, |folder| apt.unpack_closure(&package, &suite, folder))?;
        Ok(Self {
            root,
            version: package.version,
        })
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
            .arg(inside("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(inside(firmware));
        }
        command
            .env_remove("LD_LIBRARY_PATH")
            .env_remove("LD_PRELOAD")
            .env("QEMU_MODULE_DIR", inside("usr/lib/x86_64-linux-gnu/qemu"));
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
            let wanted = format!("{PACKAGE} {OLDEST_MAJOR}.0 or newer, from {suite}");
            apt.missing(&wanted, &newest_first[1], &advice)
        })
}

/// Whether a version, plain or escaped, is new enough.
fn serves(version: &str) -> bool {
    let upstream = version
        .split_once("%3a")
        .or_else(|| version.split_once(':'))
        .map_or(version, |(_, upstream)| upstream);
    upstream
        .split('.')
        .next()
        .and_then(|major| major.parse::<u32>().ok())
        .is_some_and(|major| major >= OLDEST_MAJOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_versions_do_not_serve() {
        assert!(serves("1:10.0.2+ds-2+deb13u1~bpo12+1"));
        assert!(serves("1%3a10.0.2+ds-2"));
        assert!(serves("1:11.0-1"));
        assert!(!serves("1:7.2+dfsg-7+deb12u18+b3"));
        assert!(!serves("nonsense"));
    }
}
