//! The demonstration's machine: a simulated host with three devices, and the map over it.

use std::sync::Arc;

use anyhow::{Context, Result};
use assigned_pci::{AssignedFunction, BarIndex, FunctionOptions, HostFunction, Windows};
use dma_engine::{DmaEngine, Edu};
use iommu::Type1Target;
use memory_map::{Backing, Gpa, GpaRange, RegionId, RegionManager, TargetHandle, TargetOptions};
use sim_host::{ContainerId, FunctionSpec, SimContainer, SimFunction, SimHost};

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
    /// Behind container 0.
    pub first: EngineDevice,
    /// Behind container 0, with memory in its BAR2.
    pub peer: AssignedFunction,
    /// Behind container 1.
    pub second: EngineDevice,
    containers: [Arc<SimContainer>; 2],
}

impl Machine {
    /// Puts it together: nothing is registered and no BAR is placed yet.
    pub fn new() -> Result<Self> {
        let host = SimHost::default();
        let map = RegionManager::new();
        let first = host.add_function(FunctionSpec::edu("0000:00:05.0"))?;
        let peer = host.add_function(FunctionSpec::shared_memory("0000:00:06.0", PEER_BAR_SIZE))?;
        let second = host.add_function(FunctionSpec::edu("0000:00:07.0"))?;
        let containers = [
            Arc::new(host.container(&[&first, &peer])?),
            Arc::new(host.container(&[&second])?),
        ];
        let ram = Backing::new(host.ram(RAM_SIZE)?);
        let ram = GuestRam::add(&map, "ram", ram, Gpa::new(0))?;
        Ok(Self {
            first: engine(&map, first)?,
            peer: assign(&map, peer)?,
            second: engine(&map, second)?,
            host,
            map,
            ram,
            containers,
        })
    }

    /// Registers container 0 or 1 with the map.
    pub fn register(&self, number: usize) -> Result<TargetHandle> {
        let container = self.containers.get(number).context("no such container")?;
        let target = target(Arc::clone(container))?;
        let options = TargetOptions::new(format!("container {number}"));
        Ok(self.map.register(Box::new(target), options)?)
    }

    /// How the simulated host names container 0 or 1.
    pub fn container_id(&self, number: usize) -> Option<ContainerId> {
        self.containers.get(number).map(|container| container.id())
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

#[expect(
    unsafe_code,
    reason = "a simulated container takes any number for an address"
)]
fn target(container: Arc<SimContainer>) -> Result<Type1Target<SimContainer>> {
    // SAFETY: the container is simulated: host addresses are looked up in a table and never
    // followed, so no backing can give a wrong one.
    let target = unsafe { Type1Target::new(container) };
    Ok(target)
}
