//! The channel between host and nested machine: framed messages over a raw serial line.
//!
//! The host and `lab_init` share this module, so that both ends agree by construction. The guest
//! speaks first: [`GREETING`], before which anything on the line is noise (firmware, a line that
//! is not raw yet), then [`Message::Ready`]. After that the host sends [`Message::Run`], the guest
//! answers with any number of [`Message::Stdout`] and [`Message::Stderr`] and one
//! [`Message::Exit`]; [`Message::PowerOff`] ends it.
//!
//! ```text
//! frame    kind: u8 | length: u32 LE | payload: length bytes, at most MAX_PAYLOAD
//! list     count: u32 LE | count x (length: u32 LE | bytes)
//! ```

use std::io::{self, Read, Write};

/// What the guest sends once its end of the line is raw.
pub const GREETING: &[u8; 16] = b"\0throughway/lab\n";

/// The longest payload a frame may have, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// One message, in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Host to guest: run a command as root.
    Run {
        /// Chosen by the host, repeated in every answer.
        id: u32,
        /// Program and arguments; the program is looked up on the guest's PATH.
        argv: Vec<Vec<u8>>,
        /// Variables to add to the environment, each `NAME=VALUE`.
        env: Vec<Vec<u8>>,
    },
    /// Host to guest: power off.
    PowerOff,
    /// Guest to host: the machine is up.
    Ready {
        /// The PCI functions bound to vfio-pci, as sysfs writes them.
        bound: Vec<Vec<u8>>,
        /// What did not go as it should, in words.
        problems: Vec<Vec<u8>>,
    },
    /// Guest to host: what the command wrote to its standard output.
    Stdout {
        /// The command's.
        id: u32,
        /// As written.
        bytes: Vec<u8>,
    },
    /// Guest to host: what the command wrote to its standard error.
    Stderr {
        /// The command's.
        id: u32,
        /// As written.
        bytes: Vec<u8>,
    },
    /// Guest to host: the command ended.
    Exit {
        /// The command's.
        id: u32,
        /// How.
        status: Status,
    },
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It exited with this status.
    Exited(u8),
    /// This signal ended it.
    Signalled(u8),
}

impl Status {
    /// Whether the command exited with status 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }

    /// The status as a shell would give it: the exit status, or 128 and the signal.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Signalled(signal) => signal.saturating_add(128),
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit status {code}"),
            Self::Signalled(signal) => write!(f, "ended by signal {signal}"),
        }
    }
}

/// Why a message could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The line ended inside a frame.
    #[error("the channel ended inside a message")]
    Truncated,
    /// A frame announces, or a message needs, more than [`MAX_PAYLOAD`].
    #[error("a message of {0} bytes; the channel takes {MAX_PAYLOAD}")]
    Oversized(usize),
    /// A kind nobody sends.
    #[error("a message of unknown kind {0:#04x}")]
    UnknownKind(u8),
    /// The payload does not have the form its kind asks for.
    #[error("a malformed message of kind {0:#04x}")]
    Malformed(u8),
    /// The line itself failed.
    #[error("the channel failed")]
    Io(#[from] io::Error),
}

const RUN: u8 = 1;
const POWER_OFF: u8 = 2;
const READY: u8 = 3;
const STDOUT: u8 = 4;
const STDERR: u8 = 5;
const EXIT: u8 = 6;

