//! Functions, RAM and IOMMUs put together in one map, as a guest would have them.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use assigned_pci::{
    AssignedFunction, BarIndex, BarInfo, BarKind, CutOffSwitch, FunctionOptions, HostFunction,
    Windows, place_bars,
};
use dma_engine::{DmaEngine, find_engine};
use memory_map::{
    Backing, CutOff, DmaTarget, Gpa, GpaRange, IovaRange, Quarantine, RegionId, RegionManager,
    TargetHandle, TargetName, TargetOptions,
};

use super::report::Pair;
use super::windows;
use crate::ram::GuestRam;

/// Where RAM begins.
pub const RAM: Gpa = Gpa::new(0x20_0000);

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
    pub function: Arc<AssignedFunction>,
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
    /// Where BARs may lie.
    windows: Windows,
}

impl Assembly {
    /// Lays everything out and registers the IOMMUs.
    pub fn new(parts: Parts) -> Result<Self> {
        let map = RegionManager::new();
        // The page comes first, so that a limit on locked memory is told with all that is needed.
        let page = GuestRam::add(&map, "control page", parts.page, Gpa::new(0))?;
        let ram = GuestRam::add(&map, "ram", parts.ram, RAM)?;
        let mut targets = Vec::new();
        let mut switches = Vec::new();
        for (number, target) in parts.targets.into_iter().enumerate() {
            let mut options = TargetOptions::new(format!("container {number}"));
            let switch = Arc::new(Announced::default());
            options.cut_off = Some(switch.clone());
            switches.push(switch);
            let handle = map.register(target, options);
            targets.push(handle.context("mapping RAM for the devices failed")?);
        }
        let mut members = Vec::new();
        for (host, target) in parts.functions {
            let options = FunctionOptions::default();
            let function = Arc::new(AssignedFunction::new(host, map.clone(), &options)?);
            let switch = switches.get(target).context("no such container")?;
            switch.0.add(&function);
            // An engine that goes through the function is cut off with it.
            let engine = find_engine(function.host());
            members.push(Member {
                function,
                target,
                engine,
            });
        }
        let functions: Vec<&AssignedFunction> = members.iter().map(|m| &*m.function).collect();
        let bars: Vec<BarInfo> = functions.iter().flat_map(|f| f.bars()).collect();
        let windows = windows::choose(&parts.allowed, ram.range().last(), &bars)?;
        let placed = place_bars(&functions, windows)?;
        if let Some(error) = placed.outcome.host_errors.first() {
            return Err(*error).context("placing the BARs");
        }
        Ok(Self {
            members,
            targets,
            ram,
            page,
            map,
            windows,
        })
    }

    /// Moves a BAR, with decoding on, to the highest free place of its window, as a guest would.
    /// Returns where it was, or nothing if there is no other place for it.
    pub fn move_bar(&self, member: &Member, bar: &MemberBar) -> Result<Option<GpaRange>> {
        let old = bar.range()?;
        let window = if self.windows.high.covers(&old) {
            self.windows.high
        } else {
            self.windows.low
        };
        let Some(new) = self.free_place(window, old.size()) else {
            return Ok(None);
        };
        member.write_bar(bar, new.start());
        let seen = self.map.lookup(new.start());
        ensure!(
            seen.is_some_and(|seen| seen.region == bar.region),
            "{} {} does not appear at {new}, where it was moved to",
            member.function.name(),
            bar.info.index
        );
        Ok(Some(old))
    }

    fn free_place(&self, window: GpaRange, size: u64) -> Option<GpaRange> {
        let taken: Vec<GpaRange> = self.map.view().into_iter().map(|seen| seen.range).collect();
        // A BAR's size is a power of two.
        let mut last = window.last().raw();
        loop {
            let start = last.checked_sub(size.checked_sub(1)?)? & !size.checked_sub(1)?;
            let place = GpaRange::new(Gpa::new(start), size).ok()?;
            if !window.covers(&place) {
                return None;
            }
            if taken.iter().all(|taken| !taken.overlaps(&place)) {
                return Some(place);
            }
            last = start.checked_sub(1)?;
        }
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

    /// Writes a BAR's registers, the lower first. What came of it is in the map.
    fn write_bar(&self, bar: &MemberBar, to: Gpa) {
        let registers = bar.register();
        let [a, b, c, d, e, f, g, h] = to.raw().to_le_bytes();
        let _low = self.function.config_write(registers, &[a, b, c, d]);
        if bar.info.kind.is_64_bit() {
            let _high = self.function.config_write(registers + 4, &[e, f, g, h]);
        }
    }

    /// One of its memory BARs.
    pub fn bar(&self, index: BarIndex) -> Option<MemberBar> {
        self.bars().into_iter().find(|bar| bar.info.index == index)
    }
}

impl MemberBar {
    /// Its register's offset in config space (PCI 3.0, 6.2.5).
    fn register(&self) -> u16 {
        const BAR0: u16 = 0x10;
        BAR0 + 4 * u16::from(self.info.index.get())
    }

    /// Whether reads have no side effects, so that it may be written to and put back.
    pub const fn is_prefetchable(&self) -> bool {
        let BarKind::Memory { prefetchable, .. } = self.info.kind else {
            return false;
        };
        prefetchable
    }

    /// Where it lies by its registers.
    pub fn range(&self) -> Result<GpaRange> {
        Ok(GpaRange::new(Gpa::new(self.info.address), self.info.size)?)
    }
}

/// Cuts off the devices behind an IOMMU that may hold a mapping it should not, and says so.
#[derive(Default)]
struct Announced(CutOffSwitch);

impl CutOff for Announced {
    fn cut_off(&self, target: &TargetName, why: &Quarantine) {
        eprintln!("throughway: {target} is cut off: {why}");
        self.0.cut_off(target, why);
        for (function, error) in self.0.state().into_iter().flat_map(|state| state.failed) {
            eprintln!("throughway: {function} does not stop: {error}");
        }
    }
}
