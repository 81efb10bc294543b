//! A host function and a DMA target that write one log, so that a test sees the order of what the
//! two were asked.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memory_map::{
    Access, Backing, BackingObject, DmaTarget, Errno, Gpa, HostMapping, Iova, IovaRange,
    MapRequest, Reach, RegionManager, TargetError, TargetHandle, TargetLimits, TargetOptions,
};
use parking_lot::Mutex;

use crate::{
    AssignedFunction, BarIndex, CutOffSwitch, FunctionError, FunctionOptions, HostBar, HostBarArea,
    HostFunction, HostVectors, MsiController, MsiKind, Outcome,
};

use super::fake_interrupts::FakeVectors;

pub(super) const EIO: i32 = 5;
pub(super) const ENOTTY: i32 = 25;

pub(super) const COMMAND: u16 = 0x04;
/// Bus mastering and memory decoding.
pub(super) const ON: u16 = 0x06;
/// Bus mastering alone.
pub(super) const OFF: u16 = 0x04;

/// The type bits of a BAR's register.
pub(super) const MEMORY_32: u32 = 0;
pub(super) const MEMORY_64: u32 = 0b0100;
pub(super) const MEMORY_64_PREFETCHABLE: u32 = 0b1100;
pub(super) const IO: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    ConfigWrite(u16, Vec<u8>),
    Reset,
    BarRead(u64, usize),
    BarWrite(u64, usize),
    Map(u64),
    Unmap(u64),
    /// From this vector on, with these eventfds.
    Connect(MsiKind, u16, Vec<bool>),
    Disconnect(MsiKind),
}

pub(super) type Log = Arc<Mutex<Vec<Event>>>;

/// PMCSR, device control and the advanced features' control of a function
/// [with controls](FakeHost::with_controls).
pub(super) const PMCSR: u16 = 0x44;
pub(super) const DEVICE_CONTROL: u16 = 0x58;
pub(super) const AF_CONTROL: u16 = 0x94;

type Look = dyn Fn(&Event) + Send + Sync;

/// Looks on while the host carries a call out.
#[derive(Default)]
pub(super) struct Probe(Mutex<Option<Arc<Look>>>);

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Probe")
    }
}

impl Probe {
    pub(super) fn set(&self, probe: impl Fn(&Event) + Send + Sync + 'static) {
        *self.0.lock() = Some(Arc::new(probe));
    }

    fn look(&self, event: &Event) {
        // It may come back here.
        let probe = self.0.lock().clone();
        if let Some(probe) = probe {
            probe(event);
        }
    }
}

type ReadLook = dyn Fn() + Send + Sync;

/// Looks on before the host reads config space.
#[derive(Default)]
pub(super) struct ReadProbe(Mutex<Option<Arc<ReadLook>>>);

impl std::fmt::Debug for ReadProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReadProbe")
    }
}

impl ReadProbe {
    pub(super) fn set(&self, probe: impl Fn() + Send + Sync + 'static) {
        *self.0.lock() = Some(Arc::new(probe));
    }

    fn look(&self) {
        let probe = self.0.lock().clone();
        if let Some(probe) = probe {
            probe();
        }
    }
}

#[derive(Debug)]
struct Pages(u64);

impl BackingObject for Pages {
    fn size(&self) -> u64 {
        self.0
    }
    fn map_host(&self) -> Result<Box<dyn HostMapping>, Errno> {
        Err(Errno::new(EIO))
    }
}

/// What the host is to refuse.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    pub(super) config_read: bool,
    pub(super) config_write: bool,
    pub(super) bar_access: bool,
    pub(super) reset: bool,
    /// Keeps the power state as it is, without a word.
    pub(super) power: bool,
}

#[derive(Debug)]
pub(super) struct FakeHost {
    pub(super) name: String,
    pub(super) log: Log,
    pub(super) config: Mutex<Vec<u8>>,
    pub(super) bars: [Option<HostBar>; 6],
    pub(super) refuse: Mutex<Refusals>,
    pub(super) is_virtual: bool,
    pub(super) vectors: FakeVectors,
    /// The command register as it was when the function went to sleep, to be restored.
    saved: Mutex<Option<[u8; 2]>>,
    pub(super) probe: Probe,
    pub(super) on_config_read: ReadProbe,
}

