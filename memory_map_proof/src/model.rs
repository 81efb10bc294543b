//! The model: the map once more, cell by cell, without a thought to cost.
//!
//! A cell is half a page, so that regions can start and end in the middle of one. Every question
//! is answered by looking at every region and every cell.

use memory_map::{
    Access, BackingId, ConsumerKind, DisabledBecause, Filter, Gpa, Label, Reason, RegionId,
    RegionKind, TargetLimits,
};

use crate::kernel::Translation;
use crate::shape::Shape;
use crate::{CELL, GRANULE};

/// Cells at the bottom of the address space.
pub const LOW: usize = 192;
/// Cells at its very top.
pub const HIGH: usize = 32;
/// All cells that are looked at. No script reaches beyond them.
pub const CELLS: usize = LOW + HIGH;

/// Where a cell starts.
#[must_use]
pub const fn address(cell: usize) -> u64 {
    if cell < LOW {
        cell as u64 * CELL
    } else {
        0_u64.wrapping_sub((CELLS - cell) as u64 * CELL)
    }
}

/// What lies behind one granule of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// The backing.
    pub backing: BackingId,
    /// Where in it, in bytes.
    pub offset: u64,
}

/// A region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Its id, which is also its age.
    pub id: RegionId,
    /// Its number in this script; its name is made of it.
    pub number: usize,
    /// Where it starts, whether it fits there or not.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// Why it is not enabled.
    pub disabled: Option<DisabledBecause>,
    /// Who wins.
    pub priority: i32,
    /// RAM or device memory.
    pub kind: RegionKind,
    /// Whether it can be written.
    pub access: Access,
    /// Whether sharing consumers see it.
    pub shareable: bool,
    /// What filters know it by.
    pub label: Option<&'static str>,
    /// One for every whole granule.
    pub pages: Vec<Option<Page>>,
}

impl Region {
    /// Why the guest does not see it, if so.
    #[must_use]
    pub fn inactive(&self) -> Option<DisabledBecause> {
        let wraps = self.start.checked_add(self.size - 1).is_none();
        let wrapped = wraps.then_some(DisabledBecause::Wraps(Gpa::new(self.start)));
        self.disabled.or(wrapped)
    }

    /// RAM must start on a page.
    #[must_use]
    pub fn is_misplaced(&self) -> bool {
        self.kind == RegionKind::Ram && !self.start.is_multiple_of(GRANULE)
    }

    fn covers(&self, address: u64) -> bool {
        self.inactive().is_none() && address >= self.start && address - self.start < self.size
    }

    /// What lies behind an address that it covers.
    #[must_use]
    pub fn page_at(&self, address: u64) -> Option<Page> {
        let into = address - self.start;
        let page = (*self.pages.get(index(into / GRANULE))?)?;
        let offset = page.offset + into % GRANULE;
        Some(Page { offset, ..page })
    }
}

/// A small number as an index.
#[must_use]
pub fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// What is seen at one cell.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'m> {
    /// The region.
    pub region: &'m Region,
    /// What lies behind the cell.
    pub page: Option<Page>,
}

/// Every region, in the order of age.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    /// The regions.
    pub regions: Vec<Region>,
}

/// What the guest sees, by cell.
pub type View<'m> = Vec<Option<Seen<'m>>>;

impl Model {
    /// What the guest sees at an address: of those that cover it the one of highest priority,
    /// and of equals the oldest.
    #[must_use]
    pub fn seen(&self, address: u64) -> Option<&Region> {
        let covering = self.regions.iter().filter(|region| region.covers(address));
        covering.max_by_key(|region| (region.priority, std::cmp::Reverse(region.id)))
    }

    /// What it sees everywhere.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        (0..CELLS)
            .map(|cell| {
                let region = self.seen(address(cell))?;
                let page = region.page_at(address(cell));
                Some(Seen { region, page })
            })
            .collect()
    }
}

