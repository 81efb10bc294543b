//! What events cost in kernel calls and in time, next to the bare calls in the same run.
//!
//! The event is done some times through a memory map, and then the same calls are made as often by
//! hand, in turns. The clock is looked at once for each turn: in a nested machine that may itself
//! be an event.
#![expect(
    unsafe_code,
    reason = "targets map memory for DMA; what the bench lends is made for that"
)]

use std::sync::Arc;
use std::time::Instant;

use iommu::{IoasTarget, RamCopies};
use memory_map::{Access, Backing, RegionKind, RegionManager, SubMapping, TargetOptions};
use serde::Serialize;

use super::Bench;
use super::cases::Space;
use super::counted::{Calls, Counted};
use super::target_cases::{BAR, Mapped, broken, spec};
use crate::cases::{AT, PAGE, range};
use crate::verdict::granted;
use crate::{Complaint, Verdict};

/// What one event costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Figure {
    /// What happens.
    pub event: String,
    /// How many turns there were, and how often it happened in each.
    pub turns: usize,
    /// See `turns`.
    pub in_a_turn: u64,
    /// The calls of one.
    pub calls: Calls,
    /// How long one took through the map in each turn, in nanoseconds, sorted.
    pub with_the_map: Vec<u64>,
    /// How long its kernel calls took, made by hand, in each turn, in nanoseconds, sorted.
    pub bare: Vec<u64>,
}

impl Figure {
    fn new(event: impl Into<String>, in_a_turn: u64) -> Self {
        Self {
            event: event.into(),
            turns: 0,
            in_a_turn,
            calls: Calls::default(),
            with_the_map: Vec::new(),
            bare: Vec::new(),
        }
    }

    /// The median of one of the two, in nanoseconds.
    #[must_use]
    pub fn median(times: &[u64]) -> u64 {
        times.get(times.len() / 2).copied().unwrap_or(0)
    }

    /// The share of the medians' difference in the time through the map, in thousandths.
    #[must_use]
    pub fn share_of_the_map(&self) -> u64 {
        let (with, bare) = (Self::median(&self.with_the_map), Self::median(&self.bare));
        let own = with.saturating_sub(bare).saturating_mul(1000);
        own.checked_div(with).unwrap_or(0)
    }

    /// One turn: the event, through the map that maps into `counted`, and the same by hand.
    ///
    /// # Errors
    /// The work's, and [`Complaint::Failed`] where it takes other calls than in the turns before.
    fn turn(
        &mut self,
        counted: &Counted,
        mut event: impl FnMut(u64) -> Verdict,
        mut by_hand: impl FnMut() -> Verdict,
    ) -> Verdict {
        let before = counted.calls();
        let with_the_map = self.each(|| (0..self.in_a_turn).try_for_each(&mut event))?;
        let calls = (counted.calls() - before).each(self.in_a_turn);
        if self.turns > 0 && self.calls != calls {
            return Err(Complaint::Failed {
                expected: format!("{:?} for {}, as before", self.calls, self.event),
                got: format!("{calls:?}"),
            });
        }
        let bare = self.each(|| (0..self.in_a_turn).try_for_each(|_| by_hand()))?;
        self.calls = calls;
        self.turns = self.turns.saturating_add(1);
        for (times, time) in [
            (&mut self.with_the_map, with_the_map),
            (&mut self.bare, bare),
        ] {
            let place = times.partition_point(|other| *other < time);
            times.insert(place, time);
        }
        Ok(())
    }

    /// How long one takes, of as many as there are in a turn.
    fn each(&self, work: impl FnOnce() -> Verdict) -> Result<u64, Complaint> {
        let start = Instant::now();
        work()?;
        let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(nanos.checked_div(self.in_a_turn).unwrap_or(0))
    }
}

/// Where the BAR goes to and comes from, in pages.
const MOVED: u64 = 0x3000;

