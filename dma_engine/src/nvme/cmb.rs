//! The controller memory buffer: memory in a BAR that others can read and write (section 4.7).

use std::sync::Arc;

use assigned_pci::{BarIndex, HostFunction};
use memory_map::Iova;

use super::registers::{CMBLOC, CMBMSC, CMBSTS, CMBSZ, Registers};
use super::{BufferProblem, NvmeError};

/// CMBMSC.CRE: CMBLOC and CMBSZ tell what there is.
const REGISTERS: u64 = 1;
/// CMBMSC.CMSE: the controller answers at the base address.
const MEMORY_SPACE: u64 = 1 << 1;
/// CMBSTS.CBAI.
const BASE_INVALID: u32 = 1;
const PAGE: u64 = 0x1000;

/// Where a controller's memory buffer lies. It stays enabled until the controller is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControllerMemoryBuffer {
    /// The BAR.
    pub bar: BarIndex,
    /// Where in the BAR it starts, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Whether commands may have the controller read data from it (CMBSZ.WDS).
    pub holds_write_data: bool,
    /// Whether commands may have the controller write data to it (CMBSZ.RDS).
    pub holds_read_data: bool,
}

impl ControllerMemoryBuffer {
    /// Enables a controller's memory buffer, so that peers can address it through its BAR, and
    /// tells where it is. The function must decode memory. It need not be enabled as a controller;
    /// [`Nvme`](crate::Nvme) enables it without touching the buffer.
    ///
    /// `base` is where the controller itself is to take addresses for its buffer's instead of for
    /// the bus's: a multiple of 4 KiB, such that nothing else that the controller is pointed at
    /// lies in the buffer's size from there. The bus address of the buffer's start is the usual
    /// choice. Controllers from before 1.4 do not know it and show their buffers always.
    ///
    /// # Errors
    /// [`NvmeError::NoBuffer`], and those of accessing the function.
    pub fn enable(function: &Arc<dyn HostFunction>, base: Iova) -> Result<Self, NvmeError> {
        let registers = Registers::new(Arc::clone(function));
        let refused = |why| NvmeError::NoBuffer {
            function: registers.name(),
            why,
        };
        let address = base.raw();
        if !base.is_aligned(PAGE) {
            return Err(refused(BufferProblem::Unaligned { address }));
        }
        let hidden = registers.probe()?.has_hidden_buffer();
        if hidden {
            registers.write64(CMBMSC, REGISTERS)?;
        }
        let found = read(&registers)?;
        if hidden {
            registers.write64(CMBMSC, address | MEMORY_SPACE | REGISTERS)?;
            if registers.read32(CMBSTS)? & BASE_INVALID != 0 {
                registers.write64(CMBMSC, 0)?;
                return Err(refused(BufferProblem::Base { address }));
            }
        }
        Ok(found)
    }
}

/// What CMBLOC and CMBSZ say, if it is true.
fn read(registers: &Registers) -> Result<ControllerMemoryBuffer, NvmeError> {
    let location = registers.read32(CMBLOC)?;
    let what = registers.read32(CMBSZ)?;
    let refused = |why| NvmeError::NoBuffer {
        function: registers.name(),
        why,
    };
    if location == u32::MAX && what == u32::MAX {
        return Err(registers.gone());
    }
    // Bits 11:8: 4 KiB, times 16 for each; more than 6 is reserved. At most 2^56.
    let unit = PAGE << (4 * ((what >> 8) & 0xf).min(8));
    let size = u64::from(what >> 12).saturating_mul(unit);
    let offset = u64::from(location >> 12).saturating_mul(unit);
    if size == 0 {
        return Err(refused(BufferProblem::None));
    }
    let number = location.to_le_bytes()[0] & 0x7;
    let outside = BufferProblem::OutsideBar {
        bar: number,
        offset,
        size,
    };
    let bar = BarIndex::new(number).ok_or_else(|| refused(outside))?;
    let has = registers.bar(bar)?;
    let fits = offset
        .checked_add(size)
        .is_some_and(|end| has.is_some_and(|has| end <= has));
    if !fits {
        return Err(refused(outside));
    }
    Ok(ControllerMemoryBuffer {
        bar,
        offset,
        size,
        holds_read_data: what & (1 << 3) != 0,
        holds_write_data: what & (1 << 4) != 0,
    })
}
