//! Which of a function's capabilities the guest sees, and why: one table.
//!
//! A capability that is not in the table is shown as the host has it, for a driver that knows it
//! may need it. *Hidden* means that the list leads past it, its registers read zero, and what is
//! written to them reaches nobody. *Emulated* means that its registers are this crate's.
//!
//! The host has its own say: vfio-pci takes capabilities that it does not know out of the list, and
//! lets writes through to few of the others. What it keeps back is not in the list that is read
//! here. The table says what a guest may see of any host's.

use crate::config_space::{ConfigReader, EXPRESS_SIZE};
use crate::{Capability, CapabilityList, FunctionError};

use Length::{Bytes, Lanes};
use Treatment::{Emulated, Hidden, Shown};

/// What the guest sees of a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Treatment {
    /// What the host shows. A write of which something follows for the memory map is intercepted
    /// (see the [crate's documentation](crate)).
    Shown,
    /// Registers of this crate's.
    Emulated,
    /// Nothing.
    Hidden,
}

/// What is done with a capability, and why.
#[derive(Debug, Clone, Copy)]
pub struct CapabilityRule {
    /// In which list it is.
    pub list: CapabilityList,
    /// Its id.
    pub id: u16,
    /// What the specification calls it.
    pub name: &'static str,
    /// What the guest sees of it.
    pub treatment: Treatment,
    /// Why.
    pub why: &'static str,
    /// How many bytes are hidden.
    length: Length,
}

/// How long a capability is that may be hidden.
#[derive(Debug, Clone, Copy)]
enum Length {
    /// So many bytes.
    Bytes(u16),
    /// Four bytes and for each entry so many more; so many are the low bits of this dword.
    Entries {
        counted_at: u16,
        bits: u16,
        shift: u16,
        each: u16,
    },
    /// So many bytes, and for each lane of the link so many more.
    Lanes { fixed: u16, each: u16 },
}

impl Capability {
    /// What is done with it; none where it is not known, and is shown for that reason.
    #[must_use]
    pub fn rule(&self) -> Option<&'static CapabilityRule> {
        TABLE
            .iter()
            .find(|rule| rule.list == self.list && rule.id == self.id)
    }
}

impl CapabilityRule {
    /// All rules, each list in the order of its ids.
    #[must_use]
    pub const fn all() -> &'static [Self] {
        TABLE
    }

    /// The length in bytes of a capability at `offset` that follows this rule, of a function whose
    /// link can have so many lanes. It may reach past the end of config space.
    pub(crate) fn length(
        &self,
        config: &ConfigReader<'_>,
        offset: u16,
        lanes: u16,
    ) -> Result<u16, FunctionError> {
        Ok(match self.length {
            Bytes(bytes) => bytes,
            Length::Entries {
                counted_at,
                bits,
                shift,
                each,
            } => {
                let at = offset.saturating_add(counted_at);
                if at >= EXPRESS_SIZE {
                    return Ok(4);
                }
                let [low, high, ..] = (config.u32(at)? >> shift).to_le_bytes();
                let most = 1_u16.checked_shl(bits.into()).unwrap_or(0).wrapping_sub(1);
                let entries = u16::from_le_bytes([low, high]) & most;
                entries.saturating_mul(each).saturating_add(4)
            }
            Lanes { fixed, each } => fixed
                .saturating_add(lanes.saturating_mul(each))
                .next_multiple_of(4),
        })
    }
}

