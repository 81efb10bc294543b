//! What a Debian package is, and why one may not be had.

use std::path::{Path, PathBuf};

use crate::cache::CacheError;

/// A package in one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version, as Debian writes it.
    pub version: String,
}

impl std::fmt::Display for Package {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// Why packages could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// QEMU and the kernel are taken as amd64 packages and run here.
    #[error("the lab's packages are for x86-64; this machine is {0}")]
    Architecture(&'static str),
    /// A tool of the system's package manager is not here.
    #[error("{tool} cannot be started; the lab fetches its packages with apt and dpkg (Debian)")]
    Tool {
        /// Which.
        tool: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The release is not named.
    #[error(
        "/etc/os-release names no VERSION_CODENAME, so there is no telling this release's suites"
    )]
    Release,
    /// Nothing configured carries the release.
    #[error(
        "no apt source for {codename} with component main among {}; add one (see sources.list(5))",
        list(.files)
    )]
    NoSources {
        /// The release.
        codename: String,
        /// Where was looked.
        files: Vec<PathBuf>,
    },
    /// apt or dpkg failed.
    #[error("{command} failed:\n{said}")]
    Failed {
        /// What was run.
        command: String,
        /// The end of what it said.
        said: String,
    },
    /// A package is not to be had.
    #[error(
        "missing package: {wanted}\n  suites looked at: {suites}\n  the mirror offers: {offered}\n  \
         what to do: {advice}{update}"
    )]
    Missing {
        /// Package and version.
        wanted: String,
        /// Which suites were looked at.
        suites: String,
        /// What there is instead.
        offered: String,
        /// What the reader can do.
        advice: String,
        /// What the last update of the lists complained about, if it did.
        update: String,
    },
    /// The package does not have what it should.
    #[error("{package} has no {what}")]
    Incomplete {
        /// The package.
        package: Package,
        /// What is not in it.
        what: String,
    },
    /// A file of apt's could not be read or written.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

fn list(files: &[PathBuf]) -> String {
    if files.is_empty() {
        return "no source files at all".to_owned();
    }
    let names: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
    names.join(", ")
}

/// The error of a file operation, for `map_err`.
pub(crate) fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(std::io::Error) -> PackageError + 'a {
    move |source| PackageError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
