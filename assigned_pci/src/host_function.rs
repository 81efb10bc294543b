//! The host's side of an assigned function: what the VFIO device and the simulated one both do.

use std::fmt;
use std::io;

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

    /// Whether it is a virtual function (SR-IOV), which decodes memory whatever its command
    /// register says.
    fn is_virtual(&self) -> bool {
        false
    }
}