const fn rule(
    list: CapabilityList,
    (id, name): (u16, &'static str),
    treatment: Treatment,
    length: Length,
    why: &'static str,
) -> CapabilityRule {
    CapabilityRule {
        list,
        id,
        name,
        treatment,
        why,
        length,
    }
}

/// In the standard list.
const fn standard(
    id: u16,
    name: &'static str,
    treatment: Treatment,
    bytes: u16,
    why: &'static str,
) -> CapabilityRule {
    let length = Bytes(bytes);
    rule(CapabilityList::Standard, (id, name), treatment, length, why)
}

/// In the extended list, shown.
const fn shown(id: u16, name: &'static str, why: &'static str) -> CapabilityRule {
    let length = Bytes(4);
    let treatment = Shown;
    rule(CapabilityList::Extended, (id, name), treatment, length, why)
}

/// In the extended list, hidden.
const fn hidden(id: u16, name: &'static str, length: Length, why: &'static str) -> CapabilityRule {
    let treatment = Hidden;
    rule(CapabilityList::Extended, (id, name), treatment, length, why)
}

/// Sizes of resizable BARs: control registers, counted in bits 7:5 of the first.
const RESIZABLE: Length = Length::Entries {
    counted_at: 8,
    bits: 3,
    shift: 5,
    each: 8,
};

const LINK: &str = "how the link runs is between the device and the host's port";
const NO_VIOMMU: &str = "the guest has no IOMMU that would translate, answer or tell spaces apart";
const ROOT: &str = "it belongs to root complexes and ports, of which the guest gets none";
const OTHERS: &str = "it is about functions that the guest may not have";
const READ: &str = "there is nothing in it that concerns anybody else";

/// Ids: PCI Code and ID Assignment 1.15, 2 and 3. Lengths: PCI Express Base 6.0, 7.5 to 7.9, and
/// the specifications of the older ones.
static TABLE: &[CapabilityRule] = &[
    standard(0x00, "null", Shown, 4, READ),
    standard(
        0x01,
        "power management",
        Shown,
        8,
        "a guest puts its device to sleep; changes of state are intercepted, for they cost mappings",
    ),
    standard(
        0x02,
        "AGP",
        Hidden,
        12,
        "the aperture's addresses are the host's",
    ),
    standard(0x03, "vital product data", Shown, 8, READ),
    standard(0x04, "slot identification", Hidden, 4, ROOT),
    standard(
        0x05,
        "MSI",
        Emulated,
        24,
        "messages are delivered by the machine, at addresses that mean nothing to the host; hidden \
         where there is nobody to deliver them",
    ),
    standard(0x06, "CompactPCI hot swap", Hidden, 4, ROOT),
    standard(0x07, "PCI-X", Shown, 24, READ),
    standard(
        0x08,
        "HyperTransport",
        Hidden,
        4,
        "it maps interrupts and addresses of the host's links",
    ),
    standard(
        0x09,
        "vendor-specific",
        Shown,
        4,
        "only the device's own driver knows what it needs of it",
    ),
    standard(
        0x0a,
        "debug port",
        Shown,
        4,
        "it points into a BAR, which is the guest's",
    ),
    standard(0x0b, "CompactPCI resource control", Hidden, 4, ROOT),
    standard(0x0c, "PCI hot-plug", Hidden, 8, ROOT),
    standard(0x0d, "bridge subsystem ids", Shown, 8, READ),
    standard(
        0x0e,
        "AGP 8x",
        Hidden,
        4,
        "the aperture's addresses are the host's",
    ),
    standard(
        0x0f,
        "secure device",
        Hidden,
        24,
        "it is where an IOMMU is programmed",
    ),
    standard(
        0x10,
        "PCI Express",
        Shown,
        60,
        "drivers look for it, and a function-level reset is in it, which is intercepted; of the \
         rest vfio-pci writes device control alone, without what would harm the host's links",
    ),
    standard(
        0x11,
        "MSI-X",
        Emulated,
        12,
        "as MSI; its table is trapped, and written by the host alone",
    ),
    standard(
        0x12,
        "serial ATA",
        Shown,
        8,
        "it points into a BAR, which is the guest's",
    ),
    standard(
        0x13,
        "advanced features",
        Shown,
        6,
        "a function-level reset is in it, which is intercepted",
    ),
    rule(
        CapabilityList::Standard,
        (0x14, "enhanced allocation"),
        Hidden,
        // Entries have up to 20 bytes.
        Length::Entries {
            counted_at: 0,
            bits: 6,
            shift: 16,
            each: 20,
        },
        "it says where the host's addresses are, which are not the guest's",
    ),
    standard(0x15, "flattening portal bridge", Hidden, 36, ROOT),
    shown(
        0x01,
        "advanced error reporting",
        "a driver may look at what went wrong; the host's ports report and recover",
    ),
    shown(0x02, "virtual channels", READ),
    shown(0x03, "device serial number", READ),
    shown(0x04, "power budgeting", READ),
    hidden(0x05, "root complex link declaration", Bytes(16), ROOT),
    hidden(0x06, "root complex link control", Bytes(12), ROOT),
    hidden(0x07, "root complex event collector", Bytes(12), ROOT),
    hidden(0x08, "multi-function virtual channels", Bytes(28), OTHERS),
    shown(0x09, "virtual channels of a function", READ),
    hidden(0x0a, "root complex register block", Bytes(20), ROOT),
    shown(
        0x0b,
        "vendor-specific",
        "only the device's own driver knows what it needs of it",
    ),
    hidden(0x0c, "configuration access correlation", Bytes(8), ROOT),
    hidden(
        0x0d,
        "access control services",
        Bytes(8),
        "who reaches whom is the host's to say, and what redirects requests must not be turned off",
    ),
    hidden(0x0e, "alternative routing-id", Bytes(8), OTHERS),
    hidden(0x0f, "address translation services", Bytes(8), NO_VIOMMU),
    hidden(
        0x10,
        "single-root I/O virtualization",
        Bytes(0x40),
        "a guest must not make functions that the host does not know who owns",
    ),
    hidden(0x11, "multi-root I/O virtualization", Bytes(4), OTHERS),
    hidden(
        0x12,
        "multicast",
        Bytes(40),
        "its groups lie at addresses of the host's bus, past the IOMMU",
    ),
    hidden(0x13, "page requests", Bytes(16), NO_VIOMMU),
    hidden(
        0x15,
        "resizable BARs",
        RESIZABLE,
        "BARs are emulated with the size that they had when the function was opened, and stay so",
    ),
    shown(0x16, "dynamic power allocation", READ),
    hidden(
        0x17,
        "processing hints",
        Bytes(12),
        "its steering tags name the host's processors",
    ),
    shown(
        0x18,
        "latency tolerance",
        "it is reported to the host's port, which knows what it can keep",
    ),
    hidden(
        0x19,
        "secondary PCI Express",
        Lanes { fixed: 12, each: 2 },
        LINK,
    ),
    hidden(0x1a, "protocol multiplexing", Bytes(20), LINK),
    hidden(0x1b, "process address spaces", Bytes(8), NO_VIOMMU),
    hidden(0x1c, "notifications of cache lines", Bytes(8), ROOT),
    hidden(0x1d, "downstream port containment", Bytes(16), ROOT),
    hidden(0x1e, "L1 power substates", Bytes(20), LINK),
    hidden(
        0x1f,
        "precision time measurement",
        Bytes(12),
        "the time is the host's ports' to give",
    ),
    hidden(0x20, "PCI Express over M-PHY", Bytes(28), LINK),
    hidden(0x21, "readiness notifications", Bytes(16), ROOT),
    shown(0x22, "readiness times", READ),
    shown(
        0x23,
        "designated vendor-specific",
        "only the device's own driver knows what it needs of it",
    ),
    hidden(
        0x24,
        "resizable BARs of virtual functions",
        RESIZABLE,
        OTHERS,
    ),
    hidden(0x25, "data link features", Bytes(12), LINK),
    hidden(
        0x26,
        "physical layer 16 GT/s",
        Lanes { fixed: 32, each: 1 },
        LINK,
    ),
    hidden(0x27, "lane margining", Lanes { fixed: 8, each: 4 }, LINK),
    hidden(0x28, "hierarchy id", Bytes(28), ROOT),
    shown(0x29, "enclosure management", READ),
    hidden(
        0x2a,
        "physical layer 32 GT/s",
        Lanes { fixed: 32, each: 1 },
        LINK,
    ),
    hidden(0x2b, "alternate protocols", Bytes(20), LINK),
    hidden(0x2c, "system firmware intermediary", Bytes(20), ROOT),
    hidden(0x2d, "shadow functions", Bytes(24), OTHERS),
    shown(
        0x2e,
        "data object exchange",
        "a mailbox of the device; its interrupt is one of the function's",
    ),
    shown(0x2f, "device 3", READ),
    hidden(
        0x30,
        "integrity and data encryption",
        Bytes(12),
        "its streams end at the host's port",
    ),
    hidden(
        0x31,
        "physical layer 64 GT/s",
        Lanes { fixed: 16, each: 1 },
        LINK,
    ),
    hidden(0x32, "flit logging", Bytes(60), LINK),
    hidden(0x33, "flit performance", Bytes(20), LINK),
    hidden(0x34, "flit error injection", Bytes(36), LINK),
    shown(0x35, "streamlined virtual channels", READ),
    shown(
        0x36,
        "register block locator",
        "it points into a BAR, which is the guest's",
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_rule_is_there_once_and_says_why() {
        let mut seen = BTreeSet::new();
        for rule in CapabilityRule::all() {
            let list = rule.list == CapabilityList::Extended;
            assert!(seen.insert((list, rule.id)), "{rule:?}");
            assert!(!rule.name.is_empty() && rule.why.len() > 10, "{rule:?}");
            let (offset, list) = (0x100, rule.list);
            let found = Capability {
                list,
                id: rule.id,
                offset,
            }
            .rule()
            .unwrap();
            assert_eq!(found.name, rule.name);
        }
    }

    #[test]
    fn what_is_not_known_has_no_rule() {
        for (list, id) in [
            (CapabilityList::Standard, 0x16),
            (CapabilityList::Standard, 0xff),
            (CapabilityList::Extended, 0x14),
            (CapabilityList::Extended, 0xffff),
        ] {
            let unknown = Capability {
                list,
                id,
                offset: 0x100,
            };
            assert!(unknown.rule().is_none(), "{unknown:?}");
        }
    }
}
