//! All that lies around the processors, put together. No KVM: a simulated processor does as well.
//!
//! An access that the hypervisor hands over is carried out by whoever the map's view says is
//! there, and by nobody else:
//!
//! | the view shows | what happens |
//! |---|---|
//! | a platform region | ECAM: config space. The interrupt controllers' are KVM's own: nobody |
//! | RAM | the access goes to its pages: a slot is just being redone |
//! | a BAR | the function carries it out |
//! | nothing | a BAR that the guest has half written appears ([`AssignedFunction::cpu_access`]); else nobody |
//!
//! Where nobody is, reads give all ones and writes do nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::{AssignedFunction, BarIndex};
use host_memory::Ram;
use memory_map::{
    Access as Rights, Backing, ChangeError, Gpa, GpaRange, Priority, RangeError, RegionId,
    RegionKind, RegionManager, RegionSpec, SubMapping,
};

use crate::chipset::{Chipset, Request};
use crate::function::{GuestFunction, PulledOut};
use crate::layout::RamPiece;
use crate::pci::{ConfigAddress, NoRoom, Place, Root};
use crate::platform::{ECAM, ECAM_SIZE, IO_APIC, KVM_PAGES, LOCAL_APIC};
use crate::{Access, Board, Notices};

/// RAM wins over every BAR that is placed on it.
const RAM_PRIORITY: Priority = Priority(100);
/// And the platform over both.
const PLATFORM_PRIORITY: Priority = Priority(200);
/// How often in a row memory behind a slot may not be had by one processor before the machine gives
/// up, and how long it waits each time.
const MOST_FAULTS: u32 = 1000;
const BETWEEN_FAULTS: Duration = Duration::from_millis(1);
/// After how many of them in a row it is looked for a device that does not answer.
const PATIENCE: u32 = 3;

