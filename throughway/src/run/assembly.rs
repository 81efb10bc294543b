//! Functions, address spaces and a machine, put together.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Context, Error, Result, bail, ensure};
use assigned_pci::{AssignedFunction, FunctionOptions, Windows, place_bars};
use machine::kvm::{AssignedFiles, Hypervisor, Vm};
use machine::layout::{Layout, Wanted};
use machine::{Images, Machine, Notices, Parts};
use memory_map::{Backing, IovaRange, RegionManager, TargetHandle, TargetOptions};
use vfio_sys::Bdf;

use super::RunArgs;
use super::outlet::Outlet;
use super::reach_watch::ReachWatch;
use super::report::{Function, Pair, RunReport};
use crate::host::choice::{Choice, Kind};
use crate::host::policy::Policy;
use crate::host::space::common;
use crate::host::{self, Announce, Announced, Bypasses, Opened};

/// A function that the guest gets.
struct Member {
    name: String,
    function: Arc<AssignedFunction>,
    /// Its address space's place among all.
    space: usize,
}

/// Everything but the machine itself. Fields end in this order: the functions' regions, the
/// IOMMUs, the map, KVM.
pub struct Assembly {
    members: Vec<Member>,
    spaces: Vec<(String, TargetHandle)>,
    map: RegionManager,
    bypasses: Bypasses,
    choice: Choice,
    layout: Layout,
    /// KVM's knowledge of the functions, for as long as they are used.
    _files: Option<AssignedFiles>,
    vm: Option<Vm>,
}

/// KVM, as one who wants to know of devices.
struct Announcer<'f>(&'f AssignedFiles);

impl Announce for Announcer<'_> {
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.0.add(file)
    }

    fn forget_all(&self) -> io::Result<()> {
        self.0.forget_all()
    }
}

impl Assembly {
    /// Opens the functions, finds everything a place, and registers the IOMMUs. There is no RAM
    /// yet.
    pub fn new(args: &RunArgs, policy: &Policy, hypervisor: &Hypervisor) -> Result<Self> {
        let vm = hypervisor.create()?;
        let bdfs: Vec<Bdf> = args.device.iter().map(|device| device.bdf).collect();
        let (opened, bypasses, choice, files) = if bdfs.is_empty() {
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
            let files = vm.assigned_files()?;
            let announcer = Announcer(&files);
            let (opened, bypasses, choice) =
                host::open(&bdfs, args.iommu, policy, Some(&announcer))?;
            (opened, bypasses, choice, Some(files))
        };

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
            let switch = Arc::new(Announced::default());
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
                interrupts: Some(Arc::new(vm.interrupts().clone())),
                ..FunctionOptions::default()
            };
            let function = Arc::new(AssignedFunction::new(part.host, map.clone(), &options)?);
            let switch = switches.get(part.space).context("no such address space")?;
            switch.add(&function);
            members.push(Member {
                name: device.name(),
                function,
                space: part.space,
            });
        }
        let bars: Vec<_> = members
            .iter()
            .flat_map(|member| member.function.bars())
            .filter(|bar| bar.kind.is_memory())
            .map(|bar| (bar.kind, bar.size))
            .collect();
        let layout = Layout::choose(&Wanted {
            ram: args.memory.size,
            allowed: &allowed.unwrap_or_default(),
            address_bits: vm.address_bits(),
            bars: &bars,
        })?;
        Ok(Self {
            members,
            spaces,
            map,
            bypasses,
            choice,
            layout,
            _files: files,
            vm: Some(vm),
        })
    }

    /// Places the BARs as a guest would and looks who reaches whom. Afterwards the functions are as
    /// at power-on.
    pub fn rehearse(&self, args: &RunArgs) -> Result<RunReport> {
        let functions: Vec<&AssignedFunction> = self
            .members
            .iter()
            .map(|member| &*member.function)
            .collect();
        let low = self.layout.low_window();
        let high = self.layout.high_window().unwrap_or(low);
        let pairs = place_bars(&functions, Windows { low, high })
            .map_err(Error::from)
            .and_then(|placed| match placed.outcome.host_errors.first() {
                Some(error) => Err(*error).context("placing the BARs"),
                None => self.pairs(),
            });
        // However that ended. Not every function has a reset; it is quiet all the same.
        for function in &functions {
            let _quiet: assigned_pci::Outcome = function.quiesce();
        }
        for function in &functions {
            let _reset: assigned_pci::Outcome = function.reset();
        }
        let pairs = pairs?;
        let name_of = |space: usize| self.spaces.get(space).map(|(name, _)| name.clone());
        Ok(RunReport {
            iommu: self.choice.clone(),
            processors: args.cpus,
            memory: args.memory.to_string(),
            layout: RunReport::stretches(&self.layout),
            functions: self
                .members
                .iter()
                .map(|member| Function {
                    name: member.name.clone(),
                    space: name_of(member.space).unwrap_or_default(),
                })
                .collect(),
            pairs,
        })
    }

    fn pairs(&self) -> Result<Vec<Pair>> {
        let mut pairs = Vec::new();
        for (from, who) in self.members.iter().enumerate() {
            let (_, target) = self
                .spaces
                .get(who.space)
                .context("no such address space")?;
            for (to, whose) in self.members.iter().enumerate() {
                if from == to {
                    continue;
                }
                let bypass = self.bypasses.get(&(from, to));
                for bar in whose.function.bars() {
                    let Some(region) = bar.region else {
                        continue;
                    };
                    let reach = self.map.reach_of(target.id(), region)?;
                    let bar = bar.index.get();
                    pairs.push(Pair::new(&who.name, &whose.name, bar, &reach, bypass));
                }
            }
        }
        Ok(pairs)
    }

    /// From now on says so when a function cannot reach what it may.
    pub fn watch(&self, notices: &Arc<Notices>) -> Result<ReachWatch> {
        ReachWatch::new(&self.map, notices.clone())
    }

    /// Makes the machine, with RAM for everyone.
    pub fn power_on(
        &mut self,
        args: &RunArgs,
        images: Images,
        console: Outlet,
        notices: Arc<Notices>,
    ) -> Result<Machine> {
        let vm = self.vm.take().context("the machine was made already")?;
        let functions = self.members.iter().map(|member| member.function.clone());
        let machine = Machine::new(Parts {
            vm,
            map: self.map.clone(),
            layout: self.layout.clone(),
            ram: Backing::new(args.memory.make()?),
            functions: functions.collect(),
            processors: args.cpus,
            images,
            console: Box::new(console),
            notices,
        })?;
        Ok(machine)
    }

    /// Takes everything down, and makes sure that nothing is left mapped.
    pub fn end(self) -> Result<()> {
        drop(self.members);
        for (name, handle) in self.spaces {
            let report = handle.unregister();
            ensure!(
                report.quarantined.is_empty(),
                "something is left mapped in {name}: {:?}",
                report.quarantined
            );
        }
        Ok(())
    }
}
