//! Two devices that write, each in an address space of its own, and a peer with a BAR.

use std::sync::Arc;

use assigned_pci::{BarIndex, HostFunction};
use iommu::{IoasTarget, RamCopies};
use memory_map::{
    Access, Backing, DisabledBecause, Gpa, GpaRange, Iova, Priority, Reach, RegionId, RegionKind,
    RegionManager, RegionSpec, SubMapping, TargetHandle, TargetOptions,
};
use sim_host::{FunctionSpec, SimFunction, SimHost, SimIoas, SimRam};

pub const RAM_SIZE: u64 = 0x10_0000;
pub const BAR_SIZE: u64 = 0x1_0000;
pub const BAR_AT: u64 = 0x4000_0000;
const BAR: BarIndex = BarIndex::ALL[2];

pub struct Rig {
    pub host: SimHost,
    pub map: RegionManager,
    pub writers: [Arc<SimFunction>; 2],
    pub peer: Arc<SimFunction>,
    pub spaces: [Arc<SimIoas>; 2],
    pub copies: RamCopies,
    pub ram: SimRam,
    /// The BAR's only part.
    pub backing: Backing,
    pub bar: RegionId,
}

fn spec(name: &str, at: u64, kind: RegionKind, backing: &Backing) -> RegionSpec {
    RegionSpec {
        name: name.into(),
        range: GpaRange::new(Gpa::new(at), backing.size()).unwrap(),
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
    }
}

impl Rig {
    /// RAM is there, the BAR has its place and is not enabled, and no target is registered.
    pub fn new() -> Self {
        let host = SimHost::default();
        let add = |spec: FunctionSpec| host.add_function(spec.with_command(6)).unwrap();
        let writers = [
            add(FunctionSpec::edu("0000:00:05.0")),
            add(FunctionSpec::edu("0000:00:07.0")),
        ];
        let peer = add(FunctionSpec::shared_memory("0000:00:06.0", BAR_SIZE));
        let iommufd = host.open_iommufd();
        let spaces = [Arc::new(iommufd.ioas()), Arc::new(iommufd.ioas())];
        for (space, writer) in spaces.iter().zip(&writers) {
            space.attach(writer).unwrap();
        }
        spaces[0].attach(&peer).unwrap();
        let ram = host.ram(RAM_SIZE).unwrap();
        let backing = peer.bar(BAR).unwrap().unwrap().areas[0].backing.clone();
        let map = RegionManager::new();
        let mut change = map.change();
        let memory = Backing::new(ram.clone());
        let region = change.add(spec("ram", 0, RegionKind::Ram, &memory));
        change.enable(region);
        let bar = change.add(spec("bar", BAR_AT, RegionKind::DeviceMemory, &backing));
        change.commit().unwrap();
        Self {
            host,
            map,
            writers,
            peer,
            spaces,
            copies: RamCopies::new(),
            ram,
            backing,
            bar,
        }
    }

    pub fn register(&self, which: usize) -> TargetHandle {
        #[expect(
            unsafe_code,
            reason = "the simulated host's addresses are only numbers"
        )]
        // SAFETY: no memory lies behind a simulated host's address, and its files are never read.
        let target = unsafe { IoasTarget::new(self.spaces[which].clone(), self.copies.clone()) };
        let options = TargetOptions::new(format!("ioas {which}"));
        self.map.register(Box::new(target), options).unwrap()
    }

    pub fn enable(&self) {
        let mut change = self.map.change();
        change.enable(self.bar);
        change.commit_guest().unwrap();
    }

    pub fn disable(&self) {
        let mut change = self.map.change();
        change.disable(self.bar, DisabledBecause::DecodingOff);
        change.commit_guest().unwrap();
    }

    pub fn move_to(&self, at: u64) {
        let mut change = self.map.change();
        change.move_to(self.bar, Gpa::new(at));
        change.commit_guest().unwrap();
    }

    /// What whoever learns of a revocation does.
    pub fn repair(&self) {
        let mut change = self.map.change();
        change.revoke(&self.backing);
        change.commit_guest().unwrap();
    }

    /// Whether what a writer writes at `at` arrives in the BAR.
    pub fn arrives(&self, writer: usize, at: u64) -> bool {
        let memory = self.peer.bar_memory(BAR).unwrap();
        memory.write(0x100, &[0; 4]).unwrap();
        self.writers[writer].dma_write(Iova::new(at + 0x100), b"data");
        let mut seen = [0; 4];
        memory.read(0x100, &mut seen).unwrap();
        &seen == b"data"
    }

    /// Whether the map says that the BAR is all there for a target.
    pub fn is_mapped(&self, target: &TargetHandle) -> bool {
        let reach = self.map.reach();
        let entry = reach
            .iter()
            .find(|entry| entry.target == target.id() && entry.region == self.bar);
        matches!(entry.unwrap().reach, Reach::Mapped)
    }

    /// How many mappings there are of the BAR, and how many of them are dead.
    pub fn of_the_bar(&self) -> (usize, usize) {
        let mappings = self.host.ioas_mappings();
        let bar = mappings.iter().filter(|it| it.object.contains("BAR2"));
        let dead = bar.clone().filter(|it| it.dead).count();
        (bar.count(), dead)
    }
}