impl Message {
    /// Writes the message and flushes the line.
    ///
    /// # Errors
    /// [`ChannelError::Oversized`], before anything is written, or the line's failure.
    pub fn write_to(&self, line: &mut impl Write) -> Result<(), ChannelError> {
        let mut payload = Vec::new();
        let kind = match self {
            Self::Run { id, argv, env } => {
                payload.extend(id.to_le_bytes());
                put_list(&mut payload, argv)?;
                put_list(&mut payload, env)?;
                RUN
            }
            Self::PowerOff => POWER_OFF,
            Self::Ready { bound, problems } => {
                put_list(&mut payload, bound)?;
                put_list(&mut payload, problems)?;
                READY
            }
            Self::Stdout { id, bytes } => {
                payload.extend(id.to_le_bytes());
                payload.extend(bytes);
                STDOUT
            }
            Self::Stderr { id, bytes } => {
                payload.extend(id.to_le_bytes());
                payload.extend(bytes);
                STDERR
            }
            Self::Exit { id, status } => {
                payload.extend(id.to_le_bytes());
                payload.extend(match status {
                    Status::Exited(code) => [0, *code],
                    Status::Signalled(signal) => [1, *signal],
                });
                EXIT
            }
        };
        if payload.len() > MAX_PAYLOAD {
            return Err(ChannelError::Oversized(payload.len()));
        }
        let mut frame = Vec::with_capacity(payload.len().saturating_add(5));
        frame.push(kind);
        frame.extend(length_of(&payload)?);
        frame.extend(payload);
        line.write_all(&frame)?;
        line.flush()?;
        Ok(())
    }

