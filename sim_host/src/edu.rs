//! A DMA engine, modelled on QEMU's edu (`docs/specs/edu.rst` there).
//!
//! Unlike QEMU's, its DMA happens at once instead of after 100 ms, it computes no factorials, its
//! interrupts are MSI's alone, and a buffer address that is out of range is refused instead of crashing
//! the machine.

use std::fmt;
use std::sync::{Arc, Weak};

use memory_map::Iova;
use parking_lot::Mutex;

use crate::gate::Gate;
use crate::host::HostInner;
use crate::log::BusErrorCause;
use crate::page::PAGE_LEN;
use crate::physical::Registers;
use crate::vectors::Vectors;

/// Size of the registers' BAR.
pub(crate) const BAR_SIZE: u64 = 0x10_0000;
/// "ed" stands for edu; the rest is the version.
const IDENTIFICATION: u64 = 0x0100_00ed;
/// Where the engine's own buffer lies in the engine's own address space.
const BUFFER: u64 = 0x4_0000;
const RUN: u64 = 1;
const TO_BUS: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
/// What the interrupt status says after a transfer.
const TRANSFERRED: u32 = 0x100;

/// The register file.
#[derive(Clone)]
struct State {
    liveness: u32,
    interrupts: u32,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
    buffer: [u8; PAGE_LEN],
}

impl Default for State {
    fn default() -> Self {
        Self {
            liveness: 0,
            interrupts: 0,
            source: 0,
            destination: 0,
            count: 0,
            command: 0,
            buffer: [0; PAGE_LEN],
        }
    }
}

/// The engine. It issues DMA as the function that it belongs to.
pub(crate) struct Edu {
    host: Weak<HostInner>,
    function: Arc<str>,
    gate: Arc<Gate>,
    vectors: Arc<Vectors>,
    /// Never held while DMA is under way: that may come back to these registers.
    state: Mutex<State>,
}

impl Edu {
    pub fn new(
        host: Weak<HostInner>,
        function: Arc<str>,
        gate: Arc<Gate>,
        vectors: Arc<Vectors>,
    ) -> Self {
        Self {
            host,
            function,
            gate,
            vectors,
            state: Mutex::default(),
        }
    }

    fn read_register(&self, offset: u64, len: usize) -> u64 {
        let state = self.state.lock();
        match (offset, len) {
            (0x00, 4) => IDENTIFICATION,
            (0x04, 4) => state.liveness.into(),
            (0x20, 4) => 0,
            (0x24, 4) => state.interrupts.into(),
            (0x80, 4 | 8) => state.source,
            (0x88, 4 | 8) => state.destination,
            (0x90, 4 | 8) => state.count,
            (0x98, 4 | 8) => state.command,
            _ => u64::MAX,
        }
    }

    fn write_register(&self, offset: u64, len: usize, value: u64) {
        let mut state = self.state.lock();
        let busy = state.command & RUN != 0;
        match (offset, len) {
            (0x04, 4) => {
                state.liveness = u32::try_from(!value & u64::from(u32::MAX)).unwrap_or(0);
            }
            (0x60, 4) => {
                drop(state);
                self.raise(u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0));
            }
            (0x64, 4) => {
                state.interrupts &= !u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
            }
            (0x80, 4 | 8) if !busy => state.source = value,
            (0x88, 4 | 8) if !busy => state.destination = value,
            (0x90, 4 | 8) if !busy => state.count = value,
            (0x98, 4 | 8) if !busy && value & RUN != 0 => {
                state.command = value;
                drop(state);
                self.transfer();
            }
            _ => {}
        }
    }

    /// Says why in the interrupt status, and raises an interrupt, if it says anything.
    fn raise(&self, why: u32) {
        let mut state = self.state.lock();
        state.interrupts |= why;
        if state.interrupts != 0 {
            drop(state);
            self.vectors.raise(0);
        }
    }

    /// Does the transfer that the registers describe. They say busy until it is done.
    fn transfer(&self) {
        let State {
            source,
            destination,
            count,
            command,
            mut buffer,
            ..
        } = self.state.lock().clone();
        let to_bus = command & TO_BUS != 0;
        let (bus, inner) = if to_bus {
            (Iova::new(destination), source)
        } else {
            (Iova::new(source), destination)
        };
        if let Some(host) = self.host.upgrade() {
            let refuse = |cause| host.bus_error(&self.function, bus, to_bus, cause);
            match within_buffer(&mut buffer, inner, count) {
                None => refuse(BusErrorCause::BufferOutOfRange {
                    buffer: inner,
                    count,
                }),
                Some(bytes) if !self.gate.masters_bus() => {
                    refuse(BusErrorCause::BusMasteringOff);
                    if !to_bus {
                        bytes.fill(0xff);
                    }
                }
                // It does not notice whether anybody answers.
                Some(bytes) if to_bus => {
                    host.dma_write(&self.function, bus, bytes);
                }
                Some(bytes) => {
                    host.dma_read(&self.function, bus, bytes);
                }
            }
        }
        let mut state = self.state.lock();
        if !to_bus {
            state.buffer = buffer;
        }
        state.command &= !RUN;
        drop(state);
        if command & INTERRUPT != 0 {
            self.raise(TRANSFERRED);
        }
    }
}

/// The `count` bytes of the buffer that the engine knows by the address `inner`.
fn within_buffer(buffer: &mut [u8; PAGE_LEN], inner: u64, count: u64) -> Option<&mut [u8]> {
    let start = usize::try_from(inner.checked_sub(BUFFER)?).ok()?;
    let count = usize::try_from(count).ok()?;
    buffer.get_mut(start..)?.get_mut(..count)
}

/// Cuts an access into the largest naturally aligned parts of at most 8 bytes, as the bus does.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = 0usize;
    std::iter::from_fn(move || {
        let left = len.checked_sub(at).filter(|left| *left > 0)?;
        let address = offset.checked_add(u64::try_from(at).ok()?)?;
        let size = [8usize, 4, 2, 1].into_iter().find(|size| {
            *size <= left && u64::try_from(*size).is_ok_and(|size| address.is_multiple_of(size))
        })?;
        let part = (address, at, size);
        at += size;
        Some(part)
    })
}

impl Registers for Edu {
    fn size(&self) -> u64 {
        BAR_SIZE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (address, at, size) in parts(offset, data.len()) {
            let value = self.read_register(address, size).to_le_bytes();
            for (into, from) in data.iter_mut().skip(at).take(size).zip(value) {
                *into = from;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (address, at, size) in parts(offset, data.len()) {
            let mut value = [0; 8];
            for (into, from) in value.iter_mut().zip(data.iter().skip(at).take(size)) {
                *into = *from;
            }
            self.write_register(address, size, u64::from_le_bytes(value));
        }
    }

    fn reset(&self) {
        *self.state.lock() = State::default();
    }
}

impl fmt::Debug for Edu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Edu({})", self.function)
    }
}
