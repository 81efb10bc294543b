//! A submission queue with its completion queue, one command at a time (section 4.1).

use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use super::registers::{FATAL, READY, Registers};
use super::{NvmeCommand, NvmeError, NvmeStatus};
use crate::EngineMemory;

/// How many entries a queue has, unless the controller has less room. One page of commands holds
/// four times as many.
pub(super) const DEPTH: u16 = 16;
const COMMAND_SIZE: u64 = 64;
const COMPLETION_SIZE: u64 = 16;
/// How long to wait between two looks at a completion.
const INTERVAL: Duration = Duration::from_micros(500);

/// The 16 words of a command (section 4.2): the first is filled in but for its identifier.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Entry(pub [u32; 16]);

impl Entry {
    pub fn new(opcode: u8, namespace: u32) -> Self {
        let mut entry = Self::default();
        entry.0[0] = opcode.into();
        entry.0[1] = namespace;
        entry
    }

    /// Where the data are.
    pub fn with_data(mut self, first: u64, second: u64) -> Self {
        (self.0[6], self.0[7]) = halves(first);
        (self.0[8], self.0[9]) = halves(second);
        self
    }

    /// Words 10 to 12, which each command has its own use for.
    pub fn with_words(mut self, words: [u32; 3]) -> Self {
        [self.0[10], self.0[11], self.0[12]] = words;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// The lower and the upper half.
pub(super) fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// The driver's side of a queue pair. It has come to be out of step with the controller's after
/// any error but [`NvmeError::Status`].
#[derive(Debug)]
pub(super) struct Queue {
    depth: u16,
    /// Where in the lent memory the two lie.
    commands: u64,
    completions: u64,
    /// The doorbells.
    tail_doorbell: u64,
    head_doorbell: u64,
    tail: u16,
    head: u16,
    /// The phase tag of a completion that is new: it changes with each turn (section 4.6).
    phase: bool,
    next_id: u16,
}

impl Queue {
    /// A pair of empty queues, whose memory must be zeroed.
    pub fn new(depth: u16, (commands, completions): (u64, u64), doorbells: (u64, u64)) -> Self {
        Self {
            depth: depth.max(2),
            commands,
            completions,
            tail_doorbell: doorbells.0,
            head_doorbell: doorbells.1,
            tail: 0,
            head: 0,
            phase: true,
            next_id: 0,
        }
    }

    pub const fn depth(&self) -> u16 {
        self.depth
    }

    /// Gives a command and waits for its end.
    pub fn run(
        &mut self,
        registers: &Registers,
        memory: &dyn EngineMemory,
        command: NvmeCommand,
        mut entry: Entry,
        limit: Duration,
    ) -> Result<(), NvmeError> {
        let failed = |source| NvmeError::MemoryAccess {
            function: registers.name(),
            source,
        };
        let id = self.next_id;
        // All ones is kept for errors that belong to no command.
        self.next_id = id.wrapping_add(1) % u16::MAX;
        entry.0[0] |= u32::from(id) << 16;
        let at = self.commands + u64::from(self.tail) * COMMAND_SIZE;
        memory.write(at, &entry.bytes()).map_err(failed)?;
        self.tail = self.after(self.tail);
        // The command must be in memory when the doorbell rings.
        fence(Ordering::SeqCst);
        registers.write32(self.tail_doorbell, self.tail.into())?;

        let start = Instant::now();
        let at = self.completions + u64::from(self.head) * COMPLETION_SIZE;
        let read = || {
            let mut word = [0; 4];
            memory.read(at + 12, &mut word).map_err(failed)?;
            Ok::<_, NvmeError>(u32::from_le_bytes(word))
        };
        loop {
            if (read()? & (1 << 16) != 0) == self.phase {
                break;
            }
            let waited = start.elapsed();
            let status = registers.status()?;
            if status & FATAL != 0 {
                return Err(NvmeError::Fatal {
                    function: registers.name(),
                    status,
                });
            }
            if status & READY == 0 {
                // It was reset, and will never answer.
                return Err(NvmeError::NotReady {
                    function: registers.name(),
                    wanted: "ready",
                    waited,
                    status,
                });
            }
            if waited >= limit {
                return Err(NvmeError::Timeout {
                    function: registers.name(),
                    command,
                    waited,
                });
            }
            thread::sleep(INTERVAL);
        }
        // What the command moved is looked at only after its completion was.
        fence(Ordering::SeqCst);
        // The lent memory may be read byte by byte: the phase tag may be newer than what was read
        // before it.
        let last_word = read()?;
        self.head = self.after(self.head);
        if self.head == 0 {
            self.phase = !self.phase;
        }
        registers.write32(self.head_doorbell, self.head.into())?;
        let [id_low, id_high, field_low, field_high] = last_word.to_le_bytes();
        let found = u16::from_le_bytes([id_low, id_high]);
        if found != id {
            return Err(NvmeError::Completion {
                function: registers.name(),
                command,
                expected: id,
                found,
            });
        }
        let status = NvmeStatus::new(u16::from_le_bytes([field_low, field_high]) >> 1);
        if status.is_success() {
            Ok(())
        } else {
            Err(NvmeError::Status {
                function: registers.name(),
                command,
                status,
            })
        }
    }

    fn after(&self, index: u16) -> u16 {
        index.saturating_add(1) % self.depth
    }
}
