//! The terminal of whoever started the machine, lent to the guest's serial console.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use machine::Controls;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// What comes before a command to this program: Ctrl-A.
const ESCAPE: u8 = 0x01;
/// The commands: quit, and what the terminal sends for Ctrl-A itself.
const QUIT: [u8; 2] = [b'x', b'X'];
const LITERAL: u8 = b'a';

/// How the terminal was set before it was taken over.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// A terminal that hands every key over at once. Dropping it makes it what it was.
pub struct RawTerminal(());

impl RawTerminal {
    /// Takes standard input over, if it is a terminal.
    pub fn take() -> Result<Option<Self>> {
        let input = io::stdin();
        if !input.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&input).context("asking how the terminal is set")?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let taken = Self(());
        tcsetattr(&input, OptionalActions::Now, &raw).context("setting the terminal")?;
        Ok(Some(taken))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        give_back();
    }
}

/// Makes the terminal what it was, if it has been taken over.
pub fn give_back() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // There is nobody left to tell.
        let _unchanged = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Types what comes from standard input on the guest's console, until the process ends. From a
/// terminal, Ctrl-A X ends the machine and Ctrl-A A types Ctrl-A.
pub fn type_for(controls: Controls, is_terminal: bool) -> Result<()> {
    let input = io::stdin().as_fd().try_clone_to_owned();
    let mut input = std::fs::File::from(input.context("opening standard input again")?);
    let mut keys = Keys::new(is_terminal);
    thread::Builder::new()
        .name("keyboard".to_owned())
        .spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(length @ 1..) = input.read(&mut buffer) {
                let Some(typed) = buffer.get(..length) else {
                    return;
                };
                let (typed, quit) = keys.sort(typed);
                if quit {
                    controls.end();
                }
                controls.type_in(&typed);
            }
        })
        .context("starting a thread for the keyboard")?;
    Ok(())
}

/// Tells the guest's keys from ours.
struct Keys {
    commands: bool,
    escaped: bool,
}

impl Keys {
    const fn new(commands: bool) -> Self {
        Self {
            commands,
            escaped: false,
        }
    }

    /// What of it is typed for the guest, and whether to quit.
    fn sort(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        if !self.commands {
            return (typed.to_vec(), false);
        }
        let mut quit = false;
        let mut for_guest = Vec::new();
        for key in typed {
            match (std::mem::take(&mut self.escaped), *key) {
                (false, ESCAPE) => self.escaped = true,
                (true, key) if QUIT.contains(&key) => quit = true,
                (true, LITERAL | ESCAPE) => for_guest.push(ESCAPE),
                (true, key) => for_guest.extend([ESCAPE, key]),
                (false, key) => for_guest.push(key),
            }
        }
        (for_guest, quit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_c_is_the_guests_and_control_a_x_is_ours() {
        let mut keys = Keys::new(true);
        assert_eq!(keys.sort(b"ls\n\x03"), (b"ls\n\x03".to_vec(), false));
        assert_eq!(keys.sort(b"\x01"), (vec![], false));
        assert_eq!(keys.sort(b"x"), (vec![], true));
        assert_eq!(
            keys.sort(b"\x01a\x01\x01\x01b"),
            (b"\x01\x01\x01b".to_vec(), false)
        );
        let mut pipe = Keys::new(false);
        assert_eq!(pipe.sort(b"\x01x"), (b"\x01x".to_vec(), false));
    }
}
