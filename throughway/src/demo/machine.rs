//! The demonstration's machine: a simulated host with three devices, and the map over it.

use std::sync::Arc;

use anyhow::{Context, Result};
use assigned_pci::{AssignedFunction, BarIndex, FunctionOptions, HostFunction, Windows};
use dma_engine::{DmaEngine, Edu};
use memory_map::{Backing, Gpa, GpaRange, RegionId, RegionManager, TargetHandle, TargetOptions};
use sim_host::{FunctionSpec, PowerManagement, SimFunction, SimHost};

use super::space::{Kind, Space, Spaces};
use crate::ram::GuestRam;

/// The guest's RAM in bytes.
pub const RAM_SIZE: u64 = 64 << 20;
/// The peer's BAR2 in bytes.
pub const PEER_BAR_SIZE: u64 = 16 << 20;
/// The BAR that is reached, moved and taken away.
pub const PEER_BAR: BarIndex = BarIndex::ALL[2];

/// A device with a DMA engine.
pub struct EngineDevice {
    pub function: AssignedFunction,
    pub engine: Edu,
}

/// The machine.
pub struct Machine {
    pub host: SimHost,
    pub map: RegionManager,
    pub ram: GuestRam,
    /// In the first address space.
    pub first: EngineDevice,
    /// In the first too, with memory in its BAR2. It can sleep and be reset.
    pub peer: AssignedFunction,
    /// In the second address space.
    pub second: EngineDevice,
    spaces: Spaces,
}

impl Machine {
    /// Puts it together: nothing is registered and no BAR is placed yet.
    pub fn new(kind: Kind) -> Result<Self> {
        let host = SimHost::default();
        let map = RegionManager::new();
        let first = host.add_function(FunctionSpec::edu("0000:00:05.0"))?;
        let peer = FunctionSpec::shared_memory("0000:00:06.0", PEER_BAR_SIZE)
            .with_power_management(PowerManagement::NoSoftReset)
            .with_express_flr();
        let peer = host.add_function(peer)?;
        let second = host.add_function(FunctionSpec::edu("0000:00:07.0"))?;
        let spaces = Spaces::new(kind, &host, [&[&first, &peer], &[&second]])?;
        let ram = Backing::new(host.ram(RAM_SIZE)?);
        let ram = GuestRam::add(&map, "ram", ram, Gpa::new(0))?;
        Ok(Self {
            first: engine(&map, first)?,
            peer: assign(&map, peer)?,
            second: engine(&map, second)?,
            host,
            map,
            ram,
            spaces,
        })
    }

    /// Registers address space 0 or 1 with the map.
    pub fn register(&self, number: usize) -> Result<TargetHandle> {
        let space = self.space(number)?;
        let options = TargetOptions::new(space.name());
        Ok(self.map.register(self.spaces.target(space), options)?)
    }

    /// Address space 0 or 1.
    pub fn space(&self, number: usize) -> Result<&Space> {
        self.spaces.get(number).context("no such address space")
    }

    /// The region of the peer's BAR2.
    pub fn peer_region(&self) -> Result<RegionId> {
        self.peer
            .region_of(PEER_BAR)
            .context("the peer has no BAR2")
    }

    /// Where the peer's BAR2 stands by its registers.
    pub fn peer_address(&self) -> Result<Gpa> {
        let bars = self.peer.bars();
        let bar = bars.iter().find(|bar| bar.index == PEER_BAR);
        Ok(Gpa::new(bar.context("the peer has no BAR2")?.address))
    }
}

/// Where the demonstration's guest puts BARs.
pub fn windows() -> Result<Windows> {
    Ok(Windows {
        low: GpaRange::new(Gpa::new(0xe000_0000), 0x1000_0000)?,
        high: GpaRange::new(Gpa::new(0x80_0000_0000), 0x10_0000_0000)?,
    })
}

fn assign(map: &RegionManager, function: Arc<SimFunction>) -> Result<AssignedFunction> {
    let host: Arc<dyn HostFunction> = function;
    let options = FunctionOptions::default();
    Ok(AssignedFunction::new(host, map.clone(), &options)?)
}

fn engine(map: &RegionManager, function: Arc<SimFunction>) -> Result<EngineDevice> {
    let host: Arc<dyn HostFunction> = function.clone();
    let engine = Edu::new(host);
    debug_assert!(engine.max_transfer() >= 4096);
    Ok(EngineDevice {
        function: assign(map, function)?,
        engine,
    })
}
