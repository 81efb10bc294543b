//! The host's end of the channel: a thread for each direction, so that every wait has a time limit.

use std::io::{self, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{self, Receiver, Sender};

use crate::channel::{self, ChannelError, Message};

/// Writes frames to the guest from a thread of its own: a guest that does not read must not stop
/// the clock that ends it.
pub(crate) fn writer(mut stdin: ChildStdin) -> Sender<Vec<u8>> {
    let (sender, frames) = mpsc::channel::<Vec<u8>>();
    std::thread::spawn(move || {
        for frame in frames {
            if stdin
                .write_all(&frame)
                .and_then(|()| stdin.flush())
                .is_err()
            {
                break;
            }
        }
    });
    sender
}

/// Reads messages from the guest in a thread of its own, until the line ends or breaks.
pub(crate) fn reader(stdout: ChildStdout) -> Receiver<Result<Message, ChannelError>> {
    let (sender, messages) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = io::BufReader::new(stdout);
        match channel::await_greeting(&mut line) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                let _ = sender.send(Err(error));
                return;
            }
        }
        loop {
            let message = match Message::read_from(&mut line) {
                Ok(Some(message)) => Ok(message),
                // A machine that dies may do so in the middle of a message.
                Ok(None) | Err(ChannelError::Truncated) => return,
                Err(error) => Err(error),
            };
            let broken = message.is_err();
            if sender.send(message).is_err() || broken {
                return;
            }
        }
    });
    messages
}
