//! The assigned function: one PCI function of the host's, as the guest sees it.
//!
//! The embedder makes an [`AssignedFunction`] from the host's side of the function and a handle
//! on the memory map, and shares it between its vCPU threads. It owns one region of the map for
//! each memory BAR, from its making until it is removed or dropped.
//!
//! # Locks
//! One mutex for each function, held for a whole access to config space, so that writes take
//! effect one after the other, as on the bus. It is taken before the map's locks and never the
//! other way round: whoever is called *by* the map (a target, one who watches) must not call an
//! `AssignedFunction`, only a [`HostFunction`]. A cut-off may call
//! [`AssignedFunction::cut_off`], which waits for no function's lock, and nothing else. Whoever
//! takes several functions' locks takes them in the order of their names, as a
//! [`ResetSet`](crate::ResetSet) does. No lock of the map is held across a call to the host.
//!
//! Reads and writes of BARs hold no lock while the host carries them out.

use std::fmt;
use std::sync::Arc;

use memory_map::{DisabledBecause, Gpa, Priority, RegionId, RegionManager};

use crate::bar::{Bar, BarKind};
use crate::config_space::{COMMAND, CONVENTIONAL_SIZE, ConfigReader, EXPRESS_SIZE};
use crate::controls::Controls;
use crate::cut_off::Aftermath;
use crate::discovery::{bar_error, quiesce, read_bars, read_ids, region};
use crate::filter::Filter;
use crate::guarded_host::GuardedHost;
use crate::interrupts::Interrupts;
use crate::power::PowerState;
use crate::shown::{AssignedBar, Shown};
use crate::sync::Mutex;
use crate::{
    BarIndex, Capability, FunctionError, HostCall, HostError, HostFunction, MsiController, MsiKind,
    Msix, Outcome, Treatment, capability, mappable,
};

/// How a function is assigned.
#[derive(Debug, Clone, Default)]
pub struct FunctionOptions {
    /// The priority of its BARs' regions. RAM's should be higher, so that a BAR that the guest
    /// puts over RAM does not hide it.
    pub priority: Priority,
    /// What delivers its interrupts. Without, it has none: MSI and MSI-X are hidden.
    pub interrupts: Option<Arc<dyn MsiController>>,
}

/// A vendor id and the device id that the vendor gave (PCI Local Bus 3.0, 6.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VendorDevice {
    /// The vendor.
    pub vendor: u16,
    /// The device.
    pub device: u16,
}

impl fmt::Display for VendorDevice {
    /// As `lspci -n` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)
    }
}

/// A BAR, as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarInfo {
    /// Which.
    pub index: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Its size in bytes, a power of two.
    pub size: u64,
    /// Where the guest put it: a guest-physical address, or a port for an I/O BAR.
    pub address: u64,
    /// Its region in the memory map; none for an I/O BAR.
    pub region: Option<RegionId>,
    /// Whether the region is enabled.
    pub enabled: bool,
}

/// A CPU access that reached a BAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuAccess {
    /// Which BAR answers.
    pub bar: BarIndex,
    /// Where in it the access begins, in bytes.
    pub offset: u64,
    /// What the access did to the map.
    pub outcome: Outcome,
}

/// One assigned PCI function. See the [crate's documentation](crate) for what it intercepts.
pub struct AssignedFunction {
    /// The guard, as everybody but the cut-off sees it.
    pub(crate) host: Arc<dyn HostFunction>,
    pub(crate) guard: Arc<GuardedHost>,
    pub(crate) config_size: u16,
    pub(crate) map: RegionManager,
    pub(crate) controls: Controls,
    pub(crate) aftermath: Aftermath,
    name: String,
    vendor_device: VendorDevice,
    capabilities: Vec<Capability>,
    pub(crate) filter: Filter,
    msix: Option<Msix>,
    /// Whether MSI-X's table and pending bits are emulated.
    pub(crate) emulates_msix: bool,
    /// Taken through [`AssignedFunction::lock`] only.
    pub(crate) state: Mutex<State>,
}

/// What changes.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) bars: Vec<AssignedBar>,
    /// Whether the guest sees memory decoding on. Off as soon as the guest asks for that; on only
    /// when the physical register is.
    pub(crate) decoding: bool,
    /// As the physical register said when it was last written.
    pub(crate) power: PowerState,
    /// While the host is asked for something that revokes: why no BAR may be seen.
    pub(crate) held: Option<DisabledBecause>,
    /// None without a controller.
    pub(crate) interrupts: Option<Interrupts>,
    /// Whether the function has been taken out of the guest.
    pub(crate) removed: bool,
}

