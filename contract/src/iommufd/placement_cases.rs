//! What lies where the IOMMU does not reach, or where the platform keeps addresses to itself.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use memory_map::{Access, ChangeError, Gpa, GpaRange, Iova, IovaRange, Reach, Reason, RegionKind};

use super::Bench;
use super::cases::{Space, map_ram};
use super::counted::Counted;
use super::dma_cases::{DESTINATION, TEXT, iova, ram};
use super::target_cases::{BAR, Mapped, broken, spec, written};
use crate::cases::{PAGE, pages};
use crate::verdict::{granted, same};
use crate::{Complaint, Verdict};

/// The highest address that the IOMMU reaches.
fn aperture_last(bench: &dyn Bench) -> Result<Iova, Complaint> {
    let ranges = granted(bench.ioas().ranges())?;
    let last = ranges.allowed.last().map(IovaRange::last);
    last.ok_or_else(|| Complaint::Failed {
        expected: "allowed ranges".into(),
        got: "none".into(),
    })
}

/// Adds RAM that starts at `at`, which must be refused without one call of the kernel's; tells why,
/// and sees that the BAR is still mapped.
fn refused_ram(
    mapped: &Mapped,
    bench: &dyn Bench,
    at: Iova,
    size: u64,
) -> Result<Reason, Complaint> {
    let counted = Arc::new(Counted::new(bench.ioas()));
    let target = mapped.register(&(Arc::clone(&counted) as Space))?;
    let before = counted.calls();
    let memory = bench.ram_backing();
    let mut more = spec("more", at.raw(), RegionKind::Ram, 0, &memory)?;
    more.range = GpaRange::new(Gpa::new(at.raw()), size).map_err(|error| broken(&error))?;
    for part in &mut more.sub_mappings {
        part.size = size;
    }
    let mut change = mapped.map.change();
    let region = change.add(more);
    change.enable(region);
    let reason = match change.commit() {
        Err(ChangeError::Refused { reason, .. }) => reason,
        other => {
            return Err(Complaint::Failed {
                expected: "RAM there to be refused".into(),
                got: format!("{other:?}"),
            });
        }
    };
    same("kernel calls", counted.calls(), before)?;
    same("the reach", mapped.reach(&target), Some(Reach::Mapped))?;
    Ok(reason)
}

/// It starts within the aperture and ends past it.
pub(crate) fn ram_beyond_the_aperture_is_refused_before_anything_is_done(
    bench: &mut dyn Bench,
) -> Verdict {
    let last = aperture_last(bench)?;
    let start = Iova::new(last.raw().saturating_sub(2 * PAGE).saturating_add(1));
    let mapped = Mapped::new(bench)?;
    let reason = refused_ram(&mapped, bench, start, 4 * PAGE)?;
    let expected = Reason::OutsideAperture { last: last.raw() };
    same("the reason", reason, expected)
}

/// In each window between what is allowed. Nothing moves: this one is also tried where QEMU's IOMMU
/// translates nothing.
pub(crate) fn ram_in_a_reserved_window_is_refused_before_anything_is_done(
    bench: &mut dyn Bench,
) -> Verdict {
    let allowed = granted(bench.ioas().ranges())?.allowed;
    for (below, above) in allowed.iter().zip(allowed.iter().skip(1)) {
        let start = below.last().checked_add(1);
        let last = above.start().raw().checked_sub(1);
        let (Some(start), Some(last)) = (start, last) else {
            continue;
        };
        let window = IovaRange::from_inclusive(start, Iova::new(last));
        let window = window.map_err(|error| broken(&error))?;
        let reason = refused_ram(&Mapped::new(bench)?, bench, start, PAGE)?;
        same("the reason", reason, Reason::ReservedWindow { window })?;
    }
    Ok(())
}

pub(crate) fn a_bar_beyond_the_aperture_is_out_of_reach_until_it_is_back(
    bench: &mut dyn Bench,
) -> Verdict {
    let last = aperture_last(bench)?;
    let mapped = Mapped::new(bench)?;
    let target = mapped.register(&bench.ioas())?;
    mapped.move_bar_to(last.raw().saturating_add(1))?;
    let outside = Reason::OutsideAperture { last: last.raw() };
    let unavailable = Some(Reach::Unavailable(outside));
    same("the reach", mapped.reach(&target), unavailable)?;
    same("at its old place", written(bench, BAR)? == TEXT, false)?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)?;
    mapped.move_bar(BAR)?;
    same("the reach", mapped.reach(&target), Some(Reach::Mapped))?;
    same("in the BAR", written(bench, BAR)?, TEXT)
}

/// The kernel asks neither for the mode nor for seals, so whoever is handed a file has to.
pub(crate) fn a_file_open_for_reading_is_mapped_for_writing(bench: &mut dyn Bench) -> Verdict {
    bench.ram_write(0, &TEXT)?;
    bench.ram_write(DESTINATION, &[0; 8])?;
    map_ram(bench, pages(0, 1)?, 0)?;
    let path = format!("/proc/self/fd/{}", bench.ram().as_raw_fd());
    let file = File::open(path)?;
    let fd = std::os::fd::AsFd::as_fd(&file);
    granted(
        bench
            .ioas()
            .map_file(pages(2, 1)?, fd, DESTINATION, Access::ReadWrite),
    )?;
    bench.engine().load(iova(0), 8)?;
    bench.engine().store(iova(2), 8)?;
    same("in RAM", ram(bench, DESTINATION)?, TEXT)
}
