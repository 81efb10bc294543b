//! A memory map over the address spaces: what [`IoasTarget`] makes of them.
#![expect(
    unsafe_code,
    reason = "targets map memory for DMA; what the bench lends is made for that"
)]

use std::sync::Arc;

use iommu::{IoAddressSpace, IoasTarget, RamCopies};
use memory_map::{
    Access, Backing, DisabledBecause, Gpa, GpaRange, Priority, Reach, Reason, RegionId, RegionKind,
    RegionManager, RegionSpec, SubMapping, TargetHandle, TargetOptions,
};

use super::cases::{Space, move_to};
use super::dma_cases::{DESTINATION, OTHER, SOURCE, TEXT, iova, ram};
use super::{Bench, Function};
use crate::cases::{AT, PAGE};
use crate::verdict::{granted, same};
use crate::{Complaint, Verdict};

/// Where the BAR is at first, and where it is moved to, in pages after [`AT`].
pub(crate) const BAR: u64 = 0x1000;
const MOVED: u64 = 0x3000;

/// A map of the bench's RAM at [`AT`] and of its BAR.
pub(crate) struct Mapped {
    pub map: RegionManager,
    bar: RegionId,
    backing: Backing,
    copies: RamCopies,
}

pub(crate) fn broken(error: &dyn std::error::Error) -> Complaint {
    Complaint::Failed {
        expected: "the map to work".into(),
        got: error.to_string(),
    }
}

/// A region of the whole of `backing`.
pub(crate) fn spec(
    name: &str,
    at: u64,
    kind: RegionKind,
    priority: i32,
    backing: &Backing,
) -> Result<RegionSpec, Complaint> {
    let range = GpaRange::new(Gpa::new(at), backing.size()).map_err(|error| broken(&error))?;
    Ok(RegionSpec {
        name: name.into(),
        range,
        priority: Priority(priority),
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
    })
}

impl Mapped {
    /// The BAR is at its place and enabled; no target is registered.
    pub fn new(bench: &dyn Bench) -> Result<Self, Complaint> {
        bench.ram_write(SOURCE, &TEXT)?;
        bench.ram_write(DESTINATION, &[0; 8])?;
        let (map, backing) = (RegionManager::new(), bench.bar_backing());
        let memory = bench.ram_backing();
        let mut change = map.change();
        let region = change.add(spec("ram", AT, RegionKind::Ram, 0, &memory)?);
        change.enable(region);
        let at = iova(BAR).raw();
        let bar = change.add(spec("bar", at, RegionKind::DeviceMemory, 0, &backing)?);
        change.enable(bar);
        change.commit().map_err(|error| broken(&error))?;
        Ok(Self {
            map,
            bar,
            backing,
            copies: RamCopies::new(),
        })
    }

    pub fn register(&self, ioas: &Space) -> Result<TargetHandle, Complaint> {
        let ioas: Arc<dyn IoAddressSpace> = Arc::clone(ioas);
        // SAFETY: the map's backings are the bench's RAM, a memfd, and its BAR; both are
        // `host_memory`'s or the simulated host's, and no Rust reference points into them.
        let target = unsafe { IoasTarget::new(ioas, self.copies.clone()) };
        self.map
            .register(Box::new(target), TargetOptions::new("ioas"))
            .map_err(|error| broken(&error))
    }

    pub fn move_bar(&self, page: u64) -> Verdict {
        self.move_bar_to(iova(page).raw())
    }

    pub fn move_bar_to(&self, address: u64) -> Verdict {
        let mut change = self.map.change();
        change.move_to(self.bar, Gpa::new(address));
        change
            .commit_guest()
            .map(drop)
            .map_err(|error| broken(&error))
    }

    pub fn enable_bar(&self) -> Verdict {
        let mut change = self.map.change();
        change.enable(self.bar);
        change
            .commit_guest()
            .map(drop)
            .map_err(|error| broken(&error))
    }

    pub fn disable_bar(&self) -> Verdict {
        let mut change = self.map.change();
        change.disable(self.bar, DisabledBecause::DecodingOff);
        change
            .commit_guest()
            .map(drop)
            .map_err(|error| broken(&error))
    }

    /// What whoever has caused a revocation does.
    pub fn revoke(&self) -> Verdict {
        let mut change = self.map.change();
        change.revoke(&self.backing);
        change
            .commit_guest()
            .map(drop)
            .map_err(|error| broken(&error))
    }

    pub fn reach(&self, target: &TargetHandle) -> Option<Reach> {
        let reach = self.map.reach();
        let entry = reach
            .into_iter()
            .find(|entry| entry.target == target.id() && entry.region == self.bar);
        entry.map(|entry| entry.reach)
    }
}

