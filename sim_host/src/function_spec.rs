//! What kind of function is to be plugged in.

use assigned_pci::BarIndex;
use memory_map::IovaRange;

use crate::gate::COMMAND_MEMORY;
use crate::nvme;
use crate::nvme_spec::NvmeSpec;
use crate::page::PAGE;
use crate::reset::ResetMethod;
use crate::{GroupId, NvmeFlaw, SimDisk};

/// What a BAR's type bits say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// 32-bit memory, not prefetchable.
    Memory32,
    /// 32-bit memory, prefetchable.
    Memory32Prefetchable,
    /// 64-bit memory, not prefetchable, such as an NVMe controller's BAR0.
    Memory64,
    /// 64-bit memory, prefetchable.
    Memory64Prefetchable,
}

impl BarKind {
    /// The low bits of the register.
    pub(crate) const fn type_bits(self) -> u32 {
        match self {
            Self::Io => 0b0001,
            Self::Memory32 => 0b0000,
            Self::Memory32Prefetchable => 0b1000,
            Self::Memory64 => 0b0100,
            Self::Memory64Prefetchable => 0b1100,
        }
    }

    /// Whether it takes two registers.
    pub(crate) const fn is_wide(self) -> bool {
        matches!(self, Self::Memory64 | Self::Memory64Prefetchable)
    }
}

/// A BAR to be.
#[derive(Debug, Clone)]
pub struct BarSpec {
    pub(crate) kind: BarKind,
    pub(crate) size: u64,
    pub(crate) areas: Vec<(u64, u64)>,
}

impl BarSpec {
    /// A BAR of `size` bytes. All of it can be mapped if it is memory and made of whole pages;
    /// a smaller one cannot be mapped at all.
    ///
    /// A size that is no power of two is taken as it is: no device has one, but a broken one may
    /// claim to.
    #[must_use]
    pub fn new(kind: BarKind, size: u64) -> Self {
        let whole = kind != BarKind::Io && size > 0 && size.is_multiple_of(PAGE);
        Self {
            kind,
            size,
            areas: whole.then_some((0, size)).into_iter().collect(),
        }
    }

    /// Only these parts can be mapped: pairs of offset and size in bytes, both in whole pages.
    /// What lies between them is trapped, like an MSI-X table.
    #[must_use]
    pub fn with_areas(mut self, areas: impl IntoIterator<Item = (u64, u64)>) -> Self {
        self.areas = areas.into_iter().collect();
        self
    }
}

/// What stands behind BAR0.
#[derive(Debug, Clone)]
pub(crate) enum Model {
    /// Memory, as behind every other BAR.
    Memory,
    /// QEMU's edu.
    Edu,
    /// An NVMe controller.
    Nvme(NvmeSpec),
}

/// Whether a function keeps its registers on the way from D3hot to D0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerManagement {
    /// It does (*No_Soft_Reset*).
    NoSoftReset,
    /// It does not: it comes back as from a reset, and the kernel restores config space.
    SoftReset,
}

/// An MSI capability to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MsiSpec {
    pub(crate) vectors: u16,
    pub(crate) maskable: bool,
}

/// An MSI-X capability to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MsixSpec {
    pub(crate) vectors: u16,
    pub(crate) bar: BarIndex,
    pub(crate) table: u32,
    pub(crate) pending_bits: u32,
}

/// A function to be plugged in.
#[derive(Debug, Clone)]
pub struct FunctionSpec {
    pub(crate) name: String,
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) class: u32,
    pub(crate) command: u16,
    pub(crate) config_size: u16,
    pub(crate) bars: [Option<BarSpec>; 6],
    pub(crate) raw: Vec<(u16, Vec<u8>)>,
    pub(crate) group: Option<GroupId>,
    pub(crate) reserved: Vec<IovaRange>,
    pub(crate) reset: ResetMethod,
    pub(crate) power_management: Option<PowerManagement>,
    pub(crate) express_flr: bool,
    pub(crate) advanced_flr: bool,
    pub(crate) msi: Option<MsiSpec>,
    pub(crate) msix: Option<MsixSpec>,
    pub(crate) fixed_vectors: bool,
    pub(crate) host_vectors: u16,
    pub(crate) is_virtual: bool,
    pub(crate) gone: bool,
    pub(crate) split_wide: bool,
    pub(crate) model: Model,
}

/// Where the first capability lies.
const CAPABILITIES: u8 = 0x40;

