//! Where in config space a write may cost a function its mappings: the registers behind which the
//! kernel revokes.
//!
//! Found once, when a function is made. They lie in capabilities, so nothing is at a fixed place:
//!
//! - the power state, in the power management capability's PMCSR (PCI Bus Power Management
//!   Interface 1.2, 3.2.4);
//! - *initiate function-level reset*, in the PCI Express capability's device control (PCI Express
//!   Base 6.0, 7.5.3.4), if its device capabilities have the reset;
//! - *initiate FLR*, in the advanced features capability (PCI 3.0 ECN "Advanced Capabilities"), if
//!   its capabilities have both the reset and the transactions pending bit, as the kernel wants.

use crate::config_space::ConfigReader;
use crate::power::PowerState;
use crate::{Capability, CapabilityList, FunctionError};

/// From the power management capability to PMCSR, 16 bits.
const PMCSR: u16 = 4;
/// PMCSR: D3hot to D0 is no reset.
const NO_SOFT_RESET: u16 = 1 << 3;
/// From the PCI Express capability to device capabilities, 32 bits.
const DEVICE_CAPABILITIES: u16 = 4;
/// Device capabilities: there is a function-level reset.
const EXPRESS_HAS_FLR: u32 = 1 << 28;
/// From the PCI Express capability to device control, 16 bits.
const DEVICE_CONTROL: u16 = 8;
/// The upper byte of device control: initiate a function-level reset.
const EXPRESS_FLR: u8 = 1 << 7;
/// From the advanced features capability to its capabilities, 8 bits.
const AF_CAPABILITIES: u16 = 3;
/// Advanced features: transactions pending and function-level reset, both.
const AF_HAS_FLR: u8 = 0b11;
/// From the advanced features capability to its control register, 8 bits.
const AF_CONTROL: u16 = 4;
/// The advanced features' control: initiate a function-level reset.
const AF_FLR: u8 = 1;

/// A function's PMCSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PowerControl {
    /// Where its first byte lies, which holds the state.
    pub(crate) at: u16,
    /// Whether the function keeps its registers on the way from D3hot to D0.
    pub(crate) no_soft_reset: bool,
}

/// The registers that a function has of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Controls {
    pub(crate) power: Option<PowerControl>,
    /// Device control, if a function-level reset can be initiated there.
    express: Option<u16>,
    /// The advanced features' control, likewise.
    advanced: Option<u16>,
}

/// What a write asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// This power state.
    Power(PowerControl, PowerState),
    /// A function-level reset.
    Reset,
}

impl Controls {
    /// Looks them up in a function whose standard capabilities have been walked: each ends within
    /// the first 256 bytes.
    pub(crate) fn read(
        config: &ConfigReader<'_>,
        capabilities: &[Capability],
    ) -> Result<Self, FunctionError> {
        let mut found = Self::default();
        let standard = capabilities
            .iter()
            .filter(|capability| capability.list == CapabilityList::Standard);
        for Capability { id, offset, .. } in standard {
            match *id {
                Capability::POWER_MANAGEMENT => {
                    let at = offset.saturating_add(PMCSR);
                    found.power = Some(PowerControl {
                        at,
                        no_soft_reset: config.u16(at)? & NO_SOFT_RESET != 0,
                    });
                }
                Capability::EXPRESS => {
                    let can = config.u32(offset.saturating_add(DEVICE_CAPABILITIES))?;
                    found.express =
                        (can & EXPRESS_HAS_FLR != 0).then(|| offset.saturating_add(DEVICE_CONTROL));
                }
                Capability::ADVANCED_FEATURES => {
                    let can = config.u8(offset.saturating_add(AF_CAPABILITIES))?;
                    found.advanced =
                        (can & AF_HAS_FLR == AF_HAS_FLR).then(|| offset.saturating_add(AF_CONTROL));
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// What the guest's write of `data` at `offset`, naturally aligned, asks for. None for a write
    /// that asks for nothing of the kind.
    pub(crate) fn request(&self, offset: u16, data: &[u8]) -> Option<Request> {
        // The byte that is written at `at`, if it is.
        let byte = |at: u16| {
            let within = at.checked_sub(offset)?;
            data.get(usize::from(within)).copied()
        };
        if let Some(power) = self.power
            && let Some(low) = byte(power.at)
        {
            return Some(Request::Power(power, PowerState::from_register(low)));
        }
        let initiates = |register: Option<u16>, within: u16, bit: u8| {
            register
                .and_then(|register| byte(register.checked_add(within)?))
                .is_some_and(|written| written & bit != 0)
        };
        let resets = initiates(self.express, 1, EXPRESS_FLR) || initiates(self.advanced, 0, AF_FLR);
        resets.then_some(Request::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROLS: Controls = Controls {
        power: Some(PowerControl {
            at: 0x44,
            no_soft_reset: true,
        }),
        express: Some(0x58),
        advanced: Some(0x94),
    };

    #[test]
    fn every_width_that_covers_the_bit_asks_for_it() {
        let power = |state| Some(Request::Power(CONTROLS.power.unwrap(), state));
        for (offset, data, asks) in [
            (0x44, &[3][..], power(PowerState::D3Hot)),
            (0x44, &[0, 1], power(PowerState::D0)),
            (0x44, &[0xfd, 0xff, 0, 0], power(PowerState::D1)),
            (0x45, &[3], None),
            (0x40, &[3, 3, 3, 3], None),
            (0x58, &[0xff], None),
            (0x58, &[0, 0x80], Some(Request::Reset)),
            (0x58, &[0, 0x80, 0, 0], Some(Request::Reset)),
            (0x58, &[0xff, 0x7f], None),
            (0x59, &[0x80], Some(Request::Reset)),
            (0x5a, &[0x80, 0x80], None),
            (0x94, &[1], Some(Request::Reset)),
            (0x94, &[0xfe, 0xff], None),
            (0x94, &[1, 0, 0, 0], Some(Request::Reset)),
        ] {
            assert_eq!(
                CONTROLS.request(offset, data),
                asks,
                "{offset:#x} {data:x?}"
            );
            assert_eq!(Controls::default().request(offset, data), None);
        }
    }
}
