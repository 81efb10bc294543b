//! Functions, address spaces and a machine, put together.

use std::sync::Arc;

use anyhow::{Context, Error, Result, bail};
use assigned_pci::{AssignedFunction, FunctionOptions, put_bars};
use machine::kvm::{Hypervisor, Vm};
use machine::layout::{FunctionBars, Layout, Wanted};
use machine::{Images, Machine, Notices, Parts};
use memory_map::{Backing, IovaRange, RegionManager, TargetOptions};
use vfio_sys::Bdf;

use super::RunArgs;
use super::holdings::{Holdings, Member};
use super::known_to_kvm::KnownToKvm;
use super::outlet::Outlet;
use super::reach_watch::ReachWatch;
use super::report::{Function, RunReport};
use super::snapshot::{Enlisted, Roster};
use crate::host::choice::{Choice, Kind};
use crate::host::policy::Policy;
use crate::host::space::common;
use crate::host::{self, Announced, Bypasses, Opened, Requests};

/// Everything but the machine itself. Fields end in this order: the functions' regions, the
/// IOMMUs, the map, KVM.
pub struct Assembly {
    holdings: Holdings,
    requests: Requests,
    map: RegionManager,
    bypasses: Bypasses,
    choice: Choice,
    layout: Layout,
    vm: Vm,
}

/// What comes of an assembly. The machine ends first.
pub struct Powered {
    pub machine: Machine,
    pub holdings: Holdings,
    /// By which the host says what it wants back.
    pub requests: Requests,
}

impl Assembly {
    /// Opens the functions, finds everything a place, and registers the IOMMUs. There is no RAM
    /// yet. Devices that are cut off later are told by `said`.
    pub fn new(
        args: &RunArgs,
        policy: &Policy,
        hypervisor: &Hypervisor,
        said: &Outlet,
    ) -> Result<Self> {
        let vm = hypervisor.create()?;
        let bdfs: Vec<Bdf> = args.device.iter().map(|device| device.bdf).collect();
        let (opened, bypasses, choice, known) = if bdfs.is_empty() {
            let none = Opened {
                spaces: Vec::new(),
                functions: Vec::new(),
                devices: Vec::new(),
                buses: Vec::new(),
            };
            let choice = Choice {
                chosen: Kind::Iommufd,
                because: "there is nothing to be assigned".to_owned(),
            };
            (none, Bypasses::new(), choice, None)
        } else {
            let known = KnownToKvm::new(vm.assigned_files()?);
            let (opened, bypasses, choice) = host::open(&bdfs, args.iommu, policy, Some(&known))?;
            (opened, bypasses, choice, Some(known))
        };
        let requests = Requests::of(&opened.devices)?;
        // Whoever holds a device keeps the host from having it back.
        drop((opened.devices, opened.buses));

        let map = RegionManager::new();
        let mut allowed: Option<Vec<IovaRange>> = None;
        let mut targets = Vec::new();
        for space in opened.spaces {
            let target = (space.target)();
            let limits = target.limits();
            let limits = limits.context("the kernel does not tell what the IOMMU can map")?;
            allowed = Some(match allowed {
                None => limits.allowed,
                Some(before) => common(&before, &limits.allowed),
            });
            targets.push((target, space.name, space.filter));
        }
        if allowed.as_ref().is_some_and(Vec::is_empty) {
            bail!("there is no address that all of the functions' IOMMUs can map");
        }
        let mut spaces = Vec::new();
        let mut switches = Vec::new();
        for (target, name, filter) in targets {
            let said = said.clone();
            let switch = Arc::new(Announced::new(move |line| said.say(line)));
            let mut options = TargetOptions::new(name.clone());
            options.filter = filter;
            options.cut_off = Some(switch.clone());
            switches.push(switch);
            let handle = map.register(target, options);
            spaces.push((name, handle.context("registering an IOMMU failed")?));
        }
        let mut members = Vec::new();
        for (device, part) in args.device.iter().zip(opened.functions) {
            let options = FunctionOptions {
                interrupts: Some(Arc::new(vm.interrupts().of(&part.host.name()))),
                ..FunctionOptions::default()
            };
            let function = Arc::new(AssignedFunction::new(part.host, map.clone(), &options)?);
            let switch = switches.get(part.space).context("no such address space")?;
            switch.add(&function);
            members.push(Member {
                name: device.name(),
                bdf: device.bdf,
                function: Some(function),
                space: part.space,
            });
        }
        let holdings = Holdings::new(members, spaces, known);
        let bars = holdings.functions();
        let bars: Vec<_> = bars.map(|function| FunctionBars::of(function)).collect();
        let layout = Layout::choose(&Wanted {
            ram: args.memory.size,
            allowed: &allowed.unwrap_or_default(),
            address_bits: vm.address_bits(),
            functions: &bars,
        })?;
        Ok(Self {
            holdings,
            requests,
            map,
            bypasses,
            choice,
            layout,
            vm,
        })
    }

