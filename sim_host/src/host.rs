//! The simulated host as a whole.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;

use libc::{EINVAL, ENOMEM};
use memory_map::{Access, Errno, Iova, IovaRange};
use parking_lot::{Mutex, RwLock};

use crate::address_space::AddressSpace;
use crate::call::{Call, CallBook, CallPoint, CallRecord, Injected};
use crate::dma_buf::DmaBufs;
use crate::domain::Domain;
use crate::file::Files;
use crate::ioas_state::{IoasKey, Ioases};
use crate::log::{BusError, Fault, Logs, Violation};
use crate::page::PAGE;
use crate::physical::{PhysicalBus, PhysicalObject, Storage};
use crate::sparse::SparseMemory;
use crate::translation::BrokenTranslation;
use crate::{
    ContainerId, FunctionSpec, GroupId, SimContainer, SimFunction, SimIoasMapping, SimIommufd,
    SimRam,
};

/// What the host's IOMMU and its kernel can do.
#[derive(Debug, Clone)]
pub struct HostSpec {
    /// Page sizes of the IOMMU: bit n set for pages of 2^n bytes. The smallest is at least 4 KiB.
    pub page_sizes: u64,
    /// The highest address that it translates.
    pub aperture_last: Iova,
    /// The windows that the platform keeps to itself.
    pub reserved: Vec<IovaRange>,
    /// How many mappings a container holds (the module parameter `dma_entry_limit`).
    pub entry_limit: u32,
    /// How many bytes may be pinned (`RLIMIT_MEMLOCK`); nothing stands for `CAP_IPC_LOCK`.
    pub locked_limit: Option<u64>,
}

impl Default for HostSpec {
    /// What the lab's machine has: 4 KiB, 2 MiB and 1 GiB pages, 48 bits, the MSI window of x86,
    /// 65,535 mappings, no limit on locked memory.
    fn default() -> Self {
        Self {
            page_sizes: 0x4020_1000,
            aperture_last: Iova::new(0xffff_ffff_ffff),
            reserved: IovaRange::new(Iova::new(0xfee0_0000), 0x10_0000)
                .into_iter()
                .collect(),
            entry_limit: 65_535,
            locked_limit: None,
        }
    }
}

impl HostSpec {
    /// The smallest page in bytes.
    pub(crate) fn page(&self) -> u64 {
        1u64.checked_shl(self.page_sizes.trailing_zeros())
            .unwrap_or(PAGE)
            .max(PAGE)
    }

    /// What a container may map before any function adds its own reserved ranges.
    pub(crate) fn allowed(&self) -> Vec<IovaRange> {
        let all: Vec<_> = IovaRange::from_inclusive(Iova::new(0), self.aperture_last)
            .into_iter()
            .collect();
        crate::domain::exclude(&all, &self.reserved)
    }
}

/// A mapping in a simulated IOMMU, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimMapping {
    /// Whose.
    pub container: ContainerId,
    /// Where.
    pub iova: IovaRange,
    /// What devices may do there.
    pub access: Access,
    /// Of what: `ram0`, or a function's name and BAR.
    pub object: Arc<str>,
    /// Where in that object it starts.
    pub offset: u64,
}

/// A group and what belongs to it.
#[derive(Debug, Default)]
pub(crate) struct GroupState {
    pub container: Option<ContainerId>,
    /// The address space of an iommufd that it shares; then it is in no container.
    pub ioas: Option<IoasKey>,
    /// Which of its functions are attached to that.
    pub attached: BTreeSet<Arc<str>>,
    /// What its functions reserve.
    pub reserved: Vec<IovaRange>,
}

/// A container. Without an IOMMU it takes no calls.
#[derive(Debug, Default)]
pub(crate) struct ContainerState {
    pub domain: Option<Domain>,
}

