//! The capability lists (PCI Local Bus 3.0, 6.7; PCI Express Base 6.0, 7.6), walked once when a
//! function is made.
//!
//! The lists are the device's own, so nothing in them is believed: a list that leads out of its
//! space, back to itself or to where no capability can lie is refused, and a walk visits no offset
//! twice.

use crate::config_space::{
    CAPABILITIES, CONVENTIONAL_SIZE, ConfigReader, EXPRESS_SIZE, HEADER_END, STATUS,
};
use crate::{CapabilityList, CapabilityProblem, FunctionError};

/// The status register's bit that says there is a list.
const STATUS_HAS_LIST: u16 = 1 << 4;

/// A capability of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Which list it is in. The two number their ids apart.
    pub list: CapabilityList,
    /// What it is. Unknown ids are kept as they are.
    pub id: u16,
    /// Where in config space it starts, in bytes; a multiple of four.
    pub offset: u16,
}

impl Capability {
    /// The id of power management in the standard list (PCI Bus Power Management Interface 1.2).
    pub const POWER_MANAGEMENT: u16 = 0x01;
    /// The id of PCI Express in the standard list (PCI Express Base 6.0, 7.5.3).
    pub const EXPRESS: u16 = 0x10;
    /// The id of advanced features in the standard list (PCI 3.0 ECN "Advanced Capabilities").
    pub const ADVANCED_FEATURES: u16 = 0x13;
    /// The id of MSI in the standard list (PCI Local Bus 3.0, 6.8.1).
    pub const MSI: u16 = 0x05;
    /// The id of MSI-X in the standard list (PCI Local Bus 3.0, 6.8.2).
    pub const MSIX: u16 = 0x11;
}

/// Walks both lists.
pub(crate) fn walk(
    config: &ConfigReader<'_>,
    config_size: u16,
) -> Result<Vec<Capability>, FunctionError> {
    let mut found = Vec::new();
    if config.u16(STATUS)? & STATUS_HAS_LIST != 0 {
        standard(config, &mut found)?;
    }
    if config_size >= EXPRESS_SIZE {
        extended(config, &mut found)?;
    }
    Ok(found)
}

fn standard(config: &ConfigReader<'_>, found: &mut Vec<Capability>) -> Result<(), FunctionError> {
    let mut walk = Walk::new(config, CapabilityList::Standard);
    let mut next = u16::from(config.u8(CAPABILITIES)?);
    while next != 0 {
        let offset = next;
        walk.visit(offset)?;
        let [id, pointer] = config.u16(offset)?.to_le_bytes();
        walk.fits(offset, standard_length(config, id, offset)?)?;
        found.push(Capability {
            list: walk.list,
            id: id.into(),
            offset,
        });
        next = pointer.into();
    }
    Ok(())
}

fn extended(config: &ConfigReader<'_>, found: &mut Vec<Capability>) -> Result<(), FunctionError> {
    let mut walk = Walk::new(config, CapabilityList::Extended);
    let mut next = CONVENTIONAL_SIZE;
    while next != 0 {
        let offset = next;
        walk.visit(offset)?;
        let header = config.u32(offset)?;
        // All ones at the very beginning: the bus does not carry extended config space.
        if offset == CONVENTIONAL_SIZE && header == u32::MAX {
            break;
        }
        let [low, high, _, _] = header.to_le_bytes();
        let id = u16::from_le_bytes([low, high]);
        // Id 0 is no capability: an empty list, or the first capability hidden by the host,
        // which then still points on.
        if id != 0 {
            walk.fits(offset, extended_length(config, id, offset)?)?;
            found.push(Capability {
                list: walk.list,
                id,
                offset,
            });
        }
        // Bits 31:20.
        let [_, _, low, high] = header.to_le_bytes();
        next = u16::from_le_bytes([low, high]) >> 4;
    }
    Ok(())
}

