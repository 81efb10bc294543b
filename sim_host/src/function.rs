//! A simulated PCI function.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use assigned_pci::{BarIndex, HostBar, HostBarArea, HostFunction, HostVectors, MsiKind};
use libc::{EEXIST, EINVAL, EIO, ENOSPC, ENOTTY};
use memory_map::{Backing, Iova};
use parking_lot::Mutex;

use crate::bar::SimBarArea;
use crate::call::Call;
use crate::config_space::ConfigSpace;
use crate::edu::Edu;
use crate::file::SimFile;
use crate::function_spec::{BarSpec, Model};
use crate::gate::Gate;
use crate::host::State;
use crate::log::BusErrorCause;
use crate::nvme::Nvme;
use crate::page::PAGE;
use crate::physical::{BarOwner, PhysicalObject, Storage};
use crate::reset::ResetMethod;
use crate::revocations::{RevocationCause, Revocations};
use crate::sparse::SparseMemory;
use crate::vectors::Vectors;
use crate::{BarKind, FunctionSpec, GroupId, SimBar, SimHost};

/// Where the host puts the I/O BARs; nothing is behind these addresses.
const IO_BASE: u64 = 0xc000;

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// What is behind one BAR.
pub(crate) struct Behind {
    pub(crate) object: Arc<PhysicalObject>,
    io: bool,
    areas: Vec<HostBarArea>,
}

/// A function that is plugged in and lent out.
pub struct SimFunction {
    pub(crate) host: SimHost,
    pub(crate) name: Arc<str>,
    group: GroupId,
    pub(crate) gate: Arc<Gate>,
    config_size: u16,
    pub(crate) config: Mutex<ConfigSpace>,
    pub(crate) bars: [Option<Behind>; 6],
    pub(crate) reset_method: ResetMethod,
    pub(crate) revocations: Revocations,
    vectors: Arc<Vectors>,
    /// MSI-X's table, in its BAR.
    table: Option<(BarIndex, Range<u64>)>,
    split_wide: bool,
}

impl SimFunction {
    pub(crate) fn plug(host: &SimHost, spec: FunctionSpec) -> io::Result<Arc<Self>> {
        check(&spec)?;
        let name: Arc<str> = spec.name.as_str().into();
        let gate = Arc::new(Gate::new(spec.command).of_virtual_function(spec.is_virtual));
        gate.set_gone(spec.gone);
        let vectors = Arc::new(Vectors::new(&spec, Arc::clone(&gate)));
        let mut state = host.0.state.write();
        if state.functions.contains_key(&name) {
            return refused(EEXIST);
        }
        let mut bars: [Option<Behind>; 6] = Default::default();
        let mut addresses = [0; 6];
        let places = bars.iter_mut().zip(&mut addresses);
        for ((index, bar), (slot, address)) in BarIndex::ALL.into_iter().zip(&spec.bars).zip(places)
        {
            let Some(bar) = bar else { continue };
            let io = bar.kind == BarKind::Io;
            let base = if io {
                IO_BASE
            } else {
                state
                    .bus
                    .place_bar(bar.size, bar.kind.is_wide())
                    .ok_or_else(|| io::Error::from_raw_os_error(ENOSPC))?
            };
            let who = || {
                (
                    Arc::downgrade(&host.0),
                    Arc::clone(&name),
                    Arc::clone(&gate),
                )
            };
            let storage = match &spec.model {
                Model::Edu if index.get() == 0 => {
                    let (host, name, gate) = who();
                    let vectors = Arc::clone(&vectors);
                    Storage::Registers(Arc::new(Edu::new(host, name, gate, vectors)))
                }
                Model::Nvme(nvme) if index.get() == 0 => {
                    let (host, name, gate) = who();
                    let vectors = Arc::clone(&vectors);
                    let nvme = Nvme::new(nvme.clone(), (host, name, gate), vectors);
                    Storage::Registers(Arc::new(nvme))
                }
                _ => Storage::Memory(SparseMemory::new(bar.size)),
            };
            let object = Arc::new(PhysicalObject {
                label: format!("{name} {index}").into(),
                base,
                storage,
                owner: Some(BarOwner {
                    function: Arc::clone(&name),
                    bar: index,
                    gate: Arc::clone(&gate),
                }),
            });
            if !io {
                state.bus.add(&object);
            }
            *address = base;
            *slot = Some(Behind {
                areas: areas(host, &object, bar),
                object,
                io,
            });
        }
        let group = join_group(&mut state, &spec);
        state.functions.insert(Arc::clone(&name), group);
        if !gate.has_memory_enabled() {
            state.dma_bufs.revoke(&name);
        }
        drop(state);
        Ok(Arc::new(Self {
            host: host.clone(),
            name,
            group,
            gate,
            config_size: spec.config_size,
            config: Mutex::new(ConfigSpace::new(&spec, addresses)),
            bars,
            reset_method: spec.reset,
            revocations: Revocations::default(),
            vectors,
            table: spec.msix.map(|msix| {
                let start = u64::from(msix.table);
                let size = u64::from(msix.vectors).saturating_mul(16);
                (msix.bar, start..start.saturating_add(size))
            }),
            split_wide: spec.split_wide,
        }))
    }

