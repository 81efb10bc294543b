//! Whether what one PCI function sends to another passes the IOMMU, or may be routed to it before.
//!
//! A switch or a root complex may route a request between two functions below it by its address,
//! which the IOMMU has not translated then: what the one reaches of the other is not what the
//! IOMMU allows. Access control services (ACS) redirect such requests upwards. They are read from
//! the config space of the bridges above the function that sends (PCI Express Base 6.0, 6.12 and
//! 7.7.11), as sysfs shows it. Nothing is changed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path};

use crate::{Bdf, OpenError, Sysfs};

/// How requests of one function to another may get there without the IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bypass {
    /// They are in one IOMMU group: the kernel itself cannot tell them apart.
    SameGroup {
        /// The group's number.
        group: u32,
    },
    /// They are on one bus below a bridge, where each sees what the other sends.
    SharedBus {
        /// The bridge above the bus.
        bridge: Bdf,
    },
    /// A port on the way up, or the function itself where it is one of several of its device, has
    /// no access control services.
    NoAcs {
        /// Which one.
        at: Bdf,
    },
    /// It has them, and redirection is off.
    NotRedirected {
        /// Which one.
        at: Bdf,
        /// Its ACS control register.
        control: u16,
    },
    /// It cannot be told: the kernel shows extended config space to root only.
    Unreadable {
        /// Whose config space.
        at: Bdf,
    },
}

impl fmt::Display for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameGroup { group } => write!(
                f,
                "both are in IOMMU group {group}, because nothing keeps what they send each other \
                 from going directly"
            ),
            Self::SharedBus { bridge } => {
                write!(
                    f,
                    "both are on the bus below {bridge}, where each hears the other"
                )
            }
            Self::NoAcs { at } => write!(f, "{at} has no access control services (ACS)"),
            Self::NotRedirected { at, control } => write!(
                f,
                "{at} does not redirect requests between peers (its ACS control register is \
                 {control:#06x})"
            ),
            Self::Unreadable { at } => write!(
                f,
                "whether {at} redirects requests between peers (ACS) cannot be told: only root may \
                 read that"
            ),
        }
    }
}

impl Sysfs {
    /// How requests of `from` to the BARs of `to` may get there without passing the IOMMU; `None`
    /// where all of them are sent up to it, as far as config space tells. (Some chipsets redirect
    /// without telling: then this says that they may get there when they cannot.)
    ///
    /// # Errors
    /// [`OpenError::NoSuchFunction`], [`OpenError::Sysfs`].
    pub fn bypass(&self, from: Bdf, to: Bdf) -> Result<Option<Bypass>, OpenError> {
        let (sender, receiver) = (self.function(from)?, self.function(to)?);
        if let (Some(group), Some(other)) = (sender.group, receiver.group)
            && group == other
        {
            return Ok(Some(Bypass::SameGroup { group }));
        }
        let (above, above_other) = (self.bridges_above(from)?, self.bridges_above(to)?);
        for port in &above {
            if let Some(found) = self.redirects(*port, PortType::turns_requests_around)? {
                return Ok(Some(found));
            }
        }
        let same_slot =
            (from.domain(), from.bus(), from.device()) == (to.domain(), to.bus(), to.device());
        let bridge = above.last().filter(|own| above_other.last() == Some(own));
        // Below a port there is one device, whatever its functions' numbers (ARI, SR-IOV).
        let below_port = match bridge {
            Some(bridge) => self.config(*bridge)?.port_type().turns_requests_around(),
            None => false,
        };
        match bridge {
            _ if same_slot || below_port => self.redirects(from, |_| true),
            Some(bridge) => Ok(Some(Bypass::SharedBus { bridge: *bridge })),
            None => Ok(None),
        }
    }

    /// The bridges between the root complex and a function, the uppermost first.
    fn bridges_above(&self, bdf: Bdf) -> Result<Vec<Bdf>, OpenError> {
        let link = self.function_path(bdf);
        let path = std::fs::canonicalize(&link).map_err(|source| OpenError::Sysfs {
            path: link.clone(),
            source,
        })?;
        let above = path.parent().unwrap_or(&path);
        Ok(above
            .components()
            .filter_map(|component| match component {
                Component::Normal(name) => name.to_str()?.parse().ok(),
                _ => None,
            })
            .collect())
    }

