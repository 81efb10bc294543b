//! Resets of one function: by the embedder, and by the guest through a capability.
//!
//! All go the same way, and a reset that fails goes it too, for it may have revoked all the same:
//!
//! 1. The BARs leave the map, in one commit; their reach says that the device is being reset.
//! 2. The physical command register is cleared: the function is quiet, and what the host restores
//!    after the reset is a function that neither decodes nor starts anything. Its interrupt vectors
//!    are disconnected.
//! 3. The host resets: `VFIO_DEVICE_RESET`, or the guest's write as it is. That sleeps 100 ms and
//!    more; no lock of the map is held. A function that still sleeps after `VFIO_DEVICE_RESET`,
//!    because that failed, is woken.
//! 4. The registers are as at power-on (PCI Express Base 6.0, 6.6.2): the command register is
//!    cleared, the BARs are at 0. vfio-pci hides a reset from its user, by restoring config space;
//!    a guest's driver expects one, and puts back what it wants. Where the host did restore the
//!    command register (from a function that was asleep), it is cleared once more.
//!    What other registers hold is what the host makes of them.
//! 5. The power state is read back, the BARs' revocation epochs advance, and what decodes (nothing,
//!    after a reset) comes back, all in one commit.

use memory_map::DisabledBecause;

use crate::command::Command;
use crate::config_space::COMMAND;
use crate::function::State;
use crate::power::PowerState;
use crate::{AssignedFunction, HostCall, HostError, Outcome};

impl State {
    /// The registers as after a reset.
    pub(crate) fn power_on(&mut self) {
        self.decoding = false;
        for assigned in &mut self.bars {
            assigned.bar.reset();
        }
    }
}

impl AssignedFunction {
    /// Resets the function (`VFIO_DEVICE_RESET`), and its emulated state to that at power-on: awake,
    /// nothing decoded, bus mastering off, all BARs at 0, no interrupts. See the [crate's
    /// documentation](crate) for the order. It is what a machine does to its functions when it is
    /// reset and when it ends; where there are several, [none masters the bus](Self::stop_mastering)
    /// any more before the first is [made quiet](Self::quiesce), and all are before one is reset.
    ///
    /// What was mapped from the BARs counts as revoked, whatever the host said. A function that
    /// cannot be reset is as at power-on for the guest and for the bus, and goes on otherwise as it
    /// was.
    pub fn reset(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut state = self.lock();
        if !state.removed {
            self.reset_by_host(&mut state, &mut outcome);
        }
        outcome
    }

    /// Turns bus mastering off, and nothing else: what the guest sees stays mapped, and it decodes. Of
    /// several functions all are asked to before one is [made quiet](Self::quiesce): the BARs of that
    /// one leave the map, and a peer that still writes into them would fault.
    ///
    /// One that does not say what its command register holds is left alone: to write it would be to
    /// guess whether it decodes.
    pub fn stop_mastering(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let state = self.lock();
        let mut command = [0; 2];
        if state.removed {
            return outcome;
        }
        match self.host.config_read(COMMAND, &mut command) {
            // It is gone, and does nothing any more.
            Ok(()) if command == [0xff; 2] => {}
            Ok(()) => {
                let command = Command::new(u16::from_le_bytes(command));
                if command.masters_bus() {
                    let off = command.without_bus_master().to_bytes();
                    self.write_host(COMMAND, &off, &mut outcome);
                }
            }
            Err(error) => {
                let error = HostError::new(HostCall::ConfigRead(COMMAND), &error);
                outcome.host_errors.push(error);
            }
        }
        outcome
    }

    /// Makes the function quiet, without a reset, which takes 100 ms and more: bus mastering and
    /// decoding off, interrupts disconnected, BARs at 0. What else it holds stays as it is. Where there
    /// are several functions, each [stops mastering](Self::stop_mastering) the bus first.
    pub fn quiesce(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut state = self.lock();
        if !state.removed {
            let down = self.take_down(&mut state, DisabledBecause::DecodingOff, &mut outcome);
            state.power_on();
            self.fall_silent(&mut state, &mut outcome);
            self.bring_back(&mut state, down, &mut outcome);
        }
        outcome
    }

    /// Has a function that sleeps come back to D0. A reset wakes it, but not every reset works.
    fn wake(&self, outcome: &mut Outcome) {
        if let Some(control) = self.controls.power
            && !self.read_power(outcome).is_awake()
        {
            self.write_host(control.at, &[0], outcome);
        }
    }

