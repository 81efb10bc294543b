//! QEMU's edu (`docs/specs/edu.rst` in QEMU).
//!
//! Its registers lie in BAR0. Those below 0x80 take 4-byte accesses only. The DMA registers are 8
//! bytes wide, but older kernels' vfio-pci cuts an 8-byte access in two (6.12.117 does not:
//! measured), and edu takes the first half for the whole and ignores the second. The driver finds
//! out which it is, and then refuses addresses that would be cut.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use assigned_pci::{BarIndex, HostFunction};
use memory_map::{Iova, IovaRange};

use crate::{DmaEngine, EngineError};

const BAR: BarIndex = BarIndex::ALL[0];
const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
/// How much of BAR0 the driver uses.
const NEEDED: u64 = 0xa0;

/// Start, and busy.
const RUN: u64 = 1;
/// From the engine's buffer to the bus, instead of the other way.
const TO_BUS: u64 = 1 << 1;

/// Where the engine's buffer lies in the engine's own address space. QEMU 10.0.2 crashes on a
/// transfer that leaves it; the driver always starts at its first byte and limits the length.
const BUFFER: u64 = 0x4_0000;
const BUFFER_SIZE: u64 = 4096;

/// What the identification register holds but for the version in its two upper bytes.
const EDU: u32 = 0xed;

/// The highest address of 32 bits.
const LAST_32: Iova = Iova::new(0xffff_ffff);
/// The highest address of all.
const LAST_64: Iova = Iova::new(u64::MAX);

/// How long a transfer may take. QEMU's takes 100 ms, on a machine that may be much slowed down.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait between two looks at the busy bit.
const INTERVAL: Duration = Duration::from_millis(5);

/// The driver.
///
/// It holds the function, and expects to be the only one that uses the engine. An address above
/// the device's property `dma_mask` (28 bits unless set) is cut off by the device; the driver
/// cannot see that.
#[derive(Debug)]
pub struct Edu {
    function: Arc<dyn HostFunction>,
    time_limit: Duration,
    /// Whether identity and liveness were checked, and what the highest address then was.
    last_address: Option<Iova>,
}

impl Edu {
    /// The vendor id.
    pub const VENDOR: u16 = 0x1234;
    /// The device id.
    pub const DEVICE: u16 = 0x11e8;

    /// A driver for `function`. Nothing is accessed before the first transfer.
    #[must_use]
    pub fn new(function: Arc<dyn HostFunction>) -> Self {
        Self {
            function,
            time_limit: TIME_LIMIT,
            last_address: None,
        }
    }

    /// How long a transfer may take, instead of ten seconds.
    #[must_use]
    pub fn with_time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Checks that this is an edu and that it answers, and finds out how it can be accessed. Done
    /// before the first transfer, if not earlier.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn probe(&mut self) -> Result<Iova, EngineError> {
        if let Some(last) = self.last_address {
            return Ok(last);
        }
        let bar = self
            .function
            .bar(BAR)
            .map_err(|source| self.access(source))?;
        if bar.is_none_or(|bar| bar.size < NEEDED) {
            return Err(EngineError::NoRegisters {
                function: self.function.name(),
                needed: NEEDED,
            });
        }
        let found = self.read32(IDENTIFICATION)?;
        if found & 0xffff != EDU {
            return Err(EngineError::Identification {
                function: self.function.name(),
                found,
            });
        }
        for wrote in [0x5aa5_0f1e, 0xffff_0000] {
            self.write32(LIVENESS, wrote)?;
            let read = self.read32(LIVENESS)?;
            if read != !wrote {
                return Err(EngineError::NotAlive {
                    function: self.function.name(),
                    wrote,
                    read,
                });
            }
        }
        // If it was used before, it may still be at it.
        self.wait()?;
        let wide = 0x0123_4567_89ab_cdef;
        self.write64(SOURCE, wide)?;
        let last = if self.read64(SOURCE)? == wide {
            LAST_64
        } else {
            LAST_32
        };
        self.last_address = Some(last);
        Ok(last)
    }

    fn transfer(&mut self, bus: Iova, len: u64, to_bus: bool) -> Result<(), EngineError> {
        if len == 0 || len > BUFFER_SIZE {
            return Err(EngineError::Length {
                len,
                most: BUFFER_SIZE,
            });
        }
        let range = IovaRange::new(bus, len).map_err(|source| EngineError::Range { source })?;
        let last = self.probe()?;
        if range.last() > last {
            return Err(EngineError::OutOfReach {
                function: self.function.name(),
                range,
                last,
            });
        }
        let (source, destination, command) = if to_bus {
            (BUFFER, bus.raw(), RUN | TO_BUS)
        } else {
            (bus.raw(), BUFFER, RUN)
        };
        self.write64(SOURCE, source)?;
        self.write64(DESTINATION, destination)?;
        self.write64(COUNT, len)?;
        self.write64(COMMAND, command)?;
        self.wait()
    }

    /// Waits until the engine is no longer busy.
    fn wait(&self) -> Result<(), EngineError> {
        let start = Instant::now();
        loop {
            // Its lower half is all that is needed, however the access is cut.
            if u64::from(self.read32(COMMAND)?) & RUN == 0 {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited >= self.time_limit {
                return Err(EngineError::Timeout {
                    function: self.function.name(),
                    waited,
                });
            }
            thread::sleep(INTERVAL);
        }
    }

    fn read32(&self, offset: u64) -> Result<u32, EngineError> {
        let mut data = [0; 4];
        self.function
            .bar_read(BAR, offset, &mut data)
            .map_err(|source| self.access(source))?;
        Ok(u32::from_le_bytes(data))
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), EngineError> {
        self.function
            .bar_write(BAR, offset, &value.to_le_bytes())
            .map_err(|source| self.access(source))
    }

    fn read64(&self, offset: u64) -> Result<u64, EngineError> {
        let mut data = [0; 8];
        self.function
            .bar_read(BAR, offset, &mut data)
            .map_err(|source| self.access(source))?;
        Ok(u64::from_le_bytes(data))
    }

    fn write64(&self, offset: u64, value: u64) -> Result<(), EngineError> {
        self.function
            .bar_write(BAR, offset, &value.to_le_bytes())
            .map_err(|source| self.access(source))
    }

    fn access(&self, source: std::io::Error) -> EngineError {
        EngineError::Access {
            function: self.function.name(),
            source,
        }
    }
}

impl DmaEngine for Edu {
    fn name(&self) -> String {
        format!("edu of {}", self.function.name())
    }

    fn max_transfer(&self) -> u64 {
        BUFFER_SIZE
    }

    /// Before the first transfer or [`probe`](Edu::probe), what can be said for sure.
    fn last_address(&self) -> Iova {
        self.last_address.unwrap_or(LAST_32)
    }

    fn load(&mut self, from: Iova, len: u64) -> Result<(), EngineError> {
        self.transfer(from, len, false)
    }

    fn store(&mut self, to: Iova, len: u64) -> Result<(), EngineError> {
        self.transfer(to, len, true)
    }
}

#[cfg(test)]
#[path = "edu_tests.rs"]
mod tests;
