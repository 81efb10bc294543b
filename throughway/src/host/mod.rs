//! The host's side: functions that are opened through VFIO, their address spaces, and who may reach
//! whom in them.
//!
//! Both `p2p` and `run` begin with [`open`], which takes the way to program the IOMMU that was asked
//! for or is the best there is, and puts the functions that may see the same into one address space.
//! Nothing is mapped yet: whoever opened them lays out a memory map and registers the spaces with it.
//! What is opened belongs to the opener; the host has a function back when its last handle is
//! dropped.

mod announced;
mod bus;
pub mod choice;
mod hot_reset;
mod iommufd;
pub mod policy;
mod requests;
pub mod space;
mod type1;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use assigned_pci::VfioFunction;
use memory_map::Filter;
use vfio_sys::{Bdf, CdevError, Device, Sysfs};

pub use self::announced::Announced;
pub use self::bus::Bus;
use self::choice::{Choice, Iommu, Ways, choose};
use self::policy::Policy;
pub use self::requests::{Requests, ensure_left};
use self::space::{PartFunction, Space};

/// Somebody who is told of the files of devices before these are opened: KVM.
pub trait Announce {
    /// A group's file, before a device is opened through it, or a device's own, before it is bound.
    /// `functions` are those that are opened by it.
    fn add(&self, functions: &[Bdf], file: BorrowedFd<'_>) -> io::Result<()>;

    /// None of them is used after all.
    fn forget_all(&self) -> io::Result<()>;
}

/// What is opened, whichever way.
pub struct Opened {
    pub spaces: Vec<Space>,
    pub functions: Vec<PartFunction>,
    /// The same, as devices. They are given back to the host only after this has been dropped.
    pub devices: Vec<(Bdf, Arc<VfioFunction>)>,
    /// Which of the functions a hot reset resets together.
    pub buses: Vec<Bus>,
}

/// For pairs of functions, by their places, how what the one sends to the other may go past the
/// IOMMU.
pub type Bypasses = BTreeMap<(usize, usize), String>;

/// Opens `functions`, of which somebody may want to know.
pub fn open(
    functions: &[Bdf],
    asked: Iommu,
    policy: &Policy,
    announce: Option<&dyn Announce>,
) -> Result<(Opened, Bypasses, Choice)> {
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
        announce,
    };
    let (opened, choice) = choose(asked, &mut host)?;
    Ok((opened, bypasses(&sysfs, functions)?, choice))
}

struct Host<'h> {
    sysfs: &'h Sysfs,
    functions: &'h [Bdf],
    policy: &'h Policy,
    announce: Option<&'h dyn Announce>,
}

impl Ways for Host<'_> {
    type Opened = Opened;

    fn type1(&mut self) -> Result<Opened> {
        let opened = type1::open(self);
        self.forgotten_if_failed(opened)
    }

    fn iommufd(&mut self, every_bar: bool) -> Result<Opened> {
        let opened = iommufd::open(self, every_bar);
        self.forgotten_if_failed(opened)
    }

    fn wants_bars(&self) -> bool {
        self.policy.lets_any_reach_another()
    }
}

impl Host<'_> {
    /// The other way is not to be had while somebody keeps what was opened this way.
    fn forgotten_if_failed(&self, opened: Result<Opened>) -> Result<Opened> {
        if let (Err(_), Some(announce)) = (&opened, self.announce) {
            announce.forget_all()?;
        }
        opened
    }

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

    fn announce(&self, functions: &[Bdf], file: BorrowedFd<'_>) -> Result<()> {
        if let Some(announce) = self.announce {
            announce
                .add(functions, file)
                .context("KVM does not take an assigned device")?;
        }
        Ok(())
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
fn bypasses(sysfs: &Sysfs, functions: &[Bdf]) -> Result<Bypasses> {
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[derive(Default)]
    struct Forgetful {
        forgotten: Cell<usize>,
    }

    impl Announce for Forgetful {
        fn add(&self, _: &[Bdf], _: BorrowedFd<'_>) -> io::Result<()> {
            Ok(())
        }

        fn forget_all(&self) -> io::Result<()> {
            self.forgotten.set(self.forgotten.get() + 1);
            Ok(())
        }
    }

    #[test]
    fn nothing_stays_announced_of_a_way_that_is_not_to_be_had() {
        let nowhere: Bdf = "ffff:ff:1f.7".parse().unwrap();
        let sysfs = Sysfs::default();
        let announce = Forgetful::default();
        let mut host = Host {
            sysfs: &sysfs,
            functions: &[nowhere],
            policy: &Policy::new(&[], &[nowhere]).unwrap(),
            announce: Some(&announce),
        };
        assert!(host.type1().is_err());
        assert_eq!(announce.forgotten.get(), 1);
        assert!(host.iommufd(true).is_err());
        assert_eq!(announce.forgotten.get(), 2);
    }
}
