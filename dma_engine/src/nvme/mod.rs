//! NVMe controllers (NVM Express Base Specification; section numbers are those of revision 1.4).
//!
//! Everything that a controller says is taken as it comes: it is waited for no longer than a
//! limit, and no number of its own decides how much memory is used.

mod cmb;
mod error;
mod identity;
mod prp;
mod queue;
mod registers;

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use assigned_pci::HostFunction;
use memory_map::{Iova, IovaRange};

use self::identity::{ControllerData, NamespaceData};
use self::prp::{PAGE, Pages};
use self::queue::{DEPTH, Entry, Queue, halves};
use self::registers::{
    ACQ, AQA, ASQ, CC, CONFIGURATION, Capabilities, ENABLE, FATAL, INTMS, READY, Registers,
};
use crate::EngineMemory;

pub use self::cmb::ControllerMemoryBuffer;
pub use self::error::{BufferProblem, NvmeCommand, NvmeError, NvmeStatus};
pub use self::identity::NvmeIdentity;

/// How long a command may take, on a machine that may be much slowed down.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// How long to wait between two looks at the controller's status.
const INTERVAL: Duration = Duration::from_millis(1);
/// The unit of CAP.TO.
const HALF_A_SECOND: Duration = Duration::from_millis(500);

/// Where things lie in the lent memory; each has a page.
const ADMIN_COMMANDS: u64 = 0;
const ADMIN_COMPLETIONS: u64 = PAGE;
const IO_COMMANDS: u64 = 2 * PAGE;
const IO_COMPLETIONS: u64 = 3 * PAGE;
/// What Identify gives, and what the engine's scratch blocks are saved by.
const DATA: u64 = 4 * PAGE;
const LIST: u64 = 5 * PAGE;
const PAGES: u64 = 6;

/// The I/O queue pair's identifier; 0 is the admin queues'.
const IO_QUEUE: u16 = 1;
/// The namespace that is used.
const NAMESPACE: u32 = 1;

/// A driver for a controller: one I/O queue pair, one command at a time, no interrupts.
///
/// The caller owns the function and sees to it that it decodes memory and masters the bus. The
/// controller is reset and enabled by [`enable`](Self::enable), or by the first transfer; so it is
/// again after an error that leaves open what the controller is still doing, which is every one
/// but [`NvmeError::Status`] and those of bad arguments. Dropping the driver disables the
/// controller, so that it does not write to the lent memory any more, and waits until it has
/// stopped.
///
/// Only the first namespace is used. Blocks have 512 to 4096 bytes and no metadata.
pub struct Nvme {
    registers: Registers,
    memory: Box<dyn EngineMemory>,
    time_limit: Duration,
    session: Option<Session>,
    /// Whether the controller may be enabled by us, with or without a session.
    started: bool,
}

/// What there is while the controller is enabled.
struct Session {
    identity: NvmeIdentity,
    io: Queue,
}

impl Nvme {
    /// How much memory the driver must be lent, in bytes, at the start of a page of 4 KiB.
    pub const MEMORY: u64 = PAGES * PAGE;

    /// Whether a function is an NVMe controller by its class code. One whose config space cannot be
    /// read is none.
    #[must_use]
    pub fn drives(function: &Arc<dyn HostFunction>) -> bool {
        registers::class(function).is_ok_and(|class| class == registers::CLASS)
    }

    /// A driver for `function`. Nothing is accessed yet.
    #[must_use]
    pub fn new(function: Arc<dyn HostFunction>, memory: Box<dyn EngineMemory>) -> Self {
        Self {
            registers: Registers::new(function),
            memory,
            time_limit: TIME_LIMIT,
            session: None,
            started: false,
        }
    }

    /// How long a command may take, instead of thirty seconds, and the most that is waited for the
    /// controller to become ready or to stop, whatever it asks for itself (CAP.TO, which is at
    /// most 127.5 seconds).
    #[must_use]
    pub fn with_time_limit(mut self, limit: Duration) -> Self {
        self.set_time_limit(limit);
        self
    }

