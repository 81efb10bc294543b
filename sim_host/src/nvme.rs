//! An NVMe controller, modelled on QEMU's: an admin queue pair, one I/O queue pair, a disk in
//! memory, and a controller memory buffer in BAR2 if it is asked for.
//!
//! Unlike QEMU's, commands are done at once, when the doorbell rings; its interrupts are MSI-X's
//! alone, and each completion raises one; its
//! own memory buffer holds no queues and no commands' data; and a transfer that the IOMMU blocks
//! ends with Data Transfer Error, which QEMU's does not notice. Section numbers are those of NVM
//! Express 1.4.

use std::fmt;
use std::sync::{Arc, Weak};

use memory_map::Iova;
use parking_lot::Mutex;

use crate::gate::Gate;
use crate::host::HostInner;
use crate::log::BusErrorCause;
use crate::nvme_spec::{NvmeFlaw, NvmeSpec};
use crate::page::PAGE;
use crate::physical::Registers;
use crate::vectors::Vectors;

/// Size of the registers' BAR.
pub(crate) const BAR_SIZE: u64 = 0x4000;
/// How many interrupt vectors it has.
pub(crate) const VECTORS: u16 = 4;
const COMMAND_SIZE: u64 = 64;
const COMPLETION_SIZE: u64 = 16;
/// How many entries an I/O queue has at the most.
const QUEUE_ENTRIES: u32 = 8;
/// MDTS: pages, as a power of two.
const TRANSFER_LIMIT: u8 = 5;
const ENABLE: u32 = 1;
const READY: u32 = 1;
const FATAL: u32 = 1 << 1;
/// A PRP list's page holds that many entries.
const LIST_ENTRIES: u64 = PAGE / 8;

const SUCCESS: u16 = 0;
const INVALID_OPCODE: u16 = 0x01;
const INVALID_FIELD: u16 = 0x02;
const DATA_TRANSFER_ERROR: u16 = 0x04;
const INVALID_NAMESPACE: u16 = 0x0b;
const LBA_OUT_OF_RANGE: u16 = 0x80;
/// Specific to the command.
const INVALID_QUEUE_IDENTIFIER: u16 = 0x101;
const INVALID_QUEUE_SIZE: u16 = 0x102;

/// One queue pair; no entries where there is none.
#[derive(Debug, Clone, Copy, Default)]
struct Queue {
    commands: u64,
    command_entries: u32,
    completions: u64,
    completion_entries: u32,
    /// The interrupt vector that completions raise, if they raise one.
    vector: Option<u16>,
    /// Of the submission queue.
    head: u32,
    tail: u32,
    /// Of the completion queue.
    completion_tail: u32,
    completion_head: u32,
    /// The inverse of the phase tag.
    turned: bool,
}

#[derive(Debug, Clone, Default)]
struct State {
    configuration: u32,
    status: u32,
    admin_sizes: u32,
    admin_commands: u64,
    admin_completions: u64,
    buffer_control: u64,
    queues: [Queue; 2],
    /// Commands are being done: who rings a doorbell meanwhile leaves the work to that.
    working: bool,
}

/// The controller. It issues DMA as the function that it belongs to.
pub(crate) struct Nvme {
    spec: NvmeSpec,
    host: Weak<HostInner>,
    function: Arc<str>,
    gate: Arc<Gate>,
    vectors: Arc<Vectors>,
    /// Never held while DMA is under way: that may come back to these registers.
    state: Mutex<State>,
}

/// A command as it was fetched.
struct Command([u8; 64]);

impl Command {
    fn word(&self, number: usize) -> u32 {
        let bytes = self.0.get(number * 4..).and_then(|b| b.first_chunk());
        u32::from_le_bytes(bytes.copied().unwrap_or_default())
    }

    fn wide(&self, number: usize) -> u64 {
        u64::from(self.word(number + 1)) << 32 | u64::from(self.word(number))
    }

    fn opcode(&self) -> u8 {
        self.0[0]
    }

    fn identifier(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }
}

impl Nvme {
    pub fn new(
        spec: NvmeSpec,
        (host, function, gate): (Weak<HostInner>, Arc<str>, Arc<Gate>),
        vectors: Arc<Vectors>,
    ) -> Self {
        Self {
            spec,
            host,
            function,
            gate,
            vectors,
            state: Mutex::default(),
        }
    }

    fn has(&self, flaw: NvmeFlaw) -> bool {
        self.spec.flaw == Some(flaw)
    }

