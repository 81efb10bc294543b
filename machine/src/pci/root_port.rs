//! A root port: a bridge to a bus of its own, with one function behind it.

use super::header::Header;

/// Red Hat's generic PCI Express root port, for which every kernel's port driver serves by class.
const VENDOR_DEVICE: [u8; 4] = [0x36, 0x1b, 0x0c, 0x00];
/// A PCI-to-PCI bridge (PCI Code and ID Assignment 1.11, 1.7).
const CLASS: [u8; 3] = [0x00, 0x04, 0x06];
/// A bridge's header (PCI Express Base 6.0, 7.5.1.3).
const BRIDGE: u8 = 1;
const SECONDARY_BUS: u16 = 0x19;
const BRIDGE_CONTROL: u16 = 0x3e;
/// Of the bridge control register: the bus behind is reset for as long as it is set.
const BUS_RESET: u8 = 1 << 6;
/// Where its only capability lies.
const EXPRESS: u8 = 0x40;

/// One root port.
#[derive(Debug, Clone)]
pub(super) struct RootPort {
    header: Header,
    number: u8,
}

impl RootPort {
    /// As at power-on. `number` is its slot's, which is its port's as well.
    pub(super) fn new(number: u8) -> Self {
        let mut header = Header::new();
        header.set(0x00, &VENDOR_DEVICE);
        // The status register says that there are capabilities.
        header.set(0x06, &[1 << 4]);
        header.set(0x09, &CLASS);
        header.set(0x0e, &[BRIDGE]);
        header.set(0x34, &[EXPRESS]);
        // The prefetchable window has 64 bits; there is none for ports.
        header.set(0x24, &[1, 0, 1, 0]);
        header.set(EXPRESS.into(), &express(number));

        // Memory, bus mastering, errors; what they do is up to what lies behind.
        header.allow(0x04, &[0b0100_0110, 0b0000_0101]);
        header.allow(0x0c, &[0xff]);
        header.allow(0x18, &[0xff, 0xff, 0xff]);
        header.allow(0x20, &[0xf0, 0xff, 0xf0, 0xff]);
        header.allow(0x24, &[0xf0, 0xff, 0xf0, 0xff]);
        header.allow(0x28, &[0xff; 8]);
        header.allow(0x3c, &[0xff]);
        header.allow(BRIDGE_CONTROL, &[0b0100_0011, 0]);
        // Device control, link control, root control: kept, without effect.
        header.allow(u16::from(EXPRESS).saturating_add(0x08), &[0xef, 0x7f]);
        header.allow(u16::from(EXPRESS).saturating_add(0x10), &[0xc3, 0x00]);
        header.allow(u16::from(EXPRESS).saturating_add(0x1c), &[0x0f, 0x00]);
        Self { header, number }
    }

    /// Makes it what it was at power-on.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.number);
    }

    /// The number that the guest gave the bus behind; zero until it has.
    pub(super) fn secondary_bus(&self) -> u8 {
        self.header.byte(SECONDARY_BUS)
    }

    pub(super) fn read(&self, at: u16, data: &mut [u8]) {
        self.header.read(at, data);
    }

    /// The guest writes. Whether the bus behind is reset by it.
    pub(super) fn write(&mut self, at: u16, data: &[u8]) -> bool {
        let before = self.header.byte(BRIDGE_CONTROL);
        self.header.write(at, data);
        let after = self.header.byte(BRIDGE_CONTROL);
        after & !before & BUS_RESET != 0
    }
}

/// The PCI Express capability (PCI Express Base 6.0, 7.5.3): version 2, a root port with a link
/// that is up, without a slot, so that nothing is hot-plugged.
fn express(number: u8) -> [u8; 60] {
    let mut bytes = [0; 60];
    let mut set = |at: usize, value: &[u8]| {
        for (place, byte) in bytes.iter_mut().skip(at).zip(value) {
            *place = *byte;
        }
    };
    set(0x00, &[0x10, 0, 0x42, 0]);
    // Role-based error reporting.
    set(0x04, &0x8000_u32.to_le_bytes());
    // 8 GT/s, sixteen lanes, and the port's number.
    let link = 0x3 | 16 << 4 | u32::from(number) << 24;
    set(0x0c, &link.to_le_bytes());
    // As fast and as wide, and the data link is active.
    set(0x12, &(0x3_u16 | 16 << 4 | 1 << 13).to_le_bytes());
    // The speeds there are: up to 8 GT/s.
    set(0x2c, &0xe_u32.to_le_bytes());
    set(0x30, &3_u16.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_a_bridge_whose_bus_the_guest_numbers_and_resets() {
        let mut port = RootPort::new(3);
        let mut class = [0; 4];
        port.read(0x08, &mut class);
        assert_eq!(class, [0, 0x00, 0x04, 0x06]);
        assert_eq!(port.secondary_bus(), 0);
        assert!(!port.write(0x18, &[0, 7, 7]));
        assert_eq!(port.secondary_bus(), 7);
        assert!(port.write(0x3e, &[0x40]), "set: the bus is reset");
        assert!(!port.write(0x3e, &[0x40]), "still set");
        assert!(!port.write(0x3e, &[0x00]), "let go");
        port.reset();
        assert_eq!(port.secondary_bus(), 0);
    }

    #[test]
    fn the_prefetchable_window_says_that_it_has_64_bits() {
        let mut port = RootPort::new(1);
        port.write(0x24, &[0xff; 4]);
        let mut window = [0; 4];
        port.read(0x24, &mut window);
        assert_eq!(window, [0xf1, 0xff, 0xf1, 0xff]);
        port.write(0x1c, &[0xff; 2]);
        let mut ports = [0xff; 2];
        port.read(0x1c, &mut ports);
        assert_eq!(ports, [0, 0], "no window for ports");
    }
}
