//! The kernel that this runs on, with two functions that are bound to vfio-pci.
//!
//! For each bench the functions are opened anew and given back afterwards, so that no case sees
//! what another one left.
#![expect(
    unsafe_code,
    reason = "mapping memory by address for DMA is unsafe; see RealBench::map_address"
)]

use std::any::Any;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use assigned_pci::{BarIndex, HostFunction, VfioFunction};
use dma_engine::{DmaEngine, find_engine};
use host_memory::{DeviceBar, Ram};
use iommu::IoAddressSpace;
use memory_map::{Access, Backing, BackingObject, HostMapping, HostVa, IovaRange};
use vfio_sys::{Bdf, Cdev, CdevError, Ioas, Iommufd, Sysfs};

use super::{Bench, Function, IommufdHost};
use crate::Window;
use crate::cases::{NOWHERE, PAGE};
use crate::locked_limit::LockedLimit;
use crate::real::{MASTER, MEMORY, NOWHERE_SIZE, memory_bar, set_command, told};

/// How much RAM a bench has, in a file and in none.
const RAM_SIZE: u64 = 64 * PAGE;
const ANONYMOUS_SIZE: u64 = 8 * PAGE;

/// The kernel, and the functions to try it with.
#[derive(Debug, Clone)]
pub struct RealHost {
    engine: Bdf,
    memory: Bdf,
    groups_known: bool,
}

impl RealHost {
    /// Tries with `engine`, which has a DMA engine that there is a driver for, and `memory`,
    /// which has a memory BAR of at least 64 KiB that can be mapped. Nothing is opened yet.
    #[must_use]
    pub const fn new(engine: Bdf, memory: Bdf) -> Self {
        Self {
            engine,
            memory,
            groups_known: true,
        }
    }

    /// Does not look in which IOMMU groups the functions are, as one does not who got them from
    /// somebody else.
    #[must_use]
    pub const fn without_groups(mut self) -> Self {
        self.groups_known = false;
        self
    }

    fn open(
        &self,
        sysfs: &Sysfs,
        iommufd: &Arc<Iommufd>,
        bdf: Bdf,
    ) -> io::Result<Arc<VfioFunction>> {
        let cdev = if self.groups_known {
            sysfs.open_cdev(bdf)
        } else {
            let path = sysfs.cdev_path(bdf);
            path.and_then(|path| Cdev::open(&path, bdf.to_string()))
        };
        let device = cdev
            .and_then(|cdev| cdev.bind(Arc::clone(iommufd)))
            .map_err(|error| told(&error))?;
        let function = VfioFunction::new(bdf.to_string(), device).map_err(|error| told(&error))?;
        set_command(&function, MEMORY | MASTER)?;
        Ok(Arc::new(function))
    }
}

/// The kernel's own errno, which the contract is about.
fn with_errno(result: Result<(), CdevError>) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(CdevError::Attach { source, .. }) => Err(source),
        Err(CdevError::GroupWouldMove { .. }) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        Err(error) => Err(told(&error)),
    }
}