    /// CAP: queue entries, contiguous queues, half a second, NVM commands, the memory buffer.
    fn capabilities(&self) -> u64 {
        let buffer = u64::from(self.spec.buffer > 0) << 57;
        u64::from(QUEUE_ENTRIES - 1) | (1 << 16) | (1 << 24) | (1 << 37) | buffer
    }

    /// CMBLOC and CMBSZ (sections 3.1.12 and 3.1.13), which are hidden at first.
    fn buffer(&self, control: u64) -> (u32, u32) {
        if control & 1 == 0 || self.spec.buffer == 0 {
            return (0, 0);
        }
        let pages = u32::try_from(self.spec.buffer / PAGE).unwrap_or(0);
        let bar = if self.has(NvmeFlaw::NonsenseBuffer) {
            7
        } else {
            2
        };
        (bar, pages << 12)
    }

    /// The four bytes at a multiple of four.
    fn read_word(&self, offset: u64) -> u32 {
        let state = self.state.lock();
        let half = |value: u64| {
            let value = if offset & 4 == 0 { value } else { value >> 32 };
            u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
        };
        match offset {
            0x00 | 0x04 => half(self.capabilities()),
            // 1.4.
            0x08 => 0x1_0400,
            0x14 => state.configuration,
            0x1c => state.status,
            0x24 => state.admin_sizes,
            0x28 | 0x2c => half(state.admin_commands),
            0x30 | 0x34 => half(state.admin_completions),
            0x38 => self.buffer(state.buffer_control).0,
            0x3c => self.buffer(state.buffer_control).1,
            0x50 | 0x54 => half(state.buffer_control),
            _ => 0,
        }
    }

    fn write_word(&self, offset: u64, value: u32) {
        let mut state = self.state.lock();
        let set_half = |register: &mut u64| {
            let value = u64::from(value);
            let low = u64::from(u32::MAX);
            *register = if offset & 4 == 0 {
                *register & !low | value
            } else {
                *register & low | (value << 32)
            };
        };
        match offset {
            0x14 => self.configure(&mut state, value),
            0x24 => state.admin_sizes = value & 0x0fff_0fff,
            0x28 | 0x2c => set_half(&mut state.admin_commands),
            0x30 | 0x34 => set_half(&mut state.admin_completions),
            0x50 | 0x54 if self.spec.buffer > 0 => set_half(&mut state.buffer_control),
            0x1000 | 0x1008 => {
                let queue = usize::from(offset == 0x1008);
                if state.status & (READY | FATAL) != READY {
                    return;
                }
                if let Some(queue) = state.queues.get_mut(queue)
                    && value < queue.command_entries
                {
                    queue.tail = value;
                }
                if !state.working {
                    state.working = true;
                    drop(state);
                    self.work();
                }
            }
            0x1004 | 0x100c => {
                let queue = usize::from(offset == 0x100c);
                if let Some(queue) = state.queues.get_mut(queue)
                    && value < queue.completion_entries
                {
                    queue.completion_head = value;
                }
            }
            _ => {}
        }
    }

    /// Enables it or disables it (section 3.1.5).
    fn configure(&self, state: &mut State, value: u32) {
        let was = state.configuration & ENABLE != 0;
        state.configuration = value;
        if value & ENABLE == 0 {
            if was {
                state.queues = [Queue::default(); 2];
            }
            if !self.has(NvmeFlaw::NeverStops) {
                state.status = 0;
            }
        } else if !was {
            if self.has(NvmeFlaw::FailsWhenEnabled) {
                state.status = FATAL;
            } else if !self.has(NvmeFlaw::NeverReady) {
                state.queues[0] = Queue {
                    commands: state.admin_commands,
                    command_entries: (state.admin_sizes & 0xfff) + 1,
                    completions: state.admin_completions,
                    completion_entries: (state.admin_sizes >> 16) + 1,
                    vector: Some(0),
                    ..Queue::default()
                };
                state.status = READY;
            }
        }
    }

    /// Does commands until there are none, or no room for a completion.
    fn work(&self) {
        loop {
            let (number, queue) = {
                let mut state = self.state.lock();
                let ready = state.status & (READY | FATAL) == READY;
                let waiting = (0..).zip(state.queues).find(|(_, queue)| {
                    let next = (queue.completion_tail + 1) % queue.completion_entries.max(1);
                    queue.head != queue.tail && next != queue.completion_head
                });
                let Some(waiting) = waiting.filter(|_| ready) else {
                    state.working = false;
                    return;
                };
                waiting
            };
            let mut command = Command([0; 64]);
            let at = queue.commands + u64::from(queue.head) * COMMAND_SIZE;
            if !self.fetch(at, &mut command.0) {
                self.fail();
                continue;
            }
            let status = match number {
                0 => self.administer(&command),
                _ => self.transfer(&command),
            };
            let head = (queue.head + 1) % queue.command_entries.max(1);
            if number == 1 && self.has(NvmeFlaw::Silent) {
                self.state.lock().queues[number].head = head;
                continue;
            }
            self.complete(number, &command, head, status);
        }
    }

