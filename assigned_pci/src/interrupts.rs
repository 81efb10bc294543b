//! A function's interrupts: the MSI and MSI-X registers as the guest wrote them, and the vectors
//! that follow from them.
//!
//! INTx is not offered: the interrupt pin reads as none, and *interrupt disable* stays set in the
//! physical command register, whatever the guest writes there.
//!
//! Whichever of MSI and MSI-X is enabled has the host's vectors; a guest that enables both, which
//! the specification forbids, gets MSI-X.

use std::sync::Arc;

use crate::config_space::ConfigReader;
use crate::filter::{Overlay, extent};
use crate::msi::Msi;
use crate::msix_table::MsixTable;
use crate::vectors::{Sides, Vectors};
use crate::{
    Capability, CapabilityList, FunctionError, HostFunction, HostVectors, MsiController, MsiKind,
    MsiMessage, Msix, MsixStructure, Outcome,
};

/// The most bytes of an MSI capability, with 64-bit addresses and masks.
const MSI_LENGTH: u16 = 24;
/// The bytes of an MSI-X capability.
const MSIX_LENGTH: u16 = 12;

/// The interrupts of a function that has a controller.
#[derive(Debug)]
pub(crate) struct Interrupts {
    controller: Arc<dyn MsiController>,
    msi: Option<(Msi, HostVectors)>,
    msix: Option<(MsixTable, HostVectors)>,
    /// The guest's *interrupt disable*.
    pub(crate) intx_disabled: bool,
    active: Option<Vectors>,
}

impl Interrupts {
    /// Those of a function with these capabilities. A kind of which the host lends nothing is left
    /// out.
    pub(crate) fn read(
        config: &ConfigReader<'_>,
        capabilities: &[Capability],
        msix: Option<Msix>,
        controller: Arc<dyn MsiController>,
    ) -> Result<Self, FunctionError> {
        let lent = |kind| {
            let vectors = config.host.vectors(kind);
            vectors.map_err(|errno| FunctionError::Vectors {
                function: config.function.to_owned(),
                kind,
                errno: errno.into(),
            })
        };
        let mut found = Self {
            controller,
            msi: None,
            msix: None,
            intx_disabled: false,
            active: None,
        };
        let first = |id| {
            capabilities.iter().find(|capability| {
                capability.list == CapabilityList::Standard && capability.id == id
            })
        };
        if let Some(capability) = first(Capability::MSI) {
            let vectors = lent(MsiKind::Msi)?;
            if vectors.count > 0 {
                let bytes = extent(capabilities, capability, MSI_LENGTH);
                let msi = Msi::read(config, bytes, vectors.count)?;
                found.msi = Some((msi, vectors));
            }
        }
        if let (Some(place), Some(capability)) = (msix, first(Capability::MSIX)) {
            let vectors = lent(MsiKind::MsiX)?;
            if vectors.count > 0 {
                let bytes = extent(capabilities, capability, MSIX_LENGTH);
                found.msix = Some((MsixTable::new(place, bytes.end), vectors));
            }
        }
        Ok(found)
    }

    /// Whether the registers of a capability are these.
    pub(crate) fn emulates(&self, capability: &Capability) -> bool {
        let at = capability.offset;
        let msi = self.msi.as_ref().is_some_and(|(msi, _)| msi.is_header(at));
        let msix = self.msix.as_ref();
        msi || msix.is_some_and(|(msix, _)| msix.is_header(at))
    }

    /// What the four bytes of config space at `at`, a multiple of four, hold, if they are MSI's or
    /// MSI-X's.
    pub(crate) fn overlay(&self, at: u16) -> Option<Overlay> {
        let pending = |vector| self.is_pending(MsiKind::Msi, vector);
        let msi = self.msi.iter().find_map(|(msi, _)| {
            let value = msi.read_register(at, pending)?;
            Some((msi.is_header(at), value))
        });
        let (header, value) = msi.or_else(|| {
            let (msix, _) = self.msix.as_ref()?;
            Some((msix.is_header(at), msix.read_register(at)?))
        })?;
        // The header is the list's.
        let mask = if header { 0xffff_0000 } else { u32::MAX };
        Some(Overlay::default().under(mask, value))
    }

