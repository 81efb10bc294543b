//! Outcomes: what a guest's action did to the map, and what the host said to it.

use std::fmt;

use memory_map::{Errno, InvalidChange, Report};

use crate::{BarIndex, MsiKind};

/// What came of something that the guest did to a function. The guest sees none of it: hardware
/// does not answer a write, and a read that fails gives all ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "the guest never sees what went wrong; somebody should"]
pub struct Outcome {
    /// What each commit did to the targets, in order. One that did nothing is left out.
    pub reports: Vec<Report>,
    /// What the host refused, in order.
    pub host_errors: Vec<HostError>,
    /// Commits that the map would not carry out, for example because somebody else removed a
    /// BAR's region.
    pub map_errors: Vec<InvalidChange>,
}

impl Outcome {
    /// How many mappings were made, over all targets.
    #[must_use]
    pub fn maps(&self) -> usize {
        self.reports.iter().map(Report::maps).sum()
    }

    /// How many mappings were taken down, over all targets.
    #[must_use]
    pub fn unmaps(&self) -> usize {
        self.reports.iter().map(Report::unmaps).sum()
    }

    /// Whether neither the host nor the map refused anything. A mapping that could not be made
    /// is no refusal: it is in the reports, and in the region's reach.
    #[must_use]
    pub const fn is_ok(&self) -> bool {
        self.host_errors.is_empty() && self.map_errors.is_empty()
    }

    /// Adds what came later.
    pub fn append(&mut self, later: Self) {
        self.reports.extend(later.reports);
        self.host_errors.extend(later.host_errors);
        self.map_errors.extend(later.map_errors);
    }

    /// Notes what came of a commit, and tells whether it was carried out.
    pub(crate) fn record(&mut self, committed: Result<Report, InvalidChange>) -> bool {
        match committed {
            Ok(report) => {
                if report != Report::default() {
                    self.reports.push(report);
                }
                true
            }
            Err(invalid) => {
                self.map_errors.push(invalid);
                false
            }
        }
    }
}

/// A call to the host's side that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed")]
pub struct HostError {
    /// Which call.
    pub call: HostCall,
    /// What the kernel said.
    #[source]
    pub errno: Errno,
}

impl HostError {
    pub(crate) fn new(call: HostCall, error: &std::io::Error) -> Self {
        Self {
            call,
            errno: Errno::from(error),
        }
    }
}

/// A call to the host's side of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostCall {
    /// A read of config space, at this offset in bytes.
    ConfigRead(u16),
    /// A write to config space, at this offset in bytes.
    ConfigWrite(u16),
    /// A read of a BAR, at this offset in bytes.
    BarRead(BarIndex, u64),
    /// A write to a BAR, at this offset in bytes.
    BarWrite(BarIndex, u64),
    /// The reset.
    Reset,
    /// The reset of all functions of a bus or slot.
    HotReset,
    /// Having an interrupt vector of this kind and number signalled by its eventfd.
    ConnectVector(MsiKind, u16),
    /// Disabling all interrupt vectors of a kind.
    DisconnectVectors(MsiKind),
    /// Having an interrupt vector delivered to the guest, or kept from it: the
    /// [`MsiController`](crate::MsiController)'s.
    RouteVector(MsiKind, u16),
}

impl fmt::Display for HostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConfigRead(offset) => write!(f, "reading config space at {offset:#x}"),
            Self::ConfigWrite(offset) => write!(f, "writing config space at {offset:#x}"),
            Self::BarRead(bar, offset) => write!(f, "reading {bar} at {offset:#x}"),
            Self::BarWrite(bar, offset) => write!(f, "writing {bar} at {offset:#x}"),
            Self::Reset => f.write_str("the reset"),
            Self::HotReset => f.write_str("the hot reset"),
            Self::ConnectVector(kind, vector) => write!(f, "connecting {kind} vector {vector}"),
            Self::DisconnectVectors(kind) => write!(f, "disabling the {kind} vectors"),
            Self::RouteVector(kind, vector) => write!(f, "routing {kind} vector {vector}"),
        }
    }
}