impl FunctionSpec {
    /// A function without BARs and capabilities, in a group of its own, without a reset. As VFIO
    /// leaves a function that it has opened, it decodes memory and does not master the bus.
    #[must_use]
    pub fn new(name: impl Into<String>, vendor: u16, device: u16) -> Self {
        Self {
            name: name.into(),
            vendor,
            device,
            class: 0xff_0000,
            command: COMMAND_MEMORY,
            config_size: 256,
            bars: Default::default(),
            raw: Vec::new(),
            group: None,
            reserved: Vec::new(),
            reset: ResetMethod::None,
            power_management: None,
            express_flr: false,
            advanced_flr: false,
            msi: None,
            msix: None,
            fixed_vectors: false,
            host_vectors: u16::MAX,
            is_virtual: false,
            gone: false,
            split_wide: false,
            model: Model::Memory,
        }
    }

    /// A DMA engine, modelled on QEMU's edu: BAR0 is 1 MiB of registers, 32-bit. MSI.
    #[must_use]
    pub fn edu(name: impl Into<String>) -> Self {
        let mut spec = Self::new(name, 0x1234, 0x11e8)
            .with_bar(BarIndex::ALL[0], BarSpec::new(BarKind::Memory32, 0x10_0000))
            .with_msi(1, false);
        spec.model = Model::Edu;
        spec
    }

    /// A function with a large memory BAR, modelled on QEMU's ivshmem-plain: BAR0 is 256 bytes,
    /// BAR2 is 64-bit prefetchable memory of `size` bytes.
    #[must_use]
    pub fn shared_memory(name: impl Into<String>, size: u64) -> Self {
        let mut spec = Self::new(name, 0x1af4, 0x1110)
            .with_bar(BarIndex::ALL[0], BarSpec::new(BarKind::Memory32, 0x100))
            .with_bar(
                BarIndex::ALL[2],
                BarSpec::new(BarKind::Memory64Prefetchable, size),
            );
        spec.class = 0x05_0000;
        spec
    }

    /// An NVMe controller with this disk as its first namespace, modelled on QEMU's: BAR0 is 16
    /// KiB of registers, 64-bit and not prefetchable, with an MSI-X table in its second half.
    #[must_use]
    pub fn nvme(name: impl Into<String>, disk: SimDisk) -> Self {
        let registers = BarSpec::new(BarKind::Memory64, nvme::BAR_SIZE);
        let mut spec = Self::new(name, 0x1b36, 0x0010)
            .with_bar(BarIndex::ALL[0], registers)
            .with_msix(nvme::VECTORS, BarIndex::ALL[0], 0x2000, 0x3000);
        spec.class = 0x01_0802;
        spec.model = Model::Nvme(NvmeSpec {
            disk,
            flaw: None,
            buffer: 0,
        });
        spec
    }

    /// A controller memory buffer of `size` bytes, a multiple of 4 KiB: all of BAR2. It does
    /// nothing to a function that is no NVMe controller.
    #[must_use]
    pub fn with_controller_memory_buffer(mut self, size: u64) -> Self {
        if let Model::Nvme(nvme) = &mut self.model {
            nvme.buffer = size;
            return self.with_bar(
                BarIndex::ALL[2],
                BarSpec::new(BarKind::Memory64Prefetchable, size),
            );
        }
        self
    }

    /// Bad input: an NVMe controller with something wrong.
    #[must_use]
    pub fn with_nvme_flaw(mut self, flaw: NvmeFlaw) -> Self {
        if let Model::Nvme(nvme) = &mut self.model {
            nvme.flaw = Some(flaw);
        }
        self
    }

    /// A BAR, instead of the one that was there.
    #[must_use]
    pub fn with_bar(mut self, bar: BarIndex, spec: BarSpec) -> Self {
        if let Some(slot) = self.bars.get_mut(usize::from(bar.get())) {
            *slot = Some(spec);
        }
        self
    }

    /// The command register as it is at first.
    #[must_use]
    pub fn with_command(mut self, command: u16) -> Self {
        self.command = command;
        self
    }

    /// Extended config space: 4096 bytes instead of 256.
    #[must_use]
    pub fn with_extended_config(mut self) -> Self {
        self.config_size = 4096;
        self
    }

    /// Bytes of config space, laid over everything but the command register and the BARs. They
    /// are read-only. What lies past the end is left out.
    #[must_use]
    pub fn with_config_bytes(mut self, offset: u16, bytes: impl Into<Vec<u8>>) -> Self {
        self.raw.push((offset, bytes.into()));
        self
    }

