//! Why a kernel cannot be started, and what to do.

use std::fmt;
use std::io;

use memory_map::{Gpa, GpaRange};

use crate::layout::{Bytes, RAM_UNIT};
use crate::platform;

/// Which of the files it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        })
    }
}

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read, or not from any position.
    #[error("reading the {image} failed: it must be a file that can be read from any position")]
    Read {
        /// Which file.
        image: ImageKind,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error(
        "this is no Linux kernel for x86-64, {what}: give a bzImage (vmlinuz, \
         arch/x86/boot/bzImage) or an ELF file (vmlinux)"
    )]
    NotAKernel {
        /// What it is.
        what: &'static str,
    },
    /// The kernel is too old, or was made for 32 bits.
    #[error(
        "the kernel cannot be entered in 64-bit mode (boot protocol {}.{:02}): give a 64-bit \
         kernel, Linux 3.8 or newer",
        version >> 8, version & 0xff
    )]
    No64BitEntry {
        /// The version of the boot protocol, as its header has it.
        version: u16,
    },
    /// Something in the kernel's file cannot be right.
    #[error("the kernel's file is damaged, {what}: get it anew")]
    Damaged {
        /// What it is.
        what: &'static str,
    },
    /// The kernel does not fit into the RAM below 4 GiB where it has to be.
    #[error(
        "the kernel has to lie at {needed}, and not all of that is RAM: {advice}",
        advice = advice(*needed, *ram_last)
    )]
    KernelDoesNotFit {
        /// Where it has to be, or would be if it were there.
        needed: GpaRange,
        /// The last address of RAM below 4 GiB.
        ram_last: Gpa,
    },
    /// The initrd does not fit beside the kernel.
    #[error(
        "the initrd of {} does not fit: {} are free for it between the kernel and {last}; {}",
        Bytes(*size), Bytes(*free),
        if last > ram_last { "give the machine more RAM" } else { "make it smaller" }
    )]
    InitrdDoesNotFit {
        /// Its size in bytes.
        size: u64,
        /// The largest free run of RAM where it may be, in bytes.
        free: u64,
        /// The last address that the kernel allows it to have.
        last: Gpa,
        /// The last address of RAM below 4 GiB.
        ram_last: Gpa,
    },
    /// The initrd's file has no content.
    #[error("the initrd is empty: leave it out, or give one that has been made")]
    EmptyInitrd,
    /// The command line is longer than the kernel reads.
    #[error("the command line has {length} bytes, and this kernel takes {limit}: shorten it")]
    CommandLineTooLong {
        /// How many it has.
        length: u64,
        /// How many the kernel takes.
        limit: u64,
    },
    /// The command line would end early.
    #[error("byte {position} of the command line is zero, which would end it: leave it out")]
    CommandLineZero {
        /// Where, counted from zero.
        position: usize,
    },
    /// The boot protocols have no room for the memory map.
    #[error(
        "the guest's memory map has {entries} entries, and the boot protocols take {most}: the \
         host's IOMMU cuts RAM into too many pieces; leave out the devices behind it"
    )]
    MemoryMapTooLong {
        /// How many there are.
        entries: usize,
        /// How many there may be.
        most: usize,
    },
    /// The RAM is not the layout's.
    #[error("the guest's RAM cannot be written at {address}: it is not the RAM that was laid out")]
    Memory {
        /// Where.
        address: Gpa,
        /// What the memory said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// Loading failed although the file had looked right: it changed meanwhile, or it cannot be
    /// read.
    #[error("loading the kernel failed: see to it that nobody writes to its file, and try again")]
    Loader {
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
}

fn advice(needed: GpaRange, ram_last: Gpa) -> String {
    let end = needed.last().raw().saturating_add(1);
    if needed.start().raw() < 1 << 20 {
        "give a kernel that is loaded at 1 MiB or above".to_owned()
    } else if end > platform::LOW_HOLE.raw() {
        format!("give a kernel that is loaded below {}", platform::LOW_HOLE)
    } else if needed.last() > ram_last {
        let ram = end.checked_next_multiple_of(RAM_UNIT).unwrap_or(end);
        format!("give the machine at least {} of RAM", Bytes(ram))
    } else {
        "the host's IOMMU reserves part of it; give a relocatable kernel".to_owned()
    }
}
