//! What can be wrong with a controller, and what it says itself.

use std::fmt;
use std::io;
use std::time::Duration;

use assigned_pci::BarIndex;
use memory_map::IovaRange;

/// Why an NVMe controller did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// The host refused an access to the function.
    #[error("accessing {function} failed")]
    Access {
        /// The function.
        function: String,
        /// The host's errno; `EIO` where the function does not decode memory.
        #[source]
        source: io::Error,
    },
    /// The function's class is another one.
    #[error("{function} is no NVMe controller: its class code is {class:#08x}, not 0x010802")]
    Class {
        /// The function.
        function: String,
        /// Its class code.
        class: u32,
    },
    /// BAR0 is missing, or too small for the registers and doorbells.
    #[error("{function} has no BAR0 of at least {needed:#x} bytes")]
    NoRegisters {
        /// The function.
        function: String,
        /// How large the BAR must be.
        needed: u64,
    },
    /// Registers read as all ones: the function has fallen off the bus.
    #[error("{function} answers with all ones: it is not there any more")]
    Gone {
        /// The function.
        function: String,
    },
    /// It cannot work as the driver wants it to.
    #[error("{function} {what}")]
    Unsupported {
        /// The function.
        function: String,
        /// What it has, or lacks.
        what: String,
    },
    /// It did not become ready, or did not stop, in the time that it asks for itself (CAP.TO); or
    /// it was reset while a command was under way, or before it, by somebody else.
    #[error("{function} was not {wanted} after {waited:?}: CSTS is {status:#010x}")]
    NotReady {
        /// The function.
        function: String,
        /// What was waited for.
        wanted: &'static str,
        /// How long it was waited for.
        waited: Duration,
        /// The status register.
        status: u32,
    },
    /// It says that it cannot go on (CSTS.CFS). A queue that it cannot reach makes it say so.
    #[error("{function} has failed: CSTS is {status:#010x}")]
    Fatal {
        /// The function.
        function: String,
        /// The status register.
        status: u32,
    },
    /// The lent memory does not serve.
    #[error(
        "the memory lent at {range} does not serve: {needed:#x} bytes at a whole page are needed"
    )]
    Memory {
        /// Where the device sees it.
        range: IovaRange,
        /// How much is needed, in bytes.
        needed: u64,
    },
    /// The lent memory could not be accessed.
    #[error("accessing the memory lent to {function} failed")]
    MemoryAccess {
        /// The function.
        function: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command was not completed in time.
    #[error("{function} did not complete {command} within {waited:?}")]
    Timeout {
        /// The function.
        function: String,
        /// The command.
        command: NvmeCommand,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A completion that answers no command of ours.
    #[error(
        "{function} completed command {found:#06x}, but {expected:#06x} ({command}) was asked for"
    )]
    Completion {
        /// The function.
        function: String,
        /// What was asked for.
        command: NvmeCommand,
        /// The identifier that the command had.
        expected: u16,
        /// The identifier in the completion.
        found: u16,
    },
    /// The controller refused a command, or failed at it.
    #[error("{function}: {command} ended with {status}")]
    Status {
        /// The function.
        function: String,
        /// The command.
        command: NvmeCommand,
        /// What the controller says.
        status: NvmeStatus,
    },
    /// Blocks that the namespace does not have.
    #[error("{function} has {has:#x} blocks: no {count:#x} from {first:#x} on")]
    Blocks {
        /// The function.
        function: String,
        /// The first block.
        first: u64,
        /// How many.
        count: u64,
        /// How many there are.
        has: u64,
    },
    /// The transfer has no bytes, too many for one command, or a part of a block.
    #[error("cannot transfer {len:#x} bytes at once, only multiples of {block:#x} up to {most:#x}")]
    Length {
        /// How many were asked for.
        len: u64,
        /// The size of a block.
        block: u64,
        /// How many one command can move.
        most: u64,
    },
    /// The bus addresses wrap, or do not start at a multiple of four (section 4.3: PRP offsets).
    #[error("cannot transfer {len:#x} bytes at {start:#x}: only from a multiple of four on")]
    Address {
        /// The first address.
        start: u64,
        /// How many bytes.
        len: u64,
    },
    /// The controller has no memory buffer, or tells nonsense about it.
    #[error("{function} has no usable controller memory buffer: {why}")]
    NoBuffer {
        /// The function.
        function: String,
        /// Why.
        why: BufferProblem,
    },
}

