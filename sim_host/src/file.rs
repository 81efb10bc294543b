//! Files that name what can be mapped: RAM, and the dma-bufs of BARs.
//!
//! Both hosts take real file descriptors, so the simulated one makes real memfds, which name an
//! object by their inode and are never written. Whoever lends the object owns its [`SimFile`]; it
//! is made when it is first asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};

use host_memory::Ram;
use memory_map::{BackingFile, Errno, NoFile};

use crate::SimHost;
use crate::call::Call;
use crate::physical::PhysicalObject;

/// Device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileKey(u64, u64);

/// What a file names: a part of an object.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub object: Arc<PhysicalObject>,
    /// Where in the object it starts.
    pub offset: u64,
    pub size: u64,
}

/// All files that name something.
#[derive(Debug, Default)]
pub(crate) struct Files(BTreeMap<FileKey, Named>);

impl Files {
    /// What a file names; nothing for a file of somebody else's.
    pub fn find(&self, fd: BorrowedFd<'_>) -> io::Result<Option<Named>> {
        Ok(self.0.get(&key(fd)?).cloned())
    }
}

fn key(fd: BorrowedFd<'_>) -> io::Result<FileKey> {
    let metadata = File::from(fd.try_clone_to_owned()?).metadata()?;
    Ok(FileKey(metadata.dev(), metadata.ino()))
}

/// A file to be, for a part of an object.
pub(crate) struct SimFile {
    host: SimHost,
    named: Named,
    made: OnceLock<(Ram, FileKey)>,
}

impl SimFile {
    pub fn new(host: &SimHost, object: &Arc<PhysicalObject>, offset: u64, size: u64) -> Self {
        Self {
            host: host.clone(),
            named: Named {
                object: Arc::clone(object),
                offset,
                size,
            },
            made: OnceLock::new(),
        }
    }

    /// The file, which is made now if it was not before.
    pub fn get(&self) -> Result<BackingFile<'_>, NoFile> {
        let made = match self.made.get() {
            Some(made) => made,
            None => {
                let made = self.make().map_err(|error| not_exported(&error))?;
                self.made.get_or_init(|| made)
            }
        };
        match made.0.file() {
            Some(fd) => Ok(BackingFile { fd, offset: 0 }),
            None => Err(NoFile::Anonymous),
        }
    }

    fn make(&self) -> io::Result<(Ram, FileKey)> {
        let work = || {
            let memfd = Ram::memfd(c"sim", self.named.size).map_err(io::Error::other)?;
            let fd = memfd.file().ok_or_else(|| io::Error::other("no file"))?;
            let key = key(fd)?;
            let files = &mut self.host.0.state.write().files;
            files.0.insert(key, self.named.clone());
            Ok((memfd, key))
        };
        if self.named.object.is_ram() {
            work()
        } else {
            let label = &self.named.object.label;
            self.host.call(Call::ExportDmaBuf, label, None, work)
        }
    }
}

fn not_exported(error: &io::Error) -> NoFile {
    let errno = Errno::from(error);
    NoFile::NotExported(format!("exporting it as a dma-buf failed: {errno}").into())
}

impl Drop for SimFile {
    fn drop(&mut self) {
        // Before the memfd is closed and its inode may be used again.
        if let Some((_, key)) = self.made.get() {
            self.host.0.state.write().files.0.remove(key);
        }
    }
}