/// What one target should hold at one cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// Nothing: there are no pages.
    Nothing,
    /// A mapping.
    Mapped(Translation),
    /// Nothing, although there are pages: for this reason.
    Unmappable(Reason),
}

/// What a target is like, for the model.
#[derive(Debug, Clone)]
pub struct Viewer<'t> {
    /// Its limits as they are now.
    pub limits: &'t TargetLimits,
    /// What else it is like.
    pub shape: &'t Shape,
}

impl Viewer<'_> {
    /// Why it may see nothing of a region, if so.
    #[must_use]
    pub fn refusal(&self, region: &Region) -> Option<Reason> {
        let ram = region.kind == RegionKind::Ram;
        let filtered = match &self.shape.filter {
            Filter::All => false,
            Filter::RamOnly => !ram,
            Filter::Labelled(labels) => {
                !ram && !region
                    .label
                    .is_some_and(|l| labels.contains(&Label::from(l)))
            }
        };
        if filtered || (self.shape.kind == ConsumerKind::Sharing && !(ram && region.shareable)) {
            Some(Reason::Filtered)
        } else if !ram && !self.limits.device_memory {
            Some(Reason::DeviceMemoryRefused)
        } else if region.access == Access::ReadOnly && !self.limits.read_only {
            Some(Reason::ReadOnlyUnsupported)
        } else {
            None
        }
    }

    /// What it should hold, by cell.
    #[must_use]
    pub fn due(&self, view: &View<'_>) -> Vec<Due> {
        (0..CELLS).map(|cell| self.due_at(view, cell)).collect()
    }

    fn due_at(&self, view: &View<'_>, cell: usize) -> Due {
        let Some(Seen {
            region,
            page: Some(page),
        }) = view[cell]
        else {
            return Due::Nothing;
        };
        if let Some(reason) = self.refusal(region) {
            return Due::Unmappable(reason);
        }
        let size = self.limits.page_size;
        let start = address(cell) & !(size - 1);
        let aligned = (address(cell).wrapping_sub(page.offset)) % size == 0;
        // The whole of the target's page must show this region, with pages that follow each other.
        let first = cell - index((address(cell) - start) / CELL);
        let same = |at| is_same(view, at, cell);
        let whole = (first..first + index(size / CELL)).all(same);
        if !aligned || !whole {
            return Due::Unmappable(if run_of(view, cell) < size {
                Reason::SmallerThanPage { page: size }
            } else {
                Reason::NotPageAligned { page: size }
            });
        }
        let (above, last) = (&self.limits.allowed, start + (size - 1));
        let holds = |at: u64, range: &memory_map::IovaRange| {
            (range.start().raw()..=range.last().raw()).contains(&at)
        };
        if above.iter().any(|r| holds(start, r) && holds(last, r)) {
            return Due::Mapped(Translation {
                backing: page.backing,
                offset: page.offset,
                access: region.access,
            });
        }
        let end = above.last().map_or(0, |range| range.last().raw());
        Due::Unmappable(Reason::OutsideAperture { last: end })
    }
}

/// Whether two cells show the same region, and pages of the same backing that lie as far apart.
fn is_same(view: &View<'_>, one: usize, other: usize) -> bool {
    let seen = |cell: usize| {
        let seen = view.get(cell).copied().flatten()?;
        let page = seen.page?;
        let distance = address(cell).wrapping_sub(page.offset);
        Some((seen.region.id, page.backing, distance))
    };
    seen(one).is_some() && seen(one) == seen(other)
}

/// How many bytes around a cell are one stretch with it.
fn run_of(view: &View<'_>, cell: usize) -> u64 {
    // The two stretches of cells do not touch.
    let stretch = if cell < LOW { 0..LOW } else { LOW..CELLS };
    let same = |at: &usize| is_same(view, *at, cell);
    let before = (stretch.start..cell).rev().take_while(same).count();
    let after = (cell..stretch.end).take_while(same).count();
    (before + after) as u64 * CELL
}
