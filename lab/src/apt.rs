//! apt, used without touching this machine's packages.
//!
//! [`Apt`] works in a folder of its own: its lists, its archives, its sources (this machine's
//! mirrors, see [`crate::apt_sources`]) and an empty list of installed packages, so that what it
//! resolves does not depend on what is installed here. It needs no root. The machine's `apt.conf`
//! still counts (a proxy, say), its hooks do not.
//!
//! [`Packages`] is the cache and an [`Apt`] that is opened only when something must be fetched.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt_sources::{self, Source};
use crate::cache::Cache;
use crate::package::{Package, PackageError, io_error};
use crate::package_tool::run;
use crate::progress::Progress;

/// A suite that has newer kernels than any release's own suites do. The release's mirror carries it
/// too; packages that depend on others are not taken from it.
pub const NEWER_SUITE: &str = "trixie-backports";

/// The cache, and where to fetch what it does not have.
#[derive(Debug)]
pub struct Packages<'a> {
    cache: &'a Cache,
    apt: Option<Apt>,
}

impl<'a> Packages<'a> {
    /// Packages that are kept in this cache. Nothing is fetched yet.
    #[must_use]
    pub fn new(cache: &'a Cache) -> Self {
        Self { cache, apt: None }
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &'a Cache {
        self.cache
    }

    /// The package manager, opened at the first call.
    ///
    /// # Errors
    /// As [`Apt::open`].
    pub fn apt(&mut self) -> Result<&Apt, PackageError> {
        match &mut self.apt {
            Some(apt) => Ok(apt),
            empty => Ok(empty.insert(Apt::open(self.cache)?)),
        }
    }

    /// Closes the package manager, so that others may use it. The next call of
    /// [`Packages::apt`] opens it again.
    pub fn close(&mut self) {
        self.apt = None;
    }
}

/// apt with a state of its own. Only one exists at a time for each cache; others wait.
#[derive(Debug)]
pub struct Apt {
    conf: PathBuf,
    archives: PathBuf,
    codename: String,
    suites: Vec<String>,
    /// What `apt-get update` complained about; packages may be there all the same.
    complaint: String,
    _lock: File,
}

impl Apt {
    /// Makes the private state and fetches the lists of packages.
    ///
    /// # Errors
    /// When this is no Debian machine, or its sources name no mirror of its release.
    pub fn open(cache: &Cache) -> Result<Self, PackageError> {
        if std::env::consts::ARCH != "x86_64" {
            return Err(PackageError::Architecture(std::env::consts::ARCH));
        }
        let codename = release_codename()?;
        let (files, configured) = machine_sources()?;
        let sources = apt_sources::of_release(&configured, &codename, &[NEWER_SUITE]);
        if sources.is_empty() {
            return Err(PackageError::NoSources { codename, files });
        }

        let lock = cache.lock("apt")?;
        let state = cache.root().join("apt");
        for folder in ["lists/partial", "archives/partial", "sources"] {
            let path = state.join(folder);
            fs::create_dir_all(&path).map_err(io_error("make the folder", &path))?;
        }
        let put = |name: &str, text: &str| {
            let path = state.join(name);
            fs::write(&path, text).map_err(io_error("write", &path))?;
            Ok::<_, PackageError>(path)
        };
        put("status", "")?;
        put("sources/lab.sources", &apt_sources::to_deb822(&sources))?;
        let conf = put("apt.conf", &configuration(&state))?;
        let mut apt = Self {
            conf,
            archives: state.join("archives"),
            codename,
            suites: sources.into_iter().flat_map(|s| s.suites).collect(),
            complaint: String::new(),
            _lock: lock,
        };
        apt.update()?;
        Ok(apt)
    }

