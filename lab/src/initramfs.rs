//! The nested machine's only file system: an initramfs made for each boot.
//!
//! ```text
//! /init                lab_init, PID 1
//! /bin                 busybox; lab_init adds a link for each applet
//! /lab/bin             the workspace's static programs; first on PATH
//! /lab/modules         the kernel's modules, and `order`: their names, one a line
//! /lab/files           the user's files, unless they are to be elsewhere
//! /lab/guest           on request, what a guest in the machine boots from
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cpio::Archive;

/// Where the user's files go by default.
pub const FILES: &str = "/lab/files";
/// Where the workspace's programs go.
pub const PROGRAMS: &str = "/lab/bin";
/// Where the kernel's modules go.
pub const MODULES: &str = "/lab/modules";
/// The file beside the modules that lists them in the order of loading.
pub const MODULE_ORDER: &str = "/lab/modules/order";

/// Where a guest's kernel is: the nested machine's own, as a bzImage.
pub const GUEST_KERNEL: &str = "/lab/guest/kernel";
/// Where a guest's kernel is as an ELF file with a PVH entry, if the nested machine's own is there as
/// one.
pub const GUEST_ELF: &str = "/lab/guest/vmlinux";
/// Where a guest's initramfs is, with the program `guest` as its PID 1 and nothing else.
pub const GUEST_INITRD: &str = "/lab/guest/initrd";

/// A file of this machine that the nested machine shall have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Here.
    pub host: PathBuf,
    /// There: an absolute path in the nested machine.
    pub guest: String,
}

/// Why a file could not be put into the initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// Not a file that can be read.
    #[error("cannot read {path}, wanted in the nested machine as {guest}")]
    Read {
        /// Here.
        path: PathBuf,
        /// There.
        guest: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a path a file can have in the nested machine.
    #[error(
        "{0:?} is no path for a file in the nested machine: it must be absolute, name a file and \
         have no `.` or `..` part"
    )]
    GuestPath(String),
    /// Two files for one path.
    #[error("two files for {0} in the nested machine")]
    Twice(String),
    /// A path of this machine whose file name is not text.
    #[error("{0:?} has no file name that can be used in the nested machine")]
    Name(PathBuf),
    /// The archive could not be written.
    #[error("cannot write the initramfs {path}")]
    Write {
        /// The archive.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl GuestFile {
    /// Reads `HOST[:GUEST]`. Without GUEST the file keeps its name, in [`FILES`].
    ///
    /// # Errors
    /// When GUEST is no absolute path of a file, or HOST has no usable name.
    pub fn parse(text: &str) -> Result<Self, InitramfsError> {
        if let Some((host, guest)) = text.rsplit_once(':') {
            return Ok(Self {
                host: host.into(),
                guest: checked(guest)?,
            });
        }
        Self::inside(FILES, Path::new(text))
    }

    /// The file under its own name in a folder of the nested machine.
    ///
    /// # Errors
    /// When the file has no name, or one that is not UTF-8.
    pub fn inside(folder: &str, host: &Path) -> Result<Self, InitramfsError> {
        let name = host
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| InitramfsError::Name(host.to_owned()))?;
        Ok(Self {
            host: host.to_owned(),
            guest: checked(&format!("{folder}/{name}"))?,
        })
    }
}

/// An absolute path to a file, without tricks.
fn checked(guest: &str) -> Result<String, InitramfsError> {
    let sound = guest.strip_prefix('/').is_some_and(|rest| {
        rest.split('/')
            .all(|part| !matches!(part, "" | "." | "..") && !part.contains('\0'))
    });
    if sound {
        Ok(guest.to_owned())
    } else {
        Err(InitramfsError::GuestPath(guest.to_owned()))
    }
}

/// What is in an initramfs, by absolute path. Folders are added as files need them.
#[derive(Debug, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Folder(u32),
    File(u32, Vec<u8>),
    Link(&'static str),
    Device { major: u32, minor: u32 },
}

impl Initramfs {
    /// The initramfs of a machine: init, shell and the files that every program expects.
    ///
    /// # Errors
    /// When one of the two programs cannot be read.
    pub fn new(init: &Path, busybox: &Path) -> Result<Self, InitramfsError> {
        let mut new = Self::default();
        for (folder, permissions) in [
            ("/dev", 0o755),
            ("/proc", 0o555),
            ("/root", 0o700),
            ("/run", 0o755),
            ("/sys", 0o555),
            ("/tmp", 0o1777),
            (FILES, 0o755),
        ] {
            new.insert(folder, Entry::Folder(permissions))?;
        }
        new.add_init(init)?;
        new.add(busybox, "/bin/busybox")?;
        new.insert("/bin/sh", Entry::Link("busybox"))?;
        new.text(
            "/etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        )?;
        new.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
        Ok(new)
    }

    /// The initramfs of a guest in the machine: one program.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_guest(program: &Path) -> Result<Self, InitramfsError> {
        let mut new = Self::default();
        for folder in ["/dev", "/proc", "/sys"] {
            new.insert(folder, Entry::Folder(0o755))?;
        }
        new.add_init(program)?;
        Ok(new)
    }

