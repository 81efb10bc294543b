//! What the cases get: an NVMe controller and its peers in one memory map.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::{BarIndex, HostFunction};
use dma_engine::{ControllerMemoryBuffer, DmaEngine, EngineMemory, Nvme, find_engine};
use memory_map::{
    Access, Backing, DisabledBecause, DmaTarget, Gpa, GpaRange, Iova, IovaRange, Priority, Reach,
    RegionId, RegionKind, RegionManager, RegionSpec, SubMapping, TargetHandle, TargetOptions,
};

use crate::Complaint;

/// Where RAM lies, and how much there must be, in bytes.
pub(crate) const RAM: Iova = Iova::new(0x10_0000);
pub(crate) const RAM_SIZE: u64 = 0x20_0000;
/// What is lent to the driver: the end of RAM.
pub(crate) const LENT: u64 = RAM_SIZE - Nvme::MEMORY;
/// Where the peer's BAR lies, and the controller's memory buffer. Each has room for 256 MiB.
pub(crate) const BAR: Iova = Iova::new(0x4000_0000);
pub(crate) const BUFFER: Iova = Iova::new(0x5000_0000);

/// The processor's access to RAM.
pub trait RamAccess: Send + Sync {
    /// Reads at an offset in bytes.
    ///
    /// # Errors
    /// Where the bytes do not all lie within it.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes at an offset in bytes.
    ///
    /// # Errors
    /// Where the bytes do not all lie within it.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// What a bench is made from. All functions decode memory and master the bus.
pub struct Parts {
    /// The IOMMU address space that all functions are in; nothing is mapped.
    pub target: Box<dyn DmaTarget>,
    /// The controller.
    pub nvme: Arc<dyn HostFunction>,
    /// The peer: it has a memory BAR of 64 KiB to 256 MiB that can be mapped from its start.
    pub peer: Arc<dyn HostFunction>,
    /// Another DMA engine, if there is one.
    pub engine: Option<Arc<dyn HostFunction>>,
    /// 2 MiB of RAM.
    pub ram: Backing,
    /// The same RAM.
    pub access: Arc<dyn RamAccess>,
    /// How long a command of the controller may take.
    pub time_limit: Duration,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("nvme", &self.nvme)
            .field("peer", &self.peer)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

/// A host that has such functions.
pub trait NvmeHost {
    /// Opens them anew.
    ///
    /// # Errors
    /// What they could not be opened for.
    fn parts(&self) -> io::Result<Parts>;
}

pub(crate) struct Lent(pub Arc<dyn RamAccess>, pub IovaRange);

impl EngineMemory for Lent {
    fn iova(&self) -> IovaRange {
        self.1
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read(LENT.saturating_add(offset), data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(LENT.saturating_add(offset), data)
    }
}

/// A BAR in the map.
#[derive(Clone)]
struct Mapped {
    function: Arc<dyn HostFunction>,
    index: BarIndex,
    region: RegionId,
}

/// RAM, the peer's BAR and, once it is asked for, the controller's memory buffer, in a map that an
/// IOMMU follows. The driver ends before RAM is unmapped.
pub struct Bench {
    /// The driver; nothing has been accessed yet.
    pub(crate) nvme: Nvme,
    /// The other engine.
    pub(crate) engine: Option<Box<dyn DmaEngine>>,
    /// See [`Parts::time_limit`].
    pub(crate) time_limit: Duration,
    function: Arc<dyn HostFunction>,
    engine_function: Option<Arc<dyn HostFunction>>,
    access: Arc<dyn RamAccess>,
    bar: Mapped,
    ram: RegionId,
    lent: IovaRange,
    target: TargetHandle,
    map: RegionManager,
}

impl fmt::Debug for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bench")
            .field("nvme", &self.nvme)
            .field("peer", &self.bar.function)
            .finish_non_exhaustive()
    }
}

pub(crate) fn broken(error: &(dyn std::error::Error + 'static)) -> io::Error {
    crate::real::told(error)
}

fn spec(name: &str, at: Iova, kind: RegionKind, backing: &Backing) -> io::Result<RegionSpec> {
    let range =
        GpaRange::new(Gpa::new(at.raw()), backing.size()).map_err(|error| broken(&error))?;
    Ok(RegionSpec {
        name: name.into(),
        range,
        priority: Priority(0),
        kind,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: vec![SubMapping {
            offset: 0,
            size: backing.size(),
            backing: backing.clone(),
            backing_offset: 0,
        }],
    })
}

/// Adds the part of a BAR that can be mapped from its start, enabled.
fn add_bar(
    map: &RegionManager,
    at: Iova,
    function: &Arc<dyn HostFunction>,
    index: BarIndex,
) -> io::Result<Mapped> {
    let name = format!("{} {index}", function.name());
    let bar = function.bar(index)?;
    let area = bar.and_then(|bar| bar.areas.into_iter().find(|area| area.offset == 0));
    let area = area
        .filter(|area| (0x1_0000..=0x1000_0000).contains(&area.size))
        .ok_or_else(|| io::Error::other(format!("{name} cannot be mapped from its start")))?;
    let mut change = map.change();
    let region = change.add(spec(&name, at, RegionKind::DeviceMemory, &area.backing)?);
    change.enable(region);
    change.commit().map_err(|error| broken(&error))?;
    Ok(Mapped {
        function: Arc::clone(function),
        index,
        region,
    })
}

/// The first BAR with a part at its start that can be mapped and is large enough.
pub(crate) fn memory_bar(function: &Arc<dyn HostFunction>) -> io::Result<BarIndex> {
    for index in BarIndex::ALL {
        let areas = function.bar(index)?.map(|bar| bar.areas);
        let mut areas = areas.into_iter().flatten();
        if areas.any(|area| area.offset == 0 && area.size >= 0x1_0000) {
            return Ok(index);
        }
    }
    let name = function.name();
    Err(io::Error::other(format!("{name} has no memory BAR")))
}

impl Bench {
    /// Puts the parts together.
    ///
    /// # Errors
    /// Where they cannot be.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let map = RegionManager::new();
        let mut change = map.change();
        let ram = change.add(spec("ram", RAM, RegionKind::Ram, &parts.ram)?);
        change.enable(ram);
        change.commit().map_err(|error| broken(&error))?;
        let target = map
            .register(parts.target, TargetOptions::new("nvme"))
            .map_err(|error| broken(&error))?;
        let bar = add_bar(&map, BAR, &parts.peer, memory_bar(&parts.peer)?)?;
        let lent = Iova::new(RAM.raw().saturating_add(LENT));
        let lent = IovaRange::new(lent, Nvme::MEMORY).map_err(|error| broken(&error))?;
        let memory = Box::new(Lent(Arc::clone(&parts.access), lent));
        Ok(Self {
            nvme: Nvme::new(Arc::clone(&parts.nvme), memory).with_time_limit(parts.time_limit),
            time_limit: parts.time_limit,
            engine: parts.engine.as_ref().and_then(find_engine),
            function: parts.nvme,
            engine_function: parts.engine,
            access: parts.access,
            bar,
            ram,
            lent,
            target,
            map,
        })
    }

    /// The first driver's memory, for another driver of the controller. The first one must be
    /// disabled, and not be used until the other one has been dropped.
    pub(crate) fn lent(&self) -> Box<dyn EngineMemory> {
        Box::new(Lent(Arc::clone(&self.access), self.lent))
    }

    /// The controller.
    pub(crate) fn function(&self) -> Arc<dyn HostFunction> {
        Arc::clone(&self.function)
    }

    /// The other engine's function.
    pub(crate) fn engine_function(&self) -> Option<Arc<dyn HostFunction>> {
        self.engine_function.clone()
    }

    /// Reads RAM.
    pub(crate) fn ram(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.access.read(offset, &mut data)?;
        Ok(data)
    }

    /// Writes RAM.
    pub(crate) fn ram_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.access.write(offset, data)
    }

