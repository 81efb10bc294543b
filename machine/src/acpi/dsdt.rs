//! The devices that nobody could find by looking (ACPI 6.5, 5.2.11.1).
//!
//! | path | what it is |
//! |---|---|
//! | `\_SB.PCI0` | the PCI Express root bridge, segment 0, buses 0 to 255 |
//! | `\_SB.PLAT` | what is taken: config space by address, the ports for sleep and reset |
//! | `\_SB.COM1` | the serial port |
//! | `\_SB.PWRB` | the power button |
//! | `\_SB.GED0` | the generic event device that presses it |
//! | `\_SB.PANC` | where the kernel says that it has panicked (QEMU, `docs/specs/pvpanic.rst`) |
//! | `\_S5` | soft off |
//!
//! # The root bridge's windows
//! None is called prefetchable. Linux puts a prefetchable BAR, or a bridge's prefetchable window,
//! into any window if there is no prefetchable one, looks above 4 GiB first if it has 64 bits, and
//! never puts a BAR that is not prefetchable into a prefetchable window. So the high window is
//! for every 64-bit BAR on the root bus and for the prefetchable ones behind root ports; a bridge
//! has no 64-bit window for others, which go into the low one.
//!
//! No function has an interrupt pin, so there is no interrupt routing table.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::madt::low;
use crate::layout::Layout;
use crate::platform;

/// Integers have 64 bits from revision 2 on.
const REVISION: u8 = 2;
/// The PCI root bridge's `_OSC` (PCI Firmware 3.3, 4.5.1).
const PCI_OSC: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the operating system may control there: native hot plug, PME, AER, the PCI Express
/// capability and latency tolerance reporting. All but the standard hot plug controller, which no
/// bridge of this machine has.
const PCI_CONTROL: u8 = 0b11_1101;
/// What `_OSC` says in its first dword (ACPI 6.5, 6.2.11): the UUID is not known, the revision is
/// not known, not all that was asked for is granted.
const UNKNOWN_UUID: u8 = 1 << 2;
const UNKNOWN_REVISION: u8 = 1 << 3;
const MASKED: u8 = 1 << 4;
/// What a power button is notified of when it was pressed (ACPI 6.5, 4.8.3.1.2.1).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn table(layout: &Layout) -> Sdt {
    let mut body = Vec::new();
    let devices: [&dyn Aml; 6] = [
        &RootBridge(layout),
        &Taken,
        &SerialPort,
        &PowerButton,
        &GenericEvents,
        &Panic,
    ];
    Scope::new("\\_SB_".into(), devices.to_vec()).to_aml_bytes(&mut body);
    let soft_off = Package::new(vec![&platform::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &soft_off).to_aml_bytes(&mut body);
    super::table(*b"DSDT", REVISION, &body)
}

struct RootBridge<'a>(&'a Layout);

impl RootBridge<'_> {
    fn windows(&self) -> Vec<Box<dyn Aml>> {
        let uncached = AddressSpaceCacheable::NotCacheable;
        let window = self.0.low_window();
        let (min, max) = (low(window.start()), low(window.last()));
        let mut windows: Vec<Box<dyn Aml>> = vec![
            Box::new(AddressSpace::<u16>::new_bus_number(0, u8::MAX.into())),
            Box::new(IO::new(
                platform::CONFIG_ADDRESS_PORT,
                platform::CONFIG_ADDRESS_PORT,
                1,
                8,
            )),
            Box::new(AddressSpace::<u16>::new_io(
                platform::IO_WINDOW,
                platform::IO_WINDOW_LAST,
                None,
            )),
            Box::new(AddressSpace::<u32>::new_memory(
                uncached, true, min, max, None,
            )),
        ];
        if let Some(window) = self.0.high_window() {
            let (min, max) = (window.start().raw(), window.last().raw());
            windows.push(Box::new(AddressSpace::<u64>::new_memory(
                uncached, true, min, max, None,
            )));
        }
        windows
    }
}

impl Aml for RootBridge<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let windows = self.windows();
        let resources = ResourceTemplate::new(windows.iter().map(AsRef::as_ref).collect());
        let parts: [&dyn Aml; 7] = [
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &resources),
            &PciControl,
        ];
        Device::new("PCI0".into(), parts.to_vec()).to_aml_bytes(sink);
    }
}