    /// Writes a completion (section 4.6).
    fn complete(&self, number: usize, command: &Command, head: u32, status: u16) {
        let (at, turned, vector) = {
            let mut state = self.state.lock();
            let Some(queue) = state.queues.get_mut(number) else {
                return;
            };
            queue.head = head;
            let at = queue.completions + u64::from(queue.completion_tail) * COMPLETION_SIZE;
            let turned = queue.turned;
            queue.completion_tail = (queue.completion_tail + 1) % queue.completion_entries.max(1);
            queue.turned ^= queue.completion_tail == 0;
            (at, turned, queue.vector)
        };
        let mut identifier = command.identifier();
        if self.has(NvmeFlaw::WrongIdentifier) {
            identifier ^= 0x5555;
        }
        let mut entry = [0; 16];
        let [head_low, head_high, ..] = head.to_le_bytes();
        let [id_low, id_high] = identifier.to_le_bytes();
        let [low, high] = (status << 1 | u16::from(!turned)).to_le_bytes();
        let queue = u8::from(number == 1);
        entry[8..].copy_from_slice(&[head_low, head_high, queue, 0, id_low, id_high, low, high]);
        if !self.put(at, &entry) {
            self.fail();
        } else if let Some(vector) = vector {
            self.vectors.raise(vector);
        }
    }

    fn fail(&self) {
        self.state.lock().status |= FATAL;
    }

    fn administer(&self, command: &Command) -> u16 {
        let which = command.word(10);
        let (entries, identifier) = ((which >> 16) + 1, which & 0xffff);
        let mut state = self.state.lock();
        let queue = &mut state.queues[1];
        match command.opcode() {
            0x06 => {
                drop(state);
                self.identify(command)
            }
            0x09 => SUCCESS,
            0x01 | 0x05 if identifier != 1 => INVALID_QUEUE_IDENTIFIER,
            0x01 | 0x05 if !(2..=QUEUE_ENTRIES).contains(&entries) => INVALID_QUEUE_SIZE,
            0x01 | 0x05 if !command.wide(6).is_multiple_of(PAGE) => INVALID_FIELD,
            0x05 => {
                queue.completions = command.wide(6);
                queue.completion_entries = entries;
                // Interrupts enabled, and the vector (section 5.3).
                let [flags, _, low, high] = command.word(11).to_le_bytes();
                queue.vector = (flags & 2 != 0).then(|| u16::from_le_bytes([low, high]));
                SUCCESS
            }
            0x01 if queue.completion_entries == 0 => INVALID_QUEUE_IDENTIFIER,
            0x01 => {
                queue.commands = command.wide(6);
                queue.command_entries = entries;
                SUCCESS
            }
            _ => INVALID_OPCODE,
        }
    }

    /// Section 5.15.
    fn identify(&self, command: &Command) -> u16 {
        let mut data = [0; 4096];
        match command.word(10) & 0xff {
            0 if command.word(1) != 1 => return INVALID_NAMESPACE,
            0 => {
                data[..8].copy_from_slice(&self.spec.disk.blocks.to_le_bytes());
                data[128 + 2] = self.spec.disk.shift;
            }
            1 => {
                data[24..64].fill(b' ');
                data[24..39].copy_from_slice(b"simulated  NVMe");
                data[77] = TRANSFER_LIMIT;
            }
            _ => return INVALID_FIELD,
        }
        if self.has(NvmeFlaw::NonsenseIdentity) {
            data.fill(0xff);
        }
        match self.pages(command, PAGE) {
            Ok(pages) if self.scatter(&pages, &data) => SUCCESS,
            Ok(_) => DATA_TRANSFER_ERROR,
            Err(status) => status,
        }
    }