/// Has the engine write the text to the BAR's first bytes at `page`, and tells what is there then.
pub(crate) fn written(bench: &mut dyn Bench, page: u64) -> Result<[u8; 8], Complaint> {
    bench.bar_write(0, OTHER)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(page), 8)?;
    granted(bench.bar_read(0))
}

pub(crate) fn a_bar_follows_the_map_into_two_address_spaces(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    move_to(bench, Function::Engine, &there)?;
    let mapped = Mapped::new(bench)?;
    let targets = [mapped.register(&here)?, mapped.register(&there)?];
    for target in &targets {
        same("the reach", mapped.reach(target), Some(Reach::Mapped))?;
    }
    same("in the BAR", written(bench, BAR)?, TEXT)?;
    mapped.move_bar(MOVED)?;
    same("at its old place", written(bench, BAR)?, OTHER)?;
    same("at its new place", written(bench, MOVED)?, TEXT)?;
    move_to(bench, Function::Engine, &here)?;
    same("in the other one", written(bench, MOVED)?, TEXT)?;
    mapped.disable_bar()?;
    same("when it is hidden", written(bench, MOVED)?, OTHER)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    drop(targets);
    for ioas in [&here, &there] {
        same("bytes left", granted(ioas.unmap_all())?, 0)?;
    }
    Ok(())
}

pub(crate) fn ram_in_two_targets_is_locked_once(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    if !bench.share_a_group() {
        granted(bench.attach(Function::Memory, &there))?;
    }
    let mapped = Mapped::new(bench)?;
    let limit = bench.limit_locked_memory(bench.ram_size())?;
    let first = mapped.register(&here)?;
    let second = mapped.register(&there)?;
    // The copy keeps it locked, and can be copied back.
    drop(first);
    let first = mapped.register(&here)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    drop((first, second, limit));
    for ioas in [&here, &there] {
        same("bytes left", granted(ioas.unmap_all())?, 0)?;
    }
    Ok(())
}

pub(crate) fn a_bar_that_was_revoked_is_made_anew_in_both(bench: &mut dyn Bench) -> Verdict {
    let (here, there) = (bench.ioas(), bench.alloc()?);
    move_to(bench, Function::Engine, &there)?;
    let mapped = Mapped::new(bench)?;
    let _targets = [mapped.register(&here)?, mapped.register(&there)?];
    for ioas in [&there, &here] {
        move_to(bench, Function::Engine, ioas)?;
        same("before", written(bench, BAR)?, TEXT)?;
        bench.set_decoding(false)?;
        bench.set_decoding(true)?;
        same("when it was revoked", written(bench, BAR)?, OTHER)?;
        mapped.revoke()?;
        same("after the repair", written(bench, BAR)?, TEXT)?;
    }
    move_to(bench, Function::Engine, &there)?;
    same("in the other one", written(bench, BAR)?, TEXT)
}

pub(crate) fn a_bar_that_is_revoked_is_unavailable_and_ram_stays(bench: &mut dyn Bench) -> Verdict {
    let mapped = Mapped::new(bench)?;
    let target = mapped.register(&bench.ioas())?;
    bench.set_decoding(false)?;
    mapped.revoke()?;
    let revoked = Reach::Unavailable(Reason::Revoked);
    same("the reach", mapped.reach(&target), Some(revoked))?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    bench.set_decoding(true)?;
    mapped.revoke()?;
    same("the reach", mapped.reach(&target), Some(Reach::Mapped))?;
    same("in the BAR", written(bench, BAR)?, TEXT)
}

/// RAM lies over the BAR's second page.
pub(crate) fn a_bar_that_is_partly_covered_maps_what_is_visible(bench: &mut dyn Bench) -> Verdict {
    let mapped = Mapped::new(bench)?;
    let target = mapped.register(&bench.ioas())?;
    let memory = bench.ram_backing();
    let at = iova(BAR + 1).raw();
    let mut over = spec("over", at, RegionKind::Ram, 1, &memory)?;
    let (start, size) = (Gpa::new(at), PAGE);
    over.range = GpaRange::new(start, size).map_err(|error| broken(&error))?;
    for part in &mut over.sub_mappings {
        part.size = size;
        part.backing_offset = DESTINATION;
    }
    let mut change = mapped.map.change();
    let over = change.add(over);
    change.enable(over);
    change.commit().map_err(|error| broken(&error))?;
    let partly = matches!(mapped.reach(&target), Some(Reach::Partly { .. }));
    same("partly covered", partly, true)?;
    bench.bar_write(2 * PAGE, OTHER)?;
    same("before what covers it", written(bench, BAR)?, TEXT)?;
    bench.engine().store(iova(BAR + 1), 8)?;
    same("in what covers it", ram(bench, DESTINATION)?, TEXT)?;
    bench.engine().store(iova(BAR + 2), 8)?;
    same("behind it", granted(bench.bar_read(2 * PAGE))?, TEXT)
}
