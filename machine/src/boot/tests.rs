use std::fs::File;
use std::io::{Cursor, Write};

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use memory_map::{Iova, IovaRange};
use proptest::prelude::*;
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::*;
use crate::layout::Wanted;

const MIB: u64 = 1 << 20;
const RSDP: Gpa = Gpa::new(0xe_1234);

struct Guest {
    layout: Layout,
    memory: GuestMemoryMmap<()>,
}

impl Guest {
    fn new(ram: u64) -> Self {
        Self::with(ram, &[])
    }

    fn with(ram: u64, allowed: &[IovaRange]) -> Self {
        let layout = Layout::choose(&Wanted {
            ram,
            allowed,
            address_bits: 39,
            functions: &[],
        });
        let layout = layout.unwrap();
        let pieces = layout.ram().iter().map(|piece| {
            let size = usize::try_from(piece.range.size()).unwrap();
            (GuestAddress(piece.range.start().raw()), size)
        });
        let pieces: Vec<_> = pieces.collect();
        let memory = GuestMemoryMmap::from_ranges(&pieces).unwrap();
        Self { layout, memory }
    }

    fn load(
        &self,
        kernel: &[u8],
        initrd: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        let mut initrd = initrd.map(Cursor::new);
        let kernel = &mut Cursor::new(kernel);
        load_images(
            &self.memory,
            &self.layout,
            kernel,
            initrd.as_mut(),
            cmdline,
            RSDP,
        )
    }

    fn bytes(&self, at: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn object<T: ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}

/// A kernel's code, which differs everywhere.
fn code(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i % 251).to_le_bytes()[0]).collect()
}

const CODE: usize = 8192;
const HEADER: usize = 0x1f1;

fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        syssize: 8192 / 16,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x020f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: 1,
        cmdline_size: 100,
        pref_address: 16 * MIB,
        init_size: 0x10_0000,
        ..setup_header::default()
    }
}

fn bzimage(header: &setup_header) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[HEADER..][..size_of_val(header)].copy_from_slice(header.as_slice());
    file.extend(code(CODE));
    file
}

const ELF_ENTRY: u64 = 16 * MIB + 0x40;
const PVH_ENTRY: u64 = 16 * MIB + 0x80;

/// A segment's header: type, offset, address, size in the file and in memory.
fn segment(kind: u32, fields: [u64; 4]) -> Vec<u8> {
    let [offset, address, file_size, memory_size] = fields;
    let words = [offset, address, address, file_size, memory_size, 0x1000];
    let head = [kind.to_le_bytes(), [0; 4]].concat();
    head.into_iter()
        .chain(words.into_iter().flat_map(u64::to_le_bytes))
        .collect()
}

/// An ELF kernel with code at 16 MiB, twice as long in memory, and a note if `pvh`.
fn elf(pvh: bool) -> Vec<u8> {
    let mut note = [4_u32, 8, 18].map(u32::to_le_bytes).concat();
    note.extend(b"Xen\0");
    note.extend(PVH_ENTRY.to_le_bytes());
    let size = CODE as u64;
    let mut segments = segment(1, [0x1000, 16 * MIB, size, 2 * size]);
    if pvh {
        segments.extend(segment(4, [0x200, 0, note.len() as u64, note.len() as u64]));
    }
    let mut file = vec![0; 0x1000];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&ELF_ENTRY.to_le_bytes());
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, 1 + u8::from(pvh), 0]);
    file[64..][..segments.len()].copy_from_slice(&segments);
    file[0x200..][..note.len()].copy_from_slice(&note);
    file.extend(code(CODE));
    file
}

fn state(entry: &Entry) -> (kvm_regs, kvm_sregs) {
    // What was there does not matter.
    let (mut general, mut special) = (kvm_regs::default(), kvm_sregs::default());
    general.rbx = 7;
    special.efer = 7;
    special.apic_base = 0xfee0_0900;
    entry.registers(&mut general, &mut special);
    assert_eq!(special.apic_base, 0xfee0_0900);
    (general, special)
}