/// What is wrong with a controller memory buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BufferProblem {
    /// CMBSZ says that there is none.
    None,
    /// The BAR is missing or too small for it.
    OutsideBar {
        /// The BAR.
        bar: u8,
        /// Where in it the buffer is said to start, in bytes.
        offset: u64,
        /// How large it is said to be, in bytes.
        size: u64,
    },
    /// The controller does not take the base address (CMBSTS.CBAI).
    Base {
        /// The address.
        address: u64,
    },
    /// The base address is not a multiple of 4 KiB.
    Unaligned {
        /// The address.
        address: u64,
    },
}

impl fmt::Display for BufferProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "it says that it has none"),
            Self::OutsideBar { bar, offset, size } => match BarIndex::new(*bar) {
                Some(bar) => write!(f, "{size:#x} bytes at {offset:#x} do not lie within {bar}"),
                None => write!(f, "it says that it lies in BAR{bar}"),
            },
            Self::Base { address } => write!(f, "it does not take {address:#x} as base address"),
            Self::Unaligned { address } => write!(f, "{address:#x} is not a multiple of 4 KiB"),
        }
    }
}

/// A command that the driver gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NvmeCommand {
    /// Identify, of the controller.
    IdentifyController,
    /// Identify, of the first namespace.
    IdentifyNamespace,
    /// Set Features: the number of I/O queues.
    SetQueueCount,
    /// Create I/O Completion Queue.
    CreateCompletionQueue,
    /// Create I/O Submission Queue.
    CreateSubmissionQueue,
    /// Read, from the disk to the bus.
    Read {
        /// The first block.
        block: u64,
        /// Where on the bus the bytes go.
        to: IovaRange,
    },
    /// Write, from the bus to the disk.
    Write {
        /// The first block.
        block: u64,
        /// Where on the bus the bytes come from.
        from: IovaRange,
    },
}

impl fmt::Display for NvmeCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdentifyController => write!(f, "Identify (controller)"),
            Self::IdentifyNamespace => write!(f, "Identify (namespace 1)"),
            Self::SetQueueCount => write!(f, "Set Features (number of queues)"),
            Self::CreateCompletionQueue => write!(f, "Create I/O Completion Queue"),
            Self::CreateSubmissionQueue => write!(f, "Create I/O Submission Queue"),
            Self::Read { block, to } => write!(f, "Read of block {block:#x} to {to}"),
            Self::Write { block, from } => write!(f, "Write of block {block:#x} from {from}"),
        }
    }
}

/// The status field of a completion: bits 15:1 of its last word (section 4.6.1), whatever the
/// controller put there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NvmeStatus(u16);

impl NvmeStatus {
    /// The generic status that says that data or metadata could not be moved on the bus.
    pub const DATA_TRANSFER_ERROR: Self = Self(0x04);

    /// From a completion's status field, without the phase tag.
    pub(super) const fn new(field: u16) -> Self {
        Self(field)
    }

    /// The status code type: 0 generic, 1 specific to the command, 2 media and data integrity.
    #[must_use]
    pub const fn code_type(self) -> u16 {
        (self.0 >> 8) & 0x7
    }

    /// The status code within its type.
    #[must_use]
    pub const fn code(self) -> u16 {
        self.0 & 0xff
    }

    /// Whether the command succeeded.
    pub(super) const fn is_success(self) -> bool {
        self.code() == 0 && self.code_type() == 0
    }

    /// Whether it says that data could not be moved on the bus.
    #[must_use]
    pub const fn is_data_transfer_error(self) -> bool {
        self.code() == Self::DATA_TRANSFER_ERROR.code() && self.code_type() == 0
    }
}

impl fmt::Display for NvmeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.code_type(), self.code()) {
            (0, 0x01) => "Invalid Command Opcode",
            (0, 0x02) => "Invalid Field in Command",
            (0, 0x04) => "Data Transfer Error",
            (0, 0x06) => "Internal Error",
            (0, 0x07) => "Command Abort Requested",
            (0, 0x0b) => "Invalid Namespace or Format",
            (0, 0x13) => "PRP Offset Invalid",
            (0, 0x80) => "LBA Out of Range",
            (0, 0x81) => "Capacity Exceeded",
            (1, 0x01) => "Invalid Queue Identifier",
            (1, 0x02) => "Invalid Queue Size",
            (2, 0x80) => "Write Fault",
            (2, 0x81) => "Unrecovered Read Error",
            _ => "",
        };
        write!(f, "status {}/{:#04x}", self.code_type(), self.code())?;
        if name.is_empty() {
            Ok(())
        } else {
            write!(f, " ({name})")
        }
    }
}
