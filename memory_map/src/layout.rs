//! The layout: every region with its state, and the flat view that follows from it.
//!
//! Each operation says which addresses it may have changed and how to undo it; nothing here
//! knows of consumers.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use smallvec::{SmallVec, smallvec};

use crate::change::Operation;
use crate::pages::{Pages, RegionPages};
use crate::view::{FlatView, Rank, Seen};
use crate::{
    Access, Backing, BackingId, DisabledBecause, GRANULE, Gpa, GpaRange, InvalidChange, Label,
    Priority, RegionId, RegionKind, RegionName, RegionSpec, SubMapping,
};

/// Where a region lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    At(GpaRange),
    /// It would wrap past the end of the address space, so it lies nowhere.
    Wraps(Gpa),
}

#[derive(Debug, Clone)]
pub(crate) struct Region {
    pub(crate) name: RegionName,
    pub(crate) size: u64,
    pub(crate) place: Place,
    pub(crate) disabled: Option<DisabledBecause>,
    pub(crate) priority: Priority,
    pub(crate) kind: RegionKind,
    pub(crate) access: Access,
    pub(crate) shareable: bool,
    pub(crate) label: Option<Label>,
    pub(crate) pages: RegionPages,
}

impl Region {
    /// Where it is enabled and lies, if so.
    pub(crate) fn active(&self) -> Option<GpaRange> {
        match (self.disabled, self.place) {
            (None, Place::At(range)) => Some(range),
            _ => None,
        }
    }

    /// Why it is not active, if so.
    pub(crate) fn inactive(&self) -> Option<DisabledBecause> {
        match (self.disabled, self.place) {
            (Some(why), _) => Some(why),
            (None, Place::Wraps(gpa)) => Some(DisabledBecause::Wraps(gpa)),
            (None, Place::At(_)) => None,
        }
    }

    /// The pages that overlap the offsets `start..=last`.
    pub(crate) fn pages_in(&self, start: u64, last: u64) -> impl Iterator<Item = (u64, &Pages)> {
        self.pages.overlapping(start, last)
    }
}

/// How to take one operation back.
#[derive(Debug)]
pub(crate) enum Inverse {
    Remove(RegionId),
    Insert(RegionId, Box<Region>),
    Place(RegionId, Place, Option<DisabledBecause>),
    Access(RegionId, Access),
    Pages(RegionId, (u64, u64), SmallVec<[(u64, Pages); 1]>),
}

/// As many as one change of one region makes lie in place.
pub(crate) type Inverses = SmallVec<[Inverse; 4]>;

/// What a sequence of operations came to.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Addresses (inclusive) whose translation may have changed; in any order, may overlap.
    pub(crate) dirty: SmallVec<[(u64, u64); 4]>,
    /// How to take it back, in the order it was done.
    pub(crate) inverses: Inverses,
    /// Backings that regions have gained or lost.
    pub(crate) backings: SmallVec<[BackingId; 4]>,
    /// Backings whose epoch has advanced. That cannot be taken back.
    pub(crate) revoked: Vec<Backing>,
}

/// Parts of regions that are in the layout no more.
#[derive(Debug, Default)]
pub(crate) struct Leftovers {
    regions: Vec<Region>,
    inverses: Vec<Inverse>,
}

impl From<Inverses> for Leftovers {
    fn from(inverses: Inverses) -> Self {
        Self {
            regions: Vec::new(),
            inverses: inverses.into_vec(),
        }
    }
}

/// Lays ids out in a table in the order they were given, so that a walk over neighbours stays in
/// the cache. They are counted up by this crate, so nobody can choose them such that they collide.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        // The table takes the place from the lowest bits, and compares the highest seven: those
        // of the id times 2^64 over the golden ratio.
        const HIGHEST: u64 = 0x7f << 57;
        self.0 & !HIGHEST | self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) & HIGHEST
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0.rotate_left(8) ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = id;
    }
}

pub(crate) type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;
pub(crate) type IdSet<K> = HashSet<K, BuildHasherDefault<IdHasher>>;

#[derive(Debug, Default)]
pub(crate) struct Layout {
    pub(crate) regions: IdMap<RegionId, Region>,
    pub(crate) view: FlatView,
    /// How many of a region's pages are of a backing; never zero.
    users: Users,
}