impl FakeHost {
    pub(super) fn new() -> Self {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        Self {
            name: "fake".into(),
            log: Log::default(),
            config: Mutex::new(config),
            bars: Default::default(),
            refuse: Mutex::default(),
            is_virtual: false,
            vectors: FakeVectors::default(),
            saved: Mutex::default(),
            probe: Probe::default(),
            on_config_read: ReadProbe::default(),
        }
    }

    /// Gives it power management and both ways of a function-level reset.
    pub(super) fn with_controls(self, no_soft_reset: bool) -> Self {
        let list = [
            (0x40, 0x0003_5001),
            (0x50, 0x0002_9010),
            (0x90, 0x0306_0013),
        ];
        self.capabilities(0x40, &list)
            .set_dword(PMCSR, u32::from(no_soft_reset) << 3)
            .set_dword(0x54, 1 << 28)
    }

    pub(super) fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Gives it a BAR with these mappable areas.
    pub(super) fn bar(self, index: u8, kind: u32, size: u64, areas: &[(u64, u64)]) -> Self {
        let mut host = self.set_dword(0x10 + u16::from(index) * 4, kind);
        let areas = areas
            .iter()
            .map(|(offset, size)| HostBarArea {
                offset: *offset,
                size: *size,
                backing: Backing::new(Pages(*size)),
            })
            .collect();
        host.bars[usize::from(index)] = Some(HostBar { size, areas });
        host
    }

    /// Gives it a BAR that can be mapped whole.
    pub(super) fn whole_bar(self, index: u8, kind: u32, size: u64) -> Self {
        self.bar(index, kind, size, &[(0, size)])
    }

