//! What was fetched or built once, kept outside the checkout.
//!
//! A [`Cache`] is a folder of finished entries. An entry is named by what it holds (package and
//! version), made in a folder of its own and renamed into place when it is whole, so that an
//! interrupted fetch is never taken for a finished one. A lock file per entry keeps two runs from
//! making the same entry at once; the second one waits and then finds it made.
//!
//! ```text
//! <root>/entries/NAME     whole, never changed afterwards
//! <root>/building/NAME    being made; whatever is left here is thrown away by the next maker
//! <root>/locks/NAME       held while making
//! ```

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

/// A folder of finished entries.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// The name of an entry: what it holds, with its version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryName(String);

/// Why the cache could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither variable says where the cache is.
    #[error(
        "no place for the cache: none of THROUGHWAY_CACHE, XDG_CACHE_HOME and HOME is set to an \
         absolute path; set THROUGHWAY_CACHE"
    )]
    NoPlace,
    /// The unpacked QEMU is started with its library path on the command line, where a colon
    /// separates.
    #[error("the cache's path {0} contains a colon; set THROUGHWAY_CACHE to a path without one")]
    Colon(PathBuf),
    /// A system call on the cache's files failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl EntryName {
    /// Names an entry after a subject and its version.
    ///
    /// Characters that do not belong in a file name or in a library path are escaped as apt
    /// escapes them (`%3a` for a colon).
    #[must_use]
    pub fn new(subject: &str, version: &str) -> Self {
        let mut name = String::new();
        for c in subject.chars().chain(['_']).chain(version.chars()) {
            match c {
                'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '+' | '-' | '~' | '_' => name.push(c),
                other => {
                    let mut bytes = [0; 4];
                    for byte in other.encode_utf8(&mut bytes).bytes() {
                        name.push_str(&format!("%{byte:02x}"));
                    }
                }
            }
        }
        Self(name)
    }

    /// The name as it stands in the file system.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Cache {
    /// The cache of this user: `$THROUGHWAY_CACHE`, else `$XDG_CACHE_HOME/throughway`, else
    /// `~/.cache/throughway`.
    ///
    /// # Errors
    /// When no variable names a place, or the place cannot be made.
    pub fn from_environment() -> Result<Self, CacheError> {
        let absolute = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let root = absolute("THROUGHWAY_CACHE")
            .or_else(|| absolute("XDG_CACHE_HOME").map(|p| p.join("throughway")))
            .or_else(|| absolute("HOME").map(|p| p.join(".cache/throughway")))
            .ok_or(CacheError::NoPlace)?;
        Self::at(root)
    }

    /// The cache in a given folder, which is made if it is missing.
    ///
    /// # Errors
    /// When the folder cannot be made, or its path cannot serve.
    pub fn at(root: PathBuf) -> Result<Self, CacheError> {
        if root.as_os_str().as_encoded_bytes().contains(&b':') {
            return Err(CacheError::Colon(root));
        }
        for part in ["entries", "building", "locks"] {
            let path = root.join(part);
            fs::create_dir_all(&path).map_err(io_error("make the folder", &path))?;
        }
        Ok(Self { root })
    }

    /// The cache's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of a finished entry, if there is one.
    #[must_use]
    pub fn get(&self, name: &EntryName) -> Option<PathBuf> {
        let path = self.root.join("entries").join(name.as_str());
        path.is_dir().then_some(path)
    }

    /// The finished entries whose subject is `subject`: their versions (escaped) and folders.
    ///
    /// # Errors
    /// When the folder of entries cannot be read.
    pub fn versions_of(&self, subject: &str) -> Result<Vec<(String, PathBuf)>, CacheError> {
        let entries = self.root.join("entries");
        let prefix = EntryName::new(subject, "");
        let mut found = Vec::new();
        for entry in fs::read_dir(&entries).map_err(io_error("read the folder", &entries))? {
            let entry = entry.map_err(io_error("read the folder", &entries))?;
            let name = entry.file_name();
            if let Some(version) = name.to_str().and_then(|n| n.strip_prefix(prefix.as_str())) {
                found.push((version.to_owned(), entry.path()));
            }
        }
        found.sort();
        Ok(found)
    }

    /// The folder of an entry, made by `make` if it is not there yet.
    ///
    /// `make` fills the empty folder it is given. The entry appears under its name only when
    /// `make` has succeeded.
    ///
    /// # Errors
    /// What `make` reports, or what the file system does.
    pub fn entry<E: From<CacheError>>(
        &self,
        name: &EntryName,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        if let Some(path) = self.get(name) {
            return Ok(path);
        }
        let _lock = self.lock(name.as_str())?;
        if let Some(path) = self.get(name) {
            return Ok(path);
        }
        let building = self.root.join("building").join(name.as_str());
        if building.exists() {
            eprintln!("lab: clearing away what an interrupted run has left");
            fs::remove_dir_all(&building)
                .map_err(io_error("remove the half-made folder", &building))?;
        }
        fs::create_dir(&building).map_err(io_error("make the folder", &building))?;
        make(&building)?;
        let path = self.root.join("entries").join(name.as_str());
        fs::rename(&building, &path).map_err(io_error("move into place", &path))?;
        Ok(path)
    }

    /// Waits for, then holds, the lock of that name until the returned file is dropped.
    ///
    /// # Errors
    /// When the lock file cannot be made or locked.
    pub fn lock(&self, name: &str) -> Result<File, CacheError> {
        let path = self.root.join("locks").join(name);
        let file = File::create(&path).map_err(io_error("make the lock file", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("lab: waiting for another run that is filling the cache");
                file.lock().map_err(io_error("lock", &path))?;
            }
            Err(TryLockError::Error(error)) => return Err(io_error("lock", &path)(error)),
        }
        Ok(file)
    }
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CacheError + 'a {
    move |source| CacheError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache")).unwrap();
        (dir, cache)
    }

    #[test]
    fn names_are_safe_in_paths_and_library_paths() {
        let name = EntryName::new("qemu-system-x86", "1:10.0.2+ds-2~bpo12+1");
        assert_eq!(name.as_str(), "qemu-system-x86_1%3a10.0.2+ds-2~bpo12+1");
        assert_eq!(EntryName::new("a/b", "1").as_str(), "a%2fb_1");
    }

    #[test]
    fn an_entry_is_made_once() {
        let (_dir, cache) = cache();
        let name = EntryName::new("thing", "1");
        let path = cache
            .entry::<CacheError>(&name, |dir| {
                fs::write(dir.join("x"), "whole").unwrap();
                Ok(())
            })
            .unwrap();
        assert_eq!(fs::read_to_string(path.join("x")).unwrap(), "whole");
        let again = cache
            .entry::<CacheError>(&name, |_| panic!("made twice"))
            .unwrap();
        assert_eq!(again, path);
        assert_eq!(
            cache.versions_of("thing").unwrap(),
            vec![("1".into(), path)]
        );
        assert!(cache.versions_of("thin").unwrap().is_empty());
    }

    #[test]
    fn an_interrupted_entry_is_not_there_and_is_made_anew() {
        let (_dir, cache) = cache();
        let name = EntryName::new("thing", "2");
        let interrupted = cache.entry::<CacheError>(&name, |dir| {
            fs::write(dir.join("half"), "half").unwrap();
            Err(CacheError::NoPlace)
        });
        assert!(interrupted.is_err());
        assert!(cache.get(&name).is_none());
        let path = cache.entry::<CacheError>(&name, |_| Ok(())).unwrap();
        assert!(!path.join("half").exists());
    }

    #[test]
    fn two_racing_makers_make_it_once() {
        let (_dir, cache) = cache();
        let name = EntryName::new("thing", "3");
        let made = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    cache
                        .entry::<CacheError>(&name, |_| {
                            made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                            std::thread::sleep(std::time::Duration::from_millis(30));
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn a_colon_in_the_path_is_refused() {
        assert!(matches!(
            Cache::at("/tmp/a:b".into()),
            Err(CacheError::Colon(_))
        ));
    }
}
