//! What the cases of a guest get: functions whose BARs lie where the guest puts them.

use std::io;
use std::sync::Arc;

use assigned_pci::{
    AssignedFunction, BarIndex, FunctionOptions, HostFunction, Windows, place_bars,
};
use dma_engine::{DmaEngine, EngineMemory, Nvme, NvmeEngine, ScratchBlocks, find_engine};
use memory_map::{
    Access, Backing, Gpa, GpaRange, Iova, IovaRange, Priority, Reach, RegionId, RegionKind,
    RegionManager, RegionSpec, SubMapping, TargetHandle, TargetOptions,
};

use super::bench::{LENT, Lent, RAM_SIZE, broken, memory_bar};
use super::{Parts, RamAccess};
use crate::Complaint;

/// Where the guest's RAM lies. A BAR of up to 256 MiB that is put over it leaves something to be
/// seen of the BAR.
pub(crate) const GUEST_RAM: Iova = Iova::new(0x2010_0000);
/// Where the BARs are at first, and where there is room for a BAR of 256 MiB.
const WINDOW: (u64, u64) = (0x4000_0000, 0x1000_0000);
/// How far RAM's priority is above the BARs'.
const RAM_PRIORITY: Priority = Priority(100);
/// The first base address register (PCI 3.0, 6.2.5).
const BAR0: u16 = 0x10;

/// A memory BAR of a guest's function.
#[derive(Clone)]
pub(crate) struct GuestBar {
    pub function: Arc<AssignedFunction>,
    pub index: BarIndex,
    pub region: RegionId,
    /// In bytes, a power of two.
    pub size: u64,
    is_64_bit: bool,
}

impl GuestBar {
    /// What the guest's driver does: both registers, the lower first, with decoding on.
    pub fn move_to(&self, at: u64) -> Result<(), Complaint> {
        let register = BAR0 + 4 * u16::from(self.index.get());
        let [a, b, c, d, high @ ..] = at.to_le_bytes();
        let mut outcome = self.function.config_write(register, &[a, b, c, d]);
        if self.is_64_bit {
            outcome.append(self.function.config_write(register + 4, &high));
        }
        crate::verdict::same("a BAR that moves:", outcome.is_ok(), true)
    }

    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Complaint> {
        let mut data = vec![0; len];
        match self.function.bar_read(self.index, offset, &mut data) {
            None => Ok(data),
            Some(error) => Err(broken(&error).into()),
        }
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Complaint> {
        match self.function.bar_write(self.index, offset, data) {
            None => Ok(()),
            Some(error) => Err(broken(&error).into()),
        }
    }
}

/// The processor's side of RAM.
#[derive(Clone)]
pub(crate) struct Memory(Arc<dyn RamAccess>);

impl Memory {
    /// Reads at an offset.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.0.read(offset, &mut data)?;
        Ok(data)
    }

    /// Writes at an offset.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}

/// A guest with RAM, an NVMe controller, a peer, and another engine if there is one. All decode, and
/// an IOMMU follows.
pub(crate) struct Guest {
    /// Another engine.
    pub engine: Option<Box<dyn DmaEngine>>,
    /// The peer's memory BAR.
    pub peer: GuestBar,
    /// The controller's memory buffer, or another BAR of it that is memory for others.
    pub buffer: Option<GuestBar>,
    functions: Vec<Arc<AssignedFunction>>,
    /// RAM.
    pub memory: Memory,
    ram: Backing,
    time_limit: std::time::Duration,
    target: TargetHandle,
    map: RegionManager,
}

impl Guest {
    /// Puts the parts together. Of the peer's BAR and the controller's memory buffer the smaller
    /// one hides the other, wherever both lie.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let map = RegionManager::new();
        let mut change = map.change();
        let ram = change.add(ram_region("ram", GUEST_RAM.raw(), &parts.ram, 0, RAM_SIZE)?);
        change.enable(ram);
        change.commit().map_err(|error| broken(&error))?;
        let target = map
            .register(parts.target, TargetOptions::new("guest"))
            .map_err(|error| broken(&error))?;
        let peer = memory_bar(&parts.peer)?;
        let buffer = buffer_bar(&parts.nvme)?;
        let peer_hides = match buffer {
            Some(buffer) => size_of(&parts.peer, peer)? < size_of(&parts.nvme, buffer)?,
            None => false,
        };
        let assign = |host: &Arc<dyn HostFunction>, hides: bool| {
            let priority = Priority(hides.into());
            let options = FunctionOptions {
                priority,
                ..FunctionOptions::default()
            };
            AssignedFunction::new(Arc::clone(host), map.clone(), &options)
                .map(Arc::new)
                .map_err(|error| broken(&error))
        };
        let nvme = assign(&parts.nvme, !peer_hides)?;
        let peer_function = assign(&parts.peer, peer_hides)?;
        let mut functions = vec![Arc::clone(&nvme), Arc::clone(&peer_function)];
        let mut engine = None;
        if let Some(host) = &parts.engine {
            let function = assign(host, false)?;
            engine = find_engine(function.host());
            functions.push(function);
        }
        place(&functions)?;
        let buffer = buffer.map(|index| guest_bar(&nvme, index)).transpose()?;
        Ok(Self {
            engine,
            peer: guest_bar(&peer_function, peer)?,
            buffer,
            functions,
            ram: parts.ram,
            memory: Memory(parts.access),
            time_limit: parts.time_limit,
            target,
            map,
        })
    }

