//! The MSI-X capability (PCI Local Bus 3.0, 6.8.2): where in the BARs its table and pending bits
//! lie. Both are trapped by design: a peer that could write the table could raise any interrupt.

use std::ops::Range;

use memory_map::GRANULE;

use crate::bar::Bar;
use crate::config_space::ConfigReader;
use crate::{BarIndex, Capability, CapabilityList, FunctionError, MsixProblem, MsixStructure};

/// A function's MSI-X capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msix {
    /// Where in config space it lies, in bytes.
    pub offset: u16,
    /// How many vectors it has, 1 to 2048.
    pub vectors: u16,
    /// The table, 16 bytes for each vector.
    pub table: MsixArea,
    /// The pending-bit array, 8 bytes for each 64 vectors.
    pub pending_bits: MsixArea,
}

/// Where one of the two structures of MSI-X lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixArea {
    /// In which memory BAR.
    pub bar: BarIndex,
    /// Where in it, in bytes; a multiple of 8.
    pub offset: u64,
    /// Its size in bytes; it ends within the BAR.
    pub size: u64,
}

impl MsixArea {
    /// What the capability's register says of it: the BAR in bits 2:0, the offset in the rest.
    pub(crate) fn pointer(&self) -> u32 {
        // It has been read from such a register.
        u32::try_from(self.offset).unwrap_or(0) | u32::from(self.bar.get())
    }

    /// Where in it an offset of a BAR is.
    pub(crate) fn find(&self, bar: BarIndex, offset: u64) -> Option<u64> {
        let within = offset.checked_sub(self.offset)?;
        (bar == self.bar && within < self.size).then_some(within)
    }

    /// The granules that hold any of it, as offsets in its BAR. The last may end past the BAR.
    pub(crate) const fn trapped(&self) -> Range<u64> {
        // 32-bit offset, and size of at most 32 KiB.
        let end = self.offset.saturating_add(self.size);
        self.offset & !(GRANULE - 1)..end.next_multiple_of(GRANULE)
    }
}

impl Msix {
    /// Reads the capability, if there is one, against the BARs that there are.
    pub(crate) fn read(
        config: &ConfigReader<'_>,
        capabilities: &[Capability],
        bars: &[Bar],
    ) -> Result<Option<Self>, FunctionError> {
        let Some(capability) = capabilities.iter().find(|capability| {
            capability.list == CapabilityList::Standard && capability.id == Capability::MSIX
        }) else {
            return Ok(None);
        };
        let offset = capability.offset;
        let vectors = (config.u16(offset.saturating_add(2))? & 0x7ff).saturating_add(1);
        let area = |structure, register: u16, size| {
            let pointer = config.u32(offset.saturating_add(register))?;
            area(pointer, size, bars).map_err(|problem| FunctionError::Msix {
                function: config.function.to_owned(),
                structure,
                problem,
            })
        };
        let count = u64::from(vectors);
        Ok(Some(Self {
            offset,
            vectors,
            table: area(MsixStructure::Table, 4, count.saturating_mul(16))?,
            pending_bits: area(
                MsixStructure::PendingBits,
                8,
                count.div_ceil(64).saturating_mul(8),
            )?,
        }))
    }

    /// Which of the two structures lies at an offset of a BAR, and where in it that is. Where they
    /// overlap, the table is in front.
    pub(crate) fn structure_at(&self, bar: BarIndex, offset: u64) -> Option<(MsixStructure, u64)> {
        let table = self.table.find(bar, offset);
        let table = table.map(|at| (MsixStructure::Table, at));
        table.or_else(|| {
            let at = self.pending_bits.find(bar, offset)?;
            Some((MsixStructure::PendingBits, at))
        })
    }

    /// The granules of `bar` that stay trapped.
    pub(crate) fn trapped(&self, bar: BarIndex) -> impl Iterator<Item = Range<u64>> {
        [self.table, self.pending_bits]
            .into_iter()
            .filter(move |area| area.bar == bar)
            .map(|area| area.trapped())
    }
}

/// Follows a pointer of the capability: the BAR in bits 2:0, the offset in the rest.
fn area(pointer: u32, size: u64, bars: &[Bar]) -> Result<MsixArea, MsixProblem> {
    let [low, ..] = pointer.to_le_bytes();
    let indicator = low & 0b111;
    let bar = BarIndex::new(indicator).ok_or(MsixProblem::ReservedIndicator { indicator })?;
    let offset = u64::from(pointer & !0b111);
    let bar_size = bars
        .iter()
        .find(|there| there.index() == bar && there.kind().is_memory())
        .ok_or(MsixProblem::NoSuchBar { bar })?
        .size();
    if offset.saturating_add(size) > bar_size {
        return Err(MsixProblem::PastEnd {
            bar,
            offset,
            size,
            bar_size,
        });
    }
    Ok(MsixArea { bar, offset, size })
}
