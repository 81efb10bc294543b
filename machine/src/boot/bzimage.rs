//! bzImages (Linux, `Documentation/arch/x86/boot.rst`).

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use memory_map::{Gpa, GpaRange};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::error::BootError;
use super::image::{Image, read_header};
use super::room::Room;
use super::{Kernel, Protocol};

const HEADER: u64 = 0x1f1;
/// 2.12, Linux 3.8: the first that says whether there is a 64-bit entry.
const OLDEST: u16 = 0x020c;
const BOOT_FLAG: u16 = 0xaa55;
const SECTOR: u64 = 512;
/// From the start of the loaded part to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
const PAGE: u64 = 0x1000;

pub(super) fn load<M: GuestMemoryBackend, F: Image>(
    memory: &M,
    room: &Room,
    file: &mut F,
    size: u64,
) -> Result<Kernel, BootError> {
    let mut header = setup_header::default();
    read_header(file, HEADER, header.as_mut_slice())?;
    let range = place(&header, size, room)?;
    let start = GuestAddress(range.start().raw());
    let loaded = BzImage::load(memory, Some(start), file, None);
    let loaded = loaded.map_err(|source| BootError::Loader { source })?;
    Ok(Kernel {
        range,
        entry: Gpa::new(range.start().raw().saturating_add(ENTRY_64)),
        protocol: Protocol::Linux64,
        initrd_last: header.initrd_addr_max.into(),
        command_line: header.cmdline_size.into(),
        header: loaded.setup_header,
    })
}

/// Where the part that runs in protected mode goes, with all that it needs until it manages
/// memory itself.
fn place(header: &setup_header, size: u64, room: &Room) -> Result<GpaRange, BootError> {
    let damaged = |what| BootError::Damaged { what };
    if header.boot_flag != BOOT_FLAG {
        return Err(damaged("its boot sector has no signature"));
    }
    let version = header.version;
    if version < OLDEST || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry { version });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(damaged("it is loaded below 1 MiB"));
    }
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup = (sectors + 1) * SECTOR;
    let code = u64::from(header.syssize) * 16;
    if size < setup + code.max(ENTRY_64 + 1) {
        return Err(damaged("it ends before the code does"));
    }
    let alignment = u64::from(header.kernel_alignment);
    if !alignment.is_power_of_two() || alignment < PAGE {
        return Err(damaged("its alignment is no power of two"));
    }
    let wanted = header.pref_address;
    let needed = u64::from(header.init_size).max(size - setup);
    let preferred = GpaRange::new(Gpa::new(wanted), needed)
        .map_err(|_| damaged("its preferred address has no room behind it"))?;
    if room.covers(preferred) {
        return Ok(preferred);
    }
    // A kernel that is loaded below where it prefers to be moves there by itself, so only what
    // lies above is of use.
    let elsewhere = match header.relocatable_kernel {
        0 => None,
        _ => room.from(wanted, needed, alignment),
    };
    elsewhere.ok_or(BootError::KernelDoesNotFit {
        needed: preferred,
        ram_last: room.last(),
    })
}