impl AssignedFunction {
    /// Makes the function as it is at power-on: nothing decoded, all BARs at 0. Bus mastering and
    /// decoding are turned off in the physical command register, and one disabled region for each
    /// memory BAR is added to `map`.
    ///
    /// # Errors
    /// See [`FunctionError`]: a host that refuses, a device that does not answer or whose config
    /// space makes no sense, a map that does not take the regions.
    pub fn new(
        host: Arc<dyn HostFunction>,
        map: RegionManager,
        options: &FunctionOptions,
    ) -> Result<Self, FunctionError> {
        let name = host.name();
        let config = ConfigReader {
            host: &*host,
            function: &name,
        };
        let config_size = host.config_size();
        if !matches!(config_size, CONVENTIONAL_SIZE | EXPRESS_SIZE) {
            return Err(FunctionError::ConfigSize {
                function: name,
                size: config_size,
            });
        }
        let vendor_device = read_ids(&config)?;
        let capabilities = capability::walk(&config, config_size)?;
        let found = read_bars(&config)?;
        let bars: Vec<Bar> = found.iter().map(|(bar, _)| bar.clone()).collect();
        let msix = Msix::read(&config, &capabilities, &bars)?;

        let interrupts = match &options.interrupts {
            Some(controller) => {
                let controller = Arc::clone(controller);
                Some(Interrupts::read(&config, &capabilities, msix, controller)?)
            }
            None => None,
        };
        let emulates = |capability: &Capability| {
            let interrupts = interrupts.as_ref();
            interrupts.is_some_and(|interrupts| interrupts.emulates(capability))
        };
        let filter = Filter::read(&config, &capabilities, emulates)?;
        let emulates_msix = capabilities
            .iter()
            .any(|capability| capability.id == Capability::MSIX && emulates(capability));

        let controls = Controls::read(&config, &capabilities)?;
        let power = match controls.power {
            Some(power) => PowerState::from_register(config.u8(power.at)?),
            None => PowerState::D0,
        };

        let mut state = State {
            bars: Vec::new(),
            decoding: false,
            power,
            held: None,
            interrupts,
            removed: false,
        };
        let mut change = map.change();
        for (bar, behind) in found {
            let mut shown = None;
            if bar.kind().is_memory() {
                let trapped: Vec<_> = msix
                    .iter()
                    .flat_map(|msix| msix.trapped(bar.index()))
                    .collect();
                let sub_mappings = mappable::sub_mappings(&behind, &trapped)
                    .map_err(|problem| bar_error(&name, bar.index(), problem))?;
                let spec = region(&name, &bar, sub_mappings, options).map_err(|error| {
                    FunctionError::Map {
                        function: name.clone(),
                        error,
                    }
                })?;
                let region = change.add(spec);
                let down = match power.is_awake() {
                    true => DisabledBecause::DecodingOff,
                    false => DisabledBecause::Sleeping,
                };
                change.disable(region, down);
                shown = Some(Shown {
                    region,
                    at: bar.address(),
                    down: Some(down),
                });
            }
            state.bars.push(AssignedBar {
                bar,
                backings: behind.areas.into_iter().map(|area| area.backing).collect(),
                shown,
            });
        }
        quiesce(&config, state.command_off())?;
        // The kernel revokes when decoding goes off. Nothing of ours is mapped yet.
        for backing in state.bars.iter().flat_map(|assigned| &assigned.backings) {
            backing.advance_epoch();
        }
        change.commit().map_err(|error| FunctionError::Map {
            function: name.clone(),
            error,
        })?;
        let guard = Arc::new(GuardedHost::new(host));
        Ok(Self {
            host: guard.clone(),
            guard,
            config_size,
            controls,
            aftermath: Aftermath::default(),
            name,
            vendor_device,
            capabilities,
            filter,
            msix,
            emulates_msix,
            state: Mutex::new(state),
            map,
        })
    }

    /// For people: the BDF, for a real function.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What device it is.
    #[must_use]
    pub const fn vendor_device(&self) -> VendorDevice {
        self.vendor_device
    }

    /// The host's side of the function, behind the guard that holds bus mastering off once the
    /// function has been [cut off](Self::cut_off). Whoever drives the device on the host's side
    /// should do it through this.
    #[must_use]
    pub fn host(&self) -> &Arc<dyn HostFunction> {
        &self.host
    }

    /// Its capabilities, the standard ones first, each list in its own order.
    #[must_use]
    pub fn capabilities(&self) -> &[Capability] {
        &self.capabilities
    }

    /// What the guest sees of one of its [capabilities](Self::capabilities). Where the
    /// [table](crate::CapabilityRule) says *emulated* and nobody delivers interrupts, it is hidden.
    #[must_use]
    pub fn treatment(&self, capability: &Capability) -> Treatment {
        match capability.rule() {
            _ if self.filter.hides(capability) => Treatment::Hidden,
            Some(rule) => rule.treatment,
            None => Treatment::Shown,
        }
    }