impl Layout {
    /// Carries out operations in order; all of them or, where one makes no sense, none.
    pub(crate) fn apply(
        &mut self,
        operations: &mut [Operation],
    ) -> Result<Applied, (InvalidChange, Leftovers)> {
        let mut applied = Applied::default();
        for operation in operations {
            if let Err(invalid) = self.apply_one(operation, &mut applied) {
                return Err((invalid, self.revert(applied.inverses)));
            }
        }
        for backing in &applied.revoked {
            backing.advance_epoch();
            self.mark_users(backing.id(), &mut applied.dirty);
        }
        Ok(applied)
    }

    fn apply_one(
        &mut self,
        operation: &mut Operation,
        applied: &mut Applied,
    ) -> Result<(), InvalidChange> {
        match *operation {
            Operation::Add(id, ref mut region) => {
                if let Some(region) = region.take() {
                    applied.backings.extend(backings(&region));
                    self.insert(id, *region);
                    applied.inverses.push(Inverse::Remove(id));
                }
            }
            Operation::Remove(id) => {
                let region = self.take(id).ok_or(InvalidChange::UnknownRegion(id))?;
                applied.dirty.extend(region.active().map(bounds));
                applied.backings.extend(backings(&region));
                applied.inverses.push(Inverse::Insert(id, Box::new(region)));
            }
            Operation::Enable(id) => self.set_place(id, applied, |place, _| (place, None))?,
            Operation::Disable(id, because) => {
                self.set_place(id, applied, |place, _| (place, Some(because)))?;
            }
            Operation::Move(id, to) => {
                let region = self.region(id)?;
                check_place(&region.name, region.kind, to)?;
                let size = region.size;
                let place = GpaRange::new(to, size).map_or(Place::Wraps(to), Place::At);
                self.set_place(id, applied, |_, disabled| (place, disabled))?;
            }
            Operation::SetAccess(id, access) => {
                let region = self.region_mut(id)?;
                let before = std::mem::replace(&mut region.access, access);
                if before != access {
                    applied.dirty.extend(region.active().map(bounds));
                    applied.inverses.push(Inverse::Access(id, before));
                }
            }
            Operation::SetSubMapping(id, ref sub) => {
                let region = self.region(id)?;
                let (start, pages) = checked_pages(&region.name, region.size, sub)?;
                self.replace_pages(id, (start, pages.last), smallvec![(start, pages)], applied);
            }
            Operation::RemoveSubMapping(id, offset, size) => {
                let region = self.region(id)?;
                let span = checked_span(&region.name, region.size, offset, size)?;
                self.replace_pages(id, span, SmallVec::new(), applied);
            }
            Operation::Revoke(ref backing) => applied.revoked.push(backing.clone()),
        }
        Ok(())
    }

    /// Takes operations back, the last one first. Returns what is left over, for the caller to
    /// drop without a lock: it may be the last of an embedder's object.
    #[must_use]
    pub(crate) fn revert(&mut self, inverses: Inverses) -> Leftovers {
        let mut leftovers = Leftovers::default();
        for inverse in inverses.into_iter().rev() {
            match inverse {
                Inverse::Remove(id) => leftovers.regions.extend(self.take(id)),
                Inverse::Insert(id, region) => self.insert(id, *region),
                Inverse::Place(id, place, disabled) => {
                    // The region was there a moment ago; nothing else could remove it.
                    let _known =
                        self.set_place(id, &mut Applied::default(), |_, _| (place, disabled));
                }
                Inverse::Access(id, access) => {
                    if let Some(region) = self.regions.get_mut(&id) {
                        region.access = access;
                    }
                }
                Inverse::Pages(id, span, pages) => {
                    let mut applied = Applied::default();
                    self.replace_pages(id, span, pages, &mut applied);
                    leftovers.inverses.extend(applied.inverses);
                }
            }
        }
        leftovers
    }

    pub(crate) fn region(&self, id: RegionId) -> Result<&Region, InvalidChange> {
        self.regions
            .get(&id)
            .ok_or(InvalidChange::UnknownRegion(id))
    }

    fn region_mut(&mut self, id: RegionId) -> Result<&mut Region, InvalidChange> {
        self.regions
            .get_mut(&id)
            .ok_or(InvalidChange::UnknownRegion(id))
    }

    /// What is seen in `start..=last`, with the region.
    pub(crate) fn seen(&self, start: u64, last: u64) -> impl Iterator<Item = (Seen, &Region)> {
        self.view
            .seen(start, last)
            .filter_map(|seen| Some((seen, self.regions.get(&seen.region)?)))
    }