    /// Places the BARs as a guest would and looks who reaches whom. Afterwards the functions are as
    /// at power-on.
    pub fn rehearse(&self, args: &RunArgs) -> Result<RunReport> {
        let functions: Vec<_> = self.holdings.functions().collect();
        let mut wanted = Vec::new();
        for (function, places) in functions.iter().zip(self.layout.bars()) {
            let bars = places.iter().map(|place| (place.bar, place.range.start()));
            wanted.push((&***function, bars.collect()));
        }
        let pairs = put_bars(&wanted).map_err(Error::from).and_then(|outcome| {
            match outcome.host_errors.first() {
                Some(error) => Err(*error).context("placing the BARs"),
                None => self.roster()?.all_pairs(),
            }
        });
        // However that ended. Not every function has a reset; it is quiet all the same. No BAR leaves
        // the map while a peer could write into it.
        for function in &functions {
            let _stopped: assigned_pci::Outcome = function.stop_mastering();
        }
        for function in &functions {
            let _quiet: assigned_pci::Outcome = function.quiesce();
        }
        for function in &functions {
            let _reset: assigned_pci::Outcome = function.reset();
        }
        let pairs = pairs?;
        let holdings = &self.holdings;
        Ok(RunReport {
            iommu: self.choice.clone(),
            processors: args.cpus,
            memory: args.memory.to_string(),
            layout: RunReport::stretches(&self.layout),
            functions: holdings
                .members
                .iter()
                .map(|member| Function {
                    name: member.name.clone(),
                    space: holdings
                        .space_name(member.space)
                        .unwrap_or_default()
                        .to_owned(),
                })
                .collect(),
            pairs,
        })
    }

    /// Whom to ask the map about, also while the machine runs. It keeps no function open.
    pub fn roster(&self) -> Result<Roster> {
        let holdings = &self.holdings;
        let mut functions = Vec::new();
        for member in &holdings.members {
            let target = holdings.target(member.space);
            let bars = member.function.iter().flat_map(|it| it.bars());
            functions.push(Enlisted {
                name: member.name.clone(),
                space: holdings
                    .space_name(member.space)
                    .unwrap_or_default()
                    .to_owned(),
                target: target.context("no such address space")?,
                bars: bars
                    .filter_map(|bar| Some((bar.index.get(), bar.region?)))
                    .collect(),
            });
        }
        Ok(Roster {
            map: self.map.clone(),
            functions,
            bypasses: self.bypasses.clone(),
        })
    }

    /// From now on says so when a function cannot reach what it may.
    pub fn watch(&self, notices: &Arc<Notices>) -> Result<ReachWatch> {
        ReachWatch::new(&self.map, notices.clone())
    }

    /// Makes the machine, with RAM for everyone.
    pub fn power_on(
        self,
        args: &RunArgs,
        images: Images,
        console: Outlet,
        notices: Arc<Notices>,
    ) -> Result<Powered> {
        let functions = self.holdings.functions().cloned();
        let machine = Machine::new(Parts {
            vm: self.vm,
            map: self.map,
            layout: self.layout,
            ram: Backing::new(args.memory.make()?),
            functions: functions.collect(),
            processors: args.cpus,
            images,
            console: Box::new(console),
            notices,
        })?;
        Ok(Powered {
            machine,
            holdings: self.holdings,
            requests: self.requests,
        })
    }
}
