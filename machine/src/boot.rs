//! Puts a Linux kernel into the guest's RAM, and says how the first processor enters it.
//!
//! | the file is | how it is entered | what the kernel is given |
//! |---|---|---|
//! | a bzImage (`vmlinuz`) | the 64-bit boot protocol (Linux, `Documentation/arch/x86/boot.rst`) | the zero page |
//! | an ELF file (`vmlinux`) with a PVH note | 32-bit, by the PVH boot ABI (Xen, `docs/misc/pvh.pandoc`) | `hvm_start_info` |
//! | another ELF file | the 64-bit boot protocol | the zero page |
//!
//! Which it is, is found by looking. All of it lies in the RAM below 4 GiB:
//!
//! ```text
//!   0x500      descriptor table
//!   0x6000     hvm_start_info, modules          (PVH)
//!   0x7000     zero page                        (64-bit)
//!   0x8000     memory map                       (PVH)
//!   0x9000     page tables: 4 GiB, identity     (64-bit)
//!   0x20000    command line
//!   0xa0000    firmware tables and what a PC keeps there: see acpi
//!   16 MiB     the kernel, where it wants to be
//!   ...        the initrd, as high as the kernel allows
//! ```
//!
//! The kernel's file is data: nothing that stands in it makes this panic or write anywhere but
//! into the guest's RAM. What lies here is the guest's as soon as it runs, so that a guest that
//! starts anew is loaded anew.

mod bzimage;
mod elf;
mod error;
mod image;
mod parameters;
mod registers;
mod room;

use std::fs::File;

use memory_map::{Gpa, GpaRange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use error::{BootError, ImageKind};

use crate::layout::Layout;
use image::{Image, size_of};
use room::Room;

const DESCRIPTOR_TABLE: Gpa = Gpa::new(0x500);
const STACK_TOP: Gpa = Gpa::new(0x6000);
const START_INFO: Gpa = Gpa::new(0x6000);
const MODULES: Gpa = Gpa::new(0x6800);
const ZERO_PAGE: Gpa = Gpa::new(0x7000);
const PVH_MEMORY_MAP: Gpa = Gpa::new(0x8000);
const PAGE_TABLES: Gpa = Gpa::new(0x9000);
const COMMAND_LINE: Gpa = Gpa::new(0x2_0000);
/// Room for the command line and the zero byte that ends it, up to what a PC reserves.
const COMMAND_LINE_ROOM: u64 = 0x8_0000 - 0x1000;

/// What the guest is started with.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a> {
    /// The kernel. Reading it moves the file's position.
    pub kernel: &'a File,
    /// Its initial RAM disk. Reading it moves the file's position.
    pub initrd: Option<&'a File>,
    /// Its command line, without a zero byte.
    pub cmdline: &'a str,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol: long mode, `rsi` holds the address of the zero page.
    Linux64,
    /// The PVH boot ABI: 32-bit protected mode without paging, `ebx` holds the address of
    /// `hvm_start_info`.
    Pvh,
}

/// A kernel that has been loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// How it is entered.
    pub protocol: Protocol,
    /// Where.
    pub address: Gpa,
    /// What it is given the address of.
    pub parameters: Gpa,
    /// What it takes until it manages memory itself.
    pub kernel: GpaRange,
    /// Where its initrd lies.
    pub initrd: Option<GpaRange>,
}

/// A kernel that has been read, and what is known of it.
struct Kernel {
    range: GpaRange,
    entry: Gpa,
    protocol: Protocol,
    /// The last address that its initrd may have.
    initrd_last: u64,
    /// How many bytes its command line may have, without the zero byte.
    command_line: u64,
    /// The header of a bzImage.
    header: Option<linux_loader::loader::bootparam::setup_header>,
}

/// Loads a kernel, its initrd and its command line, and writes what it is given: the memory map of
/// `layout`, and `rsdp`, where the firmware tables begin.
///
/// `memory` is the RAM of `layout`.
///
/// # Errors
/// [`BootError`], which says what to do. The guest's RAM may then hold part of it.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    layout: &Layout,
    images: &Images<'_>,
    rsdp: Gpa,
) -> Result<Entry, BootError> {
    let (mut kernel, mut initrd) = (images.kernel, images.initrd);
    load_images(
        memory,
        layout,
        &mut kernel,
        initrd.as_mut(),
        images.cmdline,
        rsdp,
    )
}

fn load_images<M: GuestMemoryBackend, F: Image>(
    memory: &M,
    layout: &Layout,
    kernel: &mut F,
    initrd: Option<&mut F>,
    cmdline: &str,
    rsdp: Gpa,
) -> Result<Entry, BootError> {
    let room = Room::of(layout);
    let size = size_of(kernel).map_err(|source| BootError::Read {
        image: ImageKind::Kernel,
        source,
    })?;
    let kernel = match image::recognise(kernel)? {
        image::Format::BzImage => bzimage::load(memory, &room, kernel, size)?,
        image::Format::Elf => elf::load(memory, &room, kernel, size)?,
    };
    let initrd = initrd.map(|initrd| load_initrd(memory, &room, &kernel, initrd));
    let initrd = initrd.transpose()?;
    write_command_line(memory, cmdline, kernel.command_line)?;
    registers::write_tables(memory, kernel.protocol)?;
    let parameters = parameters::Parameters {
        memory_map: &layout.memory_map(),
        command_line: cmdline,
        initrd,
        rsdp,
    };
    let parameters = match kernel.protocol {
        Protocol::Linux64 => parameters.write_zero_page(memory, kernel.header)?,
        Protocol::Pvh => parameters.write_start_info(memory)?,
    };
    Ok(Entry {
        protocol: kernel.protocol,
        address: kernel.entry,
        parameters,
        kernel: kernel.range,
        initrd,
    })
}

fn load_initrd<M: GuestMemoryBackend, F: Image>(
    memory: &M,
    room: &Room,
    kernel: &Kernel,
    initrd: &mut F,
) -> Result<GpaRange, BootError> {
    let failed = |source| BootError::Read {
        image: ImageKind::Initrd,
        source,
    };
    let size = size_of(initrd).map_err(failed)?;
    if size == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let range = room.for_initrd(size, kernel.range, kernel.initrd_last)?;
    image::read_into(memory, range, initrd).map_err(failed)?;
    Ok(range)
}

fn write_command_line<M: GuestMemoryBackend>(
    memory: &M,
    cmdline: &str,
    limit: u64,
) -> Result<(), BootError> {
    // A `usize` has at most 64 bits.
    let length = cmdline.len() as u64;
    let limit = limit.min(COMMAND_LINE_ROOM - 1);
    if length > limit {
        return Err(BootError::CommandLineTooLong { length, limit });
    }
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineZero { position });
    }
    write(memory, COMMAND_LINE, cmdline.as_bytes())?;
    let end = COMMAND_LINE.raw() + length;
    write(memory, Gpa::new(end), &[0])
}

fn write<M: GuestMemoryBackend>(memory: &M, at: Gpa, bytes: &[u8]) -> Result<(), BootError> {
    let written = memory.write_slice(bytes, GuestAddress(at.raw()));
    written.map_err(|source| BootError::Memory {
        address: at,
        source,
    })
}

#[cfg(test)]
mod tests;
