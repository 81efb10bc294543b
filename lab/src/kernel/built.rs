//! The kernel that is built here: Debian's sources, the repository's configuration.
//!
//! A built kernel is an entry of the cache, named by the source's version, by what the fragment
//! holds and by how it is built; a change of any of them builds another one. Everything that
//! building takes (source, tools, objects) is in the entry's folder while it is made and gone when
//! it is whole, or when making it fails.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use super::{Kernel, KernelError, configuration};
use crate::apt::{Apt, Packages};
use crate::build::{BuildTools, Step, Tools, digest, io_error, jobs, unpack_source};
use crate::cache::EntryName;
use crate::package::{Package, PackageError};
use crate::progress::Progress;

/// The pinned source's package.
const PINNED_NAME: &str = "linux-source-7.3";
/// The pinned source's version.
const PINNED_VERSION: &str = "7.3.4-1~bpo13+1";
/// The oldest series that has all that the fragment asks for.
const OLDEST: Series = (7, 0);
/// How a kernel is built and what is kept of it: raise it whenever that changes.
const BUILDER: &str = "lab1";

/// Version and patch level, such as 7 and 3.
type Series = (u32, u32);

/// What building takes, of this release.
const TOOLS: Tools = &[
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

/// How many lines `tar` and `make` print for the pinned source, to tell how far they are. Wrong
/// numbers do no harm.
const LINES_OF_TAR: usize = 100_000;
const LINES_OF_MAKE: usize = 2_450;

/// The built kernel, built if need be. One that is in the cache is used without asking the mirror.
pub(super) fn obtain(packages: &mut Packages<'_>) -> Result<Kernel, KernelError> {
    let cache = packages.cache();
    let subject = subject(configuration::FRAGMENT);
    let mut cached = cache.versions_of(&subject).map_err(PackageError::from)?;
    // The pinned one first.
    cached.sort_by_key(|(version, _)| version == PINNED_VERSION);
    if let Some((version, folder)) = cached.pop() {
        return Ok(from_entry(&folder, &version));
    }
    let pinned = Package {
        name: PINNED_NAME.to_owned(),
        version: PINNED_VERSION.to_owned(),
    };
    let source = choose(packages.apt()?, &pinned)?;
    if source != pinned {
        eprintln!("lab: the mirror no longer has {pinned}; taking {source}");
    }
    // Who waits for another run's build does not keep the package manager from a third.
    packages.close();
    let name = EntryName::new(&subject, &source.version);
    let log = cache.root().join(format!("{}.log", name.as_str()));
    let folder = cache.entry(&name, |folder| build(packages, &source, folder, &log))?;
    Ok(from_entry(&folder, &source.version))
}

/// What entries of this configuration, built this way, are called.
fn subject(fragment: &str) -> String {
    let digest = digest(fragment);
    format!("kernel-iommufd-{BUILDER}-{digest:016x}")
}

fn from_entry(folder: &Path, version: &str) -> Kernel {
    Kernel {
        image: folder.join("bzImage"),
        elf: Some(folder.join("vmlinux")),
        modules: vec![],
        description: format!("built from Linux {version} for iommufd"),
    }
}

/// The pinned package; else the newest of its series; else of the newest series that may serve.
fn choose(apt: &Apt, pinned: &Package) -> Result<Package, KernelError> {
    let names = apt.names("linux-source-")?;
    let names: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| series_of(name).is_some_and(|series| series >= OLDEST))
        .collect();
    let offered = apt.versions(&names, None)?;
    best(&offered, pinned).cloned().ok_or_else(|| {
        let advice = format!(
            "use a mirror that carries {}: the one of this machine's own apt sources was asked; or \
             pass --kernel PATH",
            crate::apt::NEWER_SUITE
        );
        apt.missing(&pinned.to_string(), &offered, &advice).into()
    })
}

/// Of each name, apt offers the newest version first.
fn best<'a>(offered: &'a [Package], pinned: &Package) -> Option<&'a Package> {
    let newest_series = || offered.iter().filter_map(|p| series_of(&p.name)).max();
    offered
        .iter()
        .find(|package| *package == pinned)
        .or_else(|| offered.iter().find(|package| package.name == pinned.name))
        .or_else(|| {
            let newest = newest_series();
            offered
                .iter()
                .find(|package| series_of(&package.name) == newest)
        })
}

/// Of `linux-source-7.3`, 7 and 3.
fn series_of(name: &str) -> Option<Series> {
    let (version, patch_level) = name.strip_prefix("linux-source-")?.split_once('.')?;
    Some((version.parse().ok()?, patch_level.parse().ok()?))
}