    /// The same for whoever has the lock.
    pub(crate) fn reset_by_host(&self, state: &mut State, outcome: &mut Outcome) {
        self.reset_with(state, outcome, |outcome| {
            if let Err(error) = self.host.reset() {
                let error = HostError::new(HostCall::Reset, &error);
                outcome.host_errors.push(error);
            }
            self.wake(outcome);
        });
    }

    /// The guest initiates a function-level reset, by this write.
    pub(crate) fn reset_by_write(
        &self,
        state: &mut State,
        (offset, data): (u16, &[u8]),
        outcome: &mut Outcome,
    ) {
        self.reset_with(state, outcome, |outcome| {
            self.write_host(offset, data, outcome);
        });
    }

    fn reset_with(
        &self,
        state: &mut State,
        outcome: &mut Outcome,
        reset: impl FnOnce(&mut Outcome),
    ) {
        let down = self.take_down(state, DisabledBecause::Resetting, outcome);
        self.fall_silent(state, outcome);
        reset(outcome);
        self.after_reset(state, outcome);
        self.bring_back(state, down, outcome);
    }

    /// Registers and power state as a reset leaves them.
    pub(crate) fn after_reset(&self, state: &mut State, outcome: &mut Outcome) {
        state.power_on();
        self.fall_silent(state, outcome);
        state.power = self.read_power(outcome);
    }

    /// Clears the physical command register, unless it reads as clear, and then disconnects all
    /// interrupt vectors.
    pub(crate) fn fall_silent(&self, state: &mut State, outcome: &mut Outcome) {
        let mut command = [0; 2];
        let off = state.command_off();
        let read = self.host.config_read(COMMAND, &mut command);
        if read.is_err() || !Command::new(u16::from_le_bytes(command)).is_as_off_as(off) {
            self.write_host(COMMAND, &off.to_bytes(), outcome);
        }
        self.end_interrupts(state, outcome);
    }

    /// To be called when the kernel may have revoked what was mapped from the BARs without having
    /// been asked to through this function: a sibling was reset that shares a bus or a slot with it
    /// and is not in its [`ResetSet`](crate::ResetSet), or the host recovered it from an error.
    ///
    /// Its mappings are taken down and made again, in one commit. The registers stay as they are,
    /// unless the physical ones say that the function sleeps or no longer decodes.
    pub fn mappings_may_be_revoked(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut state = self.lock();
        if !state.removed {
            self.look_again(&mut state, &mut outcome);
            self.sync(&mut state, true, &mut outcome);
        }
        outcome
    }

    /// Takes the BARs out of the map if nothing answers at them: the command register reads as not
    /// decoding, as all ones, or not at all. For the guest decoding is off then, and comes back as
    /// ever, when the guest turns it on. None if no BAR is shown, if they answer, or if that cannot be
    /// told, as of a virtual function.
    ///
    /// It is judged and done under the function's lock, so that nothing the guest writes comes between.
    #[must_use = "what it did to the map should not be lost"]
    pub fn hide_if_dead(&self) -> Option<Outcome> {
        let mut state = self.lock();
        let shows = state.bars.iter().any(|assigned| assigned.info().enabled);
        if state.removed || !shows || self.host.is_virtual() {
            return None;
        }
        let mut command = [0; 2];
        let mut outcome = Outcome::default();
        match self.host.config_read(COMMAND, &mut command) {
            Ok(()) if command == [0xff; 2] => {}
            Ok(()) if Command::new(u16::from_le_bytes(command)).decodes_memory() => return None,
            Ok(()) => {}
            Err(error) => {
                let error = HostError::new(HostCall::ConfigRead(COMMAND), &error);
                outcome.host_errors.push(error);
            }
        }
        state.decoding = false;
        self.sync(&mut state, true, &mut outcome);
        Some(outcome)
    }

    /// Takes over from the physical registers what the guest sees of them.
    pub(crate) fn look_again(&self, state: &mut State, outcome: &mut Outcome) {
        let decoded = state.decodes();
        let mut command = [0; 2];
        match self.host.config_read(COMMAND, &mut command) {
            // Its bit says nothing.
            Ok(()) if self.host.is_virtual() => {}
            Ok(()) => {
                let command = Command::new(u16::from_le_bytes(command));
                state.decoding &= command.decodes_memory();
            }
            Err(error) => {
                let error = HostError::new(HostCall::ConfigRead(COMMAND), &error);
                outcome.host_errors.push(error);
                state.decoding = false;
            }
        }
        state.power = self.read_power(outcome);
        state.decoding_changed(decoded);
    }

    /// The power state, as far as it is known.
    #[must_use]
    pub fn power_state(&self) -> PowerState {
        self.lock().power
    }
}
