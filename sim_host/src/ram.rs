//! RAM that the simulated host lends, as a backing.

use std::fmt;
use std::io;
use std::sync::Arc;

use libc::ENOMEM;
use memory_map::{BackingFile, BackingObject, Errno, HostMapping, HostVa, NoFile};

use crate::call::Call;
use crate::file::SimFile;
use crate::log::Violation;
use crate::physical::{PhysicalObject, Storage};
use crate::{OutOfBounds, SimHost};

/// A piece of the simulated host's RAM. Clones show the same bytes; to map it, wrap one in a
/// [`Backing`](memory_map::Backing).
#[derive(Clone)]
pub struct SimRam {
    host: SimHost,
    object: Arc<PhysicalObject>,
    file: Option<Arc<SimFile>>,
}

impl SimRam {
    pub(crate) fn new(host: SimHost, object: Arc<PhysicalObject>) -> Self {
        let file = SimFile::new(&host, &object, 0, object.size());
        Self {
            file: Some(Arc::new(file)),
            host,
            object,
        }
    }

    pub(crate) fn without_file(mut self) -> Self {
        self.file = None;
        self
    }

    /// Its name in logs and records.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.object.label
    }

    /// Reads as the guest's processor does: by no IOMMU.
    ///
    /// # Errors
    /// Where the bytes do not all lie within the RAM.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        match &self.object.storage {
            Storage::Memory(memory) => memory.read(offset, data),
            Storage::Registers(_) => Ok(()),
        }
    }

    /// Writes as the guest's processor does: by no IOMMU.
    ///
    /// # Errors
    /// Where the bytes do not all lie within the RAM.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        match &self.object.storage {
            Storage::Memory(memory) => memory.write(offset, data),
            Storage::Registers(_) => Ok(()),
        }
    }
}

impl BackingObject for SimRam {
    fn size(&self) -> u64 {
        self.object.size()
    }

    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        map_host(&self.host, &self.object, 0, self.object.size())
    }

    fn file(&self) -> Result<BackingFile<'_>, NoFile> {
        self.file.as_ref().ok_or(NoFile::Anonymous)?.get()
    }
}

impl fmt::Debug for SimRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimRam({})", self.object.label)
    }
}

/// Shows part of an object in the simulated process's address space.
pub(crate) fn map_host(
    host: &SimHost,
    object: &Arc<PhysicalObject>,
    offset: u64,
    size: u64,
) -> Result<Box<dyn HostMapping>, Errno> {
    let mapped = host.call(Call::MapHost, &object.label, None, || {
        host.0
            .state
            .write()
            .space
            .map(Arc::clone(object), offset, size)
            .ok_or_else(|| io::Error::from_raw_os_error(ENOMEM))
    });
    // A call that is told to fail after it was done leaves a mapping that nobody holds, as a
    // caller that loses the address would.
    let (_, va) = mapped?;
    Ok(Box::new(SimHostMapping {
        host: host.clone(),
        va,
    }))
}

/// A mapping into the simulated process's address space.
#[derive(Debug)]
struct SimHostMapping {
    host: SimHost,
    va: HostVa,
}

impl HostMapping for SimHostMapping {
    fn address(&self) -> HostVa {
        self.va
    }
}

impl Drop for SimHostMapping {
    fn drop(&mut self) {
        let inner = &self.host.0;
        let mut state = inner.state.write();
        if let Some(shown) = state.space.find(self.va) {
            let mut logs = inner.logs.lock();
            for (container, mapping) in state.mappings() {
                if mapping.window == shown.window {
                    logs.violations.push(Violation::FreedWhileMapped {
                        container,
                        iova: mapping.iova,
                        object: Arc::clone(&mapping.object.label),
                    });
                }
            }
        }
        state.space.unmap(self.va);
    }
}