    /// The regions that have pages of a backing.
    fn users_of(&self, backing: BackingId) -> impl Iterator<Item = RegionId> + '_ {
        self.users
            .range((backing, RegionId(0))..=(backing, RegionId(u64::MAX)))
            .map(|(&(_, id), _)| id)
    }

    /// Whether any region has pages of this backing.
    pub(crate) fn uses(&self, backing: BackingId) -> bool {
        self.users_of(backing).next().is_some()
    }

    /// Adds to `dirty` every address at which pages of a backing are active.
    pub(crate) fn mark_users(&self, backing: BackingId, dirty: &mut impl Extend<(u64, u64)>) {
        for id in self.users_of(backing) {
            let Some(region) = self.regions.get(&id) else {
                continue;
            };
            let Some(range) = region.active() else {
                continue;
            };
            let all = region.pages.iter();
            let its = all.filter(|(_, pages)| pages.backing.id() == backing);
            dirty.extend(its.map(|(offset, pages)| span_at(range, offset, pages.last)));
        }
    }

    fn insert(&mut self, id: RegionId, region: Region) {
        for (_, pages) in region.pages.iter() {
            count_user(&mut self.users, pages.backing.id(), id);
        }
        if let Some(range) = region.active() {
            let (start, last) = bounds(range);
            self.view
                .insert(start, last, Rank::new(region.priority, id));
        }
        self.regions.insert(id, region);
    }

    fn take(&mut self, id: RegionId) -> Option<Region> {
        let region = self.regions.remove(&id)?;
        for (_, pages) in region.pages.iter() {
            discount_user(&mut self.users, pages.backing.id(), id);
        }
        if let Some(range) = region.active() {
            let (start, last) = bounds(range);
            self.view
                .remove(start, last, Rank::new(region.priority, id));
        }
        Some(region)
    }

    fn set_place(
        &mut self,
        id: RegionId,
        applied: &mut Applied,
        change: impl FnOnce(Place, Option<DisabledBecause>) -> (Place, Option<DisabledBecause>),
    ) -> Result<(), InvalidChange> {
        let region = self
            .regions
            .get_mut(&id)
            .ok_or(InvalidChange::UnknownRegion(id))?;
        let before = (region.place, region.disabled);
        let active_before = region.active();
        (region.place, region.disabled) = change(before.0, before.1);
        let active_after = region.active();
        if (region.place, region.disabled) != before {
            applied
                .inverses
                .push(Inverse::Place(id, before.0, before.1));
        }
        if active_before == active_after {
            return Ok(());
        }
        let rank = Rank::new(region.priority, id);
        if let Some((start, last)) = active_before.map(bounds) {
            self.view.remove(start, last, rank);
            applied.dirty.push((start, last));
        }
        if let Some((start, last)) = active_after.map(bounds) {
            self.view.insert(start, last, rank);
            applied.dirty.push((start, last));
        }
        Ok(())
    }

    /// Puts `new` in the place of all pages in the offsets `span`; what `new` does not cover is
    /// left without.
    fn replace_pages(
        &mut self,
        id: RegionId,
        span: (u64, u64),
        new: SmallVec<[(u64, Pages); 1]>,
        applied: &mut Applied,
    ) {
        let Some(region) = self.regions.get_mut(&id) else {
            return;
        };
        let old: SmallVec<[(u64, Pages); 1]> = region
            .pages_in(span.0, span.1)
            .map(|(offset, pages)| (offset, pages.clone()))
            .collect();
        // To take this back, everything from the first old or new page to the last is replaced.
        let mut undo_span = span;
        for (offset, pages) in &old {
            undo_span = (undo_span.0.min(*offset), undo_span.1.max(pages.last));
            region.pages.remove(*offset);
            applied.backings.push(pages.backing.id());
            discount_user(&mut self.users, pages.backing.id(), id);
            if *offset < span.0 {
                let mut head = pages.clone();
                head.last = span.0.wrapping_sub(1);
                count_user(&mut self.users, head.backing.id(), id);
                region.pages.insert(*offset, head);
            }
            if pages.last > span.1 {
                let mut tail = pages.clone();
                let start = span.1.wrapping_add(1);
                tail.backing_offset = tail
                    .backing_offset
                    .wrapping_add(start.wrapping_sub(*offset));
                count_user(&mut self.users, tail.backing.id(), id);
                region.pages.insert(start, tail);
            }
        }
        for (offset, pages) in new {
            applied.backings.push(pages.backing.id());
            count_user(&mut self.users, pages.backing.id(), id);
            region.pages.insert(offset, pages);
        }
        // What goes on in the same pages is one again: at the ends of the span, and where two of
        // the new ones meet.
        let seams = region.pages.starts(span.0, span.1.saturating_add(1));
        for seam in seams {
            if let Some(joined) = region.pages.join_before(seam) {
                discount_user(&mut self.users, joined, id);
            }
        }
        if let Some(range) = region.active() {
            applied.dirty.push(span_at(range, span.0, span.1));
        }
        applied.inverses.push(Inverse::Pages(id, undo_span, old));
    }
}

