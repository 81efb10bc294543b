//! The memory behind a function's BARs.

use std::fmt;
use std::sync::Arc;

use memory_map::{BackingFile, BackingObject, Errno, HostMapping, NoFile};

use crate::file::SimFile;
use crate::physical::{PhysicalObject, Storage};
use crate::ram::map_host;
use crate::{OutOfBounds, SimHost};

/// What is behind a BAR, as the device itself sees it: by no IOMMU, whether it is decoded or not.
#[derive(Clone)]
pub struct SimBar(Arc<PhysicalObject>);

impl SimBar {
    pub(crate) fn new(object: Arc<PhysicalObject>) -> Self {
        Self(object)
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Reads. Registers answer as they do on the bus.
    ///
    /// # Errors
    /// Where the bytes do not all lie within the BAR.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        match &self.0.storage {
            Storage::Memory(memory) => memory.read(offset, data),
            Storage::Registers(registers) => {
                registers.read(offset, data);
                Ok(())
            }
        }
    }

    /// Writes. Registers act as they do on the bus.
    ///
    /// # Errors
    /// Where the bytes do not all lie within the BAR.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        match &self.0.storage {
            Storage::Memory(memory) => memory.write(offset, data),
            Storage::Registers(registers) => {
                registers.write(offset, data);
                Ok(())
            }
        }
    }
}

impl fmt::Debug for SimBar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimBar({})", self.0.label)
    }
}

/// A part of a BAR that can be mapped: the object of the backing that
/// [`HostFunction::bar`](assigned_pci::HostFunction::bar) gives.
pub struct SimBarArea {
    pub(crate) host: SimHost,
    pub(crate) object: Arc<PhysicalObject>,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) dma_buf: SimFile,
}

impl BackingObject for SimBarArea {
    fn size(&self) -> u64 {
        self.size
    }

    /// Succeeds whether the function decodes memory or not, as mmap does; it is
    /// [`map_dma`](iommu::Type1Container::map_dma) that then finds nothing there.
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        map_host(&self.host, &self.object, self.offset, self.size)
    }

    fn file(&self) -> Result<BackingFile<'_>, NoFile> {
        self.dma_buf.get()
    }
}

impl fmt::Debug for SimBarArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SimBarArea({} +{:#x}, {:#x} bytes)",
            self.object.label, self.offset, self.size
        )
    }
}
