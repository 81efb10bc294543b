//! Power states (PCI Bus Power Management Interface 1.2).
//!
//! A function that is not in D0 answers no memory access, so its BARs leave the map before the
//! physical register is written, and come back, in one commit, when it is awake again. The kernel
//! revokes what was exported of them on the way into D3hot.
//!
//! The physical register has the last word: it is read back after each write, for the kernel may
//! have refused a state without a word (a function whose virtual functions are in use does not
//! sleep), and a device may not have D1 or D2.
//!
//! A function without *No_Soft_Reset* comes back from D3hot as from a reset (5.4.1 there). vfio-pci
//! restores the registers that it had before; the guest is shown what the specification says,
//! BARs at 0 and the command register cleared, and the physical command register is made to say
//! the same.

use memory_map::DisabledBecause;

use crate::controls::PowerControl;
use crate::function::State;
use crate::{AssignedFunction, HostCall, HostError, Outcome};

/// The power states that a register can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PowerState {
    /// Awake.
    D0,
    /// Asleep, lightly.
    D1,
    /// Asleep.
    D2,
    /// Asleep, with power on.
    D3Hot,
}

impl PowerState {
    /// What the low byte of PMCSR says.
    pub(crate) const fn from_register(low: u8) -> Self {
        match low & 0b11 {
            0 => Self::D0,
            1 => Self::D1,
            2 => Self::D2,
            _ => Self::D3Hot,
        }
    }

    /// Whether the function answers and starts anything at all.
    #[must_use]
    pub const fn is_awake(self) -> bool {
        matches!(self, Self::D0)
    }
}

impl AssignedFunction {
    /// The guest writes the byte of PMCSR that holds the state.
    pub(crate) fn write_power(
        &self,
        state: &mut State,
        (control, wanted): (PowerControl, PowerState),
        (offset, data): (u16, &[u8]),
        outcome: &mut Outcome,
    ) {
        if wanted.is_awake() && state.power.is_awake() {
            // Of the other bits nothing follows.
            self.write_host(offset, data, outcome);
            return;
        }
        let before = state.power;
        let down = self.take_down(state, DisabledBecause::Sleeping, outcome);
        self.write_host(offset, data, outcome);
        let now = self.read_power(outcome);
        if before == PowerState::D3Hot && now.is_awake() && !control.no_soft_reset {
            state.power_on();
            self.fall_silent(state, outcome);
        }
        state.power = now;
        self.bring_back(state, down, outcome);
    }

    /// What the physical register says. Where the host does not tell, the function counts as
    /// asleep, and the next write to the register looks again.
    pub(crate) fn read_power(&self, outcome: &mut Outcome) -> PowerState {
        let Some(PowerControl { at, .. }) = self.controls.power else {
            return PowerState::D0;
        };
        let mut low = [0];
        match self.host.config_read(at, &mut low) {
            Ok(()) => {
                let [low] = low;
                PowerState::from_register(low)
            }
            Err(error) => {
                let error = HostError::new(HostCall::ConfigRead(at), &error);
                outcome.host_errors.push(error);
                PowerState::D3Hot
            }
        }
    }
}
