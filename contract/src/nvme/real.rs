//! The kernel that this runs on, with functions that are bound to vfio-pci.
#![expect(
    unsafe_code,
    reason = "targets map memory for DMA; what the map holds is made for that"
)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::{HostFunction, VfioFunction};
use host_memory::Ram;
use iommu::{IoasTarget, RamCopies, Type1Target};
use memory_map::{Backing, DmaTarget};
use vfio_sys::{Bdf, CdevError, Device, Ioas, Opener, Sysfs};

use super::bench::RAM_SIZE;
use super::{NvmeHost, Parts, RamAccess};
use crate::real::{MASTER, MEMORY, set_command, told};

/// How to program the IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iommu {
    /// VFIO groups and a container.
    Type1,
    /// The functions' own files and an iommufd. Needs Linux 6.19 or newer.
    Iommufd,
}

/// The kernel, and the functions to try it with.
#[derive(Debug, Clone)]
pub struct RealHost {
    /// How to program the IOMMU.
    pub iommu: Iommu,
    /// The NVMe controller.
    pub nvme: Bdf,
    /// The function with a memory BAR.
    pub peer: Bdf,
    /// Another DMA engine.
    pub engine: Option<Bdf>,
}

/// A backing that is a [`Ram`].
pub(crate) struct RealRam(pub Backing);

impl RealRam {
    fn ram(&self) -> io::Result<&Ram> {
        let ram = self.0.downcast_ref();
        ram.ok_or_else(|| io::Error::other("RAM that is none"))
    }
}

impl RamAccess for RealRam {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.ram()?.read(offset, data).map_err(|error| told(&error))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ram()?
            .write(offset, data)
            .map_err(|error| told(&error))
    }
}

/// A function that decodes memory and masters the bus.
fn function(bdf: Bdf, device: Device) -> io::Result<Arc<dyn HostFunction>> {
    let function = VfioFunction::new(bdf.to_string(), device).map_err(|error| told(&error))?;
    set_command(&function, MEMORY | MASTER)?;
    Ok(Arc::new(function))
}

pub(crate) type Opened = (Box<dyn DmaTarget>, Vec<Arc<dyn HostFunction>>);

fn open_type1(functions: &[Bdf]) -> io::Result<Opened> {
    let mut opener = Opener::new(Sysfs::default());
    let mut opened = Vec::new();
    for bdf in functions {
        let device = opener.device(*bdf).map_err(|error| told(&error))?;
        opened.push(function(*bdf, device)?);
    }
    let [container] = opener.containers() else {
        return Err(io::Error::other("the functions do not share a container"));
    };
    // SAFETY: the map's backings are `host_memory`'s RAM and `VfioFunction`s' BARs, which give
    // addresses of mappings of their own; no Rust reference points into either.
    let target = unsafe { Type1Target::new(Arc::clone(container)) };
    Ok((Box::new(target), opened))
}

fn open_iommufd(functions: &[Bdf]) -> io::Result<Opened> {
    let sysfs = Sysfs::default();
    let iommufd = Arc::new(sysfs.open_iommufd().map_err(|error| told(&error))?);
    iommufd.check_map_file().map_err(|error| told(&error))?;
    let ioas = Arc::new(Ioas::alloc(Arc::clone(&iommufd))?);
    let mut opened = Vec::new();
    for bdf in functions {
        let attached = |device: Device| -> Result<Device, CdevError> {
            device.attach(Arc::clone(&ioas))?;
            Ok(device)
        };
        let device = sysfs
            .open_cdev(*bdf)
            .and_then(|cdev| cdev.bind(Arc::clone(&iommufd)))
            .and_then(attached)
            .map_err(|error| told(&error))?;
        opened.push(function(*bdf, device)?);
    }
    // SAFETY: as in `open_type1`; the RAM's file is a memfd and the BARs' are dma-bufs.
    let target = unsafe { IoasTarget::new(ioas, RamCopies::new()) };
    Ok((Box::new(target), opened))
}

/// Opens functions that share an address space, and gives it as a target, with them in their order.
pub(crate) fn open(iommu: Iommu, functions: &[Bdf]) -> io::Result<Opened> {
    match iommu {
        Iommu::Type1 => open_type1(functions),
        Iommu::Iommufd => open_iommufd(functions),
    }
}

impl NvmeHost for RealHost {
    fn parts(&self) -> io::Result<Parts> {
        let wanted: Vec<Bdf> = [self.nvme, self.peer]
            .into_iter()
            .chain(self.engine)
            .collect();
        let (target, opened) = open(self.iommu, &wanted)?;
        let mut opened = opened.into_iter();
        let (Some(nvme), Some(peer)) = (opened.next(), opened.next()) else {
            return Err(io::Error::other("fewer functions than were opened"));
        };
        let ram = Ram::memfd(c"nvme-contract", RAM_SIZE).map_err(|error| told(&error))?;
        let ram = Backing::new(ram);
        Ok(Parts {
            target,
            nvme,
            peer,
            engine: opened.next(),
            access: Arc::new(RealRam(ram.clone())),
            ram,
            time_limit: Duration::from_secs(30),
        })
    }
}