/// One walk along one list.
struct Walk<'c> {
    function: &'c str,
    list: CapabilityList,
    visited: Vec<u16>,
}

impl<'c> Walk<'c> {
    fn new(config: &ConfigReader<'c>, list: CapabilityList) -> Self {
        Self {
            function: config.function,
            list,
            visited: Vec::new(),
        }
    }

    const fn space(&self) -> (u16, u16) {
        match self.list {
            CapabilityList::Standard => (HEADER_END, CONVENTIONAL_SIZE),
            CapabilityList::Extended => (CONVENTIONAL_SIZE, EXPRESS_SIZE),
        }
    }

    /// A capability may lie at `offset`, and is visited for the first time.
    fn visit(&mut self, offset: u16) -> Result<(), FunctionError> {
        let (first, end) = self.space();
        if offset < first {
            return Err(self.refuse(offset, CapabilityProblem::TooLow { first }));
        }
        if !offset.is_multiple_of(4) {
            return Err(self.refuse(offset, CapabilityProblem::Misaligned));
        }
        if offset >= end {
            return Err(self.refuse(offset, CapabilityProblem::Truncated { length: 4, end }));
        }
        if self.visited.contains(&offset) {
            return Err(self.refuse(offset, CapabilityProblem::Cyclic));
        }
        self.visited.push(offset);
        Ok(())
    }

    /// A capability of `length` bytes at `offset` ends within its space.
    fn fits(&self, offset: u16, length: u16) -> Result<(), FunctionError> {
        let (_, end) = self.space();
        if offset.checked_add(length).is_some_and(|last| last <= end) {
            Ok(())
        } else {
            Err(self.refuse(offset, CapabilityProblem::Truncated { length, end }))
        }
    }

    fn refuse(&self, offset: u16, problem: CapabilityProblem) -> FunctionError {
        FunctionError::Capability {
            function: self.function.to_owned(),
            list: self.list,
            offset,
            problem,
        }
    }
}

/// The least length of a standard capability. What is not known has its header and no more.
///
/// What decides the length lies in the first four bytes, which are there: offsets are multiples of
/// four.
fn standard_length(config: &ConfigReader<'_>, id: u8, offset: u16) -> Result<u16, FunctionError> {
    let third = || config.u16(offset | 2);
    Ok(match id {
        // Power management, AGP, vital product data, PCI-X.
        0x01 | 0x02 | 0x03 | 0x07 => 8,
        // MSI: 64-bit addresses and per-vector masks make it longer.
        0x05 => match third()? & 0x180 {
            0 => 10,
            0x80 => 14,
            0x100 => 20,
            _ => 24,
        },
        // Vendor-specific: it says itself.
        0x09 => third()? & 0xff,
        // PCI Express: the least of each version.
        0x10 if third()? & 0xf < 2 => 12,
        0x10 => 44,
        // MSI-X.
        0x11 => 12,
        // Advanced features.
        0x13 => 6,
        _ => 4,
    })
}

/// The least length of an extended capability. What is not known has its header and no more.
fn extended_length(config: &ConfigReader<'_>, id: u16, offset: u16) -> Result<u16, FunctionError> {
    Ok(match id {
        // Advanced error reporting.
        0x01 => 0x2c,
        // Serial number.
        0x03 => 12,
        // Alternative routing-id interpretation, address translation services.
        0x0e | 0x0f => 8,
        // Page requests.
        0x13 => 16,
        // Single-root I/O virtualization.
        0x10 => 0x40,
        // Process address space ids.
        0x1b => 8,
        // Vendor-specific and designated vendor-specific: bits 31:20 of the second dword.
        0x0b | 0x23 => {
            // With the header in the last dword, there is no second one.
            let second = offset.saturating_add(4);
            if second >= EXPRESS_SIZE {
                return Ok(8);
            }
            let [_, _, low, high] = config.u32(second)?.to_le_bytes();
            u16::from_le_bytes([low, high]) >> 4
        }
        _ => 4,
    })
}
