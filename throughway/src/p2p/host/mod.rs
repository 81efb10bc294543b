//! Opening real devices through VFIO.

mod hot_reset;
mod iommufd;
mod requests;
mod type1;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use assigned_pci::VfioFunction;
use host_memory::Ram;
use memory_map::{Backing, Filter, GRANULE};
use vfio_sys::{Bdf, CdevError, Device, Group, Sysfs};

pub use self::requests::Requests;
use super::assembly::{PartFunction, Parts, Space};
use super::choice::{Choice, Iommu, Ways, choose};
use super::policy::Policy;

/// Opens `functions` and makes `memory` bytes of RAM. What the host wants back is noticed from then
/// on, if that is asked for.
pub fn open(
    functions: &[Bdf],
    asked: Iommu,
    policy: &Policy,
    memory: u64,
    listen: bool,
) -> Result<(Parts, Choice, Option<Requests>)> {
    let sysfs = Sysfs::default();
    // What is wrong whichever way they are opened is said before anything is touched.
    for bdf in functions {
        if let Err(CdevError::Open(error)) = sysfs.cdev_path(*bdf) {
            return Err(error.into());
        }
    }
    check_groups(&sysfs, functions, policy)?;
    let mut host = Host {
        sysfs: &sysfs,
        functions,
        policy,
    };
    let (opened, choice) = choose(asked, &mut host)?;
    let buses = hot_reset::buses(&opened.devices, &opened.groups);
    let requests = listen.then(|| Requests::of(&opened.devices)).transpose()?;
    let parts = Parts {
        spaces: opened.spaces,
        functions: opened.functions,
        buses,
        bypasses: bypasses(&sysfs, functions)?,
        ram: Backing::new(Ram::memfd(c"throughway-ram", memory)?),
        page: Backing::new(Ram::memfd(
            c"throughway-control",
            GRANULE.max(host_memory::page_size()),
        )?),
    };
    Ok((parts, choice, requests))
}

/// What is opened either way.
struct Opened {
    spaces: Vec<Space>,
    functions: Vec<PartFunction>,
    /// The same, as devices.
    devices: Vec<(Bdf, Arc<VfioFunction>)>,
    /// Those that they were opened by, with their numbers.
    groups: Vec<(u32, Arc<Group>)>,
}

struct Host<'h> {
    sysfs: &'h Sysfs,
    functions: &'h [Bdf],
    policy: &'h Policy,
}

impl Ways for Host<'_> {
    type Opened = Opened;

    fn type1(&mut self) -> Result<Opened> {
        type1::open(self)
    }

    fn iommufd(&mut self, every_bar: bool) -> Result<Opened> {
        iommufd::open(self, every_bar)
    }

    fn wants_bars(&self) -> bool {
        self.policy.lets_any_reach_another()
    }
}

impl Host<'_> {
    /// The functions by what they may see, and where each is in that. Functions of one IOMMU group
    /// are together.
    fn by_filter(&self) -> (Vec<(Filter, Vec<Bdf>)>, Vec<usize>) {
        let mut classes: Vec<(Filter, Vec<Bdf>)> = Vec::new();
        let mut places = Vec::new();
        for bdf in self.functions {
            let filter = self.policy.filter_of(*bdf);
            let place = classes.iter().position(|(known, _)| *known == filter);
            let place = place.unwrap_or_else(|| {
                classes.push((filter, Vec::new()));
                classes.len().saturating_sub(1)
            });
            if let Some((_, members)) = classes.get_mut(place) {
                members.push(*bdf);
            }
            places.push(place);
        }
        (classes, places)
    }

    fn function(&self, bdf: Bdf, device: Device) -> Result<Arc<VfioFunction>> {
        let is_virtual = self.sysfs.function_path(bdf).join("physfn").exists();
        let function = VfioFunction::new(bdf.to_string(), device)?;
        Ok(Arc::new(function.of_virtual_function(is_virtual)))
    }
}

fn check_groups(sysfs: &Sysfs, functions: &[Bdf], policy: &Policy) -> Result<()> {
    let mut groups: BTreeMap<u32, Vec<Bdf>> = BTreeMap::new();
    for bdf in functions {
        if let Some(group) = sysfs.function(*bdf)?.group {
            groups.entry(group).or_default().push(*bdf);
        }
    }
    for (group, functions) in groups {
        let all = sysfs.group_members(group)?;
        let all: Vec<String> = all.into_iter().map(|member| member.name).collect();
        policy.check_group(&format!("IOMMU group {group}"), &functions, &all)?;
    }
    Ok(())
}

/// For each ordered pair, by its places, how it may go past the IOMMU.
fn bypasses(sysfs: &Sysfs, functions: &[Bdf]) -> Result<BTreeMap<(usize, usize), String>> {
    let mut found = BTreeMap::new();
    for (from, sender) in functions.iter().enumerate() {
        for (to, receiver) in functions.iter().enumerate() {
            if from == to {
                continue;
            }
            if let Some(bypass) = sysfs.bypass(*sender, *receiver)? {
                found.insert((from, to), bypass.to_string());
            }
        }
    }
    Ok(found)
}