    /// The group it is in.
    #[must_use]
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// What is behind a BAR, as the device itself sees it.
    #[must_use]
    pub fn bar_memory(&self, bar: BarIndex) -> Option<SimBar> {
        self.behind(bar)
            .map(|behind| SimBar::new(Arc::clone(&behind.object)))
    }

    /// Whether it decodes memory at this moment.
    #[must_use]
    pub fn decodes_memory(&self) -> bool {
        self.gate.decodes_memory()
    }

    /// Whether it may issue DMA at this moment.
    #[must_use]
    pub fn masters_bus(&self) -> bool {
        self.gate.masters_bus()
    }

    /// Pulls the function out without a word, or puts it back as it was: while it is gone, reads
    /// give all ones, writes vanish, and it issues no DMA.
    pub fn set_gone(&self, gone: bool) {
        let _no_dma = self.host.0.state.write();
        self.gate.set_gone(gone);
    }

    /// Raises an interrupt vector of the kind that is enabled, as a device does without regard to
    /// who listens, and tells whether anybody was signalled. Without bus mastering nothing is.
    pub fn raise(&self, vector: u16) -> bool {
        self.vectors.raise(vector)
    }

    /// The kind of interrupts that is enabled, and which of its vectors are connected to somebody.
    #[must_use]
    pub fn connected_vectors(&self) -> Option<(MsiKind, Vec<u16>)> {
        self.vectors.connected()
    }

    /// Whether an access to a BAR is one to MSI-X's table, for which vfio-pci answers.
    fn is_in_table(&self, bar: BarIndex, offset: u64) -> bool {
        let table = self.table.as_ref();
        table.is_some_and(|(of, table)| *of == bar && table.contains(&offset))
    }

    /// Issues a DMA read, as any function may that masters the bus: straight at the IOMMU, for
    /// functions without an engine of their own. What faults reads as all ones.
    pub fn dma_read(&self, iova: Iova, data: &mut [u8]) {
        if self.gate.masters_bus() {
            self.host.0.dma_read(&self.name, iova, data);
        } else {
            data.fill(0xff);
            let cause = BusErrorCause::BusMasteringOff;
            self.host.0.bus_error(&self.name, iova, false, cause);
        }
    }

    /// Issues a DMA write, likewise.
    pub fn dma_write(&self, iova: Iova, data: &[u8]) {
        if self.gate.masters_bus() {
            self.host.0.dma_write(&self.name, iova, data);
        } else {
            let cause = BusErrorCause::BusMasteringOff;
            self.host.0.bus_error(&self.name, iova, true, cause);
        }
    }

    fn behind(&self, bar: BarIndex) -> Option<&Behind> {
        self.bars.get(usize::from(bar.get()))?.as_ref()
    }

    /// The object to be accessed, or why not.
    fn accessible(&self, bar: BarIndex, offset: u64, len: usize) -> io::Result<&PhysicalObject> {
        let Some(behind) = self.behind(bar) else {
            return refused(EINVAL);
        };
        let bytes = match len {
            1 | 2 | 4 | 8 => u64::try_from(len).unwrap_or(1),
            _ => return refused(EINVAL),
        };
        let inside = offset
            .checked_add(bytes)
            .is_some_and(|end| end <= behind.object.size());
        if !inside || !offset.is_multiple_of(bytes) {
            return refused(EINVAL);
        }
        if !behind.io && !self.gate.is_gone() && !self.gate.decodes_memory() {
            return refused(EIO);
        }
        Ok(&behind.object)
    }

    /// How many bytes go over the bus at once.
    fn stride(&self, len: usize) -> usize {
        if self.split_wide {
            len.clamp(1, 4)
        } else {
            len.max(1)
        }
    }
}

/// Refuses what no function can be.
fn check(spec: &FunctionSpec) -> io::Result<()> {
    let mut upper_half = false;
    for bar in &spec.bars {
        let wide = bar.as_ref().is_some_and(|bar| bar.kind.is_wide());
        if bar.is_some() && upper_half {
            return refused(EINVAL);
        }
        upper_half = wide;
        let Some(bar) = bar else { continue };
        let areas_fit = bar.areas.iter().all(|(offset, size)| {
            *size > 0
                && offset.is_multiple_of(PAGE)
                && size.is_multiple_of(PAGE)
                && offset.checked_add(*size).is_some_and(|end| end <= bar.size)
        });
        if bar.size == 0 || !areas_fit {
            return refused(EINVAL);
        }
    }
    if upper_half { refused(EINVAL) } else { Ok(()) }
}