    /// Adds PID 1's program, and what its standard streams need before it has mounted anything.
    fn add_init(&mut self, init: &Path) -> Result<(), InitramfsError> {
        for (path, major, minor) in [("/dev/console", 5, 1), ("/dev/null", 1, 3)] {
            self.insert(path, Entry::Device { major, minor })?;
        }
        self.add(init, "/init")
    }

    /// Adds another initramfs, as a file.
    ///
    /// # Errors
    /// When its path is taken.
    pub fn nest(&mut self, inner: &Self, guest: &str) -> Result<(), InitramfsError> {
        let mut content = Vec::new();
        let written = inner.write_to(&mut content);
        written.map_err(|source| InitramfsError::Write {
            path: guest.into(),
            source,
        })?;
        self.insert(guest, Entry::File(0o644, content))
    }

    /// Adds a file of this machine, executable for all.
    ///
    /// # Errors
    /// When it cannot be read, or its path is taken.
    pub fn add(&mut self, host: &Path, guest: &str) -> Result<(), InitramfsError> {
        let content = fs::read(host).map_err(|source| InitramfsError::Read {
            path: host.to_owned(),
            guest: guest.to_owned(),
            source,
        })?;
        self.insert(guest, Entry::File(0o755, content))
    }

    /// Adds a text file.
    ///
    /// # Errors
    /// When its path is taken.
    pub fn text(&mut self, guest: &str, content: &str) -> Result<(), InitramfsError> {
        self.insert(guest, Entry::File(0o644, content.into()))
    }

    fn insert(&mut self, path: &str, entry: Entry) -> Result<(), InitramfsError> {
        let path = checked(path)?;
        for (end, _) in path.match_indices('/').skip(1) {
            match self.entries.get(&path[..end]) {
                None => {
                    self.entries
                        .insert(path[..end].to_owned(), Entry::Folder(0o755));
                }
                Some(Entry::Folder(_)) => {}
                Some(_) => return Err(InitramfsError::Twice(path[..end].to_owned())),
            }
        }
        if self.entries.contains_key(&path) {
            return Err(InitramfsError::Twice(path));
        }
        self.entries.insert(path, entry);
        Ok(())
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), InitramfsError> {
        let write = || self.write_to(io::BufWriter::new(fs::File::create(path)?));
        write().map_err(|source| InitramfsError::Write {
            path: path.to_owned(),
            source,
        })
    }

    fn write_to(&self, out: impl io::Write) -> io::Result<()> {
        let mut archive = Archive::new(out);
        // A parent sorts before its children, so folders come first.
        for (guest, entry) in &self.entries {
            match entry {
                Entry::Folder(permissions) => archive.folder(guest, *permissions)?,
                Entry::File(permissions, content) => archive.file(guest, *permissions, content)?,
                Entry::Link(target) => archive.link(guest, target)?,
                Entry::Device { major, minor } => {
                    archive.character_device(guest, 0o600, *major, *minor)?;
                }
            }
        }
        archive.finish().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_by_the_user_or_keep_their_name() {
        let file = GuestFile::parse("a/b:/c/d").unwrap();
        assert_eq!((file.host, file.guest.as_str()), ("a/b".into(), "/c/d"));
        let file = GuestFile::parse("a/b").unwrap();
        assert_eq!(file.guest, "/lab/files/b");
    }

    #[test]
    fn guest_paths_with_tricks_are_refused() {
        for text in ["a:b", "a:/", "a:/b/", "a:/../b", "a:/b//c", "a:", "/", ".."] {
            assert!(GuestFile::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_initramfs_is_a_file_in_another() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        fs::write(&program, "a program").unwrap();
        let inner = Initramfs::of_guest(&program).unwrap();
        let mut outer = Initramfs::default();
        outer.nest(&inner, GUEST_INITRD).unwrap();
        let mut alone = Vec::new();
        inner.write_to(&mut alone).unwrap();
        let Some(Entry::File(_, nested)) = outer.entries.get(GUEST_INITRD) else {
            panic!("{outer:?}");
        };
        assert_eq!(*nested, alone);
        assert!(alone.windows(9).any(|bytes| bytes == b"a program"));
    }

    #[test]
    fn parents_are_added_and_nothing_is_replaced() {
        let mut initramfs = Initramfs::default();
        initramfs.text("/a/b/c", "1").unwrap();
        assert!(matches!(
            initramfs.entries.get("/a/b"),
            Some(Entry::Folder(0o755))
        ));
        assert!(matches!(
            initramfs.text("/a/b/c", "2"),
            Err(InitramfsError::Twice(_))
        ));
        assert!(matches!(
            initramfs.text("/a/b/c/d", "2"),
            Err(InitramfsError::Twice(_))
        ));
        assert!(matches!(
            initramfs.text("/a/b", "2"),
            Err(InitramfsError::Twice(_))
        ));
    }
}