/// Fills an entry: `bzImage`, `vmlinux` (the same kernel as an ELF file with a PVH entry, without
/// symbols) and `config`.
fn build(
    packages: &mut Packages<'_>,
    source: &Package,
    folder: &Path,
    log: &Path,
) -> Result<(), KernelError> {
    let work = folder.join("work");
    let [tools, package, tree] = ["tools", "package", "tree"].map(|name| work.join(name));
    for path in [&work, &tools, &package, &tree] {
        fs::create_dir(path).map_err(io_error("make the folder", path))?;
    }
    let apt = packages.apt()?;
    apt.unpack(&BuildTools::packages(apt, TOOLS, apt.release())?, &tools)?;
    apt.unpack(std::slice::from_ref(source), &package)?;
    // Others may want packages while this one builds for minutes.
    packages.close();
    let tools = BuildTools::unpacked_in(tools)?;

    let archive = package
        .join("usr/src")
        .join(format!("{}.tar.xz", source.name));
    let unpacking = Step::new("unpacking the kernel's source", LINES_OF_TAR, log);
    unpack_source(&tools, &archive, &tree, unpacking)?;
    fs::remove_dir_all(&package).map_err(io_error("remove the folder", &package))?;

    configure(&tools, source, &tree, log)?;

    let mut make = make(&tools, &tree);
    make.arg(format!("--jobs={}", jobs())).arg("bzImage");
    let title = format!("building {source} with lab/kernel/iommufd.config");
    Step::new(&title, LINES_OF_MAKE, log).run(&mut make)?;

    let mut strip = tools.command("strip");
    strip
        .arg("-o")
        .arg(folder.join("vmlinux"))
        .arg(tree.join("vmlinux"));
    Step::new("stripping the kernel", 1, log).run(&mut strip)?;
    for (built, kept) in [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")] {
        let built = tree.join(built);
        fs::rename(&built, folder.join(kept)).map_err(io_error("move", &built))?;
    }
    // Two gigabytes of small files: it takes a while.
    let progress = Progress::start("clearing up");
    fs::remove_dir_all(&work).map_err(io_error("remove the folder", &work))?;
    progress.done();
    // All went well: nobody wants to read it.
    fs::remove_file(log).map_err(io_error("remove", log))?;
    Ok(())
}

/// The fragment on top of `tinyconfig`, and whether all of it took.
fn configure(
    tools: &BuildTools,
    source: &Package,
    tree: &Path,
    log: &Path,
) -> Result<(), KernelError> {
    let mut tiny = make(tools, tree);
    Step::new("configuring the kernel", 20, log).run(tiny.arg("tinyconfig"))?;
    let path = tree.join(".config");
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(configuration::FRAGMENT.as_bytes()))
        .map_err(io_error("write", &path))?;
    let mut rest = make(tools, tree);
    Step::new("completing the configuration", 5, log).run(rest.arg("olddefconfig"))?;
    let finished = fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let lines = configuration::not_taken(configuration::FRAGMENT, &finished);
    if lines.is_empty() {
        Ok(())
    } else {
        Err(KernelError::Configuration {
            package: source.clone(),
            lines,
        })
    }
}

/// make's variables by which the programs that the kernel builds for its own build find our libraries.
fn own_libraries(tools: &BuildTools) -> [OsString; 2] {
    let variable = |start: &str, path: &str| {
        let mut text = OsString::from(start);
        text.push(tools.inside(path));
        text
    };
    [
        variable("HOSTCFLAGS=-I", "usr/include"),
        variable("HOSTLDFLAGS=-L", "usr/lib/x86_64-linux-gnu"),
    ]
}

fn make(tools: &BuildTools, tree: &Path) -> std::process::Command {
    let mut command = tools.command("make");
    command
        .arg("--directory")
        .arg(tree)
        .args(own_libraries(tools))
        .args([
            "ARCH=x86_64",
            "KBUILD_BUILD_USER=lab",
            "KBUILD_BUILD_HOST=throughway",
        ]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str) -> Package {
        Package {
            name: name.to_owned(),
            version: version.to_owned(),
        }
    }

    #[test]
    fn only_numbered_source_packages_have_a_series() {
        assert_eq!(series_of("linux-source-7.3"), Some((7, 3)));
        assert_eq!(series_of(PINNED_NAME), Some((7, 3)));
        assert_eq!(series_of("linux-source"), None);
        assert_eq!(series_of("linux-source-7.3-rt"), None);
        assert!(series_of("linux-source-6.12") < Some(OLDEST));
    }

    #[test]
    fn what_stands_in_for_the_pinned_source_is_as_near_as_there_is() {
        let pinned = package(PINNED_NAME, PINNED_VERSION);
        let near = package(PINNED_NAME, "7.3.9-1~bpo13+1");
        let old = package("linux-source-7.2", "7.2.6-1~bpo13+1");
        let new = package("linux-source-7.10", "7.10.2-1~bpo13+1");
        let newer = package("linux-source-7.10", "7.10.3-1~bpo13+1");
        let all = [&newer, &new, &old, &near, &pinned].map(Clone::clone);
        assert_eq!(best(&all, &pinned), Some(&pinned));
        assert_eq!(best(&all[..4], &pinned), Some(&near));
        assert_eq!(best(&all[..3], &pinned), Some(&newer));
        assert_eq!(best(&all[2..3], &pinned), Some(&old));
        assert_eq!(best(&[], &pinned), None);
    }

    #[test]
    fn another_configuration_is_another_entry() {
        assert_eq!(subject("a"), subject("a"));
        assert_ne!(subject("a"), subject("b"));
    }
}