    /// Read and Write (sections 6.9 and 6.15).
    fn transfer(&self, command: &Command) -> u16 {
        let disk = &self.spec.disk;
        if command.word(1) != 1 {
            return INVALID_NAMESPACE;
        }
        let (first, count) = (command.wide(10), u64::from(command.word(12) & 0xffff) + 1);
        if first.checked_add(count).is_none_or(|end| end > disk.blocks) {
            return LBA_OUT_OF_RANGE;
        }
        let (offset, len) = (first << disk.shift, count << disk.shift);
        if len > PAGE << TRANSFER_LIMIT {
            return INVALID_FIELD;
        }
        let pages = match self.pages(command, len) {
            Ok(pages) => pages,
            Err(status) => return status,
        };
        let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
        let moved = match command.opcode() {
            0x01 => self.gather(&pages, &mut data) && disk.write(offset, &data).is_ok(),
            0x02 => disk.read(offset, &mut data).is_ok() && self.scatter(&pages, &data),
            _ => return INVALID_OPCODE,
        };
        if moved { SUCCESS } else { DATA_TRANSFER_ERROR }
    }

    /// The pieces of bus addresses that a command's `len` bytes are at (section 4.3).
    fn pages(&self, command: &Command, len: u64) -> Result<Vec<(u64, u64)>, u16> {
        let (first, second) = (command.wide(6), command.wide(8));
        if !first.is_multiple_of(4) {
            return Err(INVALID_FIELD);
        }
        let piece = len.min(PAGE - first % PAGE);
        let mut pages = vec![(first, piece)];
        let mut left = len - piece;
        if left == 0 {
            return Ok(pages);
        }
        if left <= PAGE {
            return match second.is_multiple_of(PAGE) {
                true => {
                    pages.push((second, left));
                    Ok(pages)
                }
                false => Err(INVALID_FIELD),
            };
        }
        let mut list = second;
        while left > 0 {
            let mut entry = [0; 8];
            if !self.fetch(list, &mut entry) {
                return Err(DATA_TRANSFER_ERROR);
            }
            let entry = u64::from_le_bytes(entry);
            let last_of_page = list % PAGE == (LIST_ENTRIES - 1) * 8;
            if last_of_page && left > PAGE {
                list = entry;
                continue;
            }
            if !entry.is_multiple_of(PAGE) {
                return Err(INVALID_FIELD);
            }
            let piece = left.min(PAGE);
            pages.push((entry, piece));
            left -= piece;
            list = list.wrapping_add(8);
        }
        Ok(pages)
    }

    fn gather(&self, pages: &[(u64, u64)], mut data: &mut [u8]) -> bool {
        pages.iter().all(|(at, len)| {
            let len = usize::try_from(*len).unwrap_or(0).min(data.len());
            let (piece, rest) = std::mem::take(&mut data).split_at_mut(len);
            data = rest;
            self.fetch(*at, piece)
        })
    }

    fn scatter(&self, pages: &[(u64, u64)], mut data: &[u8]) -> bool {
        pages.iter().all(|(at, len)| {
            let len = usize::try_from(*len).unwrap_or(0).min(data.len());
            let (piece, rest) = data.split_at(len);
            data = rest;
            self.put(*at, piece)
        })
    }

    /// A DMA read; whether all of it was answered.
    fn fetch(&self, at: u64, data: &mut [u8]) -> bool {
        let Some(host) = self.host.upgrade() else {
            return false;
        };
        if !self.gate.masters_bus() {
            host.bus_error(
                &self.function,
                Iova::new(at),
                false,
                BusErrorCause::BusMasteringOff,
            );
            return false;
        }
        host.dma_read(&self.function, Iova::new(at), data)
    }

    /// A DMA write; whether all of it was answered.
    fn put(&self, at: u64, data: &[u8]) -> bool {
        let Some(host) = self.host.upgrade() else {
            return false;
        };
        if !self.gate.masters_bus() {
            host.bus_error(
                &self.function,
                Iova::new(at),
                true,
                BusErrorCause::BusMasteringOff,
            );
            return false;
        }
        host.dma_write(&self.function, Iova::new(at), data)
    }
}

impl Registers for Nvme {
    fn size(&self) -> u64 {
        BAR_SIZE
    }

    /// Whole words only: accesses of other sizes read as zeroes.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset.is_multiple_of(4) {
            for (word, at) in data.chunks_exact_mut(4).zip((offset..).step_by(4)) {
                word.copy_from_slice(&self.read_word(at).to_le_bytes());
            }
        }
    }

    /// Likewise, they do nothing.
    fn write(&self, offset: u64, data: &[u8]) {
        if offset.is_multiple_of(4) {
            for (word, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
                let word = word.first_chunk().copied().unwrap_or_default();
                self.write_word(at, u32::from_le_bytes(word));
            }
        }
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        let working = state.working;
        *state = State {
            working,
            ..State::default()
        };
    }
}

impl fmt::Debug for Nvme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nvme({})", self.function)
    }
}
