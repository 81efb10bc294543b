//! The negative control of what the kernel may revoke: a peer that stops decoding, sleeps or is
//! reset is not reached while it does, and is reached again afterwards.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use assigned_pci::HostError;
use memory_map::Gpa;

use super::assembly::Assembly;
use super::control::send;
use super::exercise::{self, LEN, offset_in, two};
use super::report::{Control, Observed, Pair};
use super::witness::Source;
use crate::guest_driver::GuestDriver;
use crate::pattern::{pattern, read_bar};

/// What happens to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    DecodingOff,
    Sleep,
    Reset,
    ResetUndecoded,
    HotReset,
}

impl Event {
    const ALL: [Self; 5] = [
        Self::DecodingOff,
        Self::Sleep,
        Self::Reset,
        Self::ResetUndecoded,
        Self::HotReset,
    ];

    /// What the control is named.
    const fn what(self) -> &'static str {
        match self {
            Self::DecodingOff => "a BAR whose decoding is off",
            Self::Sleep => "a BAR that sleeps in D3hot",
            Self::Reset => "a BAR after a function-level reset",
            Self::ResetUndecoded => "a BAR after a function-level reset with its decoding off",
            Self::HotReset => "a BAR after a hot reset of its bus",
        }
    }

    /// The members to which it happens, if it can.
    fn concerns(self, assembly: &mut Assembly, pair: &Pair) -> Result<Option<Vec<usize>>> {
        let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
        let driver = GuestDriver(&peer.function);
        let can = match self {
            Self::DecodingOff => true,
            Self::Sleep => driver.can_sleep(),
            Self::Reset | Self::ResetUndecoded => driver.can_reset(),
            Self::HotReset => {
                let bus = assembly.bus_of(pair.to_member);
                // An engine that is reset itself would prove nothing.
                let bus = bus.filter(|bus| !bus.members.contains(&pair.from_member));
                return Ok(bus.map(|bus| bus.members.clone()));
            }
        };
        Ok(can.then(|| vec![pair.to_member]))
    }

    /// Has it happen. How the host says that it failed, if it does; it counts all the same.
    fn begin(self, assembly: &mut Assembly, pair: &Pair) -> Result<Option<HostError>> {
        let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
        let driver = GuestDriver(&peer.function);
        match self {
            Self::DecodingOff => driver.set_decoding(false),
            Self::Sleep => driver.set_asleep(true),
            Self::Reset => driver.reset(),
            Self::ResetUndecoded => {
                driver.set_decoding(false);
                driver.reset();
            }
            Self::HotReset => {
                let bus = assembly.bus_of(pair.to_member).cloned();
                return assembly.hot_reset(&bus.context("a bus is gone")?);
            }
        }
        Ok(None)
    }

    /// Lets the function decode again, wherever it then is.
    fn end(self, driver: GuestDriver<'_>) {
        match self {
            Self::DecodingOff => driver.set_decoding(true),
            Self::Sleep => driver.set_asleep(false),
            Self::Reset | Self::ResetUndecoded | Self::HotReset => {}
        }
    }

    /// Whether it may change what is behind a BAR.
    const fn resets(self) -> bool {
        matches!(self, Self::Reset | Self::ResetUndecoded | Self::HotReset)
    }
}

/// Everything that can happen to the peer of a pair that was exercised.
pub fn all(assembly: &mut Assembly, pair: &Pair, witness: &mut Source<'_>) -> Result<Vec<Control>> {
    let mut controls = Vec::new();
    for event in Event::ALL {
        if let Some(concerned) = event.concerns(assembly, pair)? {
            controls.push(one(assembly, pair, event, &concerned, witness)?);
        }
    }
    Ok(controls)
}

/// Writes to where the BAR was before the event, then brings those that it concerns back as a
/// guest's driver does, and moves data as before.
fn one(
    assembly: &mut Assembly,
    pair: &Pair,
    event: Event,
    concerned: &[usize],
    witness: &mut Source<'_>,
) -> Result<Control> {
    let mut saved = Vec::new();
    for member in concerned {
        let member = assembly.members.get_mut(*member);
        let member = member.context("a function is gone")?;
        // It may be an engine itself.
        member.rest()?;
        let function = Arc::clone(&member.function);
        saved.push((GuestDriver(&function).save(), function));
    }
    let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
    let bar = peer.bar(pair.index).context("a BAR is gone")?;
    let offset = offset_in(&bar);
    let at = Gpa::new(bar.range()?.start().raw().saturating_add(offset));
    let before = read_bar(&peer.function, pair.index, offset, LEN);
    let mut saved = Vec::new();
    for member in concerned {
        let member = assembly
            .members
            .get(*member)
            .context("a function is gone")?;
        let function = Arc::clone(&member.function);
        saved.push((GuestDriver(&function).save(), function));
    }
    let failed = event.begin(assembly, pair)?;
    // What came of it is in the map: the BAR must be gone before anything is tried.
    ensure!(
        assembly.map.lookup(at).is_none(),
        "{} {} is still there: {} cannot be tried",
        pair.to,
        pair.index,
        event.what()
    );
    let mut evidence = witness()?;
    let sent = pattern(0x1002, LEN);
    send(assembly, pair.from_member, at, &sent)?;
    let witness = evidence.describe(&pair.from, at);

    for (saved, function) in saved {
        let driver = GuestDriver(&function);
        event.end(driver);
        driver.restore(&saved);
    }
    let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
    let after = read_bar(&peer.function, pair.index, offset, LEN);
    // A reset may change what is behind a BAR, but not to what was sent.
    let untouched = after == before || (event.resets() && after != sent);
    Ok(Control {
        from: pair.from.clone(),
        iova: at.raw(),
        what: event.what(),
        failed: failed.map(|error| format!("{error}: {}", error.errno)),
        observed: if untouched {
            Observed::Blocked
        } else {
            Observed::Arrived
        },
        afterwards: Some(exercise::again(assembly, pair)?),
        witness,
    })
}
