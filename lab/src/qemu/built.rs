//! The emulator that is built here: Debian's source, and the repository's patch on it.
//!
//! Unpatched, QEMU now and then delivers an interrupt to a KVM guest twice, and loses one of the
//! processor that it runs on (see `docs/kernel-facts.md`): guests die of it, or the whole nested
//! machine stands still. The patch is `lab/qemu/guest-interrupts.patch`.
//!
//! As with the [kernel](crate::kernel), what was built is an entry of the cache, named by the source's
//! version, by the patch and by how it is built; and the parts of QEMU's own `configure` that matter
//! here are done by hand, because the rest of it wants an environment of Python's that is installed.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{Apt, Packages};
use crate::build::{BuildError, BuildTools, Step, Tools, digest, io_error, jobs, unpack_source};
use crate::cache::EntryName;
use crate::package::Package;

/// The program in the entry's folder, and what QEMU's build calls it.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";

const PATCH: &str = include_str!("../../qemu/guest-interrupts.patch");
const SOURCE: &str = "qemu";
/// How it is built: raise it whenever that changes.
const BUILDER: &str = "lab1";

/// What building takes, of this release.
const TOOLS: Tools = &[
    &["xz-utils"],
    &["patch"],
    &["ninja-build"],
    &["libstdc++6"],
    &["libgcc-s1"],
    &["python3.13-minimal", "python3.11-minimal"],
    &["libpython3.13-minimal", "libpython3.11-minimal"],
    &["libpython3.13-stdlib", "libpython3.11-stdlib"],
    &["libexpat1"],
    &["pkgconf-bin"],
    &["libpkgconf3"],
    &["libglib2.0-dev"],
    &["libglib2.0-0t64", "libglib2.0-0"],
    &["libffi8"],
    &["libpcre2-dev"],
    &["libpcre2-8-0"],
    &["zlib1g-dev"],
    &["zlib1g"],
    &["libfdt-dev"],
    &["libfdt1"],
];
/// What has to be newer than Debian 12's: QEMU 10 wants Meson 1.5.
const NEWER_TOOLS: Tools = &[&["meson"]];

/// How many lines `tar`, `meson` and `ninja` print, to tell how far they are. Wrong numbers do no
/// harm.
const LINES_OF_TAR: usize = 41_000;
const LINES_OF_MESON: usize = 480;
const LINES_OF_NINJA: usize = 1_533;

/// What entries of this patch, built this way, are called.
pub(super) fn subject() -> String {
    format!("qemu-{BUILDER}-{:016x}", digest(PATCH))
}

/// The folder with the emulator of a version of Debian's package, built if need be.
pub(super) fn obtain(packages: &mut Packages<'_>, version: &str) -> Result<PathBuf, BuildError> {
    let cache = packages.cache();
    let name = EntryName::new(&subject(), version);
    let source = Package {
        name: SOURCE.to_owned(),
        version: version_of_source(version).to_owned(),
    };
    // Who waits for another run's build does not keep the package manager from a third.
    packages.close();
    let log = cache.root().join(format!("{}.log", name.as_str()));
    cache.entry(&name, |folder| build(packages, &source, folder, &log))
}

/// A package that was built once more without a change of the source has `+b` and a number added.
fn version_of_source(version: &str) -> &str {
    match version.rsplit_once("+b") {
        Some((source, number))
            if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            source
        }
        _ => version,
    }
}

/// Fills an entry with the program.
fn build(
    packages: &mut Packages<'_>,
    source: &Package,
    folder: &Path,
    log: &Path,
) -> Result<(), BuildError> {
    let work = folder.join("work");
    let [tools, package, tree, objects] =
        ["tools", "package", "tree", "objects"].map(|name| work.join(name));
    for path in [&work, &tools, &package, &tree, &objects] {
        fs::create_dir(path).map_err(io_error("make the folder", path))?;
    }
    let apt = packages.apt()?;
    let mut wanted = BuildTools::packages(apt, TOOLS, apt.release())?;
    wanted.extend(newer_tools(apt)?);
    apt.unpack(&wanted, &tools)?;
    let archive = apt.download_source(source, &package)?;
    // Others may want packages while this one builds for minutes.
    packages.close();
    let tools = BuildTools::unpacked_in(tools)?;

    let unpacking = Step::new("unpacking QEMU's source", LINES_OF_TAR, log);
    unpack_source(&tools, &archive, &tree, unpacking)?;
    fs::remove_dir_all(&package).map_err(io_error("remove the folder", &package))?;
    patch(&tools, &tree, &work, log)?;
    configure(&tools, &tree, &objects, log)?;

    let mut ninja = command(&tools, "ninja");
    ninja
        .arg("-C")
        .arg(&objects)
        .arg(format!("-j{}", jobs()))
        .arg(PROGRAM);
    let title = format!("building {source} with lab/qemu/guest-interrupts.patch");
    Step::new(&title, LINES_OF_NINJA, log).run(&mut ninja)?;

    let mut strip = tools.command("strip");
    strip
        .arg("-o")
        .arg(folder.join(PROGRAM))
        .arg(objects.join(PROGRAM));
    Step::new("stripping QEMU", 1, log).run(&mut strip)?;
    fs::remove_dir_all(&work).map_err(io_error("remove the folder", &work))?;
    // All went well: nobody wants to read it.
    fs::remove_file(log).map_err(io_error("remove", log))
}