    /// A capability list that starts at `at` with these bytes.
    #[must_use]
    pub fn with_capability_list(self, at: u8, bytes: impl Into<Vec<u8>>) -> Self {
        // The list bit of the status register, and the pointer to the list.
        self.with_config_bytes(0x06, [0x10, 0x00])
            .with_config_bytes(0x34, [at])
            .with_config_bytes(u16::from(at), bytes)
    }

    /// Bad input: a capability list that never ends.
    #[must_use]
    pub fn with_cyclic_capabilities(self) -> Self {
        self.with_capability_list(CAPABILITIES, msi(0x60))
            .with_config_bytes(0x60, [0x09, CAPABILITIES, 0x03, 0x00])
    }

    /// Bad input: an MSI-X capability whose end lies past the end of the first 256 bytes.
    #[must_use]
    pub fn with_truncated_capabilities(self) -> Self {
        self.with_capability_list(0xfc, [0x11, 0x00, 0x00, 0x00])
    }

    /// Bad input: a capability list that points into the header.
    #[must_use]
    pub fn with_capabilities_in_header(self) -> Self {
        self.with_capability_list(CAPABILITIES, msi(0x10))
    }

    /// Bad input: every read gives all ones, as from a device that has fallen off the bus.
    #[must_use]
    pub fn all_ones(mut self) -> Self {
        self.gone = true;
        self
    }

    /// The group, instead of one of its own.
    #[must_use]
    pub fn in_group(mut self, group: GroupId) -> Self {
        self.group = Some(group);
        self
    }

    /// A range that the function's group reserves: it may not be mapped in a container that the
    /// group is in.
    #[must_use]
    pub fn with_reserved(mut self, range: IovaRange) -> Self {
        self.reserved.push(range);
        self
    }

    /// A function that can be reset.
    #[must_use]
    pub fn with_reset(mut self) -> Self {
        self.reset = ResetMethod::Works;
        self
    }

    /// A function whose resets all fail with `errno`, having revoked what was mapped from it.
    #[must_use]
    pub fn with_failing_reset(mut self, errno: i32) -> Self {
        self.reset = ResetMethod::Fails(errno);
        self
    }

    /// Power management, with D1, D2 and D3hot.
    #[must_use]
    pub fn with_power_management(mut self, power_management: PowerManagement) -> Self {
        self.power_management = Some(power_management);
        self
    }

    /// A PCI Express capability with a function-level reset, which works.
    #[must_use]
    pub fn with_express_flr(mut self) -> Self {
        self.express_flr = true;
        self.works()
    }

    /// An advanced features capability with a function-level reset, which works.
    #[must_use]
    pub fn with_advanced_flr(mut self) -> Self {
        self.advanced_flr = true;
        self.works()
    }

    /// An MSI capability with 64-bit addresses and so many vectors, a power of two up to 32; with
    /// or without masks. It lies at 0x40.
    #[must_use]
    pub fn with_msi(mut self, vectors: u16, maskable: bool) -> Self {
        self.msi = Some(MsiSpec { vectors, maskable });
        self
    }

    /// An MSI-X capability with so many vectors, 1 to 2048, whose table and pending bits lie at
    /// these offsets of a BAR, multiples of eight. vfio-pci answers for the table: it reads all
    /// ones, and what is written there is lost.
    #[must_use]
    pub fn with_msix(mut self, vectors: u16, bar: BarIndex, table: u32, pending_bits: u32) -> Self {
        self.msix = Some(MsixSpec {
            vectors,
            bar,
            table,
            pending_bits,
        });
        self
    }

    /// A kernel that cannot add MSI-X vectors to those that are enabled, as before Linux 6.5.
    #[must_use]
    pub fn with_fixed_vectors(mut self) -> Self {
        self.fixed_vectors = true;
        self
    }

    /// A host that has only so many interrupt vectors left.
    #[must_use]
    pub fn with_host_vectors(mut self, left: u16) -> Self {
        self.host_vectors = left;
        self
    }

    /// A virtual function: it decodes memory whatever its command register says, whose memory bit
    /// the kernel makes up.
    #[must_use]
    pub fn of_virtual_function(mut self) -> Self {
        self.is_virtual = true;
        self
    }

    fn works(mut self) -> Self {
        if self.reset == ResetMethod::None {
            self.reset = ResetMethod::Works;
        }
        self
    }

    /// A kernel that cuts 8-byte BAR accesses in two, as older kernels' vfio-pci does.
    #[must_use]
    pub fn with_split_wide_accesses(mut self) -> Self {
        self.split_wide = true;
        self
    }
}

/// An MSI capability with 64-bit addresses and one vector.
fn msi(next: u8) -> [u8; 14] {
    [0x05, next, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}
