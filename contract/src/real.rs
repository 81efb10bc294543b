//! The kernel that this runs on, with two functions that are bound to vfio-pci.
//!
//! For each bench the functions are opened anew and given back afterwards, so that no case sees
//! what another one left.
#![expect(
    unsafe_code,
    reason = "mapping memory for DMA is unsafe; see RealBench::map"
)]

use std::any::Any;
use std::fs::File;
use std::io;
use std::sync::Arc;

use assigned_pci::{BarIndex, HostFunction, VfioFunction};
use dma_engine::{DmaEngine, find_engine};
use host_memory::{DeviceBar, Mapping, Ram};
use iommu::Type1Container;
use memory_map::{Access, Backing, BackingObject, HostMapping, HostVa, IovaRange};
use vfio_sys::{Bdf, Container, Opener, Sysfs};

use crate::cases::{NOWHERE, PAGE};
use crate::locked_limit::LockedLimit;
use crate::{Bench, Type1Host, Window};

/// How much RAM a bench has.
const RAM_SIZE: u64 = 64 * PAGE;
/// How many bytes of its address range follow that have nothing behind them: they lie past the
/// end of the file. More than any case asks for.
const PAST_THE_END: u64 = 0x40_0000;
/// How large the memory BAR must be.
const LEAST_BAR: u64 = 16 * PAGE;
/// How many bytes from [`NOWHERE`] on belong to no process: no kernel puts anything there.
pub(crate) const NOWHERE_SIZE: u64 = 8 * PAGE;

/// The command register of a function that decodes memory and masters the bus.
const COMMAND: u16 = 0x04;
pub(crate) const MEMORY: u16 = 1 << 1;
pub(crate) const MASTER: u16 = 1 << 2;

/// The kernel, and the functions to try it with.
#[derive(Debug, Clone)]
pub struct RealHost {
    engine: Bdf,
    memory: Bdf,
}

impl RealHost {
    /// Tries with `engine`, which has a DMA engine that there is a driver for, and `memory`,
    /// which has a memory BAR of at least 64 KiB that can be mapped. Nothing is opened yet.
    #[must_use]
    pub const fn new(engine: Bdf, memory: Bdf) -> Self {
        Self { engine, memory }
    }
}

/// An error with its causes, in one line.
pub(crate) fn told(error: &dyn std::error::Error) -> io::Error {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    io::Error::other(text)
}

fn open(opener: &mut Opener, bdf: Bdf) -> io::Result<Arc<VfioFunction>> {
    let device = opener.device(bdf).map_err(|error| told(&error))?;
    let function = VfioFunction::new(bdf.to_string(), device).map_err(|error| told(&error))?;
    set_command(&function, MEMORY | MASTER)?;
    Ok(Arc::new(function))
}

pub(crate) fn set_command(function: &VfioFunction, bits: u16) -> io::Result<()> {
    let mut command = [0; 2];
    function.config_read(COMMAND, &mut command)?;
    let command = u16::from_le_bytes(command) & !(MEMORY | MASTER) | bits;
    function.config_write(COMMAND, &command.to_le_bytes())
}

/// The first BAR with a part at its start that can be mapped and is large enough.
pub(crate) fn memory_bar(function: &VfioFunction) -> io::Result<(BarIndex, Backing)> {
    for index in BarIndex::ALL {
        let Some(bar) = function.bar(index)? else {
            continue;
        };
        let area = bar.areas.into_iter().find(|area| area.offset == 0);
        if let Some(area) = area.filter(|area| area.size >= LEAST_BAR) {
            return Ok((index, area.backing));
        }
    }
    let name = function.name();
    Err(io::Error::other(format!(
        "{name} has no BAR that can be mapped from its start for {LEAST_BAR:#x} bytes"
    )))
}

