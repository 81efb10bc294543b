//! By groups and containers.

use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::Result;
use assigned_pci::HostFunction;
use iommu::Type1Target;
use vfio_sys::{Bdf, Container, Group, Opener};

use super::space::{PartFunction, Space};
use super::{Host, Opened, hot_reset};

/// Opens them: a container for all that may see the same, or several where their IOMMUs differ.
pub fn open(host: &Host<'_>) -> Result<Opened> {
    let (classes, places) = host.by_filter();
    // Each class has containers of its own. No group is in two classes.
    let mut openers = Vec::new();
    for _ in &classes {
        openers.push(Opener::new(host.sysfs.clone()));
    }
    // Everything that can be wrong with any group is said before one is attached.
    let mut groups: Vec<(u32, Arc<Group>)> = Vec::new();
    for ((_, members), opener) in classes.iter().zip(&mut openers) {
        for bdf in members {
            let group = opener.group(*bdf)?;
            let number = host.sysfs.function(*bdf)?.group;
            if let Some(number) = number
                && !groups.iter().any(|(known, _)| *known == number)
            {
                host.announce(&in_group(host, members, number)?, group.as_fd())?;
                groups.push((number, group));
            }
        }
    }
    // All groups join before anything is mapped, so that no container's ranges shrink later.
    let mut spaces = Vec::new();
    let mut containers: Vec<Arc<Container>> = Vec::new();
    for ((filter, members), opener) in classes.iter().zip(&mut openers) {
        for bdf in members {
            let container = opener.container(*bdf)?;
            if containers
                .iter()
                .any(|known| Arc::ptr_eq(known, &container))
            {
                continue;
            }
            let kept = Arc::clone(&container);
            spaces.push(Space {
                name: format!("container {}", containers.len()),
                filter: filter.clone(),
                target: Box::new(move || Box::new(target(Arc::clone(&kept)))),
            });
            containers.push(container);
        }
    }
    let mut functions = Vec::new();
    let mut devices = Vec::new();
    for (bdf, place) in host.functions.iter().zip(places) {
        let Some(opener) = openers.get_mut(place) else {
            continue;
        };
        let container = opener.container(*bdf)?;
        let space = containers.iter().position(|c| Arc::ptr_eq(c, &container));
        let device = opener.device(*bdf)?;
        let function = host.function(*bdf, device)?;
        devices.push((*bdf, Arc::clone(&function)));
        let function: Arc<dyn HostFunction> = function;
        functions.push(PartFunction {
            host: function,
            space: space.unwrap_or_default(),
        });
    }
    Ok(Opened {
        spaces,
        functions,
        buses: hot_reset::buses(&devices, &groups),
        devices,
    })
}

/// Those of `functions` that are in an IOMMU group.
fn in_group(host: &Host<'_>, functions: &[Bdf], number: u32) -> Result<Vec<Bdf>> {
    let mut found = Vec::new();
    for bdf in functions {
        if host.sysfs.function(*bdf)?.group == Some(number) {
            found.push(*bdf);
        }
    }
    Ok(found)
}

#[expect(unsafe_code, reason = "what the container maps must be real memory")]
fn target(container: Arc<Container>) -> Type1Target<Container> {
    // SAFETY: the map that this target is registered with has two kinds of backing: `Ram` of
    // `host_memory` and the BARs of `VfioFunction`s. Both give the address of a mapping of their
    // own that lives as long as its `HostMapping`, and no reference is ever made into either.
    unsafe { Type1Target::new(container) }
}
