//! ELF kernels: with a PVH note, or entered by the 64-bit boot protocol.

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use memory_map::{Gpa, GpaRange};
use vm_memory::GuestMemoryBackend;

use super::error::BootError;
use super::image::{Image, read_header};
use super::room::Room;
use super::{Kernel, Protocol};
use crate::platform;

/// The sizes of the file's header and of a program header (System V ABI, 64-bit).
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const X86_64: u16 = 62;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// A kernel has a handful of segments, and a page of notes.
const MOST_SEGMENTS: u16 = 256;
const MOST_NOTES: u64 = 0x1_0000;
/// What Linux reads on x86, without the zero byte (`COMMAND_LINE_SIZE`).
const COMMAND_LINE: u64 = 2047;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

pub(super) fn load<M: GuestMemoryBackend, F: Image>(
    memory: &M,
    room: &Room,
    file: &mut F,
    size: u64,
) -> Result<Kernel, BootError> {
    let (entry, segments) = check(file, size)?;
    let range = extent(&segments, room)?;
    let loaded = Elf::load(memory, None, file, None);
    let loaded = loaded.map_err(|source| BootError::Loader { source })?;
    for segment in segments.iter().filter(|segment| segment.kind == LOAD) {
        clear(memory, segment)?;
    }
    let (protocol, entry) = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => (Protocol::Pvh, Gpa::new(entry.0)),
        _ => (Protocol::Linux64, Gpa::new(entry)),
    };
    if !range.contains(entry) {
        return Err(BootError::Damaged {
            what: "it is entered where nothing is loaded",
        });
    }
    Ok(Kernel {
        range,
        entry,
        protocol,
        initrd_last: platform::LOW_HOLE.raw() - 1,
        command_line: COMMAND_LINE,
        header: None,
    })
}

/// Reads the headers: the entry and the segments, whose content is there.
fn check<F: Image>(file: &mut F, size: u64) -> Result<(u64, Vec<Segment>), BootError> {
    let damaged = |what| BootError::Damaged { what };
    let mut header = [0; HEADER];
    read_header(file, 0, &mut header)?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || half(18) != X86_64 {
        let what = "but an ELF file for another processor";
        return Err(BootError::NotAKernel { what });
    }
    let (entry, table) = (word(&header, 24), word(&header, 32));
    let count = half(56);
    if usize::from(half(54)) != PROGRAM_HEADER || count > MOST_SEGMENTS {
        return Err(damaged("its program headers make no sense"));
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let mut bytes = [0; PROGRAM_HEADER];
        let at = table.checked_add(index * PROGRAM_HEADER as u64);
        let at = at.filter(|at| *at < size);
        let at = at.ok_or_else(|| damaged("it ends within its headers"))?;
        read_header(file, at, &mut bytes)?;
        let segment = Segment {
            kind: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            offset: word(&bytes, 8),
            address: word(&bytes, 24),
            file_size: word(&bytes, 32),
            memory_size: word(&bytes, 40),
        };
        let end = segment.offset.checked_add(segment.file_size);
        if matches!(segment.kind, LOAD | NOTE) && end.is_none_or(|end| end > size) {
            return Err(damaged("it ends within a segment"));
        }
        if segment.kind == NOTE && segment.file_size > MOST_NOTES {
            return Err(damaged("its notes are too long"));
        }
        segments.push(segment);
    }
    Ok((entry, segments))
}

/// The eight bytes at `at`, which is within `bytes`.
fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// From the first byte that is loaded to the last, all of which is RAM.
fn extent(segments: &[Segment], room: &Room) -> Result<GpaRange, BootError> {
    let mut extent: Option<GpaRange> = None;
    for segment in segments {
        if segment.kind != LOAD || segment.memory_size == 0 {
            continue;
        }
        let address = Gpa::new(segment.address);
        let range = GpaRange::new(address, segment.memory_size);
        let (Ok(range), true) = (range, segment.file_size <= segment.memory_size) else {
            let what = "one of its segments makes no sense";
            return Err(BootError::Damaged { what });
        };
        let first = extent.map_or(range.start(), |e| e.start().min(range.start()));
        let last = extent.map_or(range.last(), |e| e.last().max(range.last()));
        extent = GpaRange::from_inclusive(first, last).ok();
    }
    let extent = extent.ok_or(BootError::Damaged {
        what: "it has nothing to load",
    })?;
    if room.covers(extent) {
        Ok(extent)
    } else {
        Err(BootError::KernelDoesNotFit {
            needed: extent,
            ram_last: room.last(),
        })
    }
}

/// Clears what a segment has in memory and not in the file: RAM is not new when a guest starts
/// anew.
fn clear<M: GuestMemoryBackend>(memory: &M, segment: &Segment) -> Result<(), BootError> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut address = segment.address.saturating_add(segment.file_size);
    let end = segment.address.saturating_add(segment.memory_size);
    while address < end {
        let left = usize::try_from(end - address).unwrap_or(usize::MAX);
        let part = &ZEROES[..left.min(ZEROES.len())];
        super::write(memory, Gpa::new(address), part)?;
        // A `usize` has at most 64 bits.
        address = address.saturating_add(part.len() as u64);
    }
    Ok(())
}
