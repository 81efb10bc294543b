//! Config space as a driver sizes and programs it.

use super::*;
use crate::{BarKind, BarSpec};
use assigned_pci::BarIndex;

fn space(spec: &FunctionSpec) -> ConfigSpace {
    ConfigSpace::new(spec, [0xe000_0000, 0, 0x12_4000_0000, 0, 0xc000, 0])
}

fn u32_at(config: &ConfigSpace, offset: u16) -> u32 {
    let mut data = [0; 4];
    config.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn set(config: &mut ConfigSpace, offset: u16, value: u32) {
    config.write(offset, &value.to_le_bytes());
}

#[test]
fn a_32_bit_bar_is_sized_and_placed() {
    let mut config = space(&FunctionSpec::edu("edu"));
    assert_eq!(u32_at(&config, 0), 0x11e8_1234);
    assert_eq!(u32_at(&config, 0x10), 0xe000_0000);
    set(&mut config, 0x10, u32::MAX);
    assert_eq!(u32_at(&config, 0x10), 0xfff0_0000);
    set(&mut config, 0x10, 0xd012_3456);
    assert_eq!(u32_at(&config, 0x10), 0xd010_0000);
    set(&mut config, 0x14, u32::MAX);
    assert_eq!(u32_at(&config, 0x14), 0);
}

#[test]
fn a_64_bit_bar_is_sized_half_by_half() {
    let spec = FunctionSpec::shared_memory("memory", 0x2_0000_0000);
    let mut config = space(&spec);
    assert_eq!(u32_at(&config, 0x18), 0xc);
    assert_eq!(u32_at(&config, 0x1c), 0x12);
    set(&mut config, 0x18, u32::MAX);
    set(&mut config, 0x1c, u32::MAX);
    assert_eq!(u32_at(&config, 0x18), 0xc);
    assert_eq!(u32_at(&config, 0x1c), 0xffff_fffe);
}

#[test]
fn type_bits_tell_the_kinds_apart() {
    for (kind, bits) in [
        (BarKind::Io, 1),
        (BarKind::Memory32, 0),
        (BarKind::Memory32Prefetchable, 8),
        (BarKind::Memory64, 4),
        (BarKind::Memory64Prefetchable, 12),
    ] {
        let spec =
            FunctionSpec::new("f", 1, 2).with_bar(BarIndex::ALL[0], BarSpec::new(kind, 0x4000));
        let mut config = space(&spec);
        set(&mut config, 0x10, u32::MAX);
        assert_eq!(u32_at(&config, 0x10), 0xffff_c000 | bits);
    }
}

#[test]
fn only_some_command_bits_can_be_set() {
    let mut config = space(&FunctionSpec::edu("edu"));
    assert_eq!(config.command(), 2);
    set(&mut config, 0x04, u32::MAX);
    assert_eq!(config.command(), 0x0547);
    // The status register beside it is read-only.
    assert_eq!(u32_at(&config, 0x04) >> 16, 0x10);
    config.write(0x04, &[0]);
    assert_eq!(config.command(), 0x0500);
}

#[test]
fn identity_is_read_only_and_the_interrupt_line_is_not() {
    let mut config = space(&FunctionSpec::edu("edu"));
    set(&mut config, 0, 0);
    set(&mut config, 0x3c, 0x0b);
    assert_eq!(u32_at(&config, 0), 0x11e8_1234);
    assert_eq!(u32_at(&config, 0x3c), 0x010b);
}

#[test]
fn msi_is_enabled_by_the_kernel_alone() {
    let mut config = space(&FunctionSpec::edu("edu"));
    assert_eq!(u32_at(&config, 0x34), 0x40);
    assert_eq!(u32_at(&config, 0x40), 0x0080_0005);
    set(&mut config, 0x40, u32::MAX);
    assert_eq!(u32_at(&config, 0x40), 0x0080_0005);
    set(&mut config, 0x44, 0xfee0_0000);
    assert_eq!(u32_at(&config, 0x44), 0xfee0_0000);
}

#[test]
fn the_end_of_config_space_is_known() {
    let config = space(&FunctionSpec::edu("edu"));
    assert!(config.has(0xfc, 4) && !config.has(0xfd, 4));
    let config = space(&FunctionSpec::edu("edu").with_extended_config());
    assert!(config.has(0xffc, 4) && !config.has(0xffd, 4));
}