    /// The guest writes the bits of `mask` in the four bytes of config space at `at`. Tells whether
    /// they are MSI's or MSI-X's.
    pub(crate) fn write_config(
        &mut self,
        host: &dyn HostFunction,
        at: u16,
        (mask, value): (u32, u32),
        outcome: &mut Outcome,
    ) -> bool {
        let mut written = match &mut self.msi {
            Some((msi, _)) => msi.write_register(at, mask, value),
            None => false,
        };
        if let (false, Some((msix, _))) = (written, &mut self.msix) {
            written = msix.write_register(at, mask, value);
        }
        if written {
            self.follow(host, outcome);
        }
        written
    }

    /// The guest reads one of MSI-X's structures.
    pub(crate) fn read_structure(&self, (structure, at): (MsixStructure, u64), data: &mut [u8]) {
        match (structure, &self.msix) {
            (MsixStructure::Table, Some((msix, _))) => msix.read_table(at, data),
            (MsixStructure::PendingBits, _) => {
                let pending = |vector| self.is_pending(MsiKind::MsiX, vector);
                MsixTable::read_pending(at, data, pending);
            }
            (MsixStructure::Table, None) => {}
        }
    }

    /// The guest writes one of MSI-X's structures.
    pub(crate) fn write_structure(
        &mut self,
        host: &dyn HostFunction,
        (structure, at): (MsixStructure, u64),
        data: &[u8],
        outcome: &mut Outcome,
    ) {
        let (MsixStructure::Table, Some((msix, _))) = (structure, &mut self.msix) else {
            return;
        };
        let Some(vector) = msix.write_table(at, data) else {
            return;
        };
        let message = msix.message(vector);
        if let Some(active) = &mut self.active
            && active.kind() == MsiKind::MsiX
        {
            let sides = Sides {
                host,
                controller: &*self.controller,
            };
            active.apply(sides, vector, message, outcome);
        }
    }

    /// Ends all vectors. The registers are as after a reset.
    pub(crate) fn reset(&mut self, host: &dyn HostFunction, outcome: &mut Outcome) {
        self.disconnect(host, outcome);
        self.intx_disabled = false;
        if let Some((msi, _)) = &mut self.msi {
            msi.reset();
        }
        if let Some((msix, _)) = &mut self.msix {
            msix.reset();
        }
    }

    /// The kind whose vectors the guest has enabled, and how many it may use.
    pub(crate) fn enabled(&self) -> Option<(MsiKind, u16)> {
        let msix = self.msix.as_ref().filter(|(msix, _)| msix.is_enabled());
        let msi = self.msi.as_ref().filter(|(msi, _)| msi.is_enabled());
        msix.map(|(msix, _)| (MsiKind::MsiX, msix.vectors()))
            .or_else(|| msi.map(|(msi, _)| (MsiKind::Msi, msi.vectors())))
    }

    fn disconnect(&mut self, host: &dyn HostFunction, outcome: &mut Outcome) {
        if let Some(mut active) = self.active.take() {
            active.disconnect(host, outcome);
        }
    }

    /// Makes the vectors what the registers say.
    fn follow(&mut self, host: &dyn HostFunction, outcome: &mut Outcome) {
        let wanted = self.enabled();
        if self.active.as_ref().map(Vectors::extent) != wanted {
            self.disconnect(host, outcome);
            self.active = wanted.map(|(kind, count)| Vectors::new(kind, count, self.lent(kind)));
        }
        let Some((kind, count)) = wanted else {
            return;
        };
        for vector in 0..count {
            let message = self.message(kind, vector);
            if let Some(active) = &mut self.active {
                let sides = Sides {
                    host,
                    controller: &*self.controller,
                };
                active.apply(sides, vector, message, outcome);
            }
        }
    }

    fn lent(&self, kind: MsiKind) -> HostVectors {
        let lent = match kind {
            MsiKind::Msi => self.msi.as_ref().map(|(_, lent)| *lent),
            MsiKind::MsiX => self.msix.as_ref().map(|(_, lent)| *lent),
        };
        lent.unwrap_or_default()
    }

    fn message(&self, kind: MsiKind, vector: u16) -> Option<MsiMessage> {
        match kind {
            MsiKind::Msi => self.msi.as_ref()?.0.message(vector),
            MsiKind::MsiX => self.msix.as_ref()?.0.message(vector),
        }
    }

    fn is_pending(&self, kind: MsiKind, vector: u16) -> bool {
        let active = self.active.as_ref().filter(|active| active.kind() == kind);
        active.is_some_and(|active| active.is_pending(vector))
    }
}
