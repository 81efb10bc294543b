//! What a kernel is given: the zero page, or PVH's start info.

use linux_loader::loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, boot_e820_entry, boot_params, setup_header,
};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use memory_map::{Gpa, GpaRange};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::error::BootError;
use super::{COMMAND_LINE, MODULES, PVH_MEMORY_MAP, START_INFO, ZERO_PAGE, write};
use crate::layout::{MemoryEntry, MemoryKind};

/// A loader without a number of its own.
const LOADER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// 2.15, what this was written by.
const VERSION: u16 = 0x020f;
/// The version of the start info that has a memory map.
const START_INFO_VERSION: u32 = 1;

pub(super) struct Parameters<'a> {
    pub(super) memory_map: &'a [MemoryEntry],
    pub(super) command_line: &'a str,
    pub(super) initrd: Option<GpaRange>,
    pub(super) rsdp: Gpa,
}

/// An address or a size below 4 GiB, which is where everything was put.
const fn low(number: u64) -> u32 {
    let [a, b, c, d, ..] = number.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The types of both protocols: ACPI's.
const fn type_of(kind: MemoryKind) -> u32 {
    match kind {
        MemoryKind::Ram => 1,
        MemoryKind::Reserved => 2,
    }
}

impl Parameters<'_> {
    /// The number of the memory map's entries.
    fn entries(&self) -> Result<u8, BootError> {
        let (entries, most) = (self.memory_map.len(), E820_MAX_ENTRIES_ZEROPAGE);
        let number = u8::try_from(entries).ok().filter(|_| entries <= most);
        number.ok_or(BootError::MemoryMapTooLong { entries, most })
    }

    /// Writes the zero page around a bzImage's header, or one for a kernel that has none.
    pub(super) fn write_zero_page<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        header: Option<setup_header>,
    ) -> Result<Gpa, BootError> {
        let mut page = boot_params {
            e820_entries: self.entries()?,
            acpi_rsdp_addr: self.rsdp.raw(),
            hdr: header.unwrap_or(setup_header {
                boot_flag: BOOT_FLAG,
                header: HEADER_MAGIC,
                version: VERSION,
                cmdline_size: low(self.command_line.len() as u64),
                ..setup_header::default()
            }),
            ..boot_params::default()
        };
        for (slot, entry) in page.e820_table.iter_mut().zip(self.memory_map) {
            *slot = boot_e820_entry {
                addr: entry.range.start().raw(),
                size: entry.range.size(),
                r#type: type_of(entry.kind),
            };
        }
        page.hdr.type_of_loader = LOADER;
        page.hdr.cmd_line_ptr = low(COMMAND_LINE.raw());
        page.hdr.ramdisk_image = self.initrd.map_or(0, |range| low(range.start().raw()));
        page.hdr.ramdisk_size = self.initrd.map_or(0, |range| low(range.size()));
        // A list that the loader may add to; the file cannot have begun it.
        page.hdr.setup_data = 0;
        write(memory, ZERO_PAGE, page.as_slice())?;
        Ok(ZERO_PAGE)
    }

    /// Writes PVH's start info, the memory map and the list of modules, which is the initrd.
    pub(super) fn write_start_info<M: GuestMemoryBackend>(
        &self,
        memory: &M,
    ) -> Result<Gpa, BootError> {
        let entries = u32::from(self.entries()?);
        let table: Vec<u8> = self
            .memory_map
            .iter()
            .flat_map(|entry| {
                let entry = hvm_memmap_table_entry {
                    addr: entry.range.start().raw(),
                    size: entry.range.size(),
                    type_: type_of(entry.kind),
                    reserved: 0,
                };
                entry.as_slice().to_vec()
            })
            .collect();
        write(memory, PVH_MEMORY_MAP, &table)?;
        if let Some(initrd) = self.initrd {
            let module = hvm_modlist_entry {
                paddr: initrd.start().raw(),
                size: initrd.size(),
                cmdline_paddr: 0,
                reserved: 0,
            };
            write(memory, MODULES, module.as_slice())?;
        }
        let info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: START_INFO_VERSION,
            flags: 0,
            nr_modules: u32::from(self.initrd.is_some()),
            modlist_paddr: self.initrd.map_or(0, |_| MODULES.raw()),
            cmdline_paddr: COMMAND_LINE.raw(),
            rsdp_paddr: self.rsdp.raw(),
            memmap_paddr: PVH_MEMORY_MAP.raw(),
            memmap_entries: entries,
            reserved: 0,
        };
        write(memory, START_INFO, info.as_slice())?;
        Ok(START_INFO)
    }
}
