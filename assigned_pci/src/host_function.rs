//! The host's side of an assigned function: what the VFIO device and the simulated one both do.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use memory_map::Backing;

/// Which of a function's six base address registers, 0 to 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(u8);

impl BarIndex {
    /// All six, in order.
    pub const ALL: [Self; 6] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5)];

    /// The register numbered `index`, if it is one of six.
    #[must_use]
    pub fn new(index: u8) -> Option<Self> {
        (index < 6).then_some(Self(index))
    }

    /// Its number, 0 to 5.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for BarIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BAR{}", self.0)
    }
}

/// What the host knows of a BAR. Its address and type bits come from config space.
#[derive(Debug, Clone)]
pub struct HostBar {
    /// Size in bytes; not zero.
    pub size: u64,
    /// The parts that can be mapped, by offset. What lies between them is only read and written
    /// by [`HostFunction::bar_read`] and [`HostFunction::bar_write`].
    pub areas: Vec<HostBarArea>,
}

/// A part of a BAR that can be mapped.
#[derive(Debug, Clone)]
pub struct HostBarArea {
    /// Where in the BAR it starts, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its pages; the area starts at the backing's first byte.
    pub backing: Backing,
}

/// A kind of message signalled interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MsiKind {
    /// MSI (PCI Local Bus 3.0, 6.8.1): up to 32 vectors, in config space.
    Msi,
    /// MSI-X (6.8.2 there): up to 2048 vectors, in a table in a BAR.
    MsiX,
}

impl fmt::Display for MsiKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Msi => "MSI",
            Self::MsiX => "MSI-X",
        })
    }
}

/// What the host lends of one kind of interrupt vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostVectors {
    /// How many; zero where there are none of the kind.
    pub count: u16,
    /// Whether a vector can be connected beyond those that were enabled first. Where it cannot,
    /// all must be disconnected to have more (`VFIO_IRQ_INFO_NORESIZE`): MSI always, MSI-X before
    /// Linux 6.5.
    pub dynamic: bool,
}

/// A PCI function that the host lends out.
pub trait HostFunction: Send + Sync + fmt::Debug {
    /// For people: the BDF, for a real function.
    fn name(&self) -> String;

    /// Size of config space in bytes: 256 or 4096.
    fn config_size(&self) -> u16;

    /// Reads config space as the host presents it.
    ///
    /// # Errors
    /// The kernel's errno. A read past the end is `EINVAL`.
    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()>;

    /// Writes config space.
    ///
    /// # Errors
    /// The kernel's errno. A write past the end is `EINVAL`.
    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()>;

    /// What is behind a BAR, or `None` where there is none (also for the upper half of a 64-bit
    /// one). Backings are the same at each call.
    ///
    /// # Errors
    /// The kernel's errno.
    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>>;

    /// Reads `data.len()` bytes (1, 2, 4 or 8, naturally aligned) at `offset` of a BAR.
    ///
    /// # Errors
    /// The kernel's errno; `EIO` where the device does not decode memory.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data.len()` bytes (1, 2, 4 or 8, naturally aligned) at `offset` of a BAR.
    ///
    /// # Errors
    /// The kernel's errno; `EIO` where the device does not decode memory.
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Resets the function (`VFIO_DEVICE_RESET`). Whatever it returns, mappings made from its
    /// BARs count as revoked.
    ///
    /// # Errors
    /// `ENOTTY` where the function has no reset; else the kernel's errno.
    fn reset(&self) -> io::Result<()>;

    /// What there is of one kind of interrupt vectors; none, if this is not implemented.
    ///
    /// # Errors
    /// The kernel's errno.
    fn vectors(&self, kind: MsiKind) -> io::Result<HostVectors> {
        let _ = kind;
        Ok(HostVectors::default())
    }

    /// Has the vectors from `first` on signalled by these eventfds; `None` takes one away. The
    /// host keeps references of its own to the eventfds.
    ///
    /// The first call enables the kind in the device, with `first + eventfds.len()` vectors, and
    /// later calls stay within these, unless the host's vectors are [dynamic](HostVectors). One
    /// kind can be enabled at a time.
    ///
    /// # Errors
    /// The kernel's errno: `ENOSPC` where the host has not so many vectors left, `EINVAL` for
    /// vectors that do not exist or while the other kind is enabled. Vectors of this call are then
    /// disconnected, and after a first call none is enabled.
    fn connect_vectors(
        &self,
        kind: MsiKind,
        first: u16,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let _ = (kind, first, eventfds);
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Disconnects all vectors of a kind, and disables the kind in the device.
    ///
    /// # Errors
    /// The kernel's errno: `EINVAL` where the kind is not enabled.
    fn disconnect_vectors(&self, kind: MsiKind) -> io::Result<()> {
        let _ = kind;
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Whether it is a virtual function (SR-IOV), which decodes memory whatever its command
    /// register says.
    fn is_virtual(&self) -> bool {
        false
    }
}