fn areas(host: &SimHost, object: &Arc<PhysicalObject>, bar: &BarSpec) -> Vec<HostBarArea> {
    bar.areas
        .iter()
        .map(|(offset, size)| HostBarArea {
            offset: *offset,
            size: *size,
            backing: Backing::new(SimBarArea {
                host: host.clone(),
                object: Arc::clone(object),
                offset: *offset,
                size: *size,
                dma_buf: SimFile::new(host, object, *offset, *size),
            }),
        })
        .collect()
}

fn join_group(state: &mut State, spec: &FunctionSpec) -> GroupId {
    let id = spec.group.unwrap_or_else(|| state.fresh_group());
    let group = state.groups.entry(id).or_default();
    group.reserved.extend(&spec.reserved);
    id
}

impl HostFunction for SimFunction {
    fn name(&self) -> String {
        self.name.to_string()
    }

    fn config_size(&self) -> u16 {
        self.config_size
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.host.call(Call::ConfigRead, &self.name, None, || {
            let config = self.config.lock();
            if !config.has(offset, data.len()) {
                return refused(EINVAL);
            }
            if self.gate.is_gone() {
                data.fill(0xff);
            } else {
                config.read(offset, data);
            }
            Ok(())
        })
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.host.call(Call::ConfigWrite, &self.name, None, || {
            let state = self.host.0.state.write();
            let mut config = self.config.lock();
            if !config.has(offset, data.len()) {
                return refused(EINVAL);
            }
            if self.gate.is_gone() {
                return Ok(());
            }
            let asked = config.asked(offset, data);
            if asked.memory == Some(false) {
                self.revoke(RevocationCause::CommandWrite);
            }
            let decoded = self.gate.decodes_memory();
            config.write(offset, data);
            self.gate.set_command(config.command());
            if decoded && !self.gate.decodes_memory() {
                self.record_still_mapped(&state);
            }
            if asked.memory.is_some() {
                self.restore();
            }
            if let Some(power) = asked.power {
                self.set_power(&state, &mut config, power);
            }
            if asked.reset {
                // The kernel keeps to itself whether it worked.
                let cause = RevocationCause::FunctionLevelReset;
                let _ = self.reset_function(&state, &mut config, self.reset_method, cause);
            }
            Ok(())
        })
    }

    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>> {
        self.host.call(Call::Bar, &self.name, None, || {
            Ok(self.behind(bar).map(|behind| HostBar {
                size: behind.object.size(),
                areas: behind.areas.clone(),
            }))
        })
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.host.call(Call::BarRead, &self.name, None, || {
            let object = self.accessible(bar, offset, data.len())?;
            if self.gate.is_gone() || self.is_in_table(bar, offset) {
                data.fill(0xff);
                return Ok(());
            }
            let stride = self.stride(data.len());
            for (part, at) in data.chunks_mut(stride).zip((offset..).step_by(stride)) {
                object.read(at, part);
            }
            Ok(())
        })
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        self.host.call(Call::BarWrite, &self.name, None, || {
            let object = self.accessible(bar, offset, data.len())?;
            if self.gate.is_gone() || self.is_in_table(bar, offset) {
                return Ok(());
            }
            let stride = self.stride(data.len());
            for (part, at) in data.chunks(stride).zip((offset..).step_by(stride)) {
                object.write(at, part);
            }
            Ok(())
        })
    }

    fn reset(&self) -> io::Result<()> {
        self.host.call(Call::Reset, &self.name, None, || {
            if self.reset_method == ResetMethod::None {
                return refused(ENOTTY);
            }
            let state = self.host.0.state.write();
            let mut config = self.config.lock();
            self.reset_function(
                &state,
                &mut config,
                self.reset_method,
                RevocationCause::Reset,
            )
        })
    }

    fn is_virtual(&self) -> bool {
        self.gate.is_virtual()
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
        self.host.call(Call::ConnectVectors, &self.name, None, || {
            self.vectors.connect(kind, first, eventfds)
        })
    }

    fn disconnect_vectors(&self, kind: MsiKind) -> io::Result<()> {
        self.host
            .call(Call::DisconnectVectors, &self.name, None, || {
                self.vectors.disconnect(kind)
            })
    }
}

impl Drop for SimFunction {
    /// Unplugs it. Its group stays as it is.
    fn drop(&mut self) {
        let mut state = self.host.0.state.write();
        state.functions.remove(&self.name);
        state.dma_bufs.revoke(&self.name);
        for group in state.groups.values_mut() {
            if group.attached.remove(&self.name) && group.attached.is_empty() {
                group.ioas = None;
            }
        }
        self.gate.set_gone(true);
    }
}

impl fmt::Debug for SimFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFunction({})", self.name)
    }
}