#[test]
fn a_bzimage_lies_where_it_wants_and_knows_its_parameters() {
    let guest = Guest::new(64 * MIB);
    let initrd = code(5000);
    let entry = guest
        .load(&bzimage(&header()), Some(&initrd), "console=ttyS0")
        .unwrap();
    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_eq!(entry.address.raw(), 16 * MIB + 0x200);
    assert_eq!(
        (entry.kernel.start().raw(), entry.kernel.size()),
        (16 * MIB, MIB)
    );
    assert_eq!(guest.bytes(16 * MIB, CODE), code(CODE));
    // As high as there is RAM, from a page on.
    let range = entry.initrd.unwrap();
    assert_eq!(
        (range.start().raw(), range.size()),
        (64 * MIB - 0x2000, 5000)
    );
    assert_eq!(guest.bytes(range.start().raw(), 5000), initrd);

    let page: boot_params = guest.object(entry.parameters.raw());
    let hdr = page.hdr;
    assert_eq!({ page.acpi_rsdp_addr }, RSDP.raw());
    assert_eq!({ hdr.init_size }, 1 << 20);
    assert_eq!(hdr.type_of_loader, 0xff);
    assert_eq!(
        (u64::from(hdr.ramdisk_image), { hdr.ramdisk_size }),
        (range.start().raw(), 5000)
    );
    let line = guest.bytes(u64::from(hdr.cmd_line_ptr), 14);
    assert_eq!(line, b"console=ttyS0\0");
    let told: Vec<_> = page.e820_table[..page.e820_entries.into()]
        .iter()
        .map(|e| ({ e.addr }, { e.size }, { e.r#type }))
        .collect();
    assert_eq!(told[0], (0, 0xa_0000, 1));
    assert_eq!(told[1], (0xa_0000, 0x6_0000, 2));
    assert_eq!(told[2], (MIB, 63 * MIB, 1));
    assert_eq!(told.len(), guest.layout.memory_map().len());
}

#[test]
fn the_64_bit_entry_is_in_long_mode_with_4_gib_mapped() {
    let guest = Guest::new(64 * MIB);
    let entry = guest.load(&bzimage(&header()), None, "").unwrap();
    assert_eq!(entry.initrd, None);
    let (general, special) = state(&entry);
    assert_eq!(
        (general.rip, general.rsi),
        (16 * MIB + 0x200, entry.parameters.raw())
    );
    assert_eq!((general.rflags, general.rbx), (2, 0));
    assert_eq!(
        (special.cr0, special.cr4, special.efer),
        (0x8000_0011, 0x20, 0x500)
    );
    assert_eq!(
        (special.cs.selector, special.cs.l, special.cs.db),
        (0x10, 1, 0)
    );
    assert_eq!((special.ds.selector, special.ss.limit), (0x18, u32::MAX));
    let table = guest.bytes(special.gdt.base, 48);
    let words: Vec<_> = table
        .chunks(8)
        .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
        .collect();
    let expected = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x8b00_0000_0067,
        0,
    ];
    assert_eq!(words, expected);

    // As the processor walks it.
    let walk = |address: u64| {
        let mut table = special.cr3;
        for shift in [39, 30, 21] {
            let index = address >> shift & 511;
            let found: u64 = guest.object(table + index * 8);
            if found & 0b11 != 0b11 {
                return None;
            }
            table = found & 0xf_ffff_ffff_f000;
            assert_eq!(found >> 7 & 1, u64::from(shift == 21));
        }
        Some(table | address & 0x1f_ffff)
    };
    for address in [0, 0x1234, 16 * MIB + 0x200, 0xc000_0000, 0xffff_ffff] {
        assert_eq!(walk(address), Some(address));
    }
    for address in [1 << 32, 1 << 39, 1 << 47] {
        assert_eq!(walk(address), None);
    }
}

#[test]
fn an_elf_kernel_with_a_note_is_entered_by_pvh() {
    let guest = Guest::new(64 * MIB);
    let dirty = vec![0xff; 2 * CODE];
    guest
        .memory
        .write_slice(&dirty, GuestAddress(16 * MIB))
        .unwrap();
    let initrd = code(100);
    let entry = guest.load(&elf(true), Some(&initrd), "quiet").unwrap();
    assert_eq!(
        (entry.protocol, entry.address.raw()),
        (Protocol::Pvh, PVH_ENTRY)
    );
    assert_eq!(guest.bytes(16 * MIB, CODE), code(CODE));
    assert_eq!(guest.bytes(16 * MIB + CODE as u64, CODE), vec![0; CODE]);

    let info: hvm_start_info = guest.object(entry.parameters.raw());
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336e_c578, 1, 1)
    );
    assert_eq!(info.rsdp_paddr, RSDP.raw());
    assert_eq!(guest.bytes(info.cmdline_paddr, 6), b"quiet\0");
    let module: hvm_modlist_entry = guest.object(info.modlist_paddr);
    assert_eq!(module.size, 100);
    assert_eq!(guest.bytes(module.paddr, 100), initrd);
    let map = guest.layout.memory_map();
    assert_eq!(info.memmap_entries as usize, map.len());
    for (index, entry) in (0..).zip(&map) {
        let told: hvm_memmap_table_entry = guest.object(info.memmap_paddr + index * 24);
        assert_eq!(
            (told.addr, told.size),
            (entry.range.start().raw(), entry.range.size())
        );
        assert_eq!(
            told.type_,
            if entry.kind == crate::layout::MemoryKind::Ram {
                1
            } else {
                2
            }
        );
    }

    let (general, special) = state(&entry);
    assert_eq!(
        (general.rip, general.rbx),
        (PVH_ENTRY, entry.parameters.raw())
    );
    assert_eq!(
        (special.cr0, special.cr3, special.cr4, special.efer),
        (0x11, 0, 0, 0)
    );
    assert_eq!(
        (special.cs.l, special.cs.db, special.cs.limit),
        (0, 1, u32::MAX)
    );
    assert_eq!(special.tr.limit, 0x67);
    let code: u64 = guest.object(special.gdt.base + 16);
    assert_eq!(code, 0x00cf_9b00_0000_ffff);
}

