//! What building takes beside a compiler: packages unpacked next to the source, nothing installed.
//!
//! The compiler, the linker and the C library's headers are this machine's, which has them because
//! Rust links with them. Everything else is taken from this release's packages even where the
//! machine has it, so that every machine builds alike.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::BuildError;
use crate::apt::Apt;
use crate::package::{Package, PackageError};

const COMPILER: &str = "gcc";

/// Packages that a build takes: of each group of names, the first that there is. Libraries follow the
/// programs that want them; Debian 13 has renamed some.
pub(crate) type Tools = &'static [&'static [&'static str]];

/// The unpacked tools.
#[derive(Debug)]
pub(crate) struct BuildTools {
    root: PathBuf,
}

impl BuildTools {
    /// The packages, as a suite has them.
    pub(crate) fn packages(
        apt: &Apt,
        tools: Tools,
        suite: &str,
    ) -> Result<Vec<Package>, PackageError> {
        let mut chosen = Vec::new();
        for names in tools {
            let offered = apt.versions(names, Some(suite))?;
            let package = names
                .iter()
                .find_map(|name| offered.iter().find(|package| package.name == *name));
            let missing = || {
                let advice = format!("give the machine apt sources that carry all of {suite}");
                apt.missing(&names.join(" or "), &offered, &advice)
            };
            chosen.push(package.cloned().ok_or_else(missing)?);
        }
        Ok(chosen)
    }

    /// The tools in the folder that their packages were unpacked in.
    ///
    /// # Errors
    /// When this machine has no compiler.
    pub(crate) fn unpacked_in(root: PathBuf) -> Result<Self, BuildError> {
        let mut compiler = Command::new(COMPILER);
        compiler.arg("--version").stdin(Stdio::null());
        compiler.output().map_err(|source| BuildError::Compiler {
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
    pub(crate) fn command(&self, program: &str) -> Command {
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

    /// A path in the folder of the tools.
    pub(crate) fn inside(&self, path: &str) -> PathBuf {
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
