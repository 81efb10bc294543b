//! The interrupt controllers (ACPI 6.5, 5.2.12): the processors' local APICs and the I/O APIC.
//!
//! There are no interrupt source overrides: KVM wires interrupt *n* to the *n*th input of the I/O
//! APIC for every *n*, which is what their absence says. Those below 16 are edge-triggered and
//! active high, as on the ISA bus.

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use memory_map::Gpa;

use crate::platform;

/// The revision of ACPI 6.3 and later.
const REVISION: u8 = 5;
/// No pair of 8259s that had to be turned off.
const FLAGS: u32 = 0;
/// The I/O APIC's number.
const IO_APIC_ID: u8 = 0;
/// A local APIC whose number has more than 8 bits (ACPI 6.5, 5.2.12.12).
const LOCAL_X2APIC: u8 = 9;
const ENABLED: u32 = 1;
/// The largest structure that a processor has, in bytes.
pub(super) const LARGEST_PROCESSOR: u64 = 16;

pub(super) fn table(cpus: u32) -> Sdt {
    let mut body = Vec::new();
    body.extend(low(platform::LOCAL_APIC).to_le_bytes());
    body.extend(FLAGS.to_le_bytes());
    for id in 0..cpus {
        processor(id, &mut body);
    }
    IoApic::new(IO_APIC_ID, low(platform::IO_APIC), 0).to_aml_bytes(&mut body);
    super::table(*b"APIC", REVISION, &body)
}

/// An address below 4 GiB as the tables have it.
pub(super) const fn low(address: Gpa) -> u32 {
    let [a, b, c, d, ..] = address.raw().to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn processor(id: u32, body: &mut Vec<u8>) {
    match u8::try_from(id) {
        // 255 is the broadcast.
        Ok(id) if id != u8::MAX => {
            ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(body);
        }
        _ => {
            body.extend([LOCAL_X2APIC, 16, 0, 0]);
            for field in [id, ENABLED, id] {
                body.extend(field.to_le_bytes());
            }
        }
    }
}