/// A BAR that is moved, one that is hidden and shown, one that is revoked: `turns` times as often
/// as `in_a_turn` says.
///
/// # Errors
/// Where the host does not keep the contract.
pub fn bar_events(
    bench: &dyn Bench,
    turns: usize,
    in_a_turn: u64,
) -> Result<Vec<Figure>, Complaint> {
    let mapped = Mapped::new(bench)?;
    let counted = Arc::new(Counted::new(bench.ioas()));
    let target = mapped.register(&(Arc::clone(&counted) as Space))?;
    // Where no map of ours has anything.
    let by_hand = range(AT + 0x10_0000 * PAGE, bench.bar_backing().size())?;
    let ioas = bench.ioas();
    let map = || granted(ioas.map_file(by_hand, bench.dma_buf(), 0, Access::ReadWrite));
    let again = || {
        granted(ioas.unmap(by_hand))?;
        map()
    };
    map()?;
    let figure = |event| Figure::new(event, in_a_turn);
    let mut moved = figure("a BAR is moved");
    let mut hidden = figure("a BAR stops decoding, and decodes again");
    let mut revoked = figure("a BAR was revoked, and is made anew");
    for _ in 0..turns {
        let place = |nth: u64| if nth.is_multiple_of(2) { MOVED } else { BAR };
        moved.turn(&counted, |nth| mapped.move_bar(place(nth)), again)?;
        mapped.move_bar(BAR)?;
        hidden.turn(
            &counted,
            |_| {
                mapped.disable_bar()?;
                mapped.enable_bar()
            },
            again,
        )?;
        revoked.turn(&counted, |_| mapped.revoke(), again)?;
    }
    granted(ioas.unmap(by_hand))?;
    drop(target);
    Ok(vec![moved, hidden, revoked])
}

/// An address space that is registered with a map of all of `ram`, in regions of `each` bytes, and
/// unregistered, `turns` times. `ram` is such as the bench's is; a region is mapped by one call, and
/// so has no more than 1 GiB.
///
/// # Errors
/// Where the host does not keep the contract, and where `ram` has no file.
pub fn registration(
    bench: &dyn Bench,
    ram: &Backing,
    each: u64,
    turns: usize,
) -> Result<Figure, Complaint> {
    let regions = ram.size().checked_div(each).unwrap_or(0);
    // No two are neighbours.
    let place = |nth: u64| range(AT + 2 * nth * each, each);
    let map = RegionManager::new();
    let mut change = map.change();
    for nth in 0..regions {
        let mut part = spec("part", AT, RegionKind::Ram, 0, ram)?;
        part.range = place(nth)?.to_gpa();
        part.sub_mappings = vec![SubMapping {
            offset: 0,
            size: each,
            backing: ram.clone(),
            backing_offset: nth * each,
        }];
        let part = change.add(part);
        change.enable(part);
    }
    change.commit().map_err(|error| broken(&error))?;
    let ioas = bench.ioas();
    let counted = Arc::new(Counted::new(bench.ioas()));
    let event = format!(
        "an address space is registered and unregistered, {regions} regions of {} KiB of RAM",
        each >> 10
    );
    let mut figure = Figure::new(event, 1);
    let file = ram.file().map_err(|error| broken(&error))?;
    for _ in 0..turns {
        figure.turn(
            &counted,
            |_| {
                let space = Arc::clone(&counted) as Space;
                // SAFETY: the map's backing is `host_memory`'s or the simulated host's, and no
                // Rust reference points into it.
                let target = unsafe { IoasTarget::new(space, RamCopies::new()) };
                let options = TargetOptions::new("ioas");
                let handle = map.register(Box::new(target), options);
                drop(handle.map_err(|error| broken(&error))?);
                Ok(())
            },
            || {
                granted(ioas.ranges())?;
                for nth in 0..regions {
                    let offset = file.offset.saturating_add(nth * each);
                    granted(ioas.map_file(place(nth)?, file.fd, offset, Access::ReadWrite))?;
                }
                (0..regions).try_for_each(|nth| granted(ioas.unmap(place(nth)?)).map(drop))
            },
        )?;
    }
    Ok(figure)
}
