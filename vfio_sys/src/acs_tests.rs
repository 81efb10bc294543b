use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A made-up hierarchy of PCI functions in a temporary directory, which goes when it is dropped.
struct Tree {
    root: PathBuf,
}

/// What a function's config space is like.
#[derive(Clone, Copy)]
enum Kind {
    /// Conventional, or a bridge to a conventional bus.
    Conventional,
    /// A PCI Express function of that type, with ACS (capabilities and control) or without.
    Express(u8, Option<(u16, u16)>),
    /// As shown to those who are not root.
    HeaderOnly,
}

const ENDPOINT: u8 = 0;
const UPSTREAM_PORT: u8 = 5;
/// Source validation, translation blocking and all that redirects.
const ALL: u16 = 0x1f;
const ROOT: Kind = Kind::Express(PortType::ROOT_PORT, Some((ALL, ALL)));
const DOWN: Kind = Kind::Express(PortType::DOWNSTREAM_PORT, Some((ALL, ALL)));
const LEAF: Kind = Kind::Express(ENDPOINT, None);

fn config(kind: Kind) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    match kind {
        Kind::HeaderOnly => bytes.truncate(64),
        Kind::Conventional => bytes.truncate(256),
        Kind::Express(port_type, acs) => {
            bytes[0x06] = 0x10;
            bytes[0x34] = 0x40;
            // Something else first.
            bytes[0x40..0x42].copy_from_slice(&[0x01, 0x50]);
            bytes[0x50..0x53].copy_from_slice(&[0x10, 0x00, port_type << 4 | 2]);
            let next = 0x140_u32 << 20;
            bytes[0x100..0x104].copy_from_slice(&(next | 0x1_0001).to_le_bytes());
            if let Some((can, control)) = acs {
                bytes[0x140..0x144].copy_from_slice(&0x1_000d_u32.to_le_bytes());
                bytes[0x144..0x146].copy_from_slice(&can.to_le_bytes());
                bytes[0x146..0x148].copy_from_slice(&control.to_le_bytes());
            }
        }
    }
    bytes
}