#[test]
fn an_elf_kernel_without_a_note_gets_a_zero_page() {
    let guest = Guest::new(64 * MIB);
    let entry = guest.load(&elf(false), None, "quiet").unwrap();
    assert_eq!(
        (entry.protocol, entry.address.raw()),
        (Protocol::Linux64, ELF_ENTRY)
    );
    let page: boot_params = guest.object(entry.parameters.raw());
    assert_eq!({ page.hdr.header }, 0x5372_6448);
    assert_eq!({ page.hdr.ramdisk_size }, 0);
    assert_eq!(guest.bytes(u64::from(page.hdr.cmd_line_ptr), 6), b"quiet\0");
}

#[test]
fn a_guest_starts_from_files() {
    let guest = Guest::new(64 * MIB);
    let file = |bytes: &[u8]| -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    };
    let (kernel, initrd) = (file(&bzimage(&header())), file(&code(3000)));
    let images = Images {
        kernel: &kernel,
        initrd: Some(&initrd),
        cmdline: "",
    };
    // Twice: a guest may start anew.
    let first = load(&guest.memory, &guest.layout, &images, RSDP).unwrap();
    let again = load(&guest.memory, &guest.layout, &images, RSDP).unwrap();
    assert_eq!(first, again);
    assert_eq!(
        guest.bytes(again.initrd.unwrap().start().raw(), 3000),
        code(3000)
    );
    let directory = File::open("/").unwrap();
    let images = Images {
        kernel: &directory,
        ..images
    };
    let error = load(&guest.memory, &guest.layout, &images, RSDP).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::Read {
                image: ImageKind::Kernel,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn an_initrd_stays_below_what_the_kernel_allows() {
    let guest = Guest::new(64 * MIB);
    let low = setup_header {
        initrd_addr_max: 0x01ff_ffff,
        ..header()
    };
    let entry = guest.load(&bzimage(&low), Some(&code(4096)), "").unwrap();
    assert_eq!(entry.initrd.unwrap().last().raw(), 0x01ff_ffff);
    let large = vec![1; 16 << 20];
    let error = guest.load(&bzimage(&low), Some(&large), "").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the initrd of 16 MiB does not fit: 15 MiB are free for it between the kernel and \
         0x1ffffff; make it smaller"
    );
    let large = vec![1; 48 << 20];
    let error = guest
        .load(&bzimage(&header()), Some(&large), "")
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the initrd of 48 MiB does not fit: 47 MiB are free for it between the kernel and \
         0x7fffffff; give the machine more RAM"
    );
    let error = guest.load(&bzimage(&header()), Some(&[]), "").unwrap_err();
    assert!(matches!(error, BootError::EmptyInitrd));
}

