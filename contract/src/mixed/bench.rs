//! What the cases get: an engine and a peer in one map, each behind a target of its own.

use std::fmt;
use std::io;
use std::sync::Arc;

use assigned_pci::{
    AssignedFunction, BarInfo, BarKind, FunctionOptions, HostFunction, Windows, place_bars,
};
use dma_engine::{DmaEngine, find_engine};
use memory_map::{
    Access, Backing, DmaTarget, Gpa, GpaRange, Iova, Priority, Reach, RegionId, RegionKind,
    RegionManager, RegionSpec, SubMapping, TargetHandle, TargetOptions,
};

use crate::nvme::{Iommu, RamAccess};
use crate::real::told;
use crate::{Complaint, Verdict};

/// Where RAM lies.
pub(crate) const RAM: Iova = Iova::new(0x10_0000);
/// How much RAM there must be, in bytes.
pub(crate) const RAM_SIZE: u64 = 0x20_0000;
/// Where BARs are placed: first and last address.
const LOW: (u64, u64) = (0x4000_0000, 0x7fff_ffff);
const HIGH: (u64, u64) = (0x8000_0000, 0xdfff_ffff);

const COMMAND: u16 = 0x04;
/// Memory decoding and bus mastering.
const DECODES: [u8; 2] = [6, 0];
const DECODES_NOTHING: [u8; 2] = [4, 0];

/// What a bench is made from. Nothing is mapped.
pub struct Parts {
    /// Has a DMA engine that there is a driver for.
    pub engine: Arc<dyn HostFunction>,
    /// What the engine is behind.
    pub engine_target: Box<dyn DmaTarget>,
    /// Has a prefetchable memory BAR of 64 KiB to 256 MiB that can be mapped from its start.
    pub peer: Arc<dyn HostFunction>,
    /// What the peer is behind.
    pub peer_target: Box<dyn DmaTarget>,
    /// 2 MiB of RAM.
    pub ram: Backing,
    /// The same RAM.
    pub access: Arc<dyn RamAccess>,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("engine", &self.engine)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// A host that has such functions.
pub trait MixedHost {
    /// Opens them anew: the engine by `engine`, and the peer by the other way.
    ///
    /// # Errors
    /// What they could not be opened for.
    fn parts(&self, engine: Iommu) -> io::Result<Parts>;
}

/// RAM and the BARs of both functions, in a map that both targets follow. Fields end in this order.
pub struct Bench {
    /// The engine's driver.
    pub(crate) engine: Box<dyn DmaEngine>,
    functions: [AssignedFunction; 2],
    targets: [TargetHandle; 2],
    access: Arc<dyn RamAccess>,
    map: RegionManager,
}

impl fmt::Debug for Bench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bench").finish_non_exhaustive()
    }
}

/// The two functions, and their targets, by their places.
pub(crate) const ENGINE: usize = 0;
pub(crate) const PEER: usize = 1;

fn window((first, last): (u64, u64)) -> io::Result<GpaRange> {
    GpaRange::from_inclusive(Gpa::new(first), Gpa::new(last)).map_err(|error| told(&error))
}

