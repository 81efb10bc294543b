//! What building a kernel takes beside a compiler: packages unpacked next to the source, nothing
//! installed.
//!
//! The compiler, the linker and the C library's headers are this machine's, which has them because
//! Rust links with them. Everything else is taken from this release's packages even where the
//! machine has it, so that every machine builds alike.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::KernelError;
use crate::apt::Apt;
use crate::package::{Package, PackageError};

/// The packages: of each group of names, the first that the release has. Libraries follow the
/// programs that want them; Debian 13 has renamed two.
const PACKAGES: [&[&str]; 10] = [
    &["make"],
    &["xz-utils"],
    &["flex"],
    &["bison"],
    &["m4"],
    &["libsigsegv2"],
    &["bc"],
    &["libreadline8t64", "libreadline8"],
    // For objtool, which the kernel builds for itself.
    &["libelf-dev"],
    &["libelf1t64", "libelf1"],
];
const COMPILER: &str = "gcc";

/// The unpacked tools.
#[derive(Debug)]
pub(super) struct BuildTools {
    root: PathBuf,
}

impl BuildTools {
    /// The packages, as the release has them.
    pub(super) fn packages(apt: &Apt) -> Result<Vec<Package>, KernelError> {
        let mut chosen = Vec::new();
        for names in PACKAGES {
            let offered = apt.versions(names, Some(apt.release()))?;
            let package = names
                .iter()
                .find_map(|name| offered.iter().find(|package| package.name == *name));
            let missing = || -> PackageError {
                let advice = "give the machine apt sources that carry the whole release, or pass \
                              --kernel PATH";
                apt.missing(&names.join(" or "), &offered, advice)
            };
            chosen.push(package.cloned().ok_or_else(missing)?);
        }
        Ok(chosen)
    }

    /// The tools in the folder that their packages were unpacked in.
    ///
    /// # Errors
    /// When this machine has no compiler.
    pub(super) fn unpacked_in(root: PathBuf) -> Result<Self, KernelError> {
        let mut compiler = Command::new(COMPILER);
        compiler.arg("--version").stdin(Stdio::null());
        compiler.output().map_err(|source| KernelError::Compiler {
            tool: COMPILER,
            source,
        })?;
        Ok(Self { root })
    }

    /// A command that runs with these tools in front of the machine's, at a low priority, and in an
    /// environment that is the same everywhere.
    ///
    /// It is told to end when the thread that starts it does, if `setpriv` (util-linux) is there:
    /// make passes that on to what it has started.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = match crate::qemu::setpriv() {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "TERM", "--", "nice"]);
                command
            }
            None => Command::new("nice"),
        };
        command
            .arg(program)
            .env_clear()
            .env("PATH", self.path())
            .env("LD_LIBRARY_PATH", self.libraries())
            .env("LC_ALL", "C")
            .env("M4", self.inside("usr/bin/m4"))
            .env("BISON_PKGDATADIR", self.inside("usr/share/bison"))
            .stdin(Stdio::null());
        command
    }

    /// make's variables by which the programs that the kernel builds for its own build find our
    /// libraries.
    pub(super) fn make_variables(&self) -> [OsString; 2] {
        let variable = |start: &str, path: &str| {
            let mut text = OsString::from(start);
            text.push(self.inside(path));
            text
        };
        [
            variable("HOSTCFLAGS=-I", "usr/include"),
            variable("HOSTLDFLAGS=-L", "usr/lib/x86_64-linux-gnu"),
        ]
    }

    fn inside(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn path(&self) -> OsString {
        let machine = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        joined(self.inside("usr/bin").as_os_str(), &machine)
    }

    fn libraries(&self) -> OsString {
        let [older, newer] =
            ["lib", "usr/lib"].map(|tree| self.inside(tree).join("x86_64-linux-gnu"));
        joined(older.as_os_str(), newer.as_os_str())
    }
}

fn joined(first: &OsStr, second: &OsStr) -> OsString {
    let mut both = first.to_owned();
    both.push(":");
    both.push(second);
    both
}
