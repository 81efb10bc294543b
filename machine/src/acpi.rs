//! The firmware tables: what an operating system learns about the machine before it looks.
//!
//! ```text
//!   RSDP -> XSDT -> FADT -> DSDT    the devices, see dsdt.rs
//!                -> MADT            processors, the I/O APIC
//!                -> MCFG            config space by address
//! ```
//!
//! It is the reduced-hardware kind of ACPI (ACPI 6.5, 4.1): no power management timer, no system
//! control interrupt, no fixed power button. Sleep and reset are a register each, and the power
//! button comes from a generic event device. There is no keyboard controller, VGA or real-time
//! clock, and the tables say so, so that nobody looks for them.
//!
//! The tables are made from the [`Layout`] that the machine is made from,
//! lie in RAM that the guest is told is reserved, and are the guest's from then on: whoever starts
//! the guest anew writes them anew.

mod dsdt;
mod madt;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use memory_map::Gpa;

use crate::layout::{Bytes, Layout};
use crate::platform;

const OEM: [u8; 6] = *b"THRWAY";
const OEM_TABLE: [u8; 8] = *b"THROUGHW";
const OEM_REVISION: u32 = 1;
/// What a table's address is a multiple of: a cache line, and more than the RSDP asks for (16).
const ALIGNMENT: usize = 64;
/// The header that all tables but the RSDP begin with (ACPI 6.5, 5.2.6).
const HEADER: u32 = 36;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, 5.2.9.3): VGA is not present, the operating system does not control
/// ASPM (the links are the host's), the CMOS clock is not present. A clear bit 1 says that there is
/// no keyboard controller.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// What the tables are about.
#[derive(Debug, Clone, Copy)]
pub struct Platform<'a> {
    /// How many processors there are. Their local APICs have the numbers from 0 on.
    pub cpus: u32,
    /// Where everything lies.
    pub layout: &'a Layout,
}

/// The tables, to be written to the guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Where the bytes go: [`platform::FIRMWARE_TABLES`].
    pub address: Gpa,
    /// What goes there, up to [`platform::FIRMWARE_TABLES_END`] at most.
    pub bytes: Vec<u8>,
    /// Where among them the root pointer lies, which the boot protocols hand to the guest.
    pub rsdp: Gpa,
}

/// Why there are no tables.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TablesError {
    /// They do not fit into the RAM that is kept for them.
    #[error(
        "the firmware tables of {cpus} processors take more than the {} that a PC has for them: \
         ask for fewer processors",
        Bytes(*room)
    )]
    TooLarge {
        /// How many processors were asked for.
        cpus: u32,
        /// How much room there is, in bytes.
        room: u64,
    },
}

/// Makes the tables.
///
/// # Errors
/// [`TablesError`] where there are too many processors: more than about 8,000.
pub fn tables(platform: &Platform<'_>) -> Result<Tables, TablesError> {
    let room = platform::FIRMWARE_TABLES_END.raw() - platform::FIRMWARE_TABLES.raw();
    let too_large = TablesError::TooLarge {
        cpus: platform.cpus,
        room,
    };
    // The rest is small, and its size does not depend on what is asked for.
    if u64::from(platform.cpus) * madt::LARGEST_PROCESSOR >= room {
        return Err(too_large);
    }
    let mut place = Place { bytes: Vec::new() };
    let dsdt = place.add(&dsdt::table(platform.layout));
    let fadt = place.add(&fadt(dsdt));
    let madt = place.add(&madt::table(platform.cpus));
    let mcfg = place.add(&mcfg());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table.raw());
    }
    let xsdt = place.add(&xsdt);
    let rsdp = place.add(&Rsdp::new(OEM, xsdt.raw()));
    let bytes = place.bytes;
    match u64::try_from(bytes.len()) {
        Ok(size) if size <= room => Ok(Tables {
            address: platform::FIRMWARE_TABLES,
            bytes,
            rsdp,
        }),
        _ => Err(too_large),
    }
}

/// The bytes from [`platform::FIRMWARE_TABLES`] on.
struct Place {
    bytes: Vec<u8>,
}

impl Place {
    /// Puts a table behind the others, and says where.
    fn add(&mut self, table: &dyn Aml) -> Gpa {
        let offset = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(offset, 0);
        table.to_aml_bytes(&mut self.bytes);
        // A `usize` has 64 bits on the machines that this is for.
        let address = platform::FIRMWARE_TABLES.raw() + offset as u64;
        Gpa::new(address)
    }
}

/// A table with the usual header and `body`.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, HEADER, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

fn fadt(dsdt: Gpa) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt.raw())
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // Set means that these buttons, if there are any, are devices of the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(platform::RESET_PORT);
    fadt.reset_value = platform::RESET_VALUE;
    fadt.sleep_control_reg = port(platform::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(platform::SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// A register of one byte behind an I/O port.
fn port(port: u16) -> GAS {
    let byte = AccessSize::ByteAccess;
    GAS::new(AddressSpace::SystemIo, 8, 0, byte, port.into())
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(platform::ECAM.raw(), 0, 0, u8::MAX);
    mcfg
}

#[cfg(test)]
mod tests;
