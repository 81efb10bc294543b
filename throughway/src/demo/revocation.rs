//! The steps in which the kernel revokes: decoding off, sleep, reset.

use anyhow::Result;
use memory_map::Gpa;

use super::machine::Machine;
use super::script::{Script, Seen, held_of};
use crate::guest_driver::{GuestDriver, Saved};

impl Script {
    /// The guest turns the peer's memory decoding on or off.
    pub fn decoding(&mut self, on: bool) -> Result<()> {
        let spaces = self.spaces;
        let (name, did, expected, wanted) = if on {
            (
                "decoding comes back",
                "sets memory decoding in the peer's command register",
                format!("BAR2 is mapped in both {spaces} again"),
                2,
            )
        } else {
            (
                "decoding goes off",
                "clears memory decoding in the peer's command register",
                format!("BAR2 is unmapped from both {spaces} before the device stops decoding"),
                0,
            )
        };
        self.step(name, did, expected, |machine| {
            GuestDriver(&machine.peer).set_decoding(on);
            Ok(((), in_order(machine, spaces, wanted)?))
        })
    }

    /// The guest wakes the peer, or has it sleep.
    pub fn power(&mut self, awake: bool) -> Result<()> {
        let spaces = self.spaces;
        let (name, did, expected, wanted) = if awake {
            (
                "the peer wakes",
                "writes D0 to the peer's power management register",
                format!("BAR2 is mapped in both {spaces} again"),
                2,
            )
        } else {
            (
                "the peer goes to sleep",
                "writes D3hot to the peer's power management register",
                format!("BAR2 is unmapped from both {spaces} before the device sleeps"),
                0,
            )
        };
        self.step(name, did, expected, |machine| {
            GuestDriver(&machine.peer).set_asleep(!awake);
            Ok(((), in_order(machine, spaces, wanted)?))
        })
    }

    /// The guest resets the peer, without having turned decoding off.
    pub fn reset(&mut self) -> Result<Saved> {
        let spaces = self.spaces;
        self.step(
            "the peer is reset",
            "initiates a function-level reset in the peer's config space, with decoding on",
            format!("BAR2 is unmapped from both {spaces} before the reset; its register is 0 then"),
            |machine| {
                let driver = GuestDriver(&machine.peer);
                let saved = driver.save();
                driver.reset();
                let mut seen = in_order(machine, spaces, 0)?;
                let at = machine.peer_address()?;
                seen.ok &= at == Gpa::new(0);
                seen.observed = format!("{}; the register is {at}", seen.observed);
                Ok((saved, seen))
            },
        )
    }

    /// The guest's driver puts back what the reset has cost.
    pub fn put_back(&mut self, saved: &Saved) -> Result<()> {
        let spaces = self.spaces;
        self.step(
            "the peer is put back",
            "writes BAR2 and the command register as they were",
            format!("BAR2 is mapped in both {spaces} again"),
            |machine| {
                GuestDriver(&machine.peer).restore(saved);
                Ok(((), in_order(machine, spaces, 2)?))
            },
        )
    }
}

/// Whether BAR2 is really mapped in so many address spaces, and nothing forbidden has happened.
fn in_order(machine: &Machine, spaces: &str, wanted: usize) -> Result<Seen> {
    let held = held_of(machine, machine.peer_region()?);
    let violations = machine.host.violations();
    let observed = match violations.first() {
        Some(violation) => violation.to_string(),
        None => format!("mapped in {held} {spaces}, in the right order"),
    };
    Ok(Seen {
        observed,
        ok: held == wanted && violations.is_empty(),
    })
}