    /// The release, which is also the name of its first suite.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.codename
    }

    /// The release's `-backports` suite.
    #[must_use]
    pub fn backports(&self) -> String {
        format!("{}-backports", self.codename)
    }

    fn update(&mut self) -> Result<(), PackageError> {
        let mut progress = Progress::start("fetching apt's lists of packages");
        match self.run("apt-get", &["update"], None, Some(&mut progress)) {
            Ok(_) => {}
            // A suite that some mirror lacks does no harm as long as the packages are found.
            Err(PackageError::Failed { said, .. }) => self.complaint = said,
            Err(other) => return Err(other),
        }
        progress.done();
        Ok(())
    }

    /// The names of all packages that start so.
    ///
    /// # Errors
    /// When apt fails.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, PackageError> {
        let text = self.run("apt-cache", &["pkgnames", prefix], None, None)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// All versions of these packages in all suites, or in the given one, as apt orders them.
    ///
    /// # Errors
    /// When apt fails.
    pub fn versions(
        &self,
        names: &[&str],
        suite: Option<&str>,
    ) -> Result<Vec<Package>, PackageError> {
        if names.is_empty() {
            return Ok(vec![]);
        }
        let text = self.run("apt-cache", &[&["madison"], names].concat(), None, None)?;
        Ok(parse_madison(&text, suite))
    }

    /// The error that says that a package is not to be had, and what there is.
    #[must_use]
    pub fn missing(&self, wanted: &str, offered: &[Package], advice: &str) -> PackageError {
        let offered: Vec<_> = offered.iter().map(ToString::to_string).collect();
        PackageError::Missing {
            wanted: wanted.to_owned(),
            suites: self.suites.join(" "),
            offered: if offered.is_empty() {
                "no version of it".to_owned()
            } else {
                offered.join(", ")
            },
            advice: advice.to_owned(),
            update: if self.complaint.is_empty() {
                String::new()
            } else {
                format!("\n  apt-get update said:\n{}", self.complaint)
            },
        }
    }

    /// Downloads packages, without what they depend on, and unpacks them into a folder.
    ///
    /// # Errors
    /// When apt or dpkg fails.
    pub fn unpack(&self, packages: &[Package], into: &Path) -> Result<(), PackageError> {
        let downloads = into.join("deb");
        fs::create_dir(&downloads).map_err(io_error("make the folder", &downloads))?;
        let title = match packages {
            [one] => format!("fetching {one}"),
            several => format!("fetching {} packages", several.len()),
        };
        let mut progress = Progress::start(title);
        let wanted: Vec<_> = packages
            .iter()
            .map(|package| format!("{}={}", package.name, package.version))
            .collect();
        let mut arguments = vec!["download"];
        arguments.extend(wanted.iter().map(String::as_str));
        self.run("apt-get", &arguments, Some(&downloads), Some(&mut progress))?;
        progress.done();
        self.unpack_all(&downloads, into)?;
        fs::remove_dir_all(&downloads).map_err(io_error("remove the folder", &downloads))
    }

    /// Downloads a source package and gives the archive of what Debian has it from.
    ///
    /// # Errors
    /// When apt fails, or the package has no such archive.
    pub fn download_source(&self, source: &Package, into: &Path) -> Result<PathBuf, PackageError> {
        let mut progress = Progress::start(format!("fetching the source of {source}"));
        let wanted = format!("{}={}", source.name, source.version);
        self.run(
            "apt-get",
            &["source", "--tar-only", "--only-source", &wanted],
            Some(into),
            Some(&mut progress),
        )?;
        progress.done();
        let is_it = |path: &PathBuf| path.to_string_lossy().ends_with(".orig.tar.xz");
        let archive = files_in(into)?.into_iter().find(is_it);
        archive.ok_or_else(|| PackageError::Incomplete {
            package: source.clone(),
            what: "archive of its origin".to_owned(),
        })
    }

    /// Downloads a package and everything it depends on, preferring a suite, and unpacks it all
    /// into a folder. `recommends` are left out.
    ///
    /// # Errors
    /// When apt cannot resolve it, or apt or dpkg fails.
    pub fn unpack_closure(
        &self,
        package: &Package,
        suite: &str,
        into: &Path,
    ) -> Result<(), PackageError> {
        let stale = self.archived()?;
        for path in stale {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        let mut progress = Progress::start(format!("fetching {package} and what it depends on"));
        let wanted = format!("{}={}", package.name, package.version);
        self.run(
            "apt-get",
            &[
                "install",
                "--yes",
                "--download-only",
                "--no-install-recommends",
                "--target-release",
                suite,
                &wanted,
            ],
            None,
            Some(&mut progress),
        )?;
        progress.done();
        self.unpack_all(&self.archives, into)?;
        for path in self.archived()? {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        Ok(())
    }

    fn archived(&self) -> Result<Vec<PathBuf>, PackageError> {
        packages_in(&self.archives)
    }

    fn unpack_all(&self, from: &Path, into: &Path) -> Result<(), PackageError> {
        let debs = packages_in(from)?;
        let mut progress = Progress::start(format!("unpacking {} packages", debs.len()));
        for (done, deb) in debs.iter().enumerate() {
            let percent = done.saturating_mul(100).checked_div(debs.len());
            let name = deb.file_name().unwrap_or_default().to_string_lossy();
            progress.at(percent.and_then(|p| p.try_into().ok()).unwrap_or(0), &name);
            let (deb, into) = (deb.display().to_string(), into.display().to_string());
            self.run("dpkg", &["--extract", &deb, &into], None, None)?;
        }
        progress.done();
        Ok(())
    }

    /// Runs one of apt's programs on the private state and returns its standard output.
    fn run(
        &self,
        program: &str,
        arguments: &[&str],
        folder: Option<&Path>,
        progress: Option<&mut Progress>,
    ) -> Result<String, PackageError> {
        let mut command = Command::new(program);
        if program != "dpkg" {
            command.arg("-c").arg(&self.conf);
        }
        if progress.is_some() {
            command.args(["-q", "-o", "APT::Status-Fd=1"]);
        }
        command.args(arguments);
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        run(&mut command, progress)
    }
}

/// ` name | version | uri suite/component amd64 Packages`
fn parse_madison(text: &str, suite: Option<&str>) -> Vec<Package> {
    let in_suite = |place: &str| {
        let of_place = place.split_whitespace().nth(1);
        suite.is_none_or(|suite| {
            of_place.is_some_and(|s| s.split_once('/').is_some_and(|(name, _)| name == suite))
        })
    };
    let mut packages: Vec<Package> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split('|').map(str::trim);
        if let (Some(name), Some(version), Some(place)) =
            (fields.next(), fields.next(), fields.next())
            && in_suite(place)
        {
            let package = Package {
                name: name.to_owned(),
                version: version.to_owned(),
            };
            if !packages.contains(&package) {
                packages.push(package);
            }
        }
    }
    packages
}

