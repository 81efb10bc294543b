//! Config space without what the guest is not to see.
//!
//! Computed once, when a function is made, from its capability lists, which have been walked by
//! then, and [the table](crate::capability_table): bits that are laid over what the host reads. The
//! pointers of both lists are laid over everywhere, so that the list that the guest walks is the one
//! that was walked here, whatever the device says later.
//!
//! - A hidden capability's registers read zero, up to the next capability at the most, for lists of
//!   broken devices overlap.
//! - The first extended capability cannot be unlinked. Where it is hidden, it reads as an id of 0
//!   that points on (PCI Express Base 6.0, 7.6.3), or as no list at all.
//! - The interrupt pin reads 0: INTx is not offered.
//! - Built-in self-test reads 0: there is none. It takes seconds, in which the device may forget
//!   what it held.
//!
//! What is written to a byte that is laid over whole reaches nobody.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::capability_table::Treatment;
use crate::config_space::{CAPABILITIES, CONVENTIONAL_SIZE, ConfigReader, EXPRESS_SIZE, STATUS};
use crate::{Capability, CapabilityList, FunctionError};

/// The dword that ends with built-in self-test, and its bits there.
const SELF_TEST: (u16, u32) = (0x0c, 0xff00_0000);
/// The dword with the interrupt pin, and its bits there.
const INTERRUPT_PIN: (u16, u32) = (0x3c, 0x0000_ff00);
/// The status register's bit that says that there is a list, in the dword with the command register.
const HAS_LIST: (u16, u32) = (STATUS & !3, 1 << 20);
/// The pointer of a standard capability's header.
const STANDARD_NEXT: u32 = 0x0000_ff00;
/// The pointer of an extended capability's header.
const EXTENDED_NEXT: u32 = 0xfff0_0000;
/// From the PCI Express capability to link capabilities.
const LINK_CAPABILITIES: u16 = 12;

/// Bits that are laid over a dword of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Overlay {
    /// Which bits.
    pub(crate) mask: u32,
    /// What they are; the others are 0.
    pub(crate) value: u32,
}

impl Overlay {
    /// These bits in front, the others as they are here.
    pub(crate) const fn under(self, mask: u32, value: u32) -> Self {
        Self {
            mask: self.mask | mask,
            value: (self.value & !mask) | (value & mask),
        }
    }

    /// What is left of it from this byte of the dword on.
    pub(crate) fn at_byte(self, byte: u16) -> Self {
        let bits = u32::from(byte) * 8;
        Self {
            mask: self.mask.checked_shr(bits).unwrap_or(0),
            value: self.value.checked_shr(bits).unwrap_or(0),
        }
    }

    /// For each byte whether all of it is laid over.
    pub(crate) fn covered(self) -> impl Iterator<Item = bool> {
        self.mask.to_le_bytes().into_iter().map(|byte| byte == 0xff)
    }

    /// Whether all of the first bytes are laid over.
    pub(crate) fn covers(self, bytes: usize) -> bool {
        self.covered().take(bytes).all(|covered| covered)
    }

    /// Whether one of the first bytes is laid over, all of it.
    pub(crate) fn covers_any(self, bytes: usize) -> bool {
        self.covered().take(bytes).any(|covered| covered)
    }

    /// Lays it over the bytes that were read.
    pub(crate) fn show(self, data: &mut [u8]) {
        let bits = self.mask.to_le_bytes().into_iter();
        let bits = bits.zip(self.value.to_le_bytes());
        for (byte, (mask, value)) in data.iter_mut().zip(bits) {
            *byte = (*byte & !mask) | value;
        }
    }
}

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Filter {
    /// By the dword's offset.
    overlays: BTreeMap<u16, Overlay>,
    hidden: Vec<Capability>,
}

impl Filter {
    /// The filter of a function with these capabilities. `emulates` tells whether one that the
    /// table wants emulated is.
    pub(crate) fn read(
        config: &ConfigReader<'_>,
        capabilities: &[Capability],
        emulates: impl Fn(&Capability) -> bool,
    ) -> Result<Self, FunctionError> {
        let mut filter = Self::default();
        let lanes = lanes(config, capabilities)?;
        for capability in capabilities {
            let Some(rule) = capability.rule() else {
                continue;
            };
            let hidden = match rule.treatment {
                Treatment::Shown => false,
                Treatment::Emulated => !emulates(capability),
                Treatment::Hidden => true,
            };
            if hidden {
                let length = rule.length(config, capability.offset, lanes)?;
                filter.hide(extent(capabilities, capability, length));
                filter.hidden.push(*capability);
            }
        }
        for (at, mask) in [SELF_TEST, INTERRUPT_PIN] {
            filter.lay(at, mask, 0);
        }
        filter.link_standard(capabilities);
        filter.link_extended(capabilities);
        Ok(filter)
    }