/// Why the hardware cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    /// The map does not take the platform or the RAM.
    #[error("laying out RAM and platform failed")]
    Map(#[from] ChangeError),
    /// There is a fixed address that makes no range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// There are too many functions.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// Is told what the guest asks of the machine as a whole.
pub type Asked = Box<dyn Fn(Request) + Send + Sync>;

/// The machine without its processors. It is shared by the processors' threads.
pub struct Hardware {
    map: RegionManager,
    root: Root,
    chipset: Arc<Chipset>,
    functions: Vec<Arc<GuestFunction>>,
    places: Vec<Place>,
    /// Which function's, and which of its BARs.
    bars: BTreeMap<RegionId, (usize, BarIndex)>,
    ram: Backing,
    /// Where in `ram` each region of RAM begins.
    ram_offsets: BTreeMap<RegionId, u64>,
    ecam: RegionId,
    asked: Asked,
    notices: Arc<Notices>,
}

impl Hardware {
    /// Lays RAM and the platform out in the map, and puts the functions on the bus. What the guest
    /// asks of the machine as a whole goes to `asked`, in the thread of a processor.
    ///
    /// # Errors
    /// [`HardwareError`]; the regions that were added stay in the map.
    pub fn new(
        map: RegionManager,
        ram: Backing,
        pieces: &[RamPiece],
        functions: Vec<Arc<AssignedFunction>>,
        chipset: Chipset,
        asked: Asked,
        notices: Arc<Notices>,
    ) -> Result<Self, HardwareError> {
        let mut change = map.change();
        let ecam = change.add(platform("ECAM", ECAM, ECAM_SIZE)?);
        let mut enabled = vec![ecam];
        for (name, start, size) in [
            ("I/O APIC", IO_APIC, 0x1000),
            ("local APICs", LOCAL_APIC, 0x10_0000),
            ("KVM's own pages", KVM_PAGES, 0x4000),
        ] {
            enabled.push(change.add(platform(name, start, size)?));
        }
        let mut ram_offsets = BTreeMap::new();
        for (number, piece) in pieces.iter().enumerate() {
            let region = change.add(RegionSpec {
                name: format!("RAM {number}").into(),
                range: piece.range,
                priority: RAM_PRIORITY,
                kind: RegionKind::Ram,
                access: Rights::ReadWrite,
                shareable: true,
                label: None,
                sub_mappings: vec![SubMapping {
                    offset: 0,
                    size: piece.range.size(),
                    backing: ram.clone(),
                    backing_offset: piece.offset,
                }],
            });
            ram_offsets.insert(region, piece.offset);
            enabled.push(region);
        }
        for region in enabled {
            change.enable(region);
        }
        change.commit()?;

        let root = Root::new();
        let mut places = Vec::new();
        let mut bars = BTreeMap::new();
        let functions: Vec<_> = functions
            .into_iter()
            .map(|function| Arc::new(GuestFunction::new(function, notices.clone())))
            .collect();
        for (index, function) in functions.iter().enumerate() {
            places.push(root.add(function.clone())?);
            for (region, bar) in function.regions() {
                bars.insert(region, (index, bar));
            }
        }
        Ok(Self {
            map,
            root,
            chipset: Arc::new(chipset),
            functions,
            places,
            bars,
            ram,
            ram_offsets,
            ecam,
            asked,
            notices,
        })
    }

    /// The chipset.
    #[must_use]
    pub const fn chipset(&self) -> &Arc<Chipset> {
        &self.chipset
    }

    /// Where each function was put, in their order.
    #[must_use]
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Makes everything what it was at power-on, the functions first: bus mastering off, of all of
    /// them before a BAR of one leaves the map, then reset, so that nothing writes to RAM any more.
    /// RAM keeps what is in it. No processor may run.
    pub fn reset(&self) {
        // A function whose BARs leave the map could be written to by one that still masters the bus,
        // and one that is being reset by one that is not quiet yet.
        for function in &self.functions {
            function.stop_mastering();
        }
        for function in &self.functions {
            function.quiesce();
        }
        for function in &self.functions {
            function.reset();
        }
        self.root.reset();
        self.chipset.reset();
    }

    /// Pulls a function out, by its place among those that were given: it masters the bus no more, its
    /// interrupts end, and its BARs leave the map. The others are not touched. To the guest it is as
    /// a device that was pulled out without a word, and stays away over a reset. Processors may run.
    /// None if there is no such function, or not any more.
    pub fn pull_out(&self, function: usize) -> Option<PulledOut> {
        self.functions.get(function)?.pull_out()
    }

    fn ram(&self, offset: u64, access: Access<'_>) {
        let Some(ram) = self.ram.downcast_ref::<Ram>() else {
            return;
        };
        let done = match access {
            Access::Read(data) => ram.read(offset, data),
            Access::Write(data) => ram.write(offset, data),
        };
        if let Err(error) = done {
            self.notices.note("RAM", "an access is refused", &error);
        }
    }

    /// Takes the BARs of functions that do not answer out of the map. Whether there are any.
    fn take_away_the_dead(&self) -> bool {
        // Of all of them, not up to the first.
        let dead = self.functions.iter().filter(|it| it.hide_if_dead());
        dead.count() > 0
    }
}

impl Board for Hardware {
    fn port(&self, port: u16, access: Access<'_>) {
        if let Some(request) = self.chipset.port(port, access, &self.root) {
            (self.asked)(request);
        }
    }

    fn memory(&self, gpa: Gpa, mut access: Access<'_>) {
        if let Access::Read(data) = &mut access {
            data.fill(0xff);
        }
        let Some(seen) = self.map.lookup(gpa) else {
            let found = self
                .functions
                .iter()
                .find_map(|function| Some((function, function.settle(gpa)?)));
            if let Some((function, (bar, offset))) = found {
                function.bar(bar, offset, access);
            }
            return;
        };
        let into = gpa.raw().saturating_sub(seen.range.start().raw());
        let offset = seen.offset.saturating_add(into);
        if seen.region == self.ecam {
            if let Some(at) = ConfigAddress::from_ecam(offset) {
                match access {
                    Access::Read(data) => self.root.read(at, data),
                    Access::Write(data) => self.root.write(at, data),
                }
            }
        } else if let Some((index, bar)) = self.bars.get(&seen.region) {
            if let Some(function) = self.functions.get(*index) {
                function.bar(*bar, offset, access);
            }
        } else if let Some(begins) = self.ram_offsets.get(&seen.region) {
            self.ram(begins.saturating_add(offset), access);
        }
    }

    fn memory_fault(&self, before: u32) -> bool {
        if before == 0 {
            for function in &self.functions {
                function.look_again();
            }
        } else if before < PATIENCE || !self.take_away_the_dead() {
            std::thread::sleep(BETWEEN_FAULTS);
        }
        before < MOST_FAULTS
    }
}

impl fmt::Debug for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hardware")
            .field("root", &self.root)
            .field("chipset", &self.chipset)
            .field("functions", &self.functions)
            .finish_non_exhaustive()
    }
}

/// A region that covers what the guest puts there, and has nothing behind it.
fn platform(name: &str, start: Gpa, size: u64) -> Result<RegionSpec, RangeError> {
    Ok(RegionSpec {
        name: name.into(),
        range: GpaRange::new(start, size)?,
        priority: PLATFORM_PRIORITY,
        kind: RegionKind::DeviceMemory,
        access: Rights::ReadWrite,
        shareable: false,
        label: None,
        sub_mappings: Vec::new(),
    })
}
