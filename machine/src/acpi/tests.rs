use super::*;
use crate::layout::Wanted;

fn layout() -> Layout {
    Layout::choose(&Wanted {
        ram: 2 << 30,
        allowed: &[],
        address_bits: 39,
        functions: &[],
    })
    .unwrap()
}

fn made(cpus: u32) -> Tables {
    let layout = layout();
    tables(&Platform {
        cpus,
        layout: &layout,
    })
    .unwrap()
}

/// The guest's view: tables found by following addresses.
impl Tables {
    fn from(&self, address: u64) -> &[u8] {
        let offset = address.checked_sub(self.address.raw()).unwrap();
        &self.bytes[usize::try_from(offset).unwrap()..]
    }

    /// The table at `address`, whose checksum is right.
    fn table(&self, address: u64) -> &[u8] {
        let bytes = self.from(address);
        let size = usize::try_from(u32_at(bytes, 4)).unwrap();
        assert_eq!(sum(&bytes[..size]), 0);
        &bytes[..size]
    }

    fn named(&self, signature: &[u8; 4]) -> &[u8] {
        let rsdp = self.from(self.rsdp.raw());
        let xsdt = self.table(u64_at(rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let addresses = xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0));
        let mut tables = addresses.map(|address| self.table(address));
        tables.find(|table| &table[..4] == signature).unwrap()
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let tables = made(2);
    assert_eq!(tables.address, platform::FIRMWARE_TABLES);
    assert!(tables.rsdp.is_aligned(16));
    let rsdp = tables.from(tables.rsdp.raw());
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36])), (0, 0));
    for signature in [b"FACP", b"APIC", b"MCFG"] {
        assert!(tables.named(signature).len() > 36);
    }
    let dsdt = tables.table(u64_at(tables.named(b"FACP"), 140));
    assert_eq!(&dsdt[..4], b"DSDT");
}

#[test]
fn the_fixed_table_names_the_chipsets_ports() {
    let tables = made(1);
    let fadt = tables.named(b"FACP");
    assert_eq!(fadt.len(), 276);
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 20), 1 << 20, "hardware-reduced");
    assert_eq!(flags & (1 << 10), 1 << 10, "reset register");
    // No legacy devices, no keyboard controller, no VGA, no ASPM, no CMOS clock.
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b11_0100);
    let register = |offset: usize| (fadt[offset], fadt[offset + 1], u64_at(fadt, offset + 4));
    assert_eq!(register(116), (1, 8, u64::from(platform::RESET_PORT)));
    assert_eq!(fadt[128], platform::RESET_VALUE);
    let control = u64::from(platform::SLEEP_CONTROL_PORT);
    assert_eq!(register(244), (1, 8, control));
    assert_eq!(register(256), (1, 8, control + 1));
}

/// The structures of a MADT: type and content.
fn structures(madt: &[u8]) -> Vec<(u8, &[u8])> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while let [kind, length, ..] = *rest {
        let (structure, after) = rest.split_at(length.into());
        found.push((kind, &structure[2..]));
        rest = after;
    }
    found
}