    pub(super) fn set_dword(self, offset: u16, value: u32) -> Self {
        let offset = usize::from(offset);
        self.config.lock()[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn extended(self) -> Self {
        self.config.lock().resize(4096, 0);
        self
    }

    /// Gives a register that holds nothing yet a value.
    pub(super) fn set_dword_if_clear(self, offset: u16, value: u32) -> Self {
        let at = usize::from(offset);
        let clear = self.config.lock()[at..at + 4] == [0; 4];
        if clear {
            self.set_dword(offset, value)
        } else {
            self
        }
    }

    /// Gives it a list of standard capabilities, from the pointer in the header on.
    pub(super) fn capabilities(mut self, first: u8, list: &[(u16, u32)]) -> Self {
        self = self
            .set_dword(0x04, 0x0010_0000)
            .set_dword(0x34, first.into());
        for (offset, header) in list {
            self = self.set_dword(*offset, *header);
        }
        self
    }

    pub(super) fn command(&self) -> u16 {
        let config = self.config.lock();
        u16::from_le_bytes([config[4], config[5]])
    }

    pub(super) fn backing(&self, bar: usize) -> Backing {
        self.bars[bar].as_ref().unwrap().areas[0].backing.clone()
    }

    pub(super) fn assign(self) -> Result<AssignedFunction, FunctionError> {
        let map = RegionManager::new();
        AssignedFunction::new(Arc::new(self), map, &FunctionOptions::default())
    }

    /// The error with which it is refused, as text.
    pub(super) fn refusal(self) -> String {
        self.assign().unwrap_err().to_string()
    }
}

fn refused(refuse: bool, errno: i32) -> io::Result<()> {
    if refuse {
        Err(io::Error::from_raw_os_error(errno))
    } else {
        Ok(())
    }
}

impl HostFunction for FakeHost {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn config_size(&self) -> u16 {
        self.config.lock().len().try_into().unwrap()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.on_config_read.look();
        refused(self.refuse.lock().config_read, EIO)?;
        let offset = usize::from(offset);
        data.copy_from_slice(&self.config.lock()[offset..offset + data.len()]);
        Ok(())
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        let event = Event::ConfigWrite(offset, data.to_vec());
        self.probe.look(&event);
        self.log.lock().push(event);
        let refuse = self.refuse.lock();
        refused(refuse.config_write, EIO)?;
        let mut config = self.config.lock();
        let before = config[usize::from(PMCSR)];
        let state = before & 3;
        for (place, byte) in (usize::from(offset)..).zip(data) {
            match place {
                // The status register's bits are cleared by ones; the list's is read-only.
                6 => config[place] &= !byte | 0x10,
                7 => config[place] &= !byte,
                _ => config[place] = *byte,
            }
        }
        if config[0x40] == 1 {
            // As vfio-pci: a state may be refused without a word; a function that forgets its
            // registers in D3hot gets them back; the bits that initiate a reset, which wakes the
            // function and after which everything is restored, read as zero.
            let flr = config[usize::from(DEVICE_CONTROL) + 1] & 0x80 != 0
                || config[usize::from(AF_CONTROL)] & 1 != 0;
            // No_Soft_Reset is read-only, and only D0 is reached from a deeper state.
            let mut low = config[usize::from(PMCSR)] & !8 | before & 8;
            if refuse.power || (low & 3 != 0 && low & 3 < state) {
                low = low & !3 | state;
            }
            if flr {
                low &= !3;
            }
            config[usize::from(PMCSR)] = low;
            let mut saved = self.saved.lock();
            if state != 3 && low & 0b1011 == 3 {
                *saved = Some([config[4], config[5]]);
            }
            if low & 3 == 0
                && let Some(command) = saved.take()
            {
                config[4..6].copy_from_slice(&command);
            }
            config[usize::from(DEVICE_CONTROL) + 1] &= 0x7f;
            config[usize::from(AF_CONTROL)] &= 0xfe;
        }
        Ok(())
    }

    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>> {
        Ok(self.bars[usize::from(bar.get())].clone())
    }

    fn bar_read(&self, _bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.log.lock().push(Event::BarRead(offset, data.len()));
        refused(self.refuse.lock().bar_access, EIO)?;
        data.fill(0x5a);
        Ok(())
    }

    fn bar_write(&self, _bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        self.log.lock().push(Event::BarWrite(offset, data.len()));
        refused(self.refuse.lock().bar_access, EIO)
    }

    fn reset(&self) -> io::Result<()> {
        self.probe.look(&Event::Reset);
        self.log.lock().push(Event::Reset);
        refused(self.refuse.lock().reset, ENOTTY)?;
        let mut config = self.config.lock();
        config[usize::from(PMCSR)] &= !3;
        if let Some(command) = self.saved.lock().take() {
            config[4..6].copy_from_slice(&command);
        }
        Ok(())
    }

    fn is_virtual(&self) -> bool {
        self.is_virtual
    }

    fn vectors(&self, kind: MsiKind) -> io::Result<HostVectors> {
        Ok(self.vectors.lent(kind))
    }

    fn connect_vectors(
        &self,
        kind: MsiKind,
        first: u16,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let fds = eventfds.iter().map(Option::is_some).collect();
        self.log.lock().push(Event::Connect(kind, first, fds));
        self.vectors.connect(kind, first, eventfds)
    }

    fn disconnect_vectors(&self, kind: MsiKind) -> io::Result<()> {
        self.log.lock().push(Event::Disconnect(kind));
        self.vectors.disconnect(kind)
    }
}

/// What a target holds: start to size.
pub(super) type Mapped = Arc<Mutex<BTreeMap<u64, u64>>>;

struct Recorder {
    log: Log,
    mapped: Mapped,
    stuck: Arc<AtomicBool>,
    full: Arc<AtomicBool>,
}

impl DmaTarget for Recorder {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        let last = Iova::new((1 << 52) - 1);
        Ok(TargetLimits {
            page_size: 0x1000,
            allowed: vec![IovaRange::from_inclusive(Iova::new(0), last).unwrap()],
            entry_limit: None,
            largest_mapping: 1 << 51,
            read_only: true,
            device_memory: true,
            unmap_spans: true,
        })
    }

    fn needs_host_address(&self, _backing: &Backing) -> bool {
        false
    }

    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        assert_eq!(request.access, Access::ReadWrite);
        if self.full.load(Ordering::SeqCst) {
            return Err(TargetError::kernel(Errno::new(EIO)));
        }
        let start = request.iova.start().raw();
        self.log.lock().push(Event::Map(start));
        let before = self.mapped.lock().insert(start, request.iova.size());
        assert_eq!(before, None);
        Ok(())
    }

    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        if self.stuck.load(Ordering::SeqCst) {
            return Err(TargetError::Unknown(Errno::new(EIO)));
        }
        self.log.lock().push(Event::Unmap(range.start().raw()));
        let mut mapped = self.mapped.lock();
        mapped.retain(|start, _| !range.contains(Iova::new(*start)));
        Ok(())
    }
}