    pub(crate) fn set_time_limit(&mut self, limit: Duration) {
        self.time_limit = limit;
    }

    /// The function.
    #[must_use]
    pub fn function(&self) -> &Arc<dyn HostFunction> {
        self.registers.function()
    }

    /// Resets and enables the controller and asks it what it is, unless that was done before
    /// (section 7.6.1).
    ///
    /// # Errors
    /// See [`NvmeError`].
    pub fn enable(&mut self) -> Result<&NvmeIdentity, NvmeError> {
        let session = match self.session.take() {
            Some(session) => session,
            None => {
                self.started = true;
                self.start()?
            }
        };
        Ok(&self.session.insert(session).identity)
    }

    /// Disables the controller and waits until it has stopped. It does not touch the lent memory
    /// any more if this succeeds.
    ///
    /// # Errors
    /// See [`NvmeError`].
    pub fn disable(&mut self) -> Result<(), NvmeError> {
        self.session = None;
        let cap = self.registers.probe()?;
        self.stop(cap)?;
        self.started = false;
        Ok(())
    }

    /// Disables the controller if this driver has enabled it, or has tried to.
    pub(crate) fn rest(&mut self) -> Result<(), NvmeError> {
        if self.started { self.disable() } else { Ok(()) }
    }

    /// Reads from the disk: `len` bytes from the block `block` on are written to the bus at `to`.
    ///
    /// # Errors
    /// [`NvmeError::Length`] unless `len` is a multiple of the block's size and at most
    /// [`NvmeIdentity::max_transfer`], [`NvmeError::Blocks`], [`NvmeError::Address`];
    /// [`NvmeError::Status`] where the controller could not do it. A controller need not notice
    /// that the IOMMU has blocked it: QEMU's does not.
    pub fn read(&mut self, block: u64, to: Iova, len: u64) -> Result<(), NvmeError> {
        let to = bus(to, len)?;
        self.transfer(NvmeCommand::Read { block, to }, 0x02, block, to)
    }