#[test]
fn every_processor_has_its_local_apic() {
    let tables = made(3);
    let madt = tables.named(b"APIC");
    assert_eq!(u32_at(madt, 36), 0xfee0_0000);
    let found = structures(madt);
    let apics: Vec<_> = found.iter().filter(|(kind, _)| *kind == 0).collect();
    assert_eq!(apics.len(), 3);
    assert_eq!(apics[2].1, [2, 2, 1, 0, 0, 0]);
    let io_apics: Vec<_> = found.iter().filter(|(kind, _)| *kind == 1).collect();
    assert_eq!(io_apics.len(), 1);
    assert_eq!(io_apics[0].1, [0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(found.len(), 4);
}

#[test]
fn processors_past_254_have_long_numbers() {
    let tables = made(257);
    let found = structures(tables.named(b"APIC"));
    assert_eq!(found.iter().filter(|(kind, _)| *kind == 0).count(), 255);
    let long: Vec<_> = found.iter().filter(|(kind, _)| *kind == 9).collect();
    assert_eq!(long.len(), 2);
    assert_eq!(long[0].1, [0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
    assert_eq!(long[1].1, [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]);
}

#[test]
fn too_many_processors_are_an_error() {
    let layout = layout();
    for cpus in [8_192, u32::MAX] {
        let platform = Platform {
            cpus,
            layout: &layout,
        };
        let error = tables(&platform).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "the firmware tables of {cpus} processors take more than the 124 KiB that a PC \
                 has for them: ask for fewer processors"
            )
        );
    }
    let many = made(7_000).bytes.len();
    assert!(many < 0x2_0000, "{many}");
}

#[test]
fn config_space_lies_where_the_platform_says() {
    let tables = made(1);
    let mcfg = tables.named(b"MCFG");
    assert_eq!(mcfg.len(), 60);
    assert_eq!(u64_at(mcfg, 44), platform::ECAM.raw());
    assert_eq!(mcfg[52..56], [0, 0, 0, 0xff]);
}

/// A window as the root bridge's resources have it: of memory, not cached, read and written.
fn descriptor(tag: u8, min: &[u8], max: &[u8], size: &[u8]) -> Vec<u8> {
    let zero = vec![0; min.len()];
    let length = u8::try_from(3 + 5 * min.len()).unwrap();
    let head = [tag, length, 0, 0, 0b1100, 1];
    [&head, zero.as_slice(), min, max, &zero, size].concat()
}

#[test]
fn the_root_bridge_has_the_layouts_windows() {
    let tables = made(1);
    let dsdt = tables.table(u64_at(tables.named(b"FACP"), 140));
    let low = layout().low_window();
    let u32_bytes = |n: u64| u32::try_from(n).unwrap().to_le_bytes();
    let low = descriptor(
        0x87,
        &u32_bytes(low.start().raw()),
        &u32_bytes(low.last().raw()),
        &u32_bytes(low.size()),
    );
    assert!(contains(dsdt, &low));
    let high = layout().high_window().unwrap();
    let high = descriptor(
        0x8a,
        &high.start().raw().to_le_bytes(),
        &high.last().raw().to_le_bytes(),
        &high.size().to_le_bytes(),
    );
    assert!(contains(dsdt, &high));
}

#[test]
fn without_a_high_window_none_is_named() {
    let bits = Wanted {
        ram: 2 << 30,
        allowed: &[],
        address_bits: 32,
        functions: &[],
    };
    let layout = Layout::choose(&bits).unwrap();
    assert_eq!(layout.high_window(), None);
    let platform = Platform {
        cpus: 1,
        layout: &layout,
    };
    let tables = tables(&platform).unwrap();
    let dsdt = tables.table(u64_at(tables.named(b"FACP"), 140));
    assert!(!contains(dsdt, &[0x8a, 43, 0]));
    assert!(contains(dsdt, &[0x87, 23, 0]));
}

/// Ports and interrupts as resources have them.
#[test]
fn the_devices_have_the_chipsets_ports() {
    let tables = made(1);
    let dsdt = tables.table(u64_at(tables.named(b"FACP"), 140));
    let port = |port: u16, size: u8| {
        let [low, high] = port.to_le_bytes();
        vec![0x47, 1, low, high, low, high, 1, size]
    };
    // One that this device consumes, edge-triggered, active high, exclusive.
    let interrupt = |gsi: u32| [&[0x89, 6, 0, 0b0011, 1], &gsi.to_le_bytes()[..]].concat();
    for part in [
        port(platform::CONFIG_ADDRESS_PORT, 8),
        port(platform::SERIAL_PORT, 8),
        port(platform::SLEEP_CONTROL_PORT, 4),
        port(platform::PANIC_PORT, 1),
        interrupt(platform::SERIAL_GSI),
        interrupt(platform::EVENT_GSI),
    ] {
        assert!(contains(dsdt, &part), "{part:x?}");
    }
    assert!(!contains(dsdt, &interrupt(6)));
}
