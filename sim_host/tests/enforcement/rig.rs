//! What the tests are tried on.

use assigned_pci::{BarIndex, HostFunction};
use iommu::Type1Container;
use memory_map::{Access, BackingObject, HostMapping, HostVa, Iova, IovaRange};
use sim_host::{FunctionSpec, SimBarArea, SimContainer, SimFunction, SimHost, SimRam};
use std::io;
use std::sync::Arc;

pub const MEMORY_AND_MASTER: u16 = 6;
pub const BAR0: BarIndex = BarIndex::ALL[0];
pub const BAR2: BarIndex = BarIndex::ALL[2];
pub const EDU_AT: u64 = 0x20_0000;
pub const RAM_AT: u64 = 0x10_0000;
pub const BAR_AT: u64 = 0x100_0000;

pub fn range(start: u64, size: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), size).unwrap()
}

pub fn map(c: &SimContainer, iova: IovaRange, va: HostVa, access: Access) -> io::Result<()> {
    #[expect(
        unsafe_code,
        reason = "the simulated host's addresses are only numbers"
    )]
    // SAFETY: no memory lies behind a simulated host's address.
    unsafe {
        c.map_dma(iova, va, access)
    }
}

pub fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

pub fn map_bar(function: &SimFunction, bar: BarIndex) -> Box<dyn HostMapping> {
    let bar = function.bar(bar).unwrap().unwrap();
    let area: &SimBarArea = bar.areas[0].backing.downcast_ref().unwrap();
    area.map_host().unwrap()
}

/// Two functions behind one container, with RAM and a BAR mapped.
pub struct Rig {
    pub host: SimHost,
    pub edu: Arc<SimFunction>,
    pub peer: Arc<SimFunction>,
    pub container: SimContainer,
    pub ram: SimRam,
    pub ram_va: Box<dyn HostMapping>,
    pub bar_va: Box<dyn HostMapping>,
}

impl Rig {
    pub fn new() -> Self {
        let host = SimHost::default();
        let spec = FunctionSpec::edu("edu").with_command(MEMORY_AND_MASTER);
        let edu = host.add_function(spec).unwrap();
        let spec = FunctionSpec::shared_memory("memory", 0x40_0000);
        let peer = host
            .add_function(spec.with_command(MEMORY_AND_MASTER))
            .unwrap();
        let container = host.container(&[&edu, &peer]).unwrap();
        let ram = host.ram(0x1_0000).unwrap();
        let ram_va = ram.map_host().unwrap();
        let bar_va = map_bar(&peer, BAR2);
        map(
            &container,
            range(RAM_AT, 0x1_0000),
            ram_va.address(),
            Access::ReadWrite,
        )
        .unwrap();
        map(
            &container,
            range(BAR_AT, 0x40_0000),
            bar_va.address(),
            Access::ReadWrite,
        )
        .unwrap();
        Self {
            host,
            edu,
            peer,
            container,
            ram,
            ram_va,
            bar_va,
        }
    }

    pub fn ram(&self, offset: u64) -> [u8; 4] {
        let mut data = [0; 4];
        self.ram.read(offset, &mut data).unwrap();
        data
    }

    pub fn bar(&self, offset: u64) -> [u8; 4] {
        let mut data = [0; 4];
        self.peer
            .bar_memory(BAR2)
            .unwrap()
            .read(offset, &mut data)
            .unwrap();
        data
    }

    pub fn dma_read(&self, iova: u64) -> [u8; 4] {
        let mut data = [0; 4];
        self.edu.dma_read(Iova::new(iova), &mut data);
        data
    }

    pub fn dma_write(&self, iova: u64, data: &[u8]) {
        self.edu.dma_write(Iova::new(iova), data);
    }

    pub fn nothing_wrong(&self) {
        assert_eq!(self.host.faults(), []);
        assert_eq!(self.host.bus_errors(), []);
        assert_eq!(self.host.violations(), []);
    }
}