/// What changes under one lock. DMA holds it for reading while it moves bytes, so that none
/// arrives after an unmap has returned.
#[derive(Debug)]
pub(crate) struct State {
    pub space: AddressSpace,
    pub bus: PhysicalBus,
    pub containers: BTreeMap<ContainerId, ContainerState>,
    pub ioases: Ioases,
    pub dma_bufs: Arc<DmaBufs>,
    pub files: Files,
    pub groups: BTreeMap<GroupId, GroupState>,
    /// Which functions there are, and which group each is in.
    pub functions: BTreeMap<Arc<str>, GroupId>,
    pub locked_limit: Option<u64>,
    pub broken: Option<BrokenTranslation>,
    next_container: u32,
    next_group: u32,
    next_ram: u32,
}

impl State {
    pub fn mappings(&self) -> impl Iterator<Item = (ContainerId, &crate::domain::Mapping)> {
        self.containers.iter().flat_map(|(id, container)| {
            container
                .domain
                .iter()
                .flat_map(|domain| domain.mappings().map(|mapping| (*id, mapping)))
        })
    }

    pub fn locked_pages(&self) -> u64 {
        self.containers
            .values()
            .filter_map(|container| container.domain.as_ref())
            .map(Domain::locked_pages)
            .sum()
    }

    pub fn fresh_group(&mut self) -> GroupId {
        loop {
            let id = GroupId(self.next_group);
            self.next_group = self.next_group.wrapping_add(1);
            if !self.groups.contains_key(&id) {
                return id;
            }
        }
    }

    pub fn add_container(&mut self) -> ContainerId {
        let id = ContainerId(self.next_container);
        self.next_container = self.next_container.wrapping_add(1);
        self.containers.insert(id, ContainerState::default());
        id
    }
}

pub(crate) struct HostInner {
    pub spec: HostSpec,
    pub state: RwLock<State>,
    pub logs: Mutex<Logs>,
    pub calls: Mutex<CallBook>,
    hook: Mutex<Option<Arc<Hook>>>,
    /// The state's, for those who have it locked.
    pub dma_bufs: Arc<DmaBufs>,
}

/// What happens at the points that calls reach.
type Hook = dyn Fn(CallPoint) + Send + Sync;

thread_local! {
    /// Whether this thread is in a hook: what that does reaches no points of its own.
    static IN_HOOK: Cell<bool> = const { Cell::new(false) };
}

/// A simulated host. Clones are handles on the same host.
///
/// Everything made from it holds it; it ends with the last of them.
#[derive(Clone)]
pub struct SimHost(pub(crate) Arc<HostInner>);

impl Default for SimHost {
    fn default() -> Self {
        Self::new(HostSpec::default())
    }
}

impl SimHost {
    /// A host without functions and without RAM to lend.
    #[must_use]
    pub fn new(spec: HostSpec) -> Self {
        let locked_limit = spec.locked_limit;
        let dma_bufs = Arc::new(DmaBufs::default());
        Self(Arc::new(HostInner {
            spec,
            state: RwLock::new(State {
                space: AddressSpace::new(),
                bus: PhysicalBus::new(),
                containers: BTreeMap::new(),
                ioases: Ioases::default(),
                dma_bufs: Arc::clone(&dma_bufs),
                files: Files::default(),
                groups: BTreeMap::new(),
                functions: BTreeMap::new(),
                locked_limit,
                broken: None,
                next_container: 0,
                next_group: 0,
                next_ram: 0,
            }),
            logs: Mutex::default(),
            calls: Mutex::default(),
            hook: Mutex::default(),
            dma_bufs,
        }))
    }

    /// RAM of `size` bytes, a multiple of 4 KiB; it reads as zeroes.
    ///
    /// # Errors
    /// `EINVAL` for a size that is zero or not a multiple of 4 KiB; `ENOMEM` where the host's
    /// physical address space is full.
    pub fn ram(&self, size: u64) -> io::Result<SimRam> {
        if size == 0 || !size.is_multiple_of(PAGE) {
            return Err(io::Error::from_raw_os_error(EINVAL));
        }
        let mut state = self.0.state.write();
        let base = state
            .bus
            .place_ram(size)
            .ok_or_else(|| io::Error::from_raw_os_error(ENOMEM))?;
        let label = format!("ram{}", state.next_ram).into();
        state.next_ram = state.next_ram.wrapping_add(1);
        let object = Arc::new(PhysicalObject {
            label,
            base,
            storage: Storage::Memory(SparseMemory::new(size)),
            owner: None,
        });
        state.bus.add(&object);
        Ok(SimRam::new(self.clone(), object))
    }