/// `_OSC`: grants what is asked for.
struct PciControl;

impl Aml for PciControl {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (uuid, revision, buffer) = (Arg(0), Arg(1), Arg(3));
        let (status, control, granted) = (Path::new("CDW1"), Path::new("CDW3"), Local(0));
        let [masked, unknown_revision, unknown_uuid] =
            [&MASKED, &UNKNOWN_REVISION, &UNKNOWN_UUID].map(|bit| Or::new(&status, &status, bit));

        let too_much = NotEqual::new(&granted, &control);
        let store = Store::new(&control, &granted);
        let other_revision = NotEqual::new(&revision, &ONE);
        let grant: [&dyn Aml; 4] = [
            &CreateDWordField::new(&control, &buffer, &8_u8),
            &And::new(&granted, &control, &PCI_CONTROL),
            &If::new(&too_much, vec![&masked, &store]),
            &If::new(&other_revision, vec![&unknown_revision]),
        ];

        let pci = Uuid::new(PCI_OSC);
        let is_pci = Equal::new(&uuid, &pci);
        let parts: [&dyn Aml; 4] = [
            &CreateDWordField::new(&status, &buffer, &ZERO),
            &If::new(&is_pci, grant.to_vec()),
            &Else::new(vec![&unknown_uuid]),
            &Return::new(&buffer),
        ];
        // The fields are named objects, so two calls at a time would meet.
        Method::new("_OSC".into(), 4, true, parts.to_vec()).to_aml_bytes(sink);
    }
}

/// What is no device of its own, and where nobody else may be.
struct Taken;

impl Aml for Taken {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ecam_size = low(memory_map::Gpa::new(platform::ECAM_SIZE));
        let ports = platform::SLEEP_CONTROL_PORT;
        let resources: [&dyn Aml; 2] = [
            &Memory32Fixed::new(true, low(platform::ECAM), ecam_size),
            &IO::new(ports, ports, 1, 4),
        ];
        let resources = ResourceTemplate::new(resources.to_vec());
        let parts: [&dyn Aml; 3] = [
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &resources),
        ];
        Device::new("PLAT".into(), parts.to_vec()).to_aml_bytes(sink);
    }
}

/// An interrupt that one device has for itself, edge-triggered and active high.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let resources: [&dyn Aml; 2] = [
            &IO::new(platform::SERIAL_PORT, platform::SERIAL_PORT, 1, 8),
            &interrupt(platform::SERIAL_GSI),
        ];
        let resources = ResourceTemplate::new(resources.to_vec());
        let parts: [&dyn Aml; 3] = [
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &resources),
        ];
        Device::new("COM1".into(), parts.to_vec()).to_aml_bytes(sink);
    }
}

struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let parts: [&dyn Aml; 2] = [
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ];
        Device::new("PWRB".into(), parts.to_vec()).to_aml_bytes(sink);
    }
}

/// The generic event device (ACPI 6.5, 5.6.9): its interrupt runs `_EVT`, which reads what has
/// happened, and thereby clears it.
struct GenericEvents;

impl Aml for GenericEvents {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let interrupt = interrupt(platform::EVENT_GSI);
        let (events, register) = (Local(0), Path::new("EVTS"));
        let pressed = And::new(&ZERO, &events, &platform::EVENT_POWER_BUTTON);
        let button = Path::new("PWRB");
        let notify = Notify::new(&button, &BUTTON_PRESSED);
        let handler: [&dyn Aml; 2] = [
            &Store::new(&events, &register),
            &If::new(&pressed, vec![&notify]),
        ];
        let parts: [&dyn Aml; 6] = [
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new(
                "EVTR".into(),
                OpRegionSpace::SystemIO,
                &platform::EVENT_PORT,
                &ONE,
            ),
            &Field::new(
                "EVTR".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            &Method::new("_EVT".into(), 1, true, handler.to_vec()),
        ];
        Device::new("GED0".into(), parts.to_vec()).to_aml_bytes(sink);
    }
}

struct Panic;

impl Aml for Panic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let port = IO::new(platform::PANIC_PORT, platform::PANIC_PORT, 1, 1);
        let parts: [&dyn Aml; 3] = [
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ];
        Device::new("PANC".into(), parts.to_vec()).to_aml_bytes(sink);
    }
}