    /// What keeps `at` from redirecting, if it is a port of a type that has to.
    fn redirects(
        &self,
        at: Bdf,
        has_to: impl Fn(PortType) -> bool,
    ) -> Result<Option<Bypass>, OpenError> {
        let config = self.config(at)?;
        Ok(config
            .missing_redirection(has_to)
            .map(|missing| match missing {
                Missing::Acs => Bypass::NoAcs { at },
                Missing::Redirection(control) => Bypass::NotRedirected { at, control },
                Missing::Sight => Bypass::Unreadable { at },
            }))
    }

    fn config(&self, bdf: Bdf) -> Result<ConfigBytes, OpenError> {
        let path = self.function_path(bdf).join("config");
        match read_config(&path) {
            Ok(config) => Ok(config),
            Err(source) => Err(OpenError::Sysfs { path, source }),
        }
    }
}

fn read_config(path: &Path) -> io::Result<ConfigBytes> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(EXPRESS_SIZE)
        .read_to_end(&mut bytes)?;
    Ok(ConfigBytes(bytes))
}

/// The device and port type of a PCI Express capability (7.5.3.2); none for a conventional one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PortType(Option<u8>);

impl PortType {
    const ROOT_PORT: u8 = 4;
    const DOWNSTREAM_PORT: u8 = 6;

    /// Whether it gets requests from below that it may send down again, or to its siblings.
    fn turns_requests_around(self) -> bool {
        matches!(self.0, Some(Self::ROOT_PORT | Self::DOWNSTREAM_PORT))
    }
}

/// Why requests may not be redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Acs,
    Redirection(u16),
    Sight,
}

/// As much of a function's config space as may be read.
#[derive(Debug)]
struct ConfigBytes(Vec<u8>);

const EXPRESS_SIZE: u64 = 0x1000;
const CONVENTIONAL_SIZE: usize = 0x100;
/// What the kernel shows to those who are not root.
const HEADER_SIZE: usize = 0x40;
const STATUS: usize = 0x06;
/// Status: there is a capability list.
const HAS_LIST: u16 = 1 << 4;
const CAPABILITIES: usize = 0x34;
const EXPRESS_CAPABILITY: u8 = 0x10;
const ACS_CAPABILITY: u16 = 0x000d;
/// ACS: request redirect, completion redirect, upstream forwarding.
const REDIRECTION: u16 = 1 << 2 | 1 << 3 | 1 << 4;
/// No list is longer: each entry has at least four bytes.
const MOST_ENTRIES: usize = 0x1000 / 4;

impl ConfigBytes {
    fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.0.get(at..)?.first_chunk()?;
        Some(u16::from_le_bytes(*bytes))
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    fn port_type(&self) -> PortType {
        PortType(self.express_type())
    }

    fn express_type(&self) -> Option<u8> {
        if self.u16(STATUS)? & HAS_LIST == 0 {
            return None;
        }
        let mut at = usize::from(self.u8(CAPABILITIES)? & !3);
        for _ in 0..MOST_ENTRIES {
            if at < HEADER_SIZE {
                return None;
            }
            if self.u8(at)? == EXPRESS_CAPABILITY {
                return Some(self.u8(at.saturating_add(2))? >> 4);
            }
            at = usize::from(self.u8(at.saturating_add(1))? & !3);
        }
        None
    }

    /// Where the ACS capability is.
    fn acs(&self) -> Option<usize> {
        let mut at = CONVENTIONAL_SIZE;
        for _ in 0..MOST_ENTRIES {
            let header = self.u32(at)?;
            let [low, high, ..] = header.to_le_bytes();
            if u16::from_le_bytes([low, high]) == ACS_CAPABILITY {
                return Some(at);
            }
            at = usize::try_from(header >> 20).ok()? & !3;
            if at < CONVENTIONAL_SIZE {
                return None;
            }
        }
        None
    }

    fn missing_redirection(&self, has_to: impl Fn(PortType) -> bool) -> Option<Missing> {
        if self.0.len() <= HEADER_SIZE {
            return Some(Missing::Sight);
        }
        if !has_to(self.port_type()) {
            return None;
        }
        let Some(at) = self.acs() else {
            return Some(Missing::Acs);
        };
        let can = self.u16(at.saturating_add(4)).unwrap_or(0);
        let control = self.u16(at.saturating_add(6)).unwrap_or(0);
        // What cannot be controlled is as if it were on (6.12.1, and as the kernel has it).
        let off = REDIRECTION & can & !control;
        (off != 0).then_some(Missing::Redirection(control))
    }
}

#[cfg(test)]
#[path = "acs_tests.rs"]
mod tests;