impl IommufdHost for RealHost {
    fn bench(&self) -> io::Result<Box<dyn Bench + '_>> {
        let sysfs = Sysfs::default();
        let iommufd = Arc::new(sysfs.open_iommufd().map_err(|error| told(&error))?);
        iommufd.check_map_file().map_err(|error| told(&error))?;
        let ioas = Arc::new(Ioas::alloc(Arc::clone(&iommufd))?);
        let engine_function = self.open(&sysfs, &iommufd, self.engine)?;
        let memory = self.open(&sysfs, &iommufd, self.memory)?;
        for function in [&engine_function, &memory] {
            with_errno(function.device().attach(Arc::clone(&ioas)))?;
        }
        let group = |bdf| {
            let function = sysfs.function(bdf).map_err(|error| told(&error))?;
            io::Result::Ok(function.group)
        };
        let share_a_group = group(self.engine)? == group(self.memory)?;
        let function = Arc::clone(&engine_function) as Arc<dyn HostFunction>;
        let engine = find_engine(&function).ok_or_else(|| {
            io::Error::other(format!(
                "there is no driver for a DMA engine of {}",
                self.engine
            ))
        })?;
        let ram = Ram::memfd(c"iommufd-contract", RAM_SIZE).map_err(|error| told(&error))?;
        let anonymous = Ram::anonymous(ANONYMOUS_SIZE).map_err(|error| told(&error))?;
        let anonymous_mapping = anonymous.map_host()?;
        let (bar_index, bar) = memory_bar(&memory)?;
        let bar_mapping = bar
            .downcast_ref::<DeviceBar>()
            .ok_or_else(|| io::Error::other("a BAR that is no device's"))?
            .map_host()?;
        bar.file().map_err(|error| told(&error))?;
        Ok(Box::new(RealBench {
            spares: RefCell::default(),
            ioas,
            engine,
            engine_function,
            memory,
            share_a_group,
            ram: Backing::new(ram),
            anonymous,
            anonymous_mapping,
            no_memory: File::open("/dev/null")?,
            bar_index,
            bar,
            bar_mapping,
            iommufd,
        }))
    }
}

/// Two functions that were opened for one case.
struct RealBench {
    ioas: Arc<Ioas>,
    /// What the cases have made.
    spares: RefCell<Vec<Arc<Ioas>>>,
    engine: Box<dyn DmaEngine>,
    engine_function: Arc<VfioFunction>,
    memory: Arc<VfioFunction>,
    share_a_group: bool,
    ram: Backing,
    anonymous: Ram,
    anonymous_mapping: Box<dyn HostMapping>,
    no_memory: File,
    bar_index: BarIndex,
    bar: Backing,
    bar_mapping: Box<dyn HostMapping>,
    iommufd: Arc<Iommufd>,
}

impl Drop for RealBench {
    fn drop(&mut self) {
        // Before the memory goes that was mapped by its address. Should it fail, the end of the
        // process unmaps all.
        for ioas in self.spares.get_mut().iter().chain([&self.ioas]) {
            let _ = ioas.unmap_all();
        }
    }
}

impl RealBench {
    const fn function(&self, function: Function) -> &Arc<VfioFunction> {
        match function {
            Function::Engine => &self.engine_function,
            Function::Memory => &self.memory,
        }
    }

    /// An address space of the bench's, as its own kind.
    fn known(&self, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<Arc<Ioas>> {
        let spares = self.spares.borrow();
        let mut known = spares.iter().chain([&self.ioas]);
        let found = known.find(|known| known.id() == ioas.id());
        found
            .cloned()
            .ok_or_else(|| io::Error::other("an address space of somebody else's"))
    }

    /// The file of the RAM or the BAR, which was asked for when the bench was made: a case that
    /// got the other file would fail.
    fn file_of<'b>(&'b self, backing: &'b Backing) -> BorrowedFd<'b> {
        match backing.file() {
            Ok(file) => file.fd,
            Err(_) => self.no_memory.as_fd(),
        }
    }

    fn memfd(&self) -> io::Result<&Ram> {
        let ram = self.ram.downcast_ref();
        ram.ok_or_else(|| io::Error::other("RAM that is none"))
    }

    /// Whether `size` bytes from `vaddr` on are such as may be mapped for DMA: the memory without
    /// a file, the BAR, or nothing.
    fn is_safe(&self, vaddr: HostVa, size: u64) -> bool {
        let start = vaddr.raw();
        let Some(end) = start.checked_add(size) else {
            // It wraps: no process has that.
            return true;
        };
        let nowhere = Window {
            address: NOWHERE,
            size: NOWHERE_SIZE,
        };
        [self.anonymous(), self.bar(), nowhere]
            .iter()
            .any(|window| {
                window.address.raw() <= start
                    && end <= window.address.raw().saturating_add(window.size)
            })
    }
}

impl Bench for RealBench {
    fn ioas(&self) -> Arc<dyn IoAddressSpace> {
        Arc::clone(&self.ioas) as Arc<dyn IoAddressSpace>
    }