fn backings(region: &Region) -> impl Iterator<Item = BackingId> + '_ {
    region.pages.iter().map(|(_, pages)| pages.backing.id())
}

type Users = BTreeMap<(BackingId, RegionId), usize>;

fn count_user(users: &mut Users, backing: BackingId, id: RegionId) {
    let count = users.entry((backing, id)).or_default();
    *count = count.saturating_add(1);
}

fn discount_user(users: &mut Users, backing: BackingId, id: RegionId) {
    if let Entry::Occupied(mut count) = users.entry((backing, id)) {
        match count.get().checked_sub(1) {
            None | Some(0) => drop(count.remove()),
            Some(left) => *count.get_mut() = left,
        }
    }
}

/// A range's first and last address.
pub(crate) fn bounds(range: GpaRange) -> (u64, u64) {
    (range.start().raw(), range.last().raw())
}

/// Where the offsets `start..=last` of a region at `range` lie. The offsets are within it, so
/// nothing wraps.
fn span_at(range: GpaRange, start: u64, last: u64) -> (u64, u64) {
    let base = range.start().raw();
    (base.wrapping_add(start), base.wrapping_add(last))
}

/// A region as it is added: disabled, with its pages checked.
pub(crate) fn region_from(spec: RegionSpec) -> Result<Region, InvalidChange> {
    let size = spec.range.size();
    check_place(&spec.name, spec.kind, spec.range.start())?;
    let mut pages = RegionPages::default();
    for sub in &spec.sub_mappings {
        let (start, new) = checked_pages(&spec.name, size, sub)?;
        if pages.overlapping(start, new.last).next().is_some() {
            return Err(InvalidChange::SubMappingsOverlap {
                region: spec.name,
                offset: start,
            });
        }
        pages.insert(start, new);
    }
    for seam in pages.starts(0, u64::MAX) {
        pages.join_before(seam);
    }
    Ok(Region {
        name: spec.name,
        size,
        place: Place::At(spec.range),
        disabled: Some(DisabledBecause::New),
        priority: spec.priority,
        kind: spec.kind,
        access: spec.access,
        shareable: spec.shareable,
        label: spec.label,
        pages,
    })
}

/// RAM that does not start on a page could not be mapped at all.
fn check_place(name: &RegionName, kind: RegionKind, at: Gpa) -> Result<(), InvalidChange> {
    if kind == RegionKind::Ram && !at.is_aligned(GRANULE) {
        return Err(InvalidChange::MisalignedRam {
            region: name.clone(),
            at,
        });
    }
    Ok(())
}

/// The first and last offset of `size` bytes at `offset`, checked against the region.
fn checked_span(
    region: &RegionName,
    region_size: u64,
    offset: u64,
    size: u64,
) -> Result<(u64, u64), InvalidChange> {
    let misaligned = [offset, size].iter().any(|n| n % GRANULE != 0);
    if misaligned || size == 0 {
        return Err(InvalidChange::Misaligned {
            region: region.clone(),
            offset,
            size,
            backing_offset: 0,
        });
    }
    match offset.checked_add(size) {
        Some(end) if end <= region_size => Ok((offset, end.wrapping_sub(1))),
        _ => Err(InvalidChange::PastRegion {
            region: region.clone(),
            offset,
            size,
            region_size,
        }),
    }
}

fn checked_pages(
    region: &RegionName,
    region_size: u64,
    sub: &SubMapping,
) -> Result<(u64, Pages), InvalidChange> {
    let SubMapping {
        offset,
        size,
        ref backing,
        backing_offset,
    } = *sub;
    if backing_offset % GRANULE != 0 {
        return Err(InvalidChange::Misaligned {
            region: region.clone(),
            offset,
            size,
            backing_offset,
        });
    }
    let (start, last) = checked_span(region, region_size, offset, size)?;
    let end = backing_offset.checked_add(size);
    if end.is_none_or(|end| end > backing.size()) {
        return Err(InvalidChange::PastBacking {
            region: region.clone(),
            backing_offset,
            size,
            backing_size: backing.size(),
        });
    }
    Ok((
        start,
        Pages {
            last,
            backing: backing.clone(),
            backing_offset,
        },
    ))
}
