//! The host bridge: what sits at 00.0 so that software finds a root bus.

use super::header::Header;

/// Red Hat's generic PCI Express host bridge, which drivers leave alone.
const VENDOR_DEVICE: [u8; 4] = [0x36, 0x1b, 0x08, 0x00];
/// A host bridge (PCI Code and ID Assignment 1.11, 1.7).
const CLASS: [u8; 3] = [0x00, 0x00, 0x06];

/// Its registers.
pub(super) fn host_bridge() -> Header {
    let mut header = Header::new();
    header.set(0x00, &VENDOR_DEVICE);
    header.set(0x09, &CLASS);
    header
}
