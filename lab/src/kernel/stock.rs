//! Debian's own kernel, with the modules the lab needs.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::{Kernel, KernelError};
use crate::apt::{Apt, Packages};
use crate::build::io_error;
use crate::cache::EntryName;
use crate::package::{Package, PackageError};

/// The series the stock kernel is from; what stands in for the pinned one is from it too.
const SERIES: &str = "6.12";
/// The pinned stock kernel's package. Its name holds the kernel's release.
const PINNED_NAME: &str = "linux-image-6.12.117+deb12-amd64";
/// The pinned stock kernel's version.
const PINNED_VERSION: &str = "6.12.117-1~deb12u1";

/// The modules that are taken from the package, each after what it depends on.
const MODULES: [&str; 8] = [
    "irqbypass",
    "ccp",
    "kvm",
    "kvm-amd",
    "vfio",
    "vfio_iommu_type1",
    "vfio-pci-core",
    "vfio-pci",
];
/// What is kept of a package: raise it whenever [`MODULES`] or the entry's layout changes.
const LAYOUT: &str = "lab1";

/// The stock kernel, fetched if need be. The pinned one, once in the cache, is used without asking
/// the mirror.
pub(super) fn obtain(packages: &mut Packages<'_>) -> Result<Kernel, KernelError> {
    let pinned = Package {
        name: PINNED_NAME.to_owned(),
        version: PINNED_VERSION.to_owned(),
    };
    let cache = packages.cache();
    if let Some(folder) = cache.get(&entry_name(&pinned)) {
        return Ok(from_entry(&folder, &pinned));
    }
    let apt = packages.apt()?;
    let package = choose(apt, &pinned)?;
    if package != pinned {
        eprintln!("lab: the mirror no longer has {pinned}; taking {package}");
    }
    let folder = cache.entry(&entry_name(&package), |folder| fetch(apt, &package, folder))?;
    Ok(from_entry(&folder, &package))
}

fn from_entry(folder: &Path, package: &Package) -> Kernel {
    let modules = MODULES
        .iter()
        .map(|name| folder.join(format!("{name}.ko")))
        .collect();
    Kernel {
        image: folder.join("vmlinuz"),
        elf: None,
        modules,
        description: package.to_string(),
    }
}

fn entry_name(package: &Package) -> EntryName {
    EntryName::new(&package.name, &format!("{}_{LAYOUT}", package.version))
}

/// The pinned package, or the newest of its series that is newer.
fn choose(apt: &Apt, pinned: &Package) -> Result<Package, KernelError> {
    let names = apt.names(&format!("linux-image-{SERIES}."))?;
    let names: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| release_of(name).is_some())
        .collect();
    let mut offered = apt.versions(&names, None)?;
    offered.sort_by_key(|package| std::cmp::Reverse(release_of(&package.name)));
    if offered.contains(pinned) {
        return Ok(pinned.clone());
    }
    offered
        .iter()
        .find(|package| release_of(&package.name) >= release_of(&pinned.name))
        .cloned()
        .ok_or_else(|| {
            let advice = format!(
                "give the machine apt sources that carry a newer {SERIES} kernel (Debian 12 has it \
                 in bookworm-security), or pass --kernel PATH"
            );
            apt.missing(&pinned.to_string(), &offered, &advice).into()
        })
}

/// The numbers that order the packages of the series: of `linux-image-6.12.90+deb12.1-amd64` they
/// are 90, 12 and 1. `None` for other flavours (cloud, rt, unsigned, dbg).
fn release_of(name: &str) -> Option<Vec<u32>> {
    let rest = name.strip_prefix("linux-image-")?.strip_prefix(SERIES)?;
    let (patch, debian) = rest
        .strip_prefix('.')?
        .strip_suffix("-amd64")?
        .split_once("+deb")?;
    std::iter::once(patch)
        .chain(debian.split('.'))
        .map(|number| number.parse().ok())
        .collect()
}

fn fetch(apt: &Apt, package: &Package, folder: &Path) -> Result<(), KernelError> {
    let unpacked = folder.join("unpacked");
    fs::create_dir(&unpacked).map_err(io_error("make the folder", &unpacked))?;
    apt.unpack(std::slice::from_ref(package), &unpacked)?;
    let release = package
        .name
        .strip_prefix("linux-image-")
        .unwrap_or(&package.name);
    let incomplete = |what: String| PackageError::Incomplete {
        package: package.clone(),
        what,
    };

    let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
    if !image.is_file() {
        return Err(incomplete(format!("boot/vmlinuz-{release}")).into());
    }
    let kept = folder.join("vmlinuz");
    fs::rename(&image, &kept).map_err(io_error("move", &image))?;
    // Debian 12 has /lib/modules, later releases have /usr/lib/modules.
    let trees = ["lib/modules", "usr/lib/modules"].map(|tree| unpacked.join(tree));
    let mut files = Vec::new();
    for tree in trees.iter().filter(|tree| tree.is_dir()) {
        walk(tree, &mut files)?;
    }
    for name in MODULES {
        let module = files
            .iter()
            .find(|path| {
                let file = path.file_name().and_then(|n| n.to_str());
                file.and_then(|f| f.split_once(".ko"))
                    .is_some_and(|(stem, _)| stem == name)
            })
            .ok_or_else(|| incomplete(format!("module {name}")))?;
        let content = decompressed(module)?;
        let kept = folder.join(format!("{name}.ko"));
        fs::write(&kept, content).map_err(io_error("write", &kept))?;
    }
    fs::remove_dir_all(&unpacked).map_err(io_error("remove the folder", &unpacked))?;
    Ok(())
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), KernelError> {
    for entry in fs::read_dir(folder).map_err(io_error("read the folder", folder))? {
        let entry = entry.map_err(io_error("read the folder", folder))?;
        let kind = entry.file_type().map_err(io_error("look at", folder))?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// A module as the kernel takes it: Debian compresses them with xz.
fn decompressed(path: &Path) -> Result<Vec<u8>, KernelError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("ko") => Ok(fs::read(path).map_err(io_error("read", path))?),
        Some("xz") => {
            let file = fs::File::open(path).map_err(io_error("read", path))?;
            let mut content = Vec::new();
            lzma_rs::xz_decompress(&mut BufReader::new(file), &mut content).map_err(|error| {
                KernelError::Compression {
                    path: path.to_owned(),
                    reason: format!("{error:?}"),
                }
            })?;
            Ok(content)
        }
        _ => Err(KernelError::Compression {
            path: path.to_owned(),
            reason: "neither plain nor xz".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_number() {
        let of = |tail: &str| release_of(&format!("linux-image-6.12.{tail}"));
        assert_eq!(of("90+deb12.1-amd64"), Some(vec![90, 12, 1]));
        assert!(of("117+deb12-amd64") > of("90+deb12.1-amd64"));
        assert!(of("90+deb12.1-amd64") > of("90+deb12-amd64"));
        assert!(of("90+deb12-amd64") > of("9+deb12-amd64"));
    }

    #[test]
    fn other_flavours_and_series_are_no_stock_kernel() {
        for name in [
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-rt-amd64",
            "linux-image-6.12.117+deb12-amd64-unsigned",
            "linux-image-6.12.117+deb12-amd64-dbg",
            "linux-image-6.1.100+deb12-amd64",
            "linux-image-6.12-amd64",
        ] {
            assert_eq!(release_of(name), None, "{name}");
        }
    }

    #[test]
    fn the_pin_is_of_the_series() {
        assert!(release_of(PINNED_NAME).is_some());
    }
}
