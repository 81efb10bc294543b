//! The first processor's registers, and the tables that they name.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use memory_map::Gpa;
use vm_memory::GuestMemoryBackend;

use super::error::BootError;
use super::{DESCRIPTOR_TABLE, Entry, PAGE_TABLES, Protocol, STACK_TOP, write};

/// Both protocols' selectors (`__BOOT_CS`, `__BOOT_DS`, `__BOOT_TSS`).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Segment types (Intel SDM volume 3A, 3.4.5.1): they have been accessed, or are busy.
const EXECUTE_READ: u8 = 0xb;
const READ_WRITE: u8 = 0x3;
const BUSY_TASK: u8 = 0xb;
const LOCAL_TABLE: u8 = 0x2;

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// The bit of `rflags` that is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
/// How many GiB are mapped.
const GIB: u64 = 4;

const fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

const fn code(protocol: Protocol) -> kvm_segment {
    let flat = segment(CODE, EXECUTE_READ);
    match protocol {
        Protocol::Linux64 => kvm_segment {
            l: 1,
            db: 0,
            ..flat
        },
        Protocol::Pvh => flat,
    }
}

const fn data() -> kvm_segment {
    segment(DATA, READ_WRITE)
}

const fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        db: 0,
        s: 0,
        g: 0,
        ..segment(TASK, BUSY_TASK)
    }
}

/// No local descriptor table.
const fn local_table() -> kvm_segment {
    kvm_segment {
        limit: 0,
        present: 0,
        db: 0,
        s: 0,
        g: 0,
        unusable: 1,
        ..segment(0, LOCAL_TABLE)
    }
}

/// A segment with base 0 as the descriptor table has it (Intel SDM volume 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = match segment.g {
        0 => segment.limit,
        _ => segment.limit >> 12,
    };
    let limit = u64::from(limit);
    let bits = [
        (segment.type_, 40),
        (segment.s, 44),
        (segment.dpl, 45),
        (segment.present, 47),
        (segment.avl, 52),
        (segment.l, 53),
        (segment.db, 54),
        (segment.g, 55),
    ];
    let flags = bits.iter().map(|(bits, shift)| u64::from(*bits) << shift);
    flags.fold(limit & 0xffff | (limit & 0xf_0000) << 32, |a, b| a | b)
}

/// The last two are one in 64-bit mode, where a task's descriptor is twice as long.
fn descriptors(protocol: Protocol) -> [u64; 6] {
    let [code, data, task] = [code(protocol), data(), task()].map(|s| descriptor(&s));
    [0, 0, code, data, task, 0]
}

/// Writes the descriptor table, and for 64-bit mode page tables that map the first 4 GiB to
/// themselves in pages of 2 MiB.
pub(super) fn write_tables<M: GuestMemoryBackend>(
    memory: &M,
    protocol: Protocol,
) -> Result<(), BootError> {
    write_words(memory, DESCRIPTOR_TABLE, descriptors(protocol))?;
    if protocol == Protocol::Pvh {
        return Ok(());
    }
    // One table of each of the upper levels, then a directory for each GiB.
    let upper = PAGE_TABLES.raw() + PAGE;
    let directories = upper + PAGE;
    let entries = |first: u64, number: u64| {
        let used = (0..number).map(move |index| (first + index * PAGE) | PRESENT_WRITABLE);
        used.chain(std::iter::repeat(0)).take(512)
    };
    write_words(memory, PAGE_TABLES, entries(upper, 1))?;
    write_words(memory, Gpa::new(upper), entries(directories, GIB))?;
    let pages = (0..GIB * 512).map(|index| index << 21 | PRESENT_WRITABLE | LARGE_PAGE);
    write_words(memory, Gpa::new(directories), pages)
}

fn write_words<M: GuestMemoryBackend>(
    memory: &M,
    at: Gpa,
    words: impl IntoIterator<Item = u64>,
) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    write(memory, at, &bytes)
}

impl Entry {
    /// Sets the registers of the processor that enters the kernel. What is not about that is left
    /// as it is, the local APIC's base for one: `special` is what KVM said that it holds.
    pub fn registers(&self, general: &mut kvm_regs, special: &mut kvm_sregs) {
        let parameters = self.parameters.raw();
        *general = kvm_regs {
            rip: self.address.raw(),
            rsp: STACK_TOP.raw(),
            rflags: RFLAGS,
            ..kvm_regs::default()
        };
        match self.protocol {
            Protocol::Linux64 => general.rsi = parameters,
            Protocol::Pvh => general.rbx = parameters,
        }
        special.cs = code(self.protocol);
        for segment in [
            &mut special.ds,
            &mut special.es,
            &mut special.fs,
            &mut special.gs,
            &mut special.ss,
        ] {
            *segment = data();
        }
        special.tr = task();
        special.ldt = local_table();
        special.gdt = kvm_dtable {
            base: DESCRIPTOR_TABLE.raw(),
            limit: 6 * 8 - 1,
            ..kvm_dtable::default()
        };
        special.idt = kvm_dtable::default();
        special.cr2 = 0;
        let (cr0, cr3, cr4, efer) = match self.protocol {
            Protocol::Linux64 => (
                CR0_PROTECTED | CR0_EXTENSION | CR0_PAGING,
                PAGE_TABLES.raw(),
                CR4_PHYSICAL_ADDRESS_EXTENSION,
                EFER_LONG_MODE,
            ),
            Protocol::Pvh => (CR0_PROTECTED | CR0_EXTENSION, 0, 0, 0),
        };
        special.cr0 = cr0;
        special.cr3 = cr3;
        special.cr4 = cr4;
        special.efer = efer;
    }
}
