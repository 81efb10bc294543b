//! Functions, RAM and IOMMUs put together in one map, as a guest would have them.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use assigned_pci::{
    AssignedFunction, BarIndex, BarInfo, BarKind, FunctionOptions, HostError, Windows, place_bars,
};
use dma_engine::{ControllerMemoryBuffer, DmaEngine, Nvme, NvmeEngine, find_engine};
use memory_map::{
    Backing, DmaTarget, Gpa, GpaRange, Iova, IovaRange, Reach, RegionId, RegionManager,
    TargetHandle, TargetOptions,
};

use super::report::{Pair, place_after};
use super::scratch::{LentRam, NvmeScratch};
use super::windows;
use crate::guest_driver::GuestDriver;
use crate::host::space::{PartFunction, Space, common};
use crate::host::{Announced, Bus};
use crate::ram::GuestRam;

/// Where RAM begins.
pub const RAM: Gpa = Gpa::new(0x20_0000);

/// What an assembly is made from. Nothing is mapped yet, and no function comes or goes later.
pub struct Parts {
    pub spaces: Vec<Space>,
    pub functions: Vec<PartFunction>,
    /// Which of them a hot reset resets together.
    pub buses: Vec<Bus>,
    /// For pairs of functions, by their places, how what the one sends to the other may go past
    /// the IOMMU.
    pub bypasses: BTreeMap<(usize, usize), String>,
    /// All of RAM.
    pub ram: Backing,
    /// A page of RAM that is mapped only to be unmapped again.
    pub page: Backing,
    /// Which of the functions are NVMe controllers that may serve as DMA engines.
    pub scratch: Vec<NvmeScratch>,
}

/// One function in the assembly. Its engine ends first: it may have something to put back.
pub struct Member {
    pub engine: Option<Box<dyn DmaEngine>>,
    /// Where the RAM begins that its engine was lent and cannot work without; none for an engine
    /// that needs none.
    pub lent: Option<Gpa>,
    pub function: Arc<AssignedFunction>,
    /// Its IOMMU's place.
    pub target: usize,
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
    /// What the targets are made from.
    pub spaces: Vec<RegisteredSpace>,
    /// See [`Parts::buses`].
    pub buses: Vec<Bus>,
    /// See [`Parts::bypasses`].
    bypasses: BTreeMap<(usize, usize), String>,
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
        let mut spaces = Vec::new();
        let mut allowed: Option<Vec<IovaRange>> = None;
        for space in parts.spaces {
            let target = (space.target)();
            let limits = target.limits();
            let limits = limits.context("the kernel does not tell what the IOMMU can map")?;
            allowed = Some(match allowed {
                None => limits.allowed,
                Some(before) => common(&before, &limits.allowed),
            });
            let space = RegisteredSpace {
                space,
                switch: Arc::new(Announced::on_standard_error()),
            };
            targets.push(space.register_as(target, &map)?);
            spaces.push(space);
        }
        let mut members = Vec::new();
        for PartFunction {
            host,
            space: target,
        } in parts.functions
        {
            let options = FunctionOptions::default();
            let function = Arc::new(AssignedFunction::new(host, map.clone(), &options)?);
            let space = spaces.get(target).context("no such container")?;
            space.switch.add(&function);
            let name = function.name();
            let lent = parts.scratch.iter().enumerate();
            let mut lent = lent.filter(|(_, scratch)| scratch.function.to_string() == *name);
            // An engine that goes through the function is cut off with it.
            let (engine, lent): (Option<Box<dyn DmaEngine>>, _) = match lent.next() {
                Some((number, scratch)) => {
                    ensure!(
                        Nvme::drives(function.host()),
                        "--nvme-scratch lends blocks of {name}, which is no NVMe controller"
                    );
                    let memory = Box::new(LentRam::of(&ram, number)?);
                    let start = memory.start();
                    let host = Arc::clone(function.host());
                    let engine = NvmeEngine::new(host, memory, scratch.blocks);
                    (Some(Box::new(engine)), Some(start))
                }
                None => (find_engine(function.host()), None),
            };
            members.push(Member {
                engine,
                lent,
                function,
                target,
            });
        }
        let functions: Vec<&AssignedFunction> = members.iter().map(|m| &*m.function).collect();
        let bars: Vec<BarInfo> = functions.iter().flat_map(|f| f.bars()).collect();
        let allowed = allowed.unwrap_or_default();
        let windows = windows::choose(&allowed, ram.range().last(), &bars)?;
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
            spaces,
            buses: parts.buses,
            bypasses: parts.bypasses,
            windows,
        })
    }

    /// The bus of a member, if a hot reset can reset it.
    pub fn bus_of(&self, member: usize) -> Option<&Bus> {
        self.buses.iter().find(|bus| bus.members.contains(&member))
    }

    /// [Resets](Bus::reset) a bus.
    pub fn hot_reset(&self, bus: &Bus) -> Result<Option<HostError>> {
        let members = bus.members.iter();
        let members = members.filter_map(|member| self.members.get(*member));
        bus.reset(members.map(|member| Arc::clone(&member.function)).collect())
    }

    /// Takes a member out and lets go of its function, whose BARs have left the map. Those behind it
    /// move up. An IOMMU that has nobody behind it any more is unregistered first.
    pub fn take_out(&mut self, place: usize) -> Result<()> {
        let member = self.members.get(place).context("a function is gone")?;
        let target = member.target;
        let alone = self.members.iter().filter(|it| it.target == target).count() == 1;
        if alone && target < self.targets.len() {
            let report = self.targets.remove(target).unregister();
            drop(self.spaces.remove(target));
            if let Some((_, why)) = report.quarantined.into_iter().next() {
                return Err(why).context("unregistering an IOMMU");
            }
            for member in &mut self.members {
                member.target = place_after(member.target, target).unwrap_or(member.target);
            }
        }
        self.buses.retain(|bus| !bus.members.contains(&place));
        for bus in &mut self.buses {
            let members = bus.members.iter();
            bus.members = members.filter_map(|it| place_after(*it, place)).collect();
        }
        let bypasses = std::mem::take(&mut self.bypasses).into_iter();
        let bypasses = bypasses.filter_map(|((from, to), how)| {
            Some(((place_after(from, place)?, place_after(to, place)?), how))
        });
        self.bypasses = bypasses.collect();
        drop(self.members.remove(place));
        Ok(())
    }

    /// The highest place for a BAR, in the window that it is in, that is not taken, nor one of
    /// `others`.
    pub fn place_for(&self, bar: &MemberBar, others: &[GpaRange]) -> Result<Option<GpaRange>> {
        let old = bar.range()?;
        let window = if self.windows.high.covers(&old) {
            self.windows.high
        } else {
            self.windows.low
        };
        Ok(self.free_place(window, old.size(), others))
    }

    /// Moves a BAR, with decoding on, to the highest free place of its window, as a guest would.
    /// Returns where it was, or nothing if there is no other place for it.
    pub fn move_bar(&self, member: &Member, bar: &MemberBar) -> Result<Option<GpaRange>> {
        let old = bar.range()?;
        let Some(new) = self.place_for(bar, &[])? else {
            return Ok(None);
        };
        GuestDriver(&member.function).write_bar(&bar.info, new.start());
        let seen = self.map.lookup(new.start());
        ensure!(
            seen.is_some_and(|seen| seen.region == bar.region),
            "{} {} does not appear at {new}, where it was moved to",
            member.function.name(),
            bar.info.index
        );
        Ok(Some(old))
    }

    /// The highest place in the window that is not taken, nor one of `others`.
    fn free_place(&self, window: GpaRange, size: u64, others: &[GpaRange]) -> Option<GpaRange> {
        let view = self.map.view().into_iter().map(|seen| seen.range);
        let taken: Vec<GpaRange> = view.chain(others.iter().copied()).collect();
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

    /// See [`Member::rest`]: all of them, and the first error of any.
    pub fn rest(&mut self) -> Result<()> {
        let mut done = Ok(());
        for member in &mut self.members {
            done = done.and(member.rest());
        }
        done
    }

    /// How a member reaches a BAR of another, as it stands.
    pub fn reach(&self, from: usize, bar: RegionId) -> Result<Reach> {
        let from = self.members.get(from).context("a function is gone")?;
        let target = self.targets.get(from.target).context("no such container")?;
        Ok(self.map.reach_of(target.id(), bar)?)
    }

    /// Every ordered pair and BAR, with the reach as it stands.
    pub fn pairs(&self) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        for (from, who) in self.members.iter().enumerate() {
            for (to, whose) in self.members.iter().enumerate() {
                if from == to {
                    continue;
                }
                for bar in whose.bars() {
                    let reach = self.reach(from, bar.region)?;
                    let bypass = self.bypasses.get(&(from, to)).cloned();
                    let pair = Pair::new(from, who, to, whose, &bar, &reach);
                    pairs.push(pair.with_bypass(bypass));
                }
            }
        }
        Ok(pairs)
    }
}

