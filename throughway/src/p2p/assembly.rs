//! Functions, RAM and IOMMUs put together in one map, as a guest would have them.

use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use assigned_pci::{
    AssignedFunction, BarIndex, BarInfo, BarKind, FunctionOptions, HostFunction, place_bars,
};
use dma_engine::{DmaEngine, find_engine};
use memory_map::{
    Backing, CutOff, DmaTarget, Gpa, GpaRange, IovaRange, Quarantine, RegionId, RegionManager,
    TargetHandle, TargetName, TargetOptions,
};

use super::report::Pair;
use super::windows;
use crate::ram::GuestRam;

/// What an assembly is made from.
pub struct Parts {
    /// The IOMMU address spaces.
    pub targets: Vec<Box<dyn DmaTarget>>,
    /// The functions, each with the place of its address space in `targets`.
    pub functions: Vec<(Arc<dyn HostFunction>, usize)>,
    /// Where all of the address spaces may map.
    pub allowed: Vec<IovaRange>,
    /// All of RAM.
    pub ram: Backing,
    /// A page of RAM that is mapped only to be unmapped again.
    pub page: Backing,
}

/// One function in the assembly.
pub struct Member {
    pub function: AssignedFunction,
    /// Its IOMMU's place.
    pub target: usize,
    pub engine: Option<Box<dyn DmaEngine>>,
}

/// A memory BAR of a member.
#[derive(Debug, Clone, Copy)]
pub struct MemberBar {
    pub info: BarInfo,
    pub region: RegionId,
}

/// All of it. Fields end in this order: the functions' regions, then the IOMMUs, then the map.
pub struct Assembly {
    pub members: Vec<Member>,
    pub targets: Vec<TargetHandle>,
    pub ram: GuestRam,
    /// A page that is not part of [`ram`](Self::ram); see [`Parts::page`].
    pub page: GuestRam,
    pub map: RegionManager,
}

impl Assembly {
    /// Lays everything out and registers the IOMMUs.
    pub fn new(parts: Parts) -> Result<Self> {
        let map = RegionManager::new();
        let ram = GuestRam::add(&map, "ram", parts.ram, Gpa::new(0))?;
        // Its own page, one page above the end of RAM.
        let gap = ram.range().size().saturating_add(memory_map::GRANULE);
        let page = GuestRam::add(&map, "control page", parts.page, Gpa::new(gap))?;
        let mut targets = Vec::new();
        for (number, target) in parts.targets.into_iter().enumerate() {
            let mut options = TargetOptions::new(format!("container {number}"));
            options.cut_off = Some(Arc::new(Quiesce::of(&parts.functions, number)));
            let handle = map.register(target, options);
            targets.push(handle.context("mapping RAM for the devices failed")?);
        }
        let mut members = Vec::new();
        for (host, target) in parts.functions {
            let engine = find_engine(&host);
            let function = AssignedFunction::new(host, map.clone(), &FunctionOptions::default())?;
            members.push(Member {
                function,
                target,
                engine,
            });
        }
        let assembly = Self {
            members,
            targets,
            ram,
            page,
            map,
        };
        assembly.place(&parts.allowed)?;
        Ok(assembly)
    }

    fn place(&self, allowed: &[IovaRange]) -> Result<()> {
        let functions: Vec<&AssignedFunction> = self.members.iter().map(|m| &m.function).collect();
        let bars: Vec<BarInfo> = functions.iter().flat_map(|f| f.bars()).collect();
        let windows = windows::choose(allowed, self.page.range().last(), &bars)?;
        let placed = place_bars(&functions, windows)?;
        if let Some(error) = placed.outcome.host_errors.first() {
            return Err(*error).context("placing the BARs");
        }
        Ok(())
    }

    /// Every ordered pair and BAR, with the reach as it stands.
    pub fn pairs(&self) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        for (from, who) in self.members.iter().enumerate() {
            let target = self.targets.get(who.target).context("no such container")?;
            for (to, whose) in self.members.iter().enumerate() {
                if from == to {
                    continue;
                }
                for bar in whose.bars() {
                    let reach = self.map.reach_of(target.id(), bar.region)?;
                    pairs.push(Pair::new(from, who, to, whose, &bar, &reach));
                }
            }
        }
        Ok(pairs)
    }
}

impl Member {
    /// Its memory BARs.
    pub fn bars(&self) -> Vec<MemberBar> {
        let bars = self.function.bars().into_iter();
        bars.filter_map(|info| {
            let region = info.region?;
            Some(MemberBar { info, region })
        })
        .collect()
    }

    /// One of its memory BARs.
    pub fn bar(&self, index: BarIndex) -> Option<MemberBar> {
        self.bars().into_iter().find(|bar| bar.info.index == index)
    }
}

impl MemberBar {
    /// Whether reads have no side effects, so that it may be written to and put back.
    pub const fn is_prefetchable(&self) -> bool {
        let prefetchable = true;
        matches!(self.info.kind, BarKind::Memory { prefetchable: p, .. } if p == prefetchable)
    }

    /// Where it lies by its registers.
    pub fn range(&self) -> Result<GpaRange> {
        Ok(GpaRange::new(Gpa::new(self.info.address), self.info.size)?)
    }
}

/// Turns off the devices behind an IOMMU that may hold a mapping it should not.
struct Quiesce(Vec<Weak<dyn HostFunction>>);

impl Quiesce {
    fn of(functions: &[(Arc<dyn HostFunction>, usize)], target: usize) -> Self {
        let behind = functions.iter().filter(|(_, t)| *t == target);
        Self(behind.map(|(f, _)| Arc::downgrade(f)).collect())
    }
}

impl CutOff for Quiesce {
    fn cut_off(&self, target: &TargetName, why: &Quarantine) {
        eprintln!("throughway: {target} is cut off: {why}");
        for function in self.0.iter().filter_map(Weak::upgrade) {
            // Each is tried, whatever became of the other; nothing turns bus mastering on again
            // after this, because the run ends with its outcome.
            let quiet = function.config_write(0x04, &[0, 0]);
            let reset = function.reset();
            if let (Err(error), Err(_)) = (quiet, reset) {
                eprintln!("throughway: {} does not stop: {error}", function.name());
            }
        }
    }
}