#[test]
fn a_kernel_goes_around_what_is_reserved_if_it_can() {
    let range = |start, last| IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap();
    let allowed = [range(0, 0x107_ffff), range(0x108_1000, 0xffff_ffff)];
    let guest = Guest::with(64 * MIB, &allowed);
    let entry = guest.load(&bzimage(&header()), None, "").unwrap();
    assert_eq!(entry.kernel.start().raw(), 0x120_0000);
    assert_eq!(guest.bytes(0x120_0000, CODE), code(CODE));
    let page: boot_params = guest.object(entry.parameters.raw());
    assert_eq!({ page.hdr.code32_start }, 0x120_0000);
    let fixed = setup_header {
        relocatable_kernel: 0,
        ..header()
    };
    let error = guest.load(&bzimage(&fixed), None, "").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel has to lie at 0x1000000-0x10fffff, and not all of that is RAM: the host's \
         IOMMU reserves part of it; give a relocatable kernel"
    );
}

#[test]
fn what_is_wrong_with_a_kernel_is_said() {
    let guest = Guest::new(32 * MIB);
    let error = |kernel: &[u8]| guest.load(kernel, None, "").unwrap_err().to_string();
    let with = |change: fn(&mut setup_header)| {
        let mut header = header();
        change(&mut header);
        error(&bzimage(&header))
    };
    let advice = "give a bzImage (vmlinuz, arch/x86/boot/bzImage) or an ELF file (vmlinux)";
    assert_eq!(
        error(b"\x1f\x8b compressed"),
        format!("this is no Linux kernel for x86-64, it is compressed by gzip: {advice}")
    );
    assert!(error(b"").contains("it is empty"));
    assert!(error(b"#!/bin/sh").contains("magic numbers"));
    let mut other = elf(true);
    other[18] = 183;
    assert!(error(&other).contains("another processor"));
    assert_eq!(
        with(|h| h.version = 0x0209),
        "the kernel cannot be entered in 64-bit mode (boot protocol 2.09): give a 64-bit kernel, \
         Linux 3.8 or newer"
    );
    assert!(with(|h| h.xloadflags = 0).contains("64-bit mode"));
    assert_eq!(
        with(|h| h.syssize = 8192),
        "the kernel's file is damaged, it ends before the code does: get it anew"
    );
    assert!(with(|h| h.boot_flag = 0).contains("signature"));
    assert!(with(|h| h.loadflags = 0).contains("below 1 MiB"));
    assert!(with(|h| h.kernel_alignment = 3 << 20).contains("power of two"));
    assert!(with(|h| h.pref_address = u64::MAX - 1).contains("no room behind it"));
    assert_eq!(
        with(|h| h.init_size = 100 << 20),
        "the kernel has to lie at 0x1000000-0x73fffff, and not all of that is RAM: give the \
         machine at least 116 MiB of RAM"
    );
    assert!(with(|h| h.pref_address = 1 << 40).contains("is loaded below 0xc0000000"));
    assert!(error(&bzimage(&header())[..0x220]).contains("within its headers"));

    let patched = |at: usize, bytes: &[u8]| {
        let mut file = elf(true);
        file[at..][..bytes.len()].copy_from_slice(bytes);
        error(&file)
    };
    let address = 64 + 24;
    let page = 0x1000_u64.to_le_bytes();
    assert!(patched(address, &page).contains("loaded at 1 MiB or above"));
    assert!(patched(address, &u64::MAX.to_le_bytes()).contains("makes no sense"));
    let size = 64 + 32;
    assert!(patched(size, &u64::MAX.to_le_bytes()).contains("ends within a segment"));
    let entry = 0x210;
    assert!(patched(entry, &page).contains("entered where nothing is loaded"));
    assert!(patched(56, &[0, 0]).contains("nothing to load"));
    assert!(patched(56, &[0xff, 0xff]).contains("make no sense"));
    assert!(patched(32, &u64::MAX.to_le_bytes()).contains("within its headers"));
    assert!(error(&elf(true)[..50]).contains("within its headers"));
}