    /// What is laid over the dword at `at`, a multiple of four.
    pub(crate) fn overlay(&self, at: u16) -> Overlay {
        self.overlays.get(&at).copied().unwrap_or_default()
    }

    pub(crate) fn hides(&self, capability: &Capability) -> bool {
        self.hidden.contains(capability)
    }

    fn lay(&mut self, at: u16, mask: u32, value: u32) {
        let there = self.overlays.entry(at).or_default();
        *there = there.under(mask, value);
    }

    fn hide(&mut self, bytes: Range<u16>) {
        for at in bytes {
            let lane = 0xff_u32.checked_shl(u32::from(at % 4) * 8).unwrap_or(0);
            self.lay(at & !3, lane, 0);
        }
    }

    /// The offsets of the capabilities of a list that are shown, in order.
    fn shown(&self, capabilities: &[Capability], list: CapabilityList) -> Vec<u16> {
        capabilities
            .iter()
            .filter(|capability| capability.list == list && !self.hides(capability))
            .map(|capability| capability.offset)
            .collect()
    }

    fn link_standard(&mut self, capabilities: &[Capability]) {
        let shown = self.shown(capabilities, CapabilityList::Standard);
        let first = shown.first().copied().unwrap_or(0);
        self.lay(CAPABILITIES, 0xff, first.into());
        let has_list = if shown.is_empty() { 0 } else { HAS_LIST.1 };
        self.lay(HAS_LIST.0, HAS_LIST.1, has_list);
        for (at, next) in links(&shown) {
            self.lay(at, STANDARD_NEXT, u32::from(next) << 8);
        }
    }

    fn link_extended(&mut self, capabilities: &[Capability]) {
        let mut all = capabilities.iter();
        if !all.any(|capability| capability.list == CapabilityList::Extended) {
            return;
        }
        let shown = self.shown(capabilities, CapabilityList::Extended);
        let first = shown.first().copied().unwrap_or(0);
        if first != CONVENTIONAL_SIZE {
            self.lay(CONVENTIONAL_SIZE, u32::MAX, u32::from(first) << 20);
        }
        for (at, next) in links(&shown) {
            self.lay(at, EXTENDED_NEXT, u32::from(next) << 20);
        }
    }
}

/// Each offset with the one after it; 0 after the last.
fn links(shown: &[u16]) -> impl Iterator<Item = (u16, u16)> {
    let next = shown.iter().skip(1).copied().chain([0]);
    shown.iter().copied().zip(next)
}

/// The bytes of a capability of this length, up to the next one and the end of its space.
pub(crate) fn extent(
    capabilities: &[Capability],
    capability: &Capability,
    length: u16,
) -> Range<u16> {
    let start = capability.offset;
    let space = match capability.list {
        CapabilityList::Standard => CONVENTIONAL_SIZE,
        CapabilityList::Extended => EXPRESS_SIZE,
    };
    let next = capabilities.iter().map(|other| other.offset);
    let next = next.filter(|other| *other > start).min();
    let end = start.saturating_add(length);
    start..end.min(space).min(next.unwrap_or(space))
}

/// How many lanes the function's link can have; 32 where it does not say.
fn lanes(config: &ConfigReader<'_>, capabilities: &[Capability]) -> Result<u16, FunctionError> {
    let express = capabilities.iter().find(|capability| {
        capability.list == CapabilityList::Standard && capability.id == Capability::EXPRESS
    });
    let Some(express) = express else {
        return Ok(32);
    };
    let at = express.offset.saturating_add(LINK_CAPABILITIES);
    if at >= CONVENTIONAL_SIZE {
        return Ok(32);
    }
    match (config.u16(at)? >> 4) & 0x3f {
        0 => Ok(32),
        lanes => Ok(lanes),
    }
}
