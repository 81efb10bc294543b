//! QEMU's monitor: what the nested machine's hardware is told from outside.
//!
//! A [`Monitor`] speaks QMP (QEMU's `docs/interop/qmp-spec.rst`) over a UNIX socket in the run
//! directory. [`crate::machine::Machine::monitor`] connects it at the first use; it ends with the
//! machine. Commands are answered one at a time; events that arrive meanwhile are kept until
//! somebody waits for them.
//!
//! ```text
//!   QEMU     {"QMP": {"version": ..}}          greeting, once
//!   us       {"execute": .., "id": n}          a command
//!   QEMU     {"event": .., "data": ..}         at any time
//!   QEMU     {"return": .., "id": n}           or {"error": {"class": .., "desc": ..}, "id": n}
//! ```

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

/// How long an answer to a command may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Longer lines are no QMP.
const LONGEST_LINE: usize = 16 << 20;

/// QEMU's version, as its greeting tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// Of 10.0.2: 10.
    pub major: u64,
    /// Of 10.0.2: 0.
    pub minor: u64,
    /// Of 10.0.2: 2.
    pub micro: u64,
}

/// Something that happened to the machine, told without being asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `DEVICE_DELETED`.
    pub name: String,
    /// What is told with it; null if nothing is.
    pub data: Value,
}

impl Event {
    /// The text of a field of the data.
    #[must_use]
    pub fn text(&self, field: &str) -> Option<&str> {
        self.data.get(field).and_then(Value::as_str)
    }
}

/// What QEMU says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineStatus {
    /// Whether the processors run.
    pub running: bool,
    /// QEMU's word for its state: `running`, `paused`, `internal-error`, ...
    pub status: String,
}

/// Why the monitor did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Nobody listens on the socket.
    #[error("cannot connect to QEMU's monitor at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket failed.
    #[error("QEMU's monitor failed while {during}")]
    Socket {
        /// What was being done.
        during: String,
        /// How.
        #[source]
        source: io::Error,
    },
    /// QEMU has closed the socket.
    #[error("QEMU closed its monitor while {during}")]
    Closed {
        /// What was being done.
        during: String,
    },
    /// What came is no QMP.
    #[error("QEMU's monitor said {line:?} while {during}")]
    Protocol {
        /// What came.
        line: String,
        /// What was being done.
        during: String,
    },
    /// Nothing, or not the right thing, came in time.
    #[error("QEMU's monitor took more than {} s {during}", .limit.as_secs_f64())]
    TimeLimit {
        /// What was being done.
        during: String,
        /// The limit.
        limit: Duration,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command} {arguments}: {class}: {description}")]
    Refused {
        /// The command's name.
        command: String,
        /// Its arguments, as JSON.
        arguments: Value,
        /// The error's class, such as `DeviceNotFound`.
        class: String,
        /// What QEMU says of it.
        description: String,
    },
    /// The nested kernel did not let a device go.
    #[error("the nested machine refused to let {device} go")]
    UnplugRefused {
        /// The device's identifier.
        device: String,
    },
}

/// A connected monitor.
#[derive(Debug)]
pub struct Monitor {
    socket: UnixStream,
    /// What was read and is not a whole line yet.
    unread: Vec<u8>,
    events: VecDeque<Event>,
    version: QemuVersion,
    next_id: u64,
}

impl Monitor {
    /// Connects to a monitor and makes it take commands.
    ///
    /// # Errors
    /// When nobody listens there, or what listens does not speak QMP.
    pub fn connect(path: &Path) -> Result<Self, MonitorError> {
        let socket = UnixStream::connect(path).map_err(|source| MonitorError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let mut new = Self {
            socket,
            unread: vec![],
            events: VecDeque::new(),
            version: QemuVersion {
                major: 0,
                minor: 0,
                micro: 0,
            },
            next_id: 0,
        };
        let during = "greeting";
        let greeting = new.next_message(during, Instant::now(), ANSWER_LIMIT)?;
        let number = |name| {
            let version = greeting.pointer("/QMP/version/qemu")?;
            version.get(name)?.as_u64()
        };
        match (number("major"), number("minor"), number("micro")) {
            (Some(major), Some(minor), Some(micro)) => {
                new.version = QemuVersion {
                    major,
                    minor,
                    micro,
                };
            }
            _ => {
                return Err(MonitorError::Protocol {
                    line: greeting.to_string(),
                    during: during.to_owned(),
                });
            }
        }
        new.execute("qmp_capabilities", Value::Null)?;
        Ok(new)
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> QemuVersion {
        self.version
    }

    /// Runs a command with an object of arguments, or null for none, and gives what it returns.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] with QEMU's reason; when no answer comes.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        let during = format!("executing {command}");
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments.clone();
        }
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        self.socket
            .write_all(&line)
            .map_err(|source| match source.kind() {
                io::ErrorKind::BrokenPipe => MonitorError::Closed {
                    during: during.clone(),
                },
                _ => MonitorError::Socket {
                    during: during.clone(),
                    source,
                },
            })?;
        let start = Instant::now();
        loop {
            let mut message = self.next_message(&during, start, ANSWER_LIMIT)?;
            if let Some(event) = event_of(&message) {
                self.events.push_back(event);
                continue;
            }
            let ours = message.get("id").and_then(Value::as_u64) == Some(id);
            // What cannot be read as a command is refused without its identifier.
            let anonymous = message.get("id").is_none();
            if let Some(error) = message.get("error").filter(|_| ours || anonymous) {
                let text = |field| error.get(field).and_then(Value::as_str);
                return Err(MonitorError::Refused {
                    command: command.to_owned(),
                    arguments,
                    class: text("class").unwrap_or("no class").to_owned(),
                    description: text("desc").unwrap_or("no description").to_owned(),
                });
            }
            match message.get_mut("return") {
                Some(value) if ours => return Ok(value.take()),
                _ => {
                    return Err(MonitorError::Protocol {
                        line: message.to_string(),
                        during,
                    });
                }
            }
        }
    }