/// A function in a map that one target follows.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) host: Arc<FakeHost>,
    pub(super) map: RegionManager,
    pub(super) function: Arc<AssignedFunction>,
    pub(super) mapped: Mapped,
    pub(super) target: TargetHandle,
    /// Has the target's unmaps fail.
    pub(super) stuck: Arc<AtomicBool>,
    /// Has the target's maps be refused.
    pub(super) full: Arc<AtomicBool>,
    pub(super) switch: Arc<CutOffSwitch>,
}

impl Bench {
    /// The log begins empty.
    pub(super) fn new(host: FakeHost) -> Self {
        Self::with_interrupts(host, None)
    }

    /// With something that delivers its interrupts.
    pub(super) fn with_interrupts(
        host: FakeHost,
        interrupts: Option<Arc<dyn MsiController>>,
    ) -> Self {
        let host = Arc::new(host);
        let map = RegionManager::new();
        let mapped = Mapped::default();
        let (stuck, full) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        let recorder = Recorder {
            log: host.log.clone(),
            mapped: mapped.clone(),
            stuck: stuck.clone(),
            full: full.clone(),
        };
        let switch = Arc::new(CutOffSwitch::new());
        let mut options = TargetOptions::new("recorder");
        options.cut_off = Some(switch.clone());
        let target = map.register(Box::new(recorder), options).unwrap();
        let options = FunctionOptions {
            interrupts,
            ..FunctionOptions::default()
        };
        let function = AssignedFunction::new(host.clone(), map.clone(), &options).unwrap();
        let function = Arc::new(function);
        switch.add(&function);
        host.log.lock().clear();
        Self {
            host,
            map,
            function,
            mapped,
            target,
            stuck,
            full,
            switch,
        }
    }

    /// Another target of its map, which writes another log.
    pub(super) fn second_target(&self, log: &Log) -> (TargetHandle, Mapped) {
        let mapped = Mapped::default();
        let recorder = Recorder {
            log: log.clone(),
            mapped: mapped.clone(),
            stuck: Arc::default(),
            full: Arc::default(),
        };
        let options = TargetOptions::new("second");
        let target = self.map.register(Box::new(recorder), options);
        (target.unwrap(), mapped)
    }

    /// A function with one 64-bit prefetchable BAR 2 of 64 KiB.
    pub(super) fn with_64_bit_bar() -> Self {
        Self::new(FakeHost::new().whole_bar(2, MEMORY_64_PREFETCHABLE, 0x1_0000))
    }

    /// A function with one 32-bit BAR 0 of 64 KiB.
    pub(super) fn with_32_bit_bar() -> Self {
        Self::new(FakeHost::new().whole_bar(0, MEMORY_32, 0x1_0000))
    }

    pub(super) fn command(&self, command: u16) -> Outcome {
        self.function.config_write(COMMAND, &command.to_le_bytes())
    }

    /// Writes the register numbered `register`.
    pub(super) fn bar(&self, register: u16, value: u32) -> Outcome {
        let offset = 0x10 + register * 4;
        self.function.config_write(offset, &value.to_le_bytes())
    }

    pub(super) fn read(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        assert_eq!(self.function.config_read(offset, &mut bytes), None);
        u32::from_le_bytes(bytes)
    }

    /// What was asked of the host and the target since the last look.
    pub(super) fn events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.host.log.lock())
    }

    /// Where the target's mappings start.
    pub(super) fn mapped(&self) -> Vec<u64> {
        self.mapped.lock().keys().copied().collect()
    }

    /// Where the guest sees anything, and how much.
    pub(super) fn view(&self) -> Vec<(u64, u64)> {
        self.map
            .view()
            .iter()
            .map(|segment| (segment.range.start().raw(), segment.range.size()))
            .collect()
    }

    pub(super) fn reach(&self, bar: u8) -> Reach {
        let region = self.function.region_of(BarIndex::new(bar).unwrap());
        self.map
            .reach_of(self.target.id(), region.unwrap())
            .unwrap()
    }

    pub(super) fn cpu_access(&self, gpa: u64) -> Option<(BarIndex, u64)> {
        let access = self.function.cpu_access(Gpa::new(gpa))?;
        assert!(access.outcome.is_ok());
        Some((access.bar, access.offset))
    }
}
