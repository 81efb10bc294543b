//! The fixed part of the guest-visible machine: ports, interrupt lines and addresses that the
//! firmware tables name and the chipset answers.

use memory_map::Gpa;

/// The first serial port (16550A): eight ports from here.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The global system interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;

/// ACPI's sleep control register (ACPI 6.5, 4.8.3.7): one byte. Writing the sleep type and
/// `SLP_EN` ends the machine.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register (ACPI 6.5, 4.8.3.7): one byte.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The value of sleep type `S5`, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// ACPI's reset register (ACPI 6.5, 4.8.3.6): one byte.
pub const RESET_PORT: u16 = 0x602;
/// What resets the machine when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// What has happened since it was last read, one byte: see [`EVENT_POWER_BUTTON`]. Reading clears
/// it.
pub const EVENT_PORT: u16 = 0x603;
/// The bit of [`EVENT_PORT`] that says that the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// The global system interrupt of ACPI's generic event device, edge-triggered.
pub const EVENT_GSI: u32 = 5;

/// Where a guest's kernel says that it has panicked (QEMU's pvpanic device, `QEMU0001` in ACPI): one
/// byte.
pub const PANIC_PORT: u16 = 0x505;
/// What it writes there: panicked; and panicked, with a kernel of its own to load for that.
pub const PANIC_EVENTS: u8 = 0b11;
/// The bit of [`PANIC_EVENTS`] that says that nothing comes after it.
pub const PANICKED: u8 = 0b01;

/// The port through which old software resets a PC (the keyboard controller's command port).
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// What it writes there: pulse the reset line.
pub const KEYBOARD_RESET: u8 = 0xfe;

/// PCI's configuration address port (PCI Local Bus 3.0, 3.2.2.3.2), four bytes.
pub const CONFIG_ADDRESS_PORT: u16 = 0xcf8;
/// PCI's configuration data ports, four bytes from here.
pub const CONFIG_DATA_PORT: u16 = 0xcfc;

/// The ports that I/O BARs may have: from here. A bridge's window is made of 4 KiB.
pub const IO_WINDOW: u16 = 0x1000;
/// The last of them.
pub const IO_WINDOW_LAST: u16 = 0xffff;

/// Config space by address (ECAM; PCI Express Base 6.0, 7.2.2): 1 MiB for each of 256 buses.
pub const ECAM: Gpa = Gpa::new(0xe000_0000);
/// Its size in bytes.
pub const ECAM_SIZE: u64 = 0x1000_0000;

/// The first I/O APIC.
pub const IO_APIC: Gpa = Gpa::new(0xfec0_0000);
/// The local APICs, and where MSIs are written to.
pub const LOCAL_APIC: Gpa = Gpa::new(0xfee0_0000);
/// Three pages that KVM needs for itself on Intel's processors, and one for an identity map.
pub const KVM_PAGES: Gpa = Gpa::new(0xfffb_c000);

/// Where the hole below 4 GiB begins: the 32-bit window for BARs, then everything with a fixed
/// address. RAM ends here and goes on above 4 GiB.
pub const LOW_HOLE: Gpa = Gpa::new(0xc000_0000);
/// What is left of the hole for 32-bit BARs, in bytes: up to [`ECAM`].
pub const LOW_WINDOW_SIZE: u64 = 0x2000_0000;

/// Where firmware tables lie: in the RAM that a PC keeps for them below 1 MiB.
pub const FIRMWARE_TABLES: Gpa = Gpa::new(0xe_0000);
/// Where that ends; exclusive.
pub const FIRMWARE_TABLES_END: Gpa = Gpa::new(0xf_f000);
/// Where a PC's firmware is entered: old software resets a machine by going there, and so does Linux
/// where it does not take another way.
pub const RESET_VECTOR: Gpa = Gpa::new(0xf_fff0);
/// What is there: 16-bit code that writes [`RESET_VALUE`] to [`RESET_PORT`].
pub const RESET_CODE: [u8; 9] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    // mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; hlt; and once more.
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};
