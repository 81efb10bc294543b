//! The cases of interrupts: what the host lends, and whom it signals. The controller has MSI-X, and
//! the other engine MSI.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use assigned_pci::{BarIndex, Capability, HostFunction, MsiKind};
use libc::EINVAL;
use rustix::event::{EventfdFlags, eventfd};

use super::bench::Bench;
use crate::verdict::{refused, same};
use crate::{Complaint, Verdict};

/// The command register, with memory decoding, and bus mastering on or off.
const COMMAND: u16 = 4;
const MASTERS: [u8; 2] = [6, 0];
const DOES_NOT_MASTER: [u8; 2] = [2, 0];
/// QEMU's edu: what is written here raises an interrupt, and what is written there takes it back.
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;

/// An eventfd.
struct Signal(File);

impl Signal {
    fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(fd.into()))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    /// How often it has been signalled since the last look.
    fn count(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        match (&self.0).read_exact(&mut count) {
            Ok(()) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Waits until it is signalled, as long as a command may take, and tells how often it was.
    fn wait(&self, limit: Duration) -> io::Result<u64> {
        let end = Instant::now().checked_add(limit);
        loop {
            let count = self.count()?;
            if count > 0 || end.is_none_or(|end| Instant::now() > end) {
                return Ok(count);
            }
            sleep(Duration::from_millis(1));
        }
    }
}

fn edu(bench: &Bench) -> Result<Arc<dyn HostFunction>, Complaint> {
    let edu = bench.engine_function();
    edu.ok_or_else(|| Complaint::Skipped("no other engine".into()))
}

/// What the host lends is what the devices have.
pub(super) fn vectors_are_lent_as_the_devices_have_them(bench: &mut Bench) -> Verdict {
    let nvme = bench.function();
    let lent = nvme.vectors(MsiKind::MsiX)?;
    same("several MSI-X vectors", lent.count > 1, true)?;
    let edu = edu(bench)?;
    let lent = edu.vectors(MsiKind::Msi)?;
    same("MSI vectors", lent.count, 1)?;
    same("MSI vectors that can be added to", lent.dynamic, false)?;
    same(
        "MSI-X of what has none",
        edu.vectors(MsiKind::MsiX)?.count,
        0,
    )
}

/// The controller's completions raise vector 0, and nobody else's.
pub(super) fn a_controllers_completions_signal_their_vector(bench: &mut Bench) -> Verdict {
    let nvme = bench.function();
    let (first, second) = (Signal::new()?, Signal::new()?);
    nvme.connect_vectors(MsiKind::MsiX, 0, &[first.fd(), second.fd()])?;
    bench.nvme.enable()?;
    let signalled = first.wait(bench.time_limit)? > 0;
    same("the vector's eventfd signalled", signalled, true)?;
    same("another one", second.count()?, 0)?;
    // Another eventfd in its place.
    nvme.connect_vectors(MsiKind::MsiX, 0, &[second.fd()])?;
    bench.nvme.disable()?;
    first.count()?;
    bench.nvme.enable()?;
    let signalled = second.wait(bench.time_limit)? > 0;
    same("the one in its place", signalled, true)?;
    same("the one that was there", first.count()?, 0)?;
    nvme.disconnect_vectors(MsiKind::MsiX)?;
    bench.nvme.disable()?;
    second.count()?;
    bench.nvme.enable()?;
    same("nobody any more", second.count()?, 0)
}

/// A vector can be added to those that are enabled if the host says so.
pub(super) fn vectors_are_added_if_the_host_says_so(bench: &mut Bench) -> Verdict {
    let nvme = bench.function();
    let lent = nvme.vectors(MsiKind::MsiX)?;
    let last = lent.count.saturating_sub(1);
    let signal = Signal::new()?;
    // Enabled, and nobody connected.
    nvme.connect_vectors(MsiKind::MsiX, 0, &[None])?;
    let added = nvme.connect_vectors(MsiKind::MsiX, last, &[signal.fd()]);
    if lent.dynamic {
        added?;
    } else {
        refused(added, EINVAL)?;
    }
    nvme.connect_vectors(MsiKind::MsiX, 0, &[signal.fd()])?;
    bench.nvme.enable()?;
    let signalled = signal.wait(bench.time_limit)? > 0;
    same("the first one's eventfd signalled", signalled, true)?;
    Ok(nvme.disconnect_vectors(MsiKind::MsiX)?)
}

/// What there is not, or not now, is `EINVAL`.
pub(super) fn vectors_that_there_are_not_are_refused(bench: &mut Bench) -> Verdict {
    let nvme = bench.function();
    let signal = Signal::new()?;
    let count = nvme.vectors(MsiKind::MsiX)?.count;
    let connect = |kind, first| nvme.connect_vectors(kind, first, &[signal.fd()]);
    refused(connect(MsiKind::MsiX, count), EINVAL)?;
    refused(nvme.disconnect_vectors(MsiKind::MsiX), EINVAL)?;
    connect(MsiKind::MsiX, 0)?;
    refused(connect(MsiKind::MsiX, count), EINVAL)?;
    refused(nvme.disconnect_vectors(MsiKind::Msi), EINVAL)?;
    nvme.disconnect_vectors(MsiKind::MsiX)?;
    refused(nvme.disconnect_vectors(MsiKind::MsiX), EINVAL)
}

/// An interrupt is a write like any other: without bus mastering there is none.
pub(super) fn an_interrupt_needs_bus_mastering(bench: &mut Bench) -> Verdict {
    let edu = edu(bench)?;
    let raise = || -> io::Result<()> {
        edu.bar_write(BarIndex::ALL[0], RAISE, &1_u32.to_le_bytes())?;
        edu.bar_write(BarIndex::ALL[0], ACKNOWLEDGE, &1_u32.to_le_bytes())
    };
    let signal = Signal::new()?;
    edu.connect_vectors(MsiKind::Msi, 0, &[signal.fd()])?;
    raise()?;
    same("signals", signal.wait(bench.time_limit)?, 1)?;
    edu.config_write(COMMAND, &DOES_NOT_MASTER)?;
    raise()?;
    edu.config_write(COMMAND, &MASTERS)?;
    raise()?;
    same("signals of two", signal.wait(bench.time_limit)?, 1)?;
    edu.disconnect_vectors(MsiKind::Msi)?;
    same("signals after all", signal.count()?, 0)
}

/// The host answers for MSI-X's table itself: nobody who reads or writes the BAR gets at it.
pub(super) fn the_table_is_the_hosts(bench: &mut Bench) -> Verdict {
    let nvme = bench.function();
    let (bar, offset) = table(&nvme)?;
    let signal = Signal::new()?;
    nvme.connect_vectors(MsiKind::MsiX, 0, &[signal.fd()])?;
    let mut entry = [0; 8];
    nvme.bar_read(bar, offset, &mut entry)?;
    same("the first entry's address", entry, [0xff; 8])?;
    // A mask, if it arrived.
    nvme.bar_write(bar, offset.saturating_add(12), &[1, 0, 0, 0])?;
    bench.nvme.enable()?;
    let signalled = signal.wait(bench.time_limit)? > 0;
    same("the vector's eventfd signalled", signalled, true)?;
    Ok(nvme.disconnect_vectors(MsiKind::MsiX)?)
}

/// Where a function's MSI-X table lies.
fn table(function: &Arc<dyn HostFunction>) -> Result<(BarIndex, u64), Complaint> {
    let mut at = [0];
    function.config_read(0x34, &mut at)?;
    // As many as fit into config space.
    for _ in 0..48 {
        let [offset] = at;
        let mut header = [0; 12];
        function.config_read(offset.into(), &mut header)?;
        let [id, next, _, _, pointer @ .., _, _, _, _] = header;
        if u16::from(id) == Capability::MSIX {
            let pointer = u32::from_le_bytes(pointer);
            let [low, ..] = pointer.to_le_bytes();
            let bar = BarIndex::new(low & 7);
            let bar = bar.ok_or_else(|| io::Error::other("MSI-X in no BAR"))?;
            return Ok((bar, u64::from(pointer & !7)));
        }
        if next == 0 {
            break;
        }
        at = [next];
    }
    Err(io::Error::other("no MSI-X").into())
}