fn packages_in(folder: &Path) -> Result<Vec<PathBuf>, PackageError> {
    let mut found = files_in(folder)?;
    found.retain(|path| path.extension().is_some_and(|e| e == "deb"));
    Ok(found)
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>, PackageError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error("read the folder", folder))? {
        found.push(entry.map_err(io_error("read the folder", folder))?.path());
    }
    found.sort();
    Ok(found)
}

fn release_codename() -> Result<String, PackageError> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).map_err(io_error("read", path))?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
        .ok_or(PackageError::Release)
}

/// The files with apt's sources on this machine, and what is in them.
fn machine_sources() -> Result<(Vec<PathBuf>, Vec<Source>), PackageError> {
    let told = run(
        Command::new("apt-config").args([
            "shell",
            "FILE",
            "Dir::Etc::sourcelist/f",
            "PARTS",
            "Dir::Etc::sourceparts/d",
        ]),
        None,
    )?;
    let place = |name: &str| {
        told.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| PathBuf::from(value.trim_matches('\'')))
    };
    let mut files: Vec<PathBuf> = place("FILE").into_iter().filter(|f| f.is_file()).collect();
    if let Some(parts) = place("PARTS")
        && let Ok(entries) = fs::read_dir(&parts)
    {
        let mut parts: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        parts.sort();
        files.extend(parts);
    }
    let mut sources = Vec::new();
    for file in &files {
        let read = || fs::read_to_string(file).map_err(io_error("read", file));
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.extend(apt_sources::parse_one_line(&read()?)),
            Some("sources") => sources.extend(apt_sources::parse_deb822(&read()?)),
            _ => {}
        }
    }
    Ok((files, sources))
}

/// The private configuration. It is read after the machine's own and so has the last word.
fn configuration(state: &Path) -> String {
    let state = state.display();
    format!(
        "#clear APT::Update;\n\
         #clear DPkg::Pre-Invoke;\n\
         #clear DPkg::Post-Invoke;\n\
         #clear DPkg::Pre-Install-Pkgs;\n\
         #clear Acquire::IndexTargets::deb::DEP-11;\n\
         Dir::State \"{state}/\";\n\
         Dir::State::lists \"{state}/lists/\";\n\
         Dir::State::status \"{state}/status\";\n\
         Dir::Cache \"{state}/\";\n\
         Dir::Cache::archives \"{state}/archives/\";\n\
         Dir::Cache::pkgcache \"\";\n\
         Dir::Cache::srcpkgcache \"\";\n\
         Dir::Etc::sourcelist \"/dev/null\";\n\
         Dir::Etc::sourceparts \"{state}/sources/\";\n\
         Dir::Etc::preferences \"/dev/null\";\n\
         Dir::Etc::preferencesparts \"/dev/null\";\n\
         Dir::Log \"{state}/\";\n\
         APT::Architecture \"amd64\";\n\
         APT::Architectures {{ \"amd64\"; }};\n\
         APT::Sandbox::User \"root\";\n\
         APT::Get::List-Cleanup \"true\";\n\
         APT::Update::Error-Mode \"any\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"3\";\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn madison_gives_each_version_once_and_can_be_asked_for_a_suite() {
        let text = "\
 q | 1:10.0-1~bpo12+1 | http://mirror.invalid/debian bookworm-backports/main amd64 Packages
 q | 1:7.2-1 | http://mirror.invalid/debian bookworm/main amd64 Packages
 q | 1:7.2-1 | http://mirror.invalid/security bookworm-security/main amd64 Packages
nonsense
";
        let versions = |suite| {
            parse_madison(text, suite)
                .into_iter()
                .map(|p| p.version)
                .collect::<Vec<_>>()
        };
        assert_eq!(versions(None), ["1:10.0-1~bpo12+1", "1:7.2-1"]);
        assert_eq!(versions(Some("bookworm-backports")), ["1:10.0-1~bpo12+1"]);
        assert!(versions(Some("bookworm-back")).is_empty());
    }
}
