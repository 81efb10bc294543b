//! Building what Debian has no package of: this machine's compiler, a source package, and tools that
//! are unpacked beside it.

mod step;
mod tools;

use std::io;
use std::path::{Path, PathBuf};

use crate::package::PackageError;
pub(crate) use step::Step;
pub(crate) use tools::{BuildTools, Tools};

/// Why something could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Its source, or a tool, could not be had.
    #[error(transparent)]
    Package(Box<PackageError>),
    /// There is no compiler.
    #[error(
        "the lab builds a kernel and an emulator here, and {tool} cannot be started; have root do: \
         apt-get install gcc libc6-dev"
    )]
    Compiler {
        /// Which program was tried.
        tool: &'static str,
        /// Why it cannot be started.
        #[source]
        source: io::Error,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A step failed.
    #[error("{step} failed ({how}); all it said is in {log}, among it:\n{tail}")]
    Step {
        /// What was being done.
        step: String,
        /// The exit status.
        how: String,
        /// Everything the step said. It stays until the next build.
        log: PathBuf,
        /// Its first errors and its end.
        tail: String,
    },
}

impl From<PackageError> for BuildError {
    fn from(error: PackageError) -> Self {
        Self::Package(Box::new(error))
    }
}

impl From<crate::cache::CacheError> for BuildError {
    fn from(error: crate::cache::CacheError) -> Self {
        PackageError::from(error).into()
    }
}

/// Unpacks a source's archive, without the folder that everything in it is in.
pub(crate) fn unpack_source(
    tools: &BuildTools,
    archive: &Path,
    tree: &Path,
    step: Step<'_>,
) -> Result<(), BuildError> {
    let mut tar = tools.command("tar");
    tar.args(["--extract", "--xz", "--verbose", "--strip-components=1"])
        .args(["--no-same-owner", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(tree);
    step.run(&mut tar)
}

/// How many compilers run at a time.
pub(crate) fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A number that differs for texts that differ: FNV-1a, which unlike the standard library's hashers
/// gives the same in every version of Rust.
pub(crate) fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The error of a file operation, for `map_err`.
pub(crate) fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> BuildError + 'a {
    move |source| BuildError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_fnv_1a_and_sees_every_change() {
        assert_eq!(digest("a"), 0xaf63_dc4c_8601_ec8c);
        assert_ne!(digest("CONFIG_A=y\n"), digest("CONFIG_A=n\n"));
    }
}