impl Bench {
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        let engine = find_engine(&parts.engine)
            .ok_or_else(|| io::Error::other("there is no driver for a DMA engine"))?;
        let map = RegionManager::new();
        let start = Gpa::new(RAM.raw());
        let mut change = map.change();
        let ram = change.add(RegionSpec {
            name: "ram".into(),
            range: GpaRange::new(start, RAM_SIZE).map_err(|error| told(&error))?,
            priority: Priority(0),
            kind: RegionKind::Ram,
            access: Access::ReadWrite,
            shareable: false,
            label: None,
            sub_mappings: vec![SubMapping {
                offset: 0,
                size: RAM_SIZE,
                backing: parts.ram,
                backing_offset: 0,
            }],
        });
        change.enable(ram);
        change.commit().map_err(|error| told(&error))?;
        let register = |target, name: &str| {
            let handle = map.register(target, TargetOptions::new(name));
            handle.map_err(|error| told(&error))
        };
        let targets = [
            register(parts.engine_target, "the engine's")?,
            register(parts.peer_target, "the peer's")?,
        ];
        let assigned = |function| {
            let options = FunctionOptions::default();
            let function = AssignedFunction::new(function, map.clone(), &options);
            function.map_err(|error| told(&error))
        };
        let functions = [assigned(parts.engine)?, assigned(parts.peer)?];
        let windows = Windows {
            low: window(LOW)?,
            high: window(HIGH)?,
        };
        let placed = place_bars(&functions.each_ref(), windows).map_err(|error| told(&error))?;
        if let Some(error) = placed.outcome.host_errors.first() {
            return Err(told(error));
        }
        Ok(Self {
            engine,
            functions,
            targets,
            access: parts.access,
            map,
        })
    }

    /// The peer's BAR, as its registers say.
    pub(crate) fn bar(&self) -> Result<BarInfo, Complaint> {
        let bars = self.peer().bars();
        let suits = |bar: &&BarInfo| {
            let prefetchable = matches!(
                bar.kind,
                BarKind::Memory {
                    prefetchable: true,
                    ..
                }
            );
            prefetchable && (0x1_0000..=0x1000_0000).contains(&bar.size)
        };
        let found = bars.iter().find(suits).copied();
        found.ok_or_else(|| io::Error::other("the peer has no such BAR").into())
    }

    fn peer(&self) -> &AssignedFunction {
        let [_, peer] = &self.functions;
        peer
    }

    /// What the target of one of the two says of a region.
    pub(crate) fn reach(
        &self,
        of: usize,
        region: Option<RegionId>,
    ) -> Result<Option<Reach>, Complaint> {
        let target = self.targets.get(of).map(TargetHandle::id);
        let (Some(target), Some(region)) = (target, region) else {
            return Ok(None);
        };
        let reach = self.map.reach_of(target, region);
        Ok(Some(reach.map_err(|error| told(&error))?))
    }

    /// The regions of a function's BARs of at least a page.
    pub(crate) fn regions_of(&self, function: usize) -> Vec<RegionId> {
        let bars = self.functions.get(function).map(AssignedFunction::bars);
        let bars = bars.into_iter().flatten().filter(|bar| bar.size >= 0x1000);
        bars.filter_map(|bar| bar.region).collect()
    }

    /// Has the peer decode memory, or not.
    pub(crate) fn set_decoding(&self, on: bool) -> Verdict {
        let command = if on { DECODES } else { DECODES_NOTHING };
        let outcome = self.peer().config_write(COMMAND, &command);
        no_error(outcome.host_errors.first().copied())
    }

    /// Writes both halves of the peer's BAR, with its decoding on.
    pub(crate) fn move_bar(&self, bar: &BarInfo, to: u64) -> Verdict {
        let register = 0x10 + 4 * u16::from(bar.index.get());
        let [a, b, c, d, e, f, g, h] = to.to_le_bytes();
        let _hidden_until_both_are = self.peer().config_write(register, &[a, b, c, d]);
        if bar.kind.is_64_bit() {
            let _shown = self.peer().config_write(register + 4, &[e, f, g, h]);
        }
        Ok(())
    }

    pub(crate) fn bar_read(&self, bar: &BarInfo, offset: u64) -> Result<[u8; 8], Complaint> {
        let mut data = [0; 8];
        no_error(self.peer().bar_read(bar.index, offset, &mut data))?;
        Ok(data)
    }

    pub(crate) fn bar_write(&self, bar: &BarInfo, offset: u64, data: [u8; 8]) -> Verdict {
        no_error(self.peer().bar_write(bar.index, offset, &data))
    }

    pub(crate) fn ram_read(&self, offset: u64) -> Result<[u8; 8], Complaint> {
        let mut data = [0; 8];
        self.access.read(offset, &mut data)?;
        Ok(data)
    }

    pub(crate) fn ram_write(&self, offset: u64, data: [u8; 8]) -> Verdict {
        Ok(self.access.write(offset, &data)?)
    }
}

fn no_error(error: Option<assigned_pci::HostError>) -> Verdict {
    match error {
        None => Ok(()),
        Some(error) => Err(told(&error).into()),
    }
}