    /// Plugs a device in. It is there for the nested kernel some time after.
    ///
    /// `properties` are those of QEMU's `-device`, as JSON: numbers and booleans are not text here.
    ///
    /// # Errors
    /// When QEMU refuses it.
    pub fn device_add(
        &mut self,
        driver: &str,
        id: &str,
        properties: &[(&str, Value)],
    ) -> Result<(), MonitorError> {
        let mut arguments = Map::new();
        for (name, value) in [("driver", driver), ("id", id)] {
            arguments.insert(name.to_owned(), value.into());
        }
        for (name, value) in properties {
            arguments.insert((*name).to_owned(), value.clone());
        }
        self.execute("device_add", arguments.into()).map(drop)
    }

    /// Asks the nested kernel to let a device go, and does not wait for it.
    ///
    /// # Errors
    /// When QEMU knows no such device or cannot take it out.
    pub fn device_del(&mut self, id: &str) -> Result<(), MonitorError> {
        self.execute("device_del", json!({ "id": id })).map(drop)
    }

    /// Waits until a device is gone that [`Monitor::device_del`] was told to take out.
    ///
    /// # Errors
    /// [`MonitorError::UnplugRefused`] when the nested kernel keeps it; when nothing is said of it
    /// in time.
    pub fn wait_until_deleted(&mut self, id: &str, limit: Duration) -> Result<(), MonitorError> {
        let event =
            self.wait_for_event(&format!("waiting for the end of {id}"), limit, |event| {
                matches!(
                    event.name.as_str(),
                    "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR"
                ) && event.text("device") == Some(id)
            })?;
        if event.name == "DEVICE_DELETED" {
            Ok(())
        } else {
            Err(MonitorError::UnplugRefused {
                device: id.to_owned(),
            })
        }
    }

    /// How the machine is.
    ///
    /// # Errors
    /// When no answer comes.
    pub fn query_status(&mut self) -> Result<MachineStatus, MonitorError> {
        let answer = self.execute("query-status", Value::Null)?;
        let running = answer.get("running").and_then(Value::as_bool);
        let status = answer.get("status").and_then(Value::as_str);
        match (running, status) {
            (Some(running), Some(status)) => Ok(MachineStatus {
                running,
                status: status.to_owned(),
            }),
            _ => Err(MonitorError::Protocol {
                line: answer.to_string(),
                during: "executing query-status".to_owned(),
            }),
        }
    }

    /// Ends QEMU at once, as pulling the plug does. The nested kernel is not asked.
    ///
    /// # Errors
    /// When QEMU does not take the command.
    pub fn quit(&mut self) -> Result<(), MonitorError> {
        match self.execute("quit", Value::Null) {
            // It may be gone before its answer is here.
            Ok(_) | Err(MonitorError::Closed { .. }) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Takes out the first event that `wanted` says yes to, of those that have come and have not
    /// been taken, and waits for it if there is none.
    ///
    /// # Errors
    /// [`MonitorError::TimeLimit`] when none comes in time.
    pub fn wait_for_event(
        &mut self,
        during: &str,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, MonitorError> {
        let start = Instant::now();
        loop {
            let at = self.events.iter().position(&wanted);
            if let Some(event) = at.and_then(|at| self.events.remove(at)) {
                return Ok(event);
            }
            let message = self.next_message(during, start, limit)?;
            match event_of(&message) {
                Some(event) => self.events.push_back(event),
                None => {
                    return Err(MonitorError::Protocol {
                        line: message.to_string(),
                        during: during.to_owned(),
                    });
                }
            }
        }
    }

    /// The next line, as JSON.
    fn next_message(
        &mut self,
        during: &str,
        start: Instant,
        limit: Duration,
    ) -> Result<Value, MonitorError> {
        let socket_error = |source| MonitorError::Socket {
            during: during.to_owned(),
            source,
        };
        let protocol = |line: &[u8]| MonitorError::Protocol {
            line: String::from_utf8_lossy(line).into_owned(),
            during: during.to_owned(),
        };
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|_| protocol(line.trim_ascii()));
            }
            if self.unread.len() > LONGEST_LINE {
                return Err(protocol(&self.unread));
            }
            let left = limit.saturating_sub(start.elapsed());
            let time_limit = || MonitorError::TimeLimit {
                during: during.to_owned(),
                limit,
            };
            // A socket takes no limit of zero.
            if left.is_zero() {
                return Err(time_limit());
            }
            self.socket
                .set_read_timeout(Some(left))
                .map_err(socket_error)?;
            match self.socket.read(&mut buffer) {
                Ok(0) => {
                    return Err(MonitorError::Closed {
                        during: during.to_owned(),
                    });
                }
                Ok(length) => self.unread.extend(buffer.iter().take(length)),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        return Err(time_limit());
                    }
                    io::ErrorKind::ConnectionReset => {
                        return Err(MonitorError::Closed {
                            during: during.to_owned(),
                        });
                    }
                    _ => return Err(socket_error(error)),
                },
            }
        }
    }
}

fn event_of(message: &Value) -> Option<Event> {
    Some(Event {
        name: message.get("event")?.as_str()?.to_owned(),
        data: message.get("data").cloned().unwrap_or(Value::Null),
    })
}

#[cfg(test)]
mod tests;