#[test]
fn a_command_line_is_not_cut_off() {
    let guest = Guest::new(64 * MIB);
    let fits = "x".repeat(100);
    guest.load(&bzimage(&header()), None, &fits).unwrap();
    let long = "x".repeat(101);
    let error = guest.load(&bzimage(&header()), None, &long).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the command line has 101 bytes, and this kernel takes 100: shorten it"
    );
    guest.load(&elf(true), None, &"x".repeat(2047)).unwrap();
    guest.load(&elf(true), None, &"x".repeat(2048)).unwrap_err();
    let endless = setup_header {
        cmdline_size: u32::MAX,
        ..header()
    };
    let error = guest.load(&bzimage(&endless), None, &"x".repeat(1 << 20));
    assert!(matches!(
        error,
        Err(BootError::CommandLineTooLong {
            limit: 0x7_efff,
            ..
        })
    ));
    let error = guest.load(&bzimage(&header()), None, "a\0b").unwrap_err();
    assert!(matches!(error, BootError::CommandLineZero { position: 1 }));
}

/// Nothing that a loader writes below 1 MiB overlaps anything else, or what a PC keeps there.
#[test]
fn what_lies_below_1_mib_lies_apart() {
    let places = [
        (DESCRIPTOR_TABLE, 48),
        (Gpa::new(STACK_TOP.raw() - 0x1000), 0x1000),
        (START_INFO, 56),
        (MODULES, 32),
        (ZERO_PAGE, 4096),
        (PVH_MEMORY_MAP, 128 * 24),
        (PAGE_TABLES, 6 * 4096),
        (COMMAND_LINE, COMMAND_LINE_ROOM),
        (Gpa::new(0xa_0000), 0x6_0000),
    ];
    let ranges = places.map(|(start, size)| GpaRange::new(start, size).unwrap());
    for pair in ranges.windows(2) {
        assert!(pair[0].last() < pair[1].start(), "{pair:?}");
    }
}

#[test]
fn too_many_pieces_of_ram_are_an_error() {
    let range = |start, last| IovaRange::from_inclusive(Iova::new(start), Iova::new(last)).unwrap();
    // 16 MiB, then every other 2 MiB.
    let holes = (0..200_u64).map(|i| {
        let start = (16 + 4 * i) * MIB;
        range(start, start + 2 * MIB - 1)
    });
    let mut allowed = vec![range(0, 16 * MIB - 1)];
    allowed.extend(holes);
    allowed.push(range(0xc000_0000, 0xdfff_ffff));
    let guest = Guest::with(300 * MIB, &allowed);
    let small = setup_header {
        init_size: 8192,
        ..header()
    };
    let error = guest.load(&bzimage(&small), None, "").unwrap_err();
    assert!(
        matches!(error, BootError::MemoryMapTooLong { most: 128, .. }),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Bytes of the headers are changed and the file is cut: there is an answer, whatever it is.
    #[test]
    fn a_hostile_file_gets_an_answer(
        which in 0..3,
        changes in prop::collection::vec((0_usize..0x300, any::<u8>()), 0..12),
        words in prop::collection::vec(
            (0_usize..0x60, prop_oneof![Just(u64::MAX), Just(1_u64 << 63), any::<u64>()]), 0..3
        ),
        cut in prop::option::of(0_usize..12_000),
    ) {
        let guest = Guest::new(32 * MIB);
        let mut file = match which {
            0 => bzimage(&header()),
            1 => elf(true),
            _ => elf(false),
        };
        for (at, byte) in changes {
            file[at] = byte;
        }
        for (at, word) in words {
            let at = at * 8;
            file[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        file.truncate(cut.unwrap_or(file.len()));
        if let Ok(entry) = guest.load(&file, Some(&code(100)), "x") {
            prop_assert!(entry.kernel.contains(entry.address));
            prop_assert!(!entry.kernel.overlaps(&entry.initrd.unwrap()));
            prop_assert!(entry.kernel.start().raw() >= MIB);
        }
    }

    #[test]
    fn random_bytes_get_an_answer(mut file in prop::collection::vec(any::<u8>(), 0..2000), elf: bool) {
        let guest = Guest::new(4 * MIB);
        if elf && file.len() > 6 {
            file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        } else if file.len() > 0x206 {
            file[0x202..0x206].copy_from_slice(b"HdrS");
        }
        prop_assert!(guest.load(&file, None, "").is_err());
    }
}