impl Type1Host for RealHost {
    fn bench(&self) -> io::Result<Box<dyn Bench + '_>> {
        let mut opener = Opener::new(Sysfs::default());
        let engine_function = open(&mut opener, self.engine)?;
        let memory = open(&mut opener, self.memory)?;
        let [container] = opener.containers() else {
            return Err(io::Error::other(format!(
                "{} and {} do not share a container",
                self.engine, self.memory
            )));
        };
        let container = Arc::clone(container);
        let function = Arc::clone(&engine_function) as Arc<dyn HostFunction>;
        let engine = find_engine(&function).ok_or_else(|| {
            io::Error::other(format!(
                "there is no driver for a DMA engine of {}",
                self.engine
            ))
        })?;
        let ram = Ram::memfd(c"type1-contract", RAM_SIZE).map_err(|error| told(&error))?;
        let file = ram
            .file()
            .ok_or_else(|| io::Error::other("a memfd without a file"))?
            .try_clone_to_owned()?;
        let ram_mapping = Mapping::of_file(
            Arc::new(File::from(file)),
            0,
            RAM_SIZE.saturating_add(PAST_THE_END),
            Access::ReadWrite,
        )
        .map_err(|error| told(&error))?;
        let (bar_index, bar) = memory_bar(&memory)?;
        let bar_mapping = bar
            .downcast_ref::<DeviceBar>()
            .ok_or_else(|| io::Error::other("a BAR that is no device's"))?
            .map_host()?;
        Ok(Box::new(RealBench {
            container,
            engine,
            engine_function,
            memory,
            ram,
            ram_mapping,
            bar_index,
            bar_size: bar.size(),
            bar_mapping,
        }))
    }
}

/// Two functions that were opened for one case.
struct RealBench {
    container: Arc<Container>,
    engine: Box<dyn DmaEngine>,
    engine_function: Arc<VfioFunction>,
    memory: Arc<VfioFunction>,
    ram: Ram,
    ram_mapping: Mapping,
    bar_index: BarIndex,
    bar_size: u64,
    bar_mapping: Box<dyn HostMapping>,
}

impl Drop for RealBench {
    fn drop(&mut self) {
        // While the BAR is mapped in this process, its device keeps the container open. Nothing
        // better can be done here should this fail; the end of the process unmaps all.
        let _ = self.container.unmap_all();
    }
}

impl RealBench {
    /// Whether `size` bytes from `vaddr` on are such as may be mapped for DMA: the RAM with what
    /// follows it, the BAR, or nothing.
    fn is_safe(&self, vaddr: HostVa, size: u64) -> bool {
        let start = vaddr.raw();
        let Some(end) = start.checked_add(size) else {
            // It wraps: no process has that.
            return true;
        };
        let ram = Window {
            address: self.ram_mapping.address(),
            size: RAM_SIZE.saturating_add(PAST_THE_END),
        };
        let nowhere = Window {
            address: NOWHERE,
            size: NOWHERE_SIZE,
        };
        [ram, self.bar(), nowhere].iter().any(|window| {
            window.address.raw() <= start && end <= window.address.raw().saturating_add(window.size)
        })
    }
}

impl Bench for RealBench {
    fn container(&self) -> &dyn Type1Container {
        &*self.container
    }

    fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        if !self.is_safe(vaddr, iova.size()) {
            return Err(io::Error::other(format!(
                "{vaddr} does not belong to the bench"
            )));
        }
        // SAFETY: the bytes are of the RAM's or the BAR's mapping, which stay in place until
        // after `unmap_all` in `drop` and into which no Rust reference points, or there is
        // nothing behind them that could be mapped.
        unsafe { self.container.map_dma(iova, vaddr, access) }
    }

    fn ram(&self) -> Window {
        Window {
            address: self.ram_mapping.address(),
            size: RAM_SIZE,
        }
    }

    fn ram_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.ram.read(offset, data).map_err(|error| told(&error))
    }

    fn ram_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ram.write(offset, data).map_err(|error| told(&error))
    }

    fn bar(&self) -> Window {
        Window {
            address: self.bar_mapping.address(),
            size: self.bar_size,
        }
    }

    fn bar_read(&self, offset: u64) -> io::Result<[u8; 8]> {
        let mut data = [0; 8];
        self.memory.bar_read(self.bar_index, offset, &mut data)?;
        Ok(data)
    }

    fn bar_write(&self, offset: u64, data: [u8; 8]) -> io::Result<()> {
        self.memory.bar_write(self.bar_index, offset, &data)
    }

    fn set_decoding(&self, on: bool) -> io::Result<()> {
        set_command(&self.memory, if on { MEMORY | MASTER } else { MASTER })
    }

    fn set_mastering(&self, on: bool) -> io::Result<()> {
        let bits = if on { MEMORY | MASTER } else { MEMORY };
        set_command(&self.engine_function, bits)
    }

    fn without_iommu(&self) -> io::Result<Box<dyn Type1Container>> {
        let container = Sysfs::default().open_container();
        Ok(Box::new(container.map_err(|error| told(&error))?))
    }

    fn engine(&mut self) -> &mut dyn DmaEngine {
        &mut *self.engine
    }

    fn limit_locked_memory(&self, bytes: u64) -> io::Result<Box<dyn Any>> {
        Ok(Box::new(LockedLimit::new(bytes)?))
    }
}