    /// The same, but in no file: it can only be mapped by its host address.
    ///
    /// # Errors
    /// As for [`ram`](Self::ram).
    pub fn anonymous_ram(&self, size: u64) -> io::Result<SimRam> {
        Ok(self.ram(size)?.without_file())
    }

    /// Plugs a function in.
    ///
    /// # Errors
    /// `EEXIST` where one of that name is there; `EINVAL` for a BAR that no function can have:
    /// empty, or a 64-bit one without a register for its upper half; `ENOSPC` where the BARs find
    /// no room on the bus.
    pub fn add_function(&self, spec: FunctionSpec) -> io::Result<Arc<SimFunction>> {
        SimFunction::plug(self, spec)
    }

    /// Opens a container: no group, no IOMMU.
    #[must_use]
    pub fn open_container(&self) -> SimContainer {
        let id = self.0.state.write().add_container();
        SimContainer::new(self.clone(), id)
    }

    /// Opens a container, has the functions' groups join it and sets its IOMMU.
    ///
    /// # Errors
    /// As [`SimContainer::attach`] and [`SimContainer::set_iommu`].
    pub fn container(&self, functions: &[&SimFunction]) -> io::Result<SimContainer> {
        let container = self.open_container();
        for function in functions {
            container.attach(function.group())?;
        }
        container.set_iommu()?;
        Ok(container)
    }

    /// Opens an iommufd.
    #[must_use]
    pub fn open_iommufd(&self) -> SimIommufd {
        SimIommufd::new(self.clone())
    }

    /// Has `hook` be called at every point that a call reaches, with no lock of the host's held;
    /// nothing for no hook. What the hook itself does reaches no points.
    pub fn set_hook(&self, hook: Option<Arc<dyn Fn(CallPoint) + Send + Sync>>) {
        *self.0.hook.lock() = hook;
    }

    /// Revokes a function's dma-bufs, as a reset does whose beginning was all that happened of
    /// it.
    pub fn revoke_dma_bufs(&self, function: &SimFunction) {
        let state = self.0.state.write();
        state.dma_bufs.revoke(&function.name);
    }

    /// Has a function's dma-bufs be mapped again, as when a reset is over.
    pub fn restore_dma_bufs(&self, function: &SimFunction) {
        let state = self.0.state.write();
        state.dma_bufs.restore(&function.name);
    }

    /// Sets how many bytes may be pinned from now on (`RLIMIT_MEMLOCK`); nothing for no limit.
    pub fn set_locked_limit(&self, bytes: Option<u64>) {
        self.0.state.write().locked_limit = bytes;
    }

    /// How many bytes iommufd has pinned. It counts apart from type1.
    #[must_use]
    pub fn iommufd_locked_bytes(&self) -> u64 {
        let pages = self.0.state.read().pinned_pages(None, &[]);
        pages.saturating_mul(PAGE)
    }

    /// All mappings in all address spaces of all iommufds.
    #[must_use]
    pub fn ioas_mappings(&self) -> Vec<SimIoasMapping> {
        self.0.state.read().all_ioas_mappings()
    }

    /// How many bytes are pinned by containers.
    #[must_use]
    pub fn locked_bytes(&self) -> u64 {
        self.0.state.read().locked_pages().saturating_mul(PAGE)
    }

    /// Has the IOMMU translate wrongly from now on, or rightly again.
    pub fn break_translation(&self, how: Option<BrokenTranslation>) {
        self.0.state.write().broken = how;
    }

    /// All mappings in all containers; [`ioas_mappings`](Self::ioas_mappings) has the others.
    #[must_use]
    pub fn mappings(&self) -> Vec<SimMapping> {
        self.0
            .state
            .read()
            .mappings()
            .map(|(container, mapping)| SimMapping {
                container,
                iova: mapping.iova,
                access: mapping.access,
                object: Arc::clone(&mapping.object.label),
                offset: mapping.offset,
            })
            .collect()
    }

