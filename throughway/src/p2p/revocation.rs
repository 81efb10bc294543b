//! The negative control of what the kernel may revoke: a peer that stops decoding, sleeps or is
//! reset is not reached while it does, and is reached again afterwards.

use anyhow::{Context, Result, ensure};
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
}

impl Event {
    const ALL: [Self; 3] = [Self::DecodingOff, Self::Sleep, Self::Reset];

    /// What the control is named.
    const fn what(self) -> &'static str {
        match self {
            Self::DecodingOff => "a BAR whose decoding is off",
            Self::Sleep => "a BAR that sleeps in D3hot",
            Self::Reset => "a BAR after a function-level reset",
        }
    }

    fn can_happen_to(self, driver: GuestDriver<'_>) -> bool {
        match self {
            Self::DecodingOff => true,
            Self::Sleep => driver.can_sleep(),
            Self::Reset => driver.can_reset(),
        }
    }

    fn begin(self, driver: GuestDriver<'_>) {
        match self {
            Self::DecodingOff => driver.set_decoding(false),
            Self::Sleep => driver.set_asleep(true),
            Self::Reset => driver.reset(),
        }
    }

    /// Lets the function decode again, wherever it then is.
    fn end(self, driver: GuestDriver<'_>) {
        match self {
            Self::DecodingOff => driver.set_decoding(true),
            Self::Sleep => driver.set_asleep(false),
            Self::Reset => {}
        }
    }
}

/// Everything that can happen to the peer of a pair that was exercised.
pub fn all(assembly: &mut Assembly, pair: &Pair, witness: &mut Source<'_>) -> Result<Vec<Control>> {
    let mut controls = Vec::new();
    for event in Event::ALL {
        let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
        if event.can_happen_to(GuestDriver(&peer.function)) {
            controls.push(one(assembly, pair, event, witness)?);
        }
    }
    Ok(controls)
}

/// Writes to where the BAR was before the event, then brings the peer back as a guest's driver
/// does, and moves data as before.
fn one(
    assembly: &mut Assembly,
    pair: &Pair,
    event: Event,
    witness: &mut Source<'_>,
) -> Result<Control> {
    let peer = assembly.members.get_mut(pair.to_member);
    let peer = peer.context("a function is gone")?;
    // It may be an engine itself.
    peer.rest()?;
    let bar = peer.bar(pair.index).context("a BAR is gone")?;
    let offset = offset_in(&bar);
    let at = Gpa::new(bar.range()?.start().raw().saturating_add(offset));
    let before = read_bar(&peer.function, pair.index, offset, LEN);
    let saved = GuestDriver(&peer.function).save();
    event.begin(GuestDriver(&peer.function));
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

    let (_, peer, _) = two(assembly, pair.from_member, pair.to_member)?;
    let driver = GuestDriver(&peer.function);
    event.end(driver);
    driver.restore(&saved);
    let after = read_bar(&peer.function, pair.index, offset, LEN);
    // A reset may change what is behind a BAR, but not to what was sent.
    let untouched = after == before || (event == Event::Reset && after != sent);
    Ok(Control {
        from: pair.from.clone(),
        iova: at.raw(),
        what: event.what(),
        observed: if untouched {
            Observed::Blocked
        } else {
            Observed::Arrived
        },
        afterwards: Some(exercise::again(assembly, pair)?),
        witness,
    })
}
