//! Signals to this process: the machine's power button, and a question.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use machine::Controls;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::outlet::Outlet;
use super::snapshot::Roster;
use super::terminal;

/// How long a guest has to turn itself off.
const GRACE: Duration = Duration::from_secs(30);
/// With which status this process ends at the third signal, if the machine has not ended by then.
const GIVEN_UP: u8 = 1;
const STEP: Duration = Duration::from_millis(100);

/// Presses the power button at the first signal that asks this process to end, and ends the
/// machine at the second, or after 30 s.
pub fn press_for(controls: Controls) -> Result<()> {
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP]).context("preparing for signals failed")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.forever().next().is_none() {
                return;
            }
            controls.press_power_button();
            let pressed = Instant::now();
            while pressed.elapsed() < GRACE && signals.pending().next().is_none() {
                thread::sleep(STEP);
            }
            controls.end();
            // Whoever insists is not kept waiting. The kernel resets what is given back to it.
            if signals.forever().next().is_some() {
                terminal::give_back();
                std::process::exit(i32::from(GIVEN_UP));
            }
        })
        .context("starting a thread for signals")?;
    Ok(())
}

/// The signal by which somebody asks what the map and the reach are. From now on it ends nobody.
pub fn questions() -> Result<Signals> {
    Signals::new([SIGUSR1]).context("preparing for signals failed")
}

/// Tells it each time somebody asks.
pub fn tell_for(
    mut questions: Signals,
    roster: Roster,
    mut said: Outlet,
    json: bool,
) -> Result<()> {
    thread::Builder::new()
        .name("map".to_owned())
        .spawn(move || {
            for _ in questions.forever() {
                // It can be written as JSON, and an outlet takes everything.
                if let Ok(lines) = roster.look().lines(json) {
                    let _said = said.write_all(lines.as_bytes());
                }
            }
        })
        .context("starting a thread for signals")?;
    Ok(())
}