/// From the release's `-backports` suite, else from the release itself.
fn newer_tools(apt: &Apt) -> Result<Vec<Package>, BuildError> {
    BuildTools::packages(apt, NEWER_TOOLS, &apt.backports())
        .or_else(|_| BuildTools::packages(apt, NEWER_TOOLS, apt.release()))
        .map_err(BuildError::from)
}

/// Changes the source. A patch that does not fit exactly is an error.
fn patch(tools: &BuildTools, tree: &Path, work: &Path, log: &Path) -> Result<(), BuildError> {
    let file = work.join("patch");
    fs::write(&file, PATCH).map_err(io_error("write", &file))?;
    let mut patch = tools.command("patch");
    patch
        .args(["--strip=1", "--fuzz=0", "--batch", "--directory"])
        .arg(tree)
        .arg("--input")
        .arg(&file);
    Step::new("patching QEMU's source", 1, log).run(&mut patch)
}

/// What QEMU's `configure` would do: the files that its build expects, and Meson.
fn configure(
    tools: &BuildTools,
    tree: &Path,
    objects: &Path,
    log: &Path,
) -> Result<(), BuildError> {
    let put = |name: &str, text: &str| {
        let path = objects.join(name);
        fs::write(&path, text).map_err(io_error("write", &path))?;
        Ok::<_, BuildError>(path)
    };
    let settings = format!(
        "SRC_PATH={}\nTARGET_DIRS=x86_64-softmmu\nGDB=\nGENISOIMAGE=\n",
        tree.display()
    );
    put("config-host.mak", &settings)?;
    // What it would be used for, firmware, is not in Debian's source.
    let native = put("native.ini", "[binaries]\nbzip2 = 'none'\n")?;
    let headers = objects.join("linux-headers");
    fs::create_dir(&headers).map_err(io_error("make the folder", &headers))?;
    let link = headers.join("asm");
    symlink(tree.join("linux-headers/asm-x86"), &link).map_err(io_error("make the link", &link))?;

    let mut meson = command(tools, &python_in(tools)?);
    meson
        .arg(tools.inside("usr/bin/meson"))
        .arg("setup")
        .arg("--native-file")
        .arg(native)
        .args(["--wrap-mode=nodownload", "--buildtype=release"])
        .args([
            "-Dauto_features=disabled",
            "-Ddocs=disabled",
            "-Dinstall_blobs=false",
            "-Dkvm=disabled",
            "-Doptimization=2",
            "-Dtools=disabled",
            "-Dwerror=false",
        ])
        .arg(objects)
        .arg(tree);
    Step::new("configuring QEMU", LINES_OF_MESON, log).run(&mut meson)
}

/// The name of the interpreter among the tools.
fn python_in(tools: &BuildTools) -> Result<String, BuildError> {
    let programs = tools.inside("usr/bin");
    let unreadable = |source| io_error("read the folder", &programs)(source);
    for entry in fs::read_dir(&programs).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.starts_with("python3.")) {
            return Ok(name.to_owned());
        }
    }
    Err(unreadable(io::Error::new(
        io::ErrorKind::NotFound,
        "no Python in it",
    )))
}

/// A command that finds the unpacked Python's modules and the unpacked libraries.
fn command(tools: &BuildTools, program: &str) -> Command {
    let libraries = tools.inside("usr/lib/x86_64-linux-gnu/pkgconfig");
    let mut places = OsString::from(libraries);
    places.push(":");
    places.push(tools.inside("usr/share/pkgconfig"));
    let mut command = tools.command(program);
    command
        .env("PYTHONHOME", tools.inside("usr"))
        .env("PYTHONPATH", tools.inside("usr/lib/python3/dist-packages"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PKG_CONFIG", tools.inside("usr/bin/pkgconf"))
        .env("PKG_CONFIG_SYSROOT_DIR", tools.inside(""))
        .env("PKG_CONFIG_LIBDIR", places);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_was_built_again_is_from_the_same_source() {
        assert_eq!(version_of_source("1:10.0.13+ds-1+b2"), "1:10.0.13+ds-1");
        for same in ["1:10.0.2+ds-2+deb13u1~bpo12+1", "1:10.0.13+ds-1", "10+b"] {
            assert_eq!(version_of_source(same), same);
        }
    }
}