    /// How many host mappings ([`HostMapping`](memory_map::HostMapping)) are alive.
    #[must_use]
    pub fn host_mappings(&self) -> usize {
        self.0.state.read().space.len()
    }

    /// The DMA accesses that the IOMMU refused, in order.
    #[must_use]
    pub fn faults(&self) -> Vec<Fault> {
        self.0.logs.lock().faults.clone()
    }

    /// The same, and forgets them.
    #[must_use]
    pub fn take_faults(&self) -> Vec<Fault> {
        std::mem::take(&mut self.0.logs.lock().faults)
    }

    /// The DMA accesses that nobody answered, in order.
    #[must_use]
    pub fn bus_errors(&self) -> Vec<BusError> {
        self.0.logs.lock().bus_errors.clone()
    }

    /// The same, and forgets them.
    #[must_use]
    pub fn take_bus_errors(&self) -> Vec<BusError> {
        std::mem::take(&mut self.0.logs.lock().bus_errors)
    }

    /// What must never happen and did, in order. It cannot be made to forget.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        self.0.logs.lock().violations.clone()
    }

    /// Has the `nth` call of a kind from now on (1 is the next) fail with `errno`; it does
    /// nothing.
    pub fn fail(&self, call: Call, nth: u64, errno: i32) {
        self.0
            .calls
            .lock()
            .fail(call, nth, Errno::new(errno), false);
    }

    /// Has the `nth` call of a kind from now on (1 is the next) do what it was asked and then say
    /// that it failed with `errno`.
    pub fn fail_though_done(&self, call: Call, nth: u64, errno: i32) {
        self.0.calls.lock().fail(call, nth, Errno::new(errno), true);
    }

    /// Has every call of a kind fail from now on, without doing anything.
    pub fn fail_from_now(&self, call: Call, errno: i32) {
        self.0
            .calls
            .lock()
            .fail_from_now(call, Errno::new(errno), false);
    }

    /// Has every call of a kind do what it was asked and then say that it failed.
    pub fn fail_from_now_though_done(&self, call: Call, errno: i32) {
        self.0
            .calls
            .lock()
            .fail_from_now(call, Errno::new(errno), true);
    }

    /// Calls off every failure that was asked for and has not happened.
    pub fn stop_failing(&self) {
        self.0.calls.lock().stop_failing();
    }

    /// How many calls of a kind there were, failed ones included.
    #[must_use]
    pub fn count(&self, call: Call) -> u64 {
        self.0.calls.lock().count(call)
    }

    /// The calls that were made, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<CallRecord> {
        self.0.calls.lock().records().to_vec()
    }

    /// Forgets the calls that were made; the counts stay.
    pub fn forget_calls(&self) {
        self.0.calls.lock().forget_records();
    }

    /// Makes one call: counts it, lets it fail if that was asked for, records how it ended.
    pub(crate) fn call<T>(
        &self,
        call: Call,
        on: &Arc<str>,
        iova: Option<IovaRange>,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.reach_point(CallPoint::Before(call));
        let injected = self.0.calls.lock().begin(call);
        let result = match injected {
            None => work(),
            Some(Injected::Refused(errno)) => Err(errno.into()),
            Some(Injected::Done(errno)) => work().and(Err(errno.into())),
        };
        let outcome = result.as_ref().map(|_| ());
        self.0.calls.lock().record(call, on, iova, outcome);
        self.reach_point(CallPoint::After(call));
        result
    }

    /// Lets happen what is to happen at this point.
    pub(crate) fn reach_point(&self, point: CallPoint) {
        if IN_HOOK.get() {
            return;
        }
        let hook = self.0.hook.lock().clone();
        if let Some(hook) = hook {
            IN_HOOK.set(true);
            hook(point);
            IN_HOOK.set(false);
        }
    }
}

impl fmt::Debug for SimHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimHost")
    }
}