impl Tree {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("throughway-acs-{}-{number}", std::process::id());
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(root.join("bus/pci/devices")).unwrap();
        Self { root }
    }

    /// Adds functions, each below the one before.
    fn chain(&self, functions: &[(&str, Kind)]) {
        let mut path = self.root.join("devices/pci0000:00");
        for (name, kind) in functions {
            path.push(name);
            if path.exists() {
                continue;
            }
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("config"), config(*kind)).unwrap();
            symlink(&path, self.root.join("bus/pci/devices").join(name)).unwrap();
        }
    }

    /// Puts a function into an IOMMU group.
    fn group(&self, name: &str, group: u32) {
        let target = self.root.join(format!("kernel/iommu_groups/{group}"));
        fs::create_dir_all(&target).unwrap();
        let function = self.root.join("bus/pci/devices").join(name);
        symlink(target, function.join("iommu_group")).unwrap();
    }

    fn bypass(&self, from: &str, to: &str) -> Option<Bypass> {
        let sysfs = Sysfs::new(&self.root, "/nowhere");
        sysfs
            .bypass(from.parse().unwrap(), to.parse().unwrap())
            .unwrap()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

const A: &str = "0000:03:00.0";
const B: &str = "0000:04:00.0";

/// Two functions below one switch, whose ports are of these kinds.
fn below_a_switch(root: Kind, down_a: Kind) -> Tree {
    let tree = Tree::new();
    let top = [
        ("0000:00:08.0", root),
        ("0000:01:00.0", Kind::Express(UPSTREAM_PORT, None)),
    ];
    tree.chain(&[&top[..], &[("0000:02:00.0", down_a), (A, LEAF)]].concat());
    tree.chain(&[&top[..], &[("0000:02:01.0", DOWN), (B, LEAF)]].concat());
    tree
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

#[test]
fn ports_that_redirect_send_everything_by_the_iommu() {
    let tree = below_a_switch(ROOT, DOWN);
    assert_eq!(tree.bypass(A, B), None);
    assert_eq!(tree.bypass(B, A), None);
}

#[test]
fn a_switch_port_without_acs_is_named_for_what_comes_from_below_it() {
    let none = Kind::Express(PortType::DOWNSTREAM_PORT, None);
    let tree = below_a_switch(ROOT, none);
    let at = bdf("0000:02:00.0");
    assert_eq!(tree.bypass(A, B), Some(Bypass::NoAcs { at }));
    // What comes from the other side does not pass that port on its way up.
    assert_eq!(tree.bypass(B, A), None);
    assert!(Bypass::NoAcs { at }.to_string().contains("0000:02:00.0"));
}

#[test]
fn redirection_that_is_off_is_told_with_the_register() {
    for off in [1 << 2, 1 << 3, 1 << 4] {
        let control = ALL & !off;
        let port = Kind::Express(PortType::DOWNSTREAM_PORT, Some((ALL, control)));
        let at = bdf("0000:02:00.0");
        let found = below_a_switch(ROOT, port).bypass(A, B);
        assert_eq!(found, Some(Bypass::NotRedirected { at, control }));
    }
    // Source validation and translation blocking redirect nothing.
    let port = Kind::Express(PortType::DOWNSTREAM_PORT, Some((ALL, ALL & !3)));
    assert_eq!(below_a_switch(ROOT, port).bypass(A, B), None);
    // What cannot be turned off is on.
    let port = Kind::Express(PortType::DOWNSTREAM_PORT, Some((0x04, 0x04)));
    assert_eq!(below_a_switch(ROOT, port).bypass(A, B), None);
}

#[test]
fn the_root_port_counts_too() {
    let none = Kind::Express(PortType::ROOT_PORT, None);
    let tree = below_a_switch(none, DOWN);
    let at = bdf("0000:00:08.0");
    assert_eq!(tree.bypass(A, B), Some(Bypass::NoAcs { at }));
    // Also towards what is not below it.
    tree.chain(&[("0000:00:06.0", Kind::Conventional)]);
    assert_eq!(tree.bypass(A, "0000:00:06.0"), Some(Bypass::NoAcs { at }));
    assert_eq!(tree.bypass("0000:00:06.0", A), None);
}

#[test]
fn functions_on_the_root_bus_send_everything_by_the_iommu() {
    let tree = Tree::new();
    tree.chain(&[("0000:00:05.0", Kind::Conventional)]);
    tree.chain(&[("0000:00:06.0", Kind::Conventional)]);
    assert_eq!(tree.bypass("0000:00:05.0", "0000:00:06.0"), None);
}

#[test]
fn functions_on_one_conventional_bus_hear_each_other() {
    let tree = Tree::new();
    let bridge = ("0000:00:1e.0", Kind::Conventional);
    tree.chain(&[bridge, ("0000:05:01.0", Kind::Conventional)]);
    tree.chain(&[bridge, ("0000:05:02.0", Kind::Conventional)]);
    let found = tree.bypass("0000:05:01.0", "0000:05:02.0");
    let bridge = bdf("0000:00:1e.0");
    assert_eq!(found, Some(Bypass::SharedBus { bridge }));
}

#[test]
fn functions_of_one_device_need_acs_of_their_own() {
    let tree = Tree::new();
    tree.chain(&[("0000:00:07.0", LEAF)]);
    tree.chain(&[("0000:00:07.1", Kind::Express(ENDPOINT, Some((ALL, ALL))))]);
    let at = bdf("0000:00:07.0");
    let found = tree.bypass("0000:00:07.0", "0000:00:07.1");
    assert_eq!(found, Some(Bypass::NoAcs { at }));
    assert_eq!(tree.bypass("0000:00:07.1", "0000:00:07.0"), None);
}

#[test]
fn below_a_port_all_functions_are_one_device_whatever_their_numbers() {
    let tree = Tree::new();
    let port = ("0000:00:08.0", ROOT);
    let redirects = Kind::Express(ENDPOINT, Some((ALL, ALL)));
    tree.chain(&[port, ("0000:01:10.0", redirects)]);
    tree.chain(&[port, ("0000:01:11.0", LEAF)]);
    assert_eq!(tree.bypass("0000:01:10.0", "0000:01:11.0"), None);
    let at = bdf("0000:01:11.0");
    let found = tree.bypass("0000:01:11.0", "0000:01:10.0");
    assert_eq!(found, Some(Bypass::NoAcs { at }));
}

#[test]
fn one_group_is_the_kernels_own_word_for_it() {
    let tree = below_a_switch(ROOT, DOWN);
    tree.group(A, 7);
    tree.group(B, 8);
    assert_eq!(tree.bypass(A, B), None);
    let tree = below_a_switch(ROOT, DOWN);
    tree.group(A, 7);
    tree.group(B, 7);
    assert_eq!(tree.bypass(A, B), Some(Bypass::SameGroup { group: 7 }));
}

#[test]
fn what_may_not_be_read_is_told() {
    let tree = below_a_switch(Kind::HeaderOnly, DOWN);
    let at = bdf("0000:00:08.0");
    assert_eq!(tree.bypass(A, B), Some(Bypass::Unreadable { at }));
    assert!(Bypass::Unreadable { at }.to_string().contains("root"));
}

#[test]
fn lists_that_never_end_are_left() {
    let mut bytes = config(Kind::Express(PortType::ROOT_PORT, None));
    // Both lists point back at themselves.
    bytes[0x50] = 0x05;
    bytes[0x51] = 0x40;
    bytes[0x140..0x144].copy_from_slice(&(0x100_u32 << 20 | 0x1_0002).to_le_bytes());
    let looping = ConfigBytes(bytes);
    assert_eq!(looping.port_type(), PortType(None));
    assert_eq!(looping.acs(), None);
}

#[test]
fn a_function_that_is_not_there() {
    let tree = Tree::new();
    tree.chain(&[("0000:00:05.0", LEAF)]);
    let sysfs = Sysfs::new(&tree.root, "/nowhere");
    let error = sysfs.bypass(bdf("0000:00:05.0"), bdf("0000:00:06.0"));
    let error = error.unwrap_err();
    assert!(matches!(error, OpenError::NoSuchFunction { .. }), "{error}");
}