    /// Writes to the disk: `len` bytes from the block `block` on are read from the bus at `from`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write(&mut self, block: u64, from: Iova, len: u64) -> Result<(), NvmeError> {
        let from = bus(from, len)?;
        self.transfer(NvmeCommand::Write { block, from }, 0x01, block, from)
    }

    /// Where the bounce page is, which is free between commands.
    pub(crate) fn bounce(&self) -> Iova {
        self.at(DATA)
    }

    /// Reads the bounce page.
    pub(crate) fn bounce_read(&self, data: &mut [u8]) -> Result<(), NvmeError> {
        self.memory
            .read(DATA, data)
            .map_err(|source| self.memory_access(source))
    }

    /// Writes the bounce page.
    pub(crate) fn bounce_write(&self, data: &[u8]) -> Result<(), NvmeError> {
        self.memory
            .write(DATA, data)
            .map_err(|source| self.memory_access(source))
    }

    fn transfer(
        &mut self,
        command: NvmeCommand,
        opcode: u8,
        block: u64,
        range: IovaRange,
    ) -> Result<(), NvmeError> {
        let len = range.size();
        let &NvmeIdentity {
            block_size,
            blocks: has,
            max_transfer: most,
            ..
        } = self.enable()?;
        if !len.is_multiple_of(block_size) || len > most {
            return Err(NvmeError::Length {
                len,
                block: block_size,
                most,
            });
        }
        let count = len / block_size;
        if block.checked_add(count).is_none_or(|end| end > has) {
            return Err(NvmeError::Blocks {
                function: self.registers.name(),
                first: block,
                count,
                has,
            });
        }
        let pages = Pages::of(range);
        let second = match *pages.rest {
            [] => 0,
            [page] => page,
            _ => {
                self.memory
                    .write(LIST, &pages.list())
                    .map_err(|source| self.memory_access(source))?;
                self.at(LIST).raw()
            }
        };
        let (low, high) = halves(block);
        // At most 512 pages of blocks of 512 bytes; counted from zero.
        let last = u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX);
        let entry = Entry::new(opcode, NAMESPACE)
            .with_data(pages.first, second)
            .with_words([low, high, last]);
        let Some(mut session) = self.session.take() else {
            return Ok(());
        };
        let done = self.run(&mut session.io, command, entry);
        if matches!(done, Ok(()) | Err(NvmeError::Status { .. })) {
            self.session = Some(session);
        }
        done
    }

    fn run(&self, queue: &mut Queue, command: NvmeCommand, entry: Entry) -> Result<(), NvmeError> {
        let limit = self.time_limit;
        queue.run(&self.registers, &*self.memory, command, entry, limit)
    }

    /// From whatever state it is in to one with an I/O queue pair.
    fn start(&self) -> Result<Session, NvmeError> {
        let range = self.memory.iova();
        if !range.start().is_aligned(PAGE) || range.size() < Self::MEMORY {
            return Err(NvmeError::Memory {
                range,
                needed: Self::MEMORY,
            });
        }
        let cap = self.registers.probe()?;
        if !cap.has_nvm_commands() {
            return Err(self.unsupported("has no NVM command set".into()));
        }
        if cap.smallest_page() != 0 {
            let power = cap.smallest_page().saturating_add(12);
            return Err(self.unsupported(format!("wants memory pages of 2^{power} bytes")));
        }
        let admin_doorbells = self.registers.doorbells(cap, 0)?;
        let io_doorbells = self.registers.doorbells(cap, IO_QUEUE)?;
        self.stop(cap)?;
        let zeroes = [0; 4096];
        for page in 0..PAGES {
            self.memory
                .write(page * PAGE, &zeroes)
                .map_err(|source| self.memory_access(source))?;
        }
        let mut admin = Queue::new(DEPTH, (ADMIN_COMMANDS, ADMIN_COMPLETIONS), admin_doorbells);
        self.go(cap, &admin)?;

        let mut data = [0; identity::SIZE];
        self.identify(&mut admin, NvmeCommand::IdentifyController, &mut data)?;
        let controller = ControllerData::read(&data);
        self.identify(&mut admin, NvmeCommand::IdentifyNamespace, &mut data)?;
        let namespace = NamespaceData::read(&data).map_err(|what| self.unsupported(what))?;

        let depth = cap.queue_entries().min(DEPTH.into());
        let depth = u16::try_from(depth).unwrap_or(DEPTH);
        let io = Queue::new(depth, (IO_COMMANDS, IO_COMPLETIONS), io_doorbells);
        self.create_queues(&mut admin, &io)?;
        let block_size = namespace.block_size;
        Ok(Session {
            identity: NvmeIdentity {
                model: controller.model,
                block_size,
                blocks: namespace.blocks,
                max_transfer: controller.max_transfer / block_size * block_size,
            },
            io,
        })
    }

    /// Enables it, with the admin queues (section 7.6.1).
    fn go(&self, cap: Capabilities, admin: &Queue) -> Result<(), NvmeError> {
        let registers = &self.registers;
        let last = u32::from(admin.depth()).saturating_sub(1);
        registers.write32(AQA, (last << 16) | last)?;
        registers.write64(ASQ, self.at(ADMIN_COMMANDS).raw())?;
        registers.write64(ACQ, self.at(ADMIN_COMPLETIONS).raw())?;
        // Completions are polled for: the admin queue's would interrupt otherwise.
        registers.write32(INTMS, u32::MAX)?;
        registers.write32(CC, CONFIGURATION)?;
        self.wait(cap, READY)
    }

    /// Disables it; it may have failed before (section 7.3.2).
    fn stop(&self, cap: Capabilities) -> Result<(), NvmeError> {
        let configuration = self.registers.read32(CC)?;
        self.registers.write32(CC, configuration & !ENABLE)?;
        self.wait(cap, 0)
    }

    /// Waits until CSTS.RDY is as wanted, as long as the controller asks for.
    fn wait(&self, cap: Capabilities, ready: u32) -> Result<(), NvmeError> {
        let limit = (HALF_A_SECOND * cap.timeout().max(1)).min(self.time_limit);
        let start = Instant::now();
        loop {
            let status = self.registers.status()?;
            if ready != 0 && status & FATAL != 0 {
                return Err(NvmeError::Fatal {
                    function: self.registers.name(),
                    status,
                });
            }
            if status & READY == ready {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited >= limit {
                return Err(NvmeError::NotReady {
                    function: self.registers.name(),
                    wanted: if ready == 0 { "disabled" } else { "ready" },
                    waited,
                    status,
                });
            }
            thread::sleep(INTERVAL);
        }
    }

    fn identify(
        &self,
        admin: &mut Queue,
        command: NvmeCommand,
        data: &mut [u8; identity::SIZE],
    ) -> Result<(), NvmeError> {
        let (namespace, structure) = match command {
            NvmeCommand::IdentifyNamespace => (NAMESPACE, 0),
            _ => (0, 1),
        };
        let entry = Entry::new(0x06, namespace)
            .with_data(self.at(DATA).raw(), 0)
            .with_words([structure, 0, 0]);
        self.run(admin, command, entry)?;
        self.bounce_read(data)
    }

    /// One pair, completions polled for (sections 5.21.1.7, 5.3 and 5.4).
    fn create_queues(&self, admin: &mut Queue, io: &Queue) -> Result<(), NvmeError> {
        const NUMBER_OF_QUEUES: u32 = 0x07;
        const CONTIGUOUS: u32 = 1;
        // Both counts are from zero.
        let entry = Entry::new(0x09, 0).with_words([NUMBER_OF_QUEUES, 0, 0]);
        self.run(admin, NvmeCommand::SetQueueCount, entry)?;
        let id = u32::from(IO_QUEUE);
        let which = (u32::from(io.depth()).saturating_sub(1) << 16) | id;
        let entry = Entry::new(0x05, 0)
            .with_data(self.at(IO_COMPLETIONS).raw(), 0)
            .with_words([which, CONTIGUOUS, 0]);
        self.run(admin, NvmeCommand::CreateCompletionQueue, entry)?;
        let entry = Entry::new(0x01, 0)
            .with_data(self.at(IO_COMMANDS).raw(), 0)
            .with_words([which, (id << 16) | CONTIGUOUS, 0]);
        self.run(admin, NvmeCommand::CreateSubmissionQueue, entry)
    }

    /// Where the device sees an offset of the lent memory, which [`start`](Self::start) has seen
    /// to be large enough.
    fn at(&self, offset: u64) -> Iova {
        let start = self.memory.iova().start();
        start.checked_add(offset).unwrap_or(start)
    }

    fn unsupported(&self, what: String) -> NvmeError {
        NvmeError::Unsupported {
            function: self.registers.name(),
            what,
        }
    }

    fn memory_access(&self, source: std::io::Error) -> NvmeError {
        NvmeError::MemoryAccess {
            function: self.registers.name(),
            source,
        }
    }
}

/// The bus addresses of a transfer.
fn bus(start: Iova, len: u64) -> Result<IovaRange, NvmeError> {
    match IovaRange::new(start, len) {
        Ok(range) if start.is_aligned(4) => Ok(range),
        _ => Err(NvmeError::Address {
            start: start.raw(),
            len,
        }),
    }
}

impl fmt::Debug for Nvme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nvme")
            .field("function", &self.registers.name())
            .field("memory", &self.memory.iova())
            .field("identity", &self.session.as_ref().map(|s| &s.identity))
            .finish_non_exhaustive()
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        // A controller that cannot be asked has been reset or has left the bus: it is not enabled.
        let _ = self
            .registers
            .read32(CC)
            .and_then(|configuration| match configuration {
                u32::MAX => Ok(()),
                configuration if configuration & ENABLE == 0 => Ok(()),
                _ => self.disable(),
            });
    }
}

#[cfg(test)]
pub(crate) mod test_rig;
#[cfg(test)]
mod tests;