    /// The kind of interrupts that the guest has enabled, and how many vectors it may use.
    #[must_use]
    pub fn enabled_vectors(&self) -> Option<(MsiKind, u16)> {
        self.lock().interrupts.as_ref()?.enabled()
    }

    /// Its MSI-X capability, if it has one.
    #[must_use]
    pub const fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    /// Its BARs, as they are now, by index. The upper half of a 64-bit one is not listed.
    #[must_use]
    pub fn bars(&self) -> Vec<BarInfo> {
        let state = self.lock();
        state.bars.iter().map(AssignedBar::info).collect()
    }

    /// The region of a memory BAR, if there is such a BAR.
    #[must_use]
    pub fn region_of(&self, bar: BarIndex) -> Option<RegionId> {
        let state = self.lock();
        let assigned = state.bars.iter().find(|a| a.bar.index() == bar)?;
        assigned.shown.map(|shown| shown.region)
    }

    /// The BAR of a region, if the region is one of this function's.
    #[must_use]
    pub fn bar_of(&self, region: RegionId) -> Option<BarIndex> {
        let state = self.lock();
        let mut bars = state.bars.iter();
        bars.find(|a| a.shown.is_some_and(|shown| shown.region == region))
            .map(|a| a.bar.index())
    }

    /// To be called for a CPU access at `gpa` where nothing in the map's view answers. If a BAR of
    /// this function is there as its registers stand, the access reaches it: half written or not,
    /// it is visible from now on. A BAR that is being sized stays down.
    #[must_use = "what it did to the map should not be lost"]
    pub fn cpu_access(&self, gpa: Gpa) -> Option<CpuAccess> {
        let mut state = self.lock();
        if state.removed || !state.decodes() {
            return None;
        }
        let (bar, offset) = state.bars.iter_mut().find_map(|assigned| {
            let bar = &mut assigned.bar;
            if !bar.kind().is_memory() || bar.is_sized() {
                return None;
            }
            let offset = gpa.raw().checked_sub(bar.address())?;
            if offset >= bar.size() {
                return None;
            }
            bar.settle();
            Some((bar.index(), offset))
        })?;
        let mut outcome = Outcome::default();
        self.sync(&mut state, false, &mut outcome);
        Some(CpuAccess {
            bar,
            offset,
            outcome,
        })
    }

    /// Takes the function out of the guest: bus mastering goes off, and is held off for good, its
    /// interrupts are disconnected, and its regions leave the map in one commit. From then on config
    /// space reads all ones and everything written is ignored. A second call does nothing.
    ///
    /// The host's side goes on decoding: what is not reached any more is not reached because nobody
    /// has a mapping of it. It is closed when this value and all backings of its BARs are dropped.
    pub fn remove(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut state = self.lock();
        if state.removed {
            return outcome;
        }
        state.removed = true;
        state.decoding = false;
        if let Err(error) = self.guard.cut_off() {
            let error = HostError::new(HostCall::ConfigWrite(COMMAND), &error);
            outcome.host_errors.push(error);
        }
        self.end_interrupts(&mut state, &mut outcome);
        let regions: Vec<_> = state
            .bars
            .iter_mut()
            .filter_map(|assigned| assigned.shown.take())
            .map(|shown| shown.region)
            .collect();
        let mut change = self.map.change();
        for region in &regions {
            change.remove(*region);
        }
        if !outcome.record(change.commit_guest()) {
            // Somebody else has removed one of them: the others go one by one.
            for region in regions {
                let mut change = self.map.change();
                change.remove(region);
                outcome.record(change.commit_guest());
            }
        }
        outcome
    }

    /// Whether memory accesses are answered: the guest has turned memory decoding on, and the
    /// function is awake.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.lock().decodes()
    }

    /// Disconnects all interrupt vectors; their registers are as at power-on.
    pub(crate) fn end_interrupts(&self, state: &mut State, outcome: &mut Outcome) {
        if let Some(interrupts) = &mut state.interrupts {
            interrupts.reset(&*self.host, outcome);
        }
    }

    /// Writes the host's config space and tells whether the host took it.
    pub(crate) fn write_host(&self, offset: u16, data: &[u8], outcome: &mut Outcome) -> bool {
        let written = self.host.config_write(offset, data);
        if let Err(error) = &written {
            let error = HostError::new(HostCall::ConfigWrite(offset), error);
            outcome.host_errors.push(error);
        }
        written.is_ok()
    }
}

impl Drop for AssignedFunction {
    /// Takes its regions out of the map.
    fn drop(&mut self) {
        // The map cannot refuse; that a region has gone before is no harm.
        drop(self.remove());
    }
}

impl fmt::Debug for AssignedFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AssignedFunction")
            .field("name", &self.name)
            .field("vendor_device", &self.vendor_device)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
