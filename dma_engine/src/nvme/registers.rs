//! The registers in BAR0 (section 3.1).
//!
//! All accesses have 4 bytes: the specification allows that for the 8-byte registers too, and
//! kernels cut longer ones in two anyway.

use std::sync::Arc;

use assigned_pci::{BarIndex, HostFunction};

use super::NvmeError;

const BAR: BarIndex = BarIndex::ALL[0];
/// Capabilities.
pub(super) const CAP: u64 = 0x00;
/// Interrupt mask set.
pub(super) const INTMS: u64 = 0x0c;
/// Controller configuration.
pub(super) const CC: u64 = 0x14;
/// Controller status.
pub(super) const CSTS: u64 = 0x1c;
/// Admin queue attributes: the sizes.
pub(super) const AQA: u64 = 0x24;
/// Admin submission queue's address.
pub(super) const ASQ: u64 = 0x28;
/// Admin completion queue's address.
pub(super) const ACQ: u64 = 0x30;
/// Controller memory buffer: location, size, memory space control, status.
pub(super) const CMBLOC: u64 = 0x38;
pub(super) const CMBSZ: u64 = 0x3c;
pub(super) const CMBMSC: u64 = 0x50;
pub(super) const CMBSTS: u64 = 0x58;
/// The first doorbell.
const DOORBELLS: u64 = 0x1000;

/// CC.EN.
pub(super) const ENABLE: u32 = 1;
/// CC as the driver sets it: entries of 64 and 16 bytes, pages of 4 KiB, NVM command set, enabled.
pub(super) const CONFIGURATION: u32 = (4 << 20) | (6 << 16) | ENABLE;
/// CSTS.RDY.
pub(super) const READY: u32 = 1;
/// CSTS.CFS.
pub(super) const FATAL: u32 = 1 << 1;

/// The class code of an NVMe controller: mass storage, non-volatile memory, NVM Express.
pub(super) const CLASS: u32 = 0x01_0802;

/// What CAP says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capabilities(u64);

impl Capabilities {
    /// The largest I/O queue, in entries: 2 to 65536, if the controller keeps to the rules.
    pub fn queue_entries(self) -> u32 {
        u32::from(self.bits16(0)).saturating_add(1)
    }

    /// In units of 500 ms, how long enabling and disabling may take.
    pub fn timeout(self) -> u32 {
        u32::from(self.bits16(24) & 0xff)
    }

    /// From one doorbell to the next, in bytes: 4 to 128 KiB.
    pub fn stride(self) -> u64 {
        4 << (self.bits16(32) & 0xf)
    }

    pub fn has_nvm_commands(self) -> bool {
        self.0 & (1 << 37) != 0
    }

    /// The smallest memory page, as a power of two from 4 KiB on.
    pub fn smallest_page(self) -> u16 {
        self.bits16(48) & 0xf
    }

    /// Whether CMBLOC and CMBSZ are shown only when asked for, by CMBMSC (since 1.4).
    pub fn has_hidden_buffer(self) -> bool {
        self.0 & (1 << 57) != 0
    }

    fn bits16(self, from: u32) -> u16 {
        let [low, high, ..] = (self.0 >> from).to_le_bytes();
        u16::from_le_bytes([low, high])
    }
}

/// A function's class code, which is three bytes.
pub(super) fn class(function: &Arc<dyn HostFunction>) -> std::io::Result<u32> {
    // Its revision is below it.
    let mut class = [0; 4];
    function.config_read(0x08, &mut class)?;
    Ok(u32::from_le_bytes(class) >> 8)
}

/// The registers of one function.
#[derive(Debug, Clone)]
pub(super) struct Registers(Arc<dyn HostFunction>);

impl Registers {
    /// Accesses nothing yet.
    pub fn new(function: Arc<dyn HostFunction>) -> Self {
        Self(function)
    }

    pub fn name(&self) -> String {
        self.0.name()
    }

    pub fn function(&self) -> &Arc<dyn HostFunction> {
        &self.0
    }

    /// Sees that this is an NVMe controller that answers, and what it can do.
    pub fn probe(&self) -> Result<Capabilities, NvmeError> {
        let class = class(&self.0).map_err(|source| self.access(source))?;
        if class == 0xff_ffff {
            return Err(self.gone());
        }
        if class != CLASS {
            return Err(NvmeError::Class {
                function: self.name(),
                class,
            });
        }
        self.need(DOORBELLS)?;
        let cap = self.read64(CAP)?;
        if cap == u64::MAX {
            return Err(self.gone());
        }
        Ok(Capabilities(cap))
    }

    /// How many bytes a BAR has, if it is there.
    pub fn bar(&self, bar: BarIndex) -> Result<Option<u64>, NvmeError> {
        let bar = self.0.bar(bar).map_err(|source| self.access(source))?;
        Ok(bar.map(|bar| bar.size))
    }

    /// Sees that BAR0 has that many bytes.
    fn need(&self, needed: u64) -> Result<(), NvmeError> {
        if self.bar(BAR)?.is_none_or(|size| size < needed) {
            return Err(NvmeError::NoRegisters {
                function: self.name(),
                needed,
            });
        }
        Ok(())
    }

    /// Where a queue's doorbells are: the submission queue's tail, and the completion queue's
    /// head (section 3.1).
    pub fn doorbells(&self, cap: Capabilities, queue: u16) -> Result<(u64, u64), NvmeError> {
        let stride = cap.stride();
        let tail = DOORBELLS.saturating_add(stride.saturating_mul(u64::from(queue) * 2));
        let head = tail.saturating_add(stride);
        self.need(head.saturating_add(4))?;
        Ok((tail, head))
    }

    /// CSTS; all ones is no status.
    pub fn status(&self) -> Result<u32, NvmeError> {
        match self.read32(CSTS)? {
            u32::MAX => Err(self.gone()),
            status => Ok(status),
        }
    }

    pub fn read32(&self, offset: u64) -> Result<u32, NvmeError> {
        let mut data = [0; 4];
        self.0
            .bar_read(BAR, offset, &mut data)
            .map_err(|source| self.access(source))?;
        Ok(u32::from_le_bytes(data))
    }

    pub fn write32(&self, offset: u64, value: u32) -> Result<(), NvmeError> {
        self.0
            .bar_write(BAR, offset, &value.to_le_bytes())
            .map_err(|source| self.access(source))
    }

    pub fn read64(&self, offset: u64) -> Result<u64, NvmeError> {
        let low = self.read32(offset)?;
        let high = self.read32(offset.saturating_add(4))?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    /// The upper half first: a register whose lower half has something begin sees the whole.
    pub fn write64(&self, offset: u64, value: u64) -> Result<(), NvmeError> {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.write32(offset.saturating_add(4), u32::from_le_bytes([e, f, g, h]))?;
        self.write32(offset, u32::from_le_bytes([a, b, c, d]))
    }

    pub fn gone(&self) -> NvmeError {
        NvmeError::Gone {
            function: self.name(),
        }
    }

    fn access(&self, source: std::io::Error) -> NvmeError {
        NvmeError::Access {
            function: self.name(),
            source,
        }
    }
}
