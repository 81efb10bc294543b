//! Faults of QEMU's IOMMU model, as its trace names them.
//!
//! `-trace vtd_dmar_fault` prints one line for each translation that failed, unlike QEMU's
//! one-line message (once per process) and the kernel's (rate-limited). It is therefore the
//! witness that a DMA was blocked: it comes from outside the kernel under test.

use std::fmt;

/// A PCI function as the bus knows it: bus, device and function number in sixteen bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequesterId(u16);

impl RequesterId {
    /// The function with this bus, device (0-31) and function (0-7) number.
    #[must_use]
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        let devfn = device << 3 | function;
        Some(Self(u16::from_be_bytes([bus, devfn])))
    }
}

impl From<u16> for RequesterId {
    fn from(source_id: u16) -> Self {
        Self(source_id)
    }
}

impl fmt::Display for RequesterId {
    /// The way sysfs writes it, in domain 0 (QEMU has no other): `0000:00:05.0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [bus, devfn] = self.0.to_be_bytes();
        write!(f, "0000:{bus:02x}:{:02x}.{}", devfn >> 3, devfn & 7)
    }
}

/// One blocked DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmarFault {
    /// The function that asked.
    pub device: RequesterId,
    /// The I/O virtual address it asked for, exactly. One DMA may be blocked in several pieces (edu's
    /// come four bytes at a time, measured with QEMU 10.0.2), each of them a fault.
    pub iova: u64,
    /// Whether it wanted to write.
    pub write: bool,
    /// The fault reason of the VT-d specification (5: no write permission, 6: no read permission).
    pub reason: u32,
}

impl fmt::Display for DmarFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.write { "write to" } else { "read from" };
        let Self {
            device,
            iova,
            reason,
            ..
        } = self;
        write!(f, "{device}: {verb} {iova:#x} blocked, reason {reason}")
    }
}

/// The faults in a piece of QEMU's trace; lines of other events, and cut lines, are passed over.
#[must_use]
pub fn parse_trace(trace: &str) -> Vec<DmarFault> {
    trace.lines().filter_map(parse_line).collect()
}

/// `vtd_dmar_fault sid 0x28 fault 5 addr 0x1000 write 1`, possibly behind a time stamp.
fn parse_line(line: &str) -> Option<DmarFault> {
    let (_, fields) = line.split_once("vtd_dmar_fault ")?;
    let mut words = fields.split_whitespace();
    let mut field = |name: &str| match words.next() {
        Some(word) if word == name => words.next(),
        _ => None,
    };
    let device = u16::from_str_radix(field("sid")?.strip_prefix("0x")?, 16).ok()?;
    let reason = field("fault")?.parse().ok()?;
    let iova = u64::from_str_radix(field("addr")?.strip_prefix("0x")?, 16).ok()?;
    let write = match field("write")? {
        "0" => false,
        "1" => true,
        _ => return None,
    };
    Some(DmarFault {
        device: device.into(),
        iova,
        write,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_device_address_and_direction() {
        let faults = parse_trace("vtd_dmar_fault sid 0x28 fault 5 addr 0xfe000040 write 1\n");
        let expected = DmarFault {
            device: RequesterId::new(0, 5, 0).unwrap(),
            iova: 0xfe00_0040,
            write: true,
            reason: 5,
        };
        assert_eq!(faults, [expected]);
        assert_eq!(
            expected.to_string(),
            "0000:00:05.0: write to 0xfe000040 blocked, reason 5"
        );
    }

    #[test]
    fn a_time_stamp_in_front_is_accepted() {
        let line = "4711@1700000000.123456:vtd_dmar_fault sid 0x100 fault 6 addr 0x0 write 0";
        let fault = parse_trace(line)[0];
        assert_eq!(fault.device.to_string(), "0000:01:00.0");
        assert!(!fault.write);
    }

    #[test]
    fn other_and_cut_lines_are_passed_over() {
        let trace = "qemu-system-x86_64: vtd_iommu_translate: detected translation failure\n\
                     vtd_dmar_fault sid 0x28 fault 5 addr 0x10\n\
                     vtd_dmar_fault sid 0x fault 5 addr 0x10 write 1\n\
                     vtd_dmar_fault sid 0x28 fault 5 addr 0x10 write 2\n\
                     vtd_dmar_fault sid 0x28 fault 5 add";
        assert!(parse_trace(trace).is_empty());
    }

    #[test]
    fn requester_ids_outside_the_bus_are_refused() {
        assert!(RequesterId::new(0, 32, 0).is_none());
        assert!(RequesterId::new(0, 0, 8).is_none());
        assert_eq!(
            RequesterId::new(255, 31, 7).unwrap().to_string(),
            "0000:ff:1f.7"
        );
    }
}