    /// The controller as an engine, with these blocks. There is to be one at a time.
    pub fn nvme(&self, scratch: ScratchBlocks) -> Result<NvmeEngine, Complaint> {
        let [nvme, ..] = self.functions.as_slice() else {
            return Err(io::Error::other("no controller").into());
        };
        let host = Arc::clone(nvme.host());
        let engine = NvmeEngine::new(host, self.lent()?, scratch);
        Ok(engine.with_time_limit(self.time_limit))
    }

    /// How many bytes a block of the controller's disk has.
    pub fn block_size(&self) -> Result<u64, Complaint> {
        let [nvme, ..] = self.functions.as_slice() else {
            return Err(io::Error::other("no controller").into());
        };
        let mut driver =
            Nvme::new(Arc::clone(nvme.host()), self.lent()?).with_time_limit(self.time_limit);
        Ok(driver.enable()?.block_size)
    }

    fn lent(&self) -> io::Result<Box<dyn EngineMemory>> {
        let start = Iova::new(GUEST_RAM.raw().saturating_add(LENT));
        let range = IovaRange::new(start, Nvme::MEMORY).map_err(|error| broken(&error))?;
        Ok(Box::new(Lent(Arc::clone(&self.memory.0), range)))
    }

    /// Shows a piece of RAM at a second address, over whatever is there.
    pub fn add_cover(&self, at: u64, offset: u64, size: u64) -> Result<RegionId, Complaint> {
        let mut change = self.map.change();
        let cover = change.add(ram_region("cover", at, &self.ram, offset, size)?);
        change.enable(cover);
        change.commit().map_err(|error| broken(&error))?;
        Ok(cover)
    }

    /// Takes it away.
    pub fn remove(&self, region: RegionId) -> Result<(), Complaint> {
        let mut change = self.map.change();
        change.remove(region);
        change.commit().map_err(|error| broken(&error))?;
        Ok(())
    }

    /// How far the functions reach a BAR.
    pub fn reach(&self, bar: &GuestBar) -> Result<Reach, Complaint> {
        let reach = self.map.reach_of(self.target.id(), bar.region);
        Ok(reach.map_err(|error| broken(&error))?)
    }

    /// What the guest sees at an address.
    pub fn seen_at(&self, at: u64) -> Option<RegionId> {
        self.map.lookup(Gpa::new(at)).map(|seen| seen.region)
    }
}

fn place(functions: &[Arc<AssignedFunction>]) -> io::Result<()> {
    let (start, size) = WINDOW;
    let window = GpaRange::new(Gpa::new(start), size).map_err(|error| broken(&error))?;
    let functions: Vec<&AssignedFunction> = functions.iter().map(|it| &**it).collect();
    let windows = Windows {
        low: window,
        high: window,
    };
    let placed = place_bars(&functions, windows).map_err(|error| broken(&error))?;
    match placed.outcome.host_errors.first() {
        Some(error) => Err(broken(error)),
        None => Ok(()),
    }
}

fn guest_bar(function: &Arc<AssignedFunction>, index: BarIndex) -> io::Result<GuestBar> {
    let bar = function.bars().into_iter().find(|bar| bar.index == index);
    let none = || io::Error::other(format!("{} has no {index}", function.name()));
    let bar = bar.ok_or_else(none)?;
    Ok(GuestBar {
        function: Arc::clone(function),
        index,
        region: bar.region.ok_or_else(none)?,
        size: bar.size,
        is_64_bit: bar.kind.is_64_bit(),
    })
}

/// A controller's first BAR but for its registers that can be mapped from its start.
fn buffer_bar(nvme: &Arc<dyn HostFunction>) -> io::Result<Option<BarIndex>> {
    for index in BarIndex::ALL.into_iter().skip(1) {
        let areas = nvme.bar(index)?.map(|bar| bar.areas);
        let mut areas = areas.into_iter().flatten();
        if areas.any(|area| area.offset == 0 && area.size >= 0x1_0000) {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

fn size_of(function: &Arc<dyn HostFunction>, index: BarIndex) -> io::Result<u64> {
    Ok(function.bar(index)?.map_or(0, |bar| bar.size))
}

fn ram_region(
    name: &str,
    at: u64,
    backing: &Backing,
    backing_offset: u64,
    size: u64,
) -> io::Result<RegionSpec> {
    Ok(RegionSpec {
        name: name.into(),
        range: GpaRange::new(Gpa::new(at), size).map_err(|error| broken(&error))?,
        priority: RAM_PRIORITY,
        kind: RegionKind::Ram,
        access: Access::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: vec![SubMapping {
            offset: 0,
            size,
            backing: backing.clone(),
            backing_offset,
        }],
    })
}