    /// Reads the peer's BAR.
    pub(crate) fn bar(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        read(&self.bar.function, self.bar.index, offset, len)
    }

    /// Writes the peer's BAR.
    pub(crate) fn bar_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        write(&self.bar.function, self.bar.index, offset, data)
    }

    /// Takes the peer's BAR out of the map, or puts it back.
    pub(crate) fn set_bar(&self, on: bool) -> Result<(), Complaint> {
        self.set(self.bar.region, on)
    }

    /// Takes RAM out of the map, or puts it back.
    pub(crate) fn set_ram(&self, on: bool) -> Result<(), Complaint> {
        self.set(self.ram, on)
    }

    fn set(&self, region: RegionId, on: bool) -> Result<(), Complaint> {
        let mut change = self.map.change();
        if on {
            change.enable(region);
        } else {
            change.disable(region, DisabledBecause::DecodingOff);
        }
        change.commit_guest().map_err(|error| broken(&error))?;
        let reach = self
            .map
            .reach_of(self.target.id(), region)
            .map_err(|error| broken(&error))?;
        crate::verdict::same("reach", reach == Reach::Mapped, on)
    }

    /// Enables the controller's memory buffer and puts it into the map at [`BUFFER`].
    pub(crate) fn add_buffer(&self) -> Result<Buffer<'_>, Complaint> {
        let found = ControllerMemoryBuffer::enable(&self.function, BUFFER)
            .map_err(dma_engine::EngineError::from)?;
        let mapped = add_bar(&self.map, BUFFER, &self.function, found.bar)?;
        self.set(mapped.region, true)?;
        Ok(Buffer {
            bench: self,
            mapped,
            found,
        })
    }
}

/// The controller's memory buffer in the map.
pub(crate) struct Buffer<'b> {
    bench: &'b Bench,
    mapped: Mapped,
    found: ControllerMemoryBuffer,
}

impl Buffer<'_> {
    /// Where on the bus an offset of it is.
    pub fn at(&self, offset: u64) -> Iova {
        let offset = self.found.offset.saturating_add(offset);
        BUFFER.checked_add(offset).unwrap_or(BUFFER)
    }

    pub fn size(&self) -> u64 {
        self.found.size
    }

    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let offset = self.found.offset.saturating_add(offset);
        read(&self.mapped.function, self.mapped.index, offset, len)
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = self.found.offset.saturating_add(offset);
        write(&self.mapped.function, self.mapped.index, offset, data)
    }

    pub fn set(&self, on: bool) -> Result<(), Complaint> {
        self.bench.set(self.mapped.region, on)
    }
}

/// Reads a BAR, eight bytes at a time.
fn read(
    function: &Arc<dyn HostFunction>,
    bar: BarIndex,
    offset: u64,
    len: usize,
) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    for (word, at) in data.chunks_mut(8).zip((offset..).step_by(8)) {
        function.bar_read(bar, at, word)?;
    }
    Ok(data)
}

/// Writes a BAR, likewise.
fn write(
    function: &Arc<dyn HostFunction>,
    bar: BarIndex,
    offset: u64,
    data: &[u8],
) -> io::Result<()> {
    for (word, at) in data.chunks(8).zip((offset..).step_by(8)) {
        function.bar_write(bar, at, word)?;
    }
    Ok(())
}