/// An address space that a target was made of, which can be unregistered and registered again.
pub struct RegisteredSpace {
    space: Space,
    switch: Arc<Announced>,
}

impl RegisteredSpace {
    /// Maps everything that its functions may reach, and keeps it so.
    pub fn register(&self, map: &RegionManager) -> Result<TargetHandle> {
        self.register_as((self.space.target)(), map)
    }

    fn register_as(&self, target: Box<dyn DmaTarget>, map: &RegionManager) -> Result<TargetHandle> {
        let mut options = TargetOptions::new(self.space.name.clone());
        options.filter = self.space.filter.clone();
        options.cut_off = Some(self.switch.clone());
        let handle = map.register(target, options);
        handle.context("mapping RAM for the devices failed")
    }
}

impl Member {
    /// Why it has no engine.
    pub fn no_engine(&self) -> String {
        let name = self.function.name();
        if Nvme::drives(self.function.host()) {
            format!("{name} moves data only by way of blocks of its disk: see --nvme-scratch")
        } else {
            format!("no driver for {name}'s DMA engine")
        }
    }

    /// Has its engine put back what it has changed, and stop, so that its function can be reset and
    /// RAM be taken away.
    pub fn rest(&mut self) -> Result<()> {
        let Some(engine) = &mut self.engine else {
            return Ok(());
        };
        let name = engine.name();
        engine
            .finish()
            .with_context(|| format!("putting back what the {name} has overwritten failed"))
    }

    /// Has it show what memory it has in its BARs, as its guest's driver would: an NVMe controller
    /// hides its memory buffer after each reset.
    pub fn show_memory(&self) {
        /// Where the controller is to take its own buffer for meant: no IOMMU leads there.
        const NOWHERE: Iova = Iova::new(1 << 62);
        let host = self.function.host();
        if Nvme::drives(host) {
            // What has none, or does not show it, is seen by the data.
            let _shown = ControllerMemoryBuffer::enable(host, NOWHERE);
        }
    }

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