    /// Reads the next message; `None` when the line ends where a message may end.
    ///
    /// # Errors
    /// What is wrong with the frame, or the line's failure.
    pub fn read_from(line: &mut impl Read) -> Result<Option<Self>, ChannelError> {
        let mut kind = [0];
        loop {
            match line.read(&mut kind) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut length = [0; 4];
        line.read_exact(&mut length).map_err(or_truncated)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD {
            return Err(ChannelError::Oversized(length));
        }
        let mut payload = vec![0; length];
        line.read_exact(&mut payload).map_err(or_truncated)?;
        Self::decode(kind[0], &payload).map(Some)
    }

    fn decode(kind: u8, mut payload: &[u8]) -> Result<Self, ChannelError> {
        let malformed = || ChannelError::Malformed(kind);
        let rest = &mut payload;
        let message = match kind {
            RUN => Self::Run {
                id: take_u32(rest).ok_or_else(malformed)?,
                argv: take_list(rest).ok_or_else(malformed)?,
                env: take_list(rest).ok_or_else(malformed)?,
            },
            POWER_OFF => Self::PowerOff,
            READY => Self::Ready {
                bound: take_list(rest).ok_or_else(malformed)?,
                problems: take_list(rest).ok_or_else(malformed)?,
            },
            STDOUT => Self::Stdout {
                id: take_u32(rest).ok_or_else(malformed)?,
                bytes: std::mem::take(rest).to_vec(),
            },
            STDERR => Self::Stderr {
                id: take_u32(rest).ok_or_else(malformed)?,
                bytes: std::mem::take(rest).to_vec(),
            },
            EXIT => Self::Exit {
                id: take_u32(rest).ok_or_else(malformed)?,
                status: match std::mem::take(rest) {
                    [0, code] => Status::Exited(*code),
                    [1, signal] => Status::Signalled(*signal),
                    _ => return Err(malformed()),
                },
            },
            other => return Err(ChannelError::UnknownKind(other)),
        };
        if payload.is_empty() {
            Ok(message)
        } else {
            Err(malformed())
        }
    }
}

/// Reads up to and including the [`GREETING`], throwing away what comes before; `false` when the
/// line ends first.
///
/// # Errors
/// The line's failure.
pub fn await_greeting(line: &mut impl Read) -> Result<bool, ChannelError> {
    let mut window = [0; GREETING.len()];
    let mut byte = [0];
    while &window != GREETING {
        match line.read(&mut byte) {
            Ok(0) => return Ok(false),
            Ok(_) => {
                window.rotate_left(1);
                if let Some(last) = window.last_mut() {
                    *last = byte[0];
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

fn or_truncated(error: io::Error) -> ChannelError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ChannelError::Truncated,
        _ => error.into(),
    }
}

fn length_of(bytes: &[u8]) -> Result<[u8; 4], ChannelError> {
    u32::try_from(bytes.len())
        .map(u32::to_le_bytes)
        .map_err(|_| ChannelError::Oversized(bytes.len()))
}

fn put_list(payload: &mut Vec<u8>, list: &[Vec<u8>]) -> Result<(), ChannelError> {
    let count = u32::try_from(list.len()).map_err(|_| ChannelError::Oversized(list.len()))?;
    payload.extend(count.to_le_bytes());
    for item in list {
        payload.extend(length_of(item)?);
        payload.extend(item);
    }
    Ok(())
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    let (number, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(u32::from_le_bytes(*number))
}

fn take_list(rest: &mut &[u8]) -> Option<Vec<Vec<u8>>> {
    let count = take_u32(rest)?;
    // Not reserved ahead: the count may lie.
    let mut list = Vec::new();
    for _ in 0..count {
        let length = usize::try_from(take_u32(rest)?).ok()?;
        let (item, tail) = rest.split_at_checked(length)?;
        *rest = tail;
        list.push(item.to_vec());
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        vec![
            Message::Run {
                id: 7,
                argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"\xff\0\n".to_vec(), vec![]],
                env: vec![b"A=b".to_vec()],
            },
            Message::PowerOff,
            Message::Ready {
                bound: vec![b"0000:00:05.0".to_vec()],
                problems: vec![],
            },
            Message::Stdout {
                id: u32::MAX,
                bytes: (0..=255).collect(),
            },
            Message::Stderr {
                id: 0,
                bytes: vec![],
            },
            Message::Exit {
                id: 1,
                status: Status::Exited(3),
            },
            Message::Exit {
                id: 1,
                status: Status::Signalled(9),
            },
        ]
    }

    #[test]
    fn messages_come_out_as_they_went_in() {
        let mut line = Vec::new();
        for message in samples() {
            message.write_to(&mut line).unwrap();
        }
        let mut line = line.as_slice();
        for message in samples() {
            assert_eq!(Message::read_from(&mut line).unwrap(), Some(message));
        }
        assert_eq!(Message::read_from(&mut line).unwrap(), None);
    }

    #[test]
    fn every_cut_of_a_frame_is_truncated() {
        for message in samples() {
            let mut frame = Vec::new();
            message.write_to(&mut frame).unwrap();
            for cut in 1..frame.len() {
                assert!(matches!(
                    Message::read_from(&mut &frame[..cut]),
                    Err(ChannelError::Truncated)
                ));
            }
        }
    }

    #[test]
    fn an_announced_length_past_the_limit_is_refused_without_reading_on() {
        let frame = [STDOUT, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(
            Message::read_from(&mut frame.as_slice()),
            Err(ChannelError::Oversized(0xffff_ffff))
        ));
    }

    #[test]
    fn an_oversized_message_is_refused_before_anything_is_written() {
        let mut line = Vec::new();
        let message = Message::Stdout {
            id: 0,
            bytes: vec![0; MAX_PAYLOAD],
        };
        assert!(matches!(
            message.write_to(&mut line),
            Err(ChannelError::Oversized(_))
        ));
        assert!(line.is_empty());
    }

    #[test]
    fn lists_that_lie_about_their_lengths_are_malformed() {
        for payload in [
            &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff][..],
            &[1, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0, b'x'],
            &[1, 0, 0],
        ] {
            assert!(matches!(
                Message::decode(RUN, payload),
                Err(ChannelError::Malformed(RUN))
            ));
        }
    }

    #[test]
    fn trailing_bytes_and_unknown_kinds_are_refused() {
        assert!(matches!(
            Message::decode(POWER_OFF, &[0]),
            Err(ChannelError::Malformed(POWER_OFF))
        ));
        assert!(matches!(
            Message::decode(EXIT, &[0, 0, 0, 0, 2, 0]),
            Err(ChannelError::Malformed(EXIT))
        ));
        assert!(matches!(
            Message::decode(0x7f, &[]),
            Err(ChannelError::UnknownKind(0x7f))
        ));
    }

    #[test]
    fn noise_before_the_greeting_is_thrown_away() {
        let mut line = b"\0SeaBIOS\0\0throughway".to_vec();
        line.extend(GREETING);
        line.push(POWER_OFF);
        let mut line = line.as_slice();
        assert!(await_greeting(&mut line).unwrap());
        assert_eq!(line, [POWER_OFF]);
        assert!(!await_greeting(&mut line).unwrap());
    }
}