    fn alloc(&self) -> io::Result<Arc<dyn IoAddressSpace>> {
        let ioas = Arc::new(Ioas::alloc(Arc::clone(&self.iommufd))?);
        self.spares.borrow_mut().push(Arc::clone(&ioas));
        Ok(ioas)
    }

    fn destroy(&self, ioas: Arc<dyn IoAddressSpace>) {
        let id = ioas.id();
        self.spares.borrow_mut().retain(|spare| spare.id() != id);
    }

    fn attach(&self, function: Function, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<()> {
        let ioas = self.known(ioas)?;
        with_errno(self.function(function).device().attach(ioas))
    }

    fn attach_group(&self, function: Function, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<()> {
        let ioas = self.known(ioas)?;
        with_errno(self.function(function).device().attach_group(ioas))
    }

    fn detach(&self, function: Function) -> io::Result<()> {
        self.function(function).device().detach()
    }

    fn share_a_group(&self) -> bool {
        self.share_a_group
    }

    fn ram(&self) -> BorrowedFd<'_> {
        self.file_of(&self.ram)
    }

    fn ram_backing(&self) -> Backing {
        self.ram.clone()
    }

    fn ram_size(&self) -> u64 {
        RAM_SIZE
    }

    fn ram_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let read = self.memfd()?.read(offset, data);
        read.map_err(|error| told(&error))
    }

    fn ram_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = self.memfd()?.write(offset, data);
        written.map_err(|error| told(&error))
    }

    fn no_memory(&self) -> BorrowedFd<'_> {
        self.no_memory.as_fd()
    }

    fn anonymous(&self) -> Window {
        Window {
            address: self.anonymous_mapping.address(),
            size: ANONYMOUS_SIZE,
        }
    }

    fn anonymous_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let read = self.anonymous.read(offset, data);
        read.map_err(|error| told(&error))
    }

    fn map_address(
        &self,
        ioas: &Arc<dyn IoAddressSpace>,
        iova: IovaRange,
        vaddr: HostVa,
        access: Access,
    ) -> io::Result<()> {
        if !self.is_safe(vaddr, iova.size()) {
            return Err(io::Error::other(format!(
                "{vaddr} does not belong to the bench"
            )));
        }
        // SAFETY: the bytes are of the mapping of the memory without a file, which stays in place
        // until after `unmap_all` in `drop` and into which no Rust reference points, or of the
        // BAR's, or there is nothing behind them: those the kernel does not pin.
        unsafe { ioas.map(iova, vaddr, access) }
    }

    fn bar(&self) -> Window {
        Window {
            address: self.bar_mapping.address(),
            size: self.bar.size(),
        }
    }

    fn dma_buf(&self) -> BorrowedFd<'_> {
        self.file_of(&self.bar)
    }

    fn bar_backing(&self) -> Backing {
        self.bar.clone()
    }

    fn bar_read(&self, offset: u64) -> io::Result<[u8; 8]> {
        let mut data = [0; 8];
        self.memory.bar_read(self.bar_index, offset, &mut data)?;
        Ok(data)
    }

    fn bar_write(&self, offset: u64, data: [u8; 8]) -> io::Result<()> {
        self.memory.bar_write(self.bar_index, offset, &data)
    }

    fn memory(&self) -> Arc<dyn HostFunction> {
        Arc::clone(&self.memory) as Arc<dyn HostFunction>
    }

    fn hot_reset(&self) -> io::Result<()> {
        self.memory.device().hot_reset(&[])
    }

    fn set_decoding(&self, on: bool) -> io::Result<()> {
        set_command(&self.memory, if on { MEMORY | MASTER } else { MASTER })
    }

    fn set_mastering(&self, on: bool) -> io::Result<()> {
        let bits = if on { MEMORY | MASTER } else { MEMORY };
        set_command(&self.engine_function, bits)
    }

    fn engine(&mut self) -> &mut dyn DmaEngine {
        &mut *self.engine
    }

    fn limit_locked_memory(&self, bytes: u64) -> io::Result<Box<dyn Any>> {
        Ok(Box::new(LockedLimit::new(bytes)?))
    }
}
