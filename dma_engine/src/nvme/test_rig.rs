//! A simulated controller with RAM and a peer, for the driver's and the engine's tests.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::{BarIndex, HostFunction};
use iommu::Type1Container;
use memory_map::{Access, BackingObject, HostMapping, Iova, IovaRange};
use sim_host::{FunctionSpec, SimBarArea, SimContainer, SimDisk, SimFunction, SimHost, SimRam};

use super::Nvme;
use super::registers::CC;
use crate::EngineMemory;

pub(crate) const RAM: u64 = 0x10_0000;
pub(crate) const RAM_SIZE: u64 = 0x40_0000;
/// Where the peer's BAR is mapped.
pub(crate) const BAR: u64 = 0x4000_0000;
pub(crate) const BAR_SIZE: u64 = 0x10_0000;
const LENT: u64 = RAM_SIZE - Nvme::MEMORY;

/// What a test lends: the end of RAM.
pub(crate) struct Lent {
    pub ram: SimRam,
    pub range: IovaRange,
}

impl EngineMemory for Lent {
    fn iova(&self) -> IovaRange {
        self.range
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.ram.read(LENT + offset, data).map_err(io::Error::other)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ram
            .write(LENT + offset, data)
            .map_err(io::Error::other)
    }
}

pub(crate) struct Rig {
    pub host: SimHost,
    pub controller: Arc<SimFunction>,
    pub peer: Arc<SimFunction>,
    pub disk: SimDisk,
    pub ram: SimRam,
    pub container: SimContainer,
    _mappings: Vec<Box<dyn HostMapping>>,
}

impl Rig {
    /// A controller of that kind with a disk whose bytes tell where they are, and RAM and the
    /// peer's BAR mapped for it.
    pub fn new(disk: &SimDisk, change: impl FnOnce(FunctionSpec) -> FunctionSpec) -> Self {
        let host = SimHost::default();
        let spec = change(FunctionSpec::nvme("nvme", disk.clone()));
        let controller = host.add_function(spec.with_command(0x6)).unwrap();
        let peer = host
            .add_function(FunctionSpec::shared_memory("peer", BAR_SIZE))
            .unwrap();
        let container = host.container(&[&controller, &peer]).unwrap();
        let ram = host.ram(RAM_SIZE).unwrap();
        let mappings = vec![map(&container, RAM, &ram), map_bar(&container, BAR, &peer)];
        Self {
            host,
            controller,
            peer,
            disk: disk.clone(),
            ram,
            container,
            _mappings: mappings,
        }
    }

    pub fn function(&self) -> Arc<dyn HostFunction> {
        Arc::clone(&self.controller) as Arc<dyn HostFunction>
    }

    pub fn lent(&self) -> Box<Lent> {
        Box::new(Lent {
            ram: self.ram.clone(),
            range: IovaRange::new(Iova::new(RAM + LENT), Nvme::MEMORY).unwrap(),
        })
    }

    pub fn nvme(&self) -> Nvme {
        Nvme::new(self.function(), self.lent()).with_time_limit(Duration::from_millis(30))
    }

    /// Takes the peer's BAR out of the IOMMU.
    pub fn unmap_bar(&self) {
        let range = IovaRange::new(Iova::new(BAR), BAR_SIZE).unwrap();
        assert_eq!(self.container.unmap_dma(range).unwrap(), BAR_SIZE);
    }

    pub fn ram_at(&self, iova: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(len).unwrap()];
        self.ram.read(iova - RAM, &mut data).unwrap();
        data
    }

    pub fn bar_at(&self, iova: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(len).unwrap()];
        let bar = self.peer.bar_memory(BarIndex::ALL[2]).unwrap();
        bar.read(iova - BAR, &mut data).unwrap();
        data
    }

    pub fn bar_write(&self, iova: u64, data: &[u8]) {
        let bar = self.peer.bar_memory(BarIndex::ALL[2]).unwrap();
        bar.write(iova - BAR, data).unwrap();
    }

    pub fn disk_at(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(len).unwrap()];
        self.disk.read(offset, &mut data).unwrap();
        data
    }

    /// Whether the controller is enabled (CC.EN).
    pub fn is_enabled(&self) -> bool {
        self.configuration()[0] & 1 != 0
    }

    /// Disables it, without the driver.
    pub fn disable(&self) {
        let [low, rest @ ..] = self.configuration();
        let [a, b, c] = rest;
        self.controller
            .bar_write(BarIndex::ALL[0], CC, &[low & !1, a, b, c])
            .unwrap();
    }

    fn configuration(&self) -> [u8; 4] {
        let mut data = [0; 4];
        self.controller
            .bar_read(BarIndex::ALL[0], CC, &mut data)
            .unwrap();
        data
    }

    /// Nothing was blocked, and nobody broke a rule.
    pub fn ensure_clean(&self) {
        assert_eq!(self.host.faults(), []);
        assert!(self.host.bus_errors().is_empty() && self.host.violations().is_empty());
    }
}

/// Maps all of `object` at `at`.
fn map(container: &SimContainer, at: u64, object: &dyn BackingObject) -> Box<dyn HostMapping> {
    let mapping = object.map_host().unwrap();
    let range = IovaRange::new(Iova::new(at), object.size()).unwrap();
    #[expect(
        unsafe_code,
        reason = "the simulated host's addresses are only numbers"
    )]
    // SAFETY: no memory lies behind a simulated host's address.
    unsafe { container.map_dma(range, mapping.address(), Access::ReadWrite) }.unwrap();
    mapping
}

/// Maps all of a function's BAR2 at `at`.
pub(crate) fn map_bar(
    container: &SimContainer,
    at: u64,
    function: &SimFunction,
) -> Box<dyn HostMapping> {
    let bar = function.bar(BarIndex::ALL[2]).unwrap().unwrap();
    let area: &SimBarArea = bar.areas[0].backing.downcast_ref().unwrap();
    map(container, at, area)
}

/// `len` bytes that differ by seed and by place.
pub(crate) fn text(seed: u8, len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (at % 251).to_le_bytes()[0] ^ (at >> 12).to_le_bytes()[0] ^ seed)
        .collect()
}

/// A disk full of [`text`].
pub(crate) fn disk(blocks: u64, shift: u8) -> SimDisk {
    let disk = SimDisk::with_block_shift(blocks, shift);
    disk.write(0, &text(0x11, blocks << shift)).unwrap();
    disk
}
