//! Opening real devices through VFIO.

use std::sync::Arc;

use anyhow::{Context, Result};
use assigned_pci::{HostFunction, VfioFunction};
use host_memory::Ram;
use iommu::Type1Target;
use memory_map::{Backing, DmaTarget, GRANULE, IovaRange, TargetLimits};
use vfio_sys::{Bdf, Container, Opener, Sysfs};

use super::assembly::Parts;
use super::windows::common;

/// Opens `functions` and makes `memory` bytes of RAM.
pub fn open(functions: &[Bdf], memory: u64) -> Result<Parts> {
    let mut opener = Opener::new(Sysfs::default());
    // Everything that can be wrong with any of them is said before anything is touched.
    for bdf in functions {
        opener.group(*bdf)?;
    }
    // All groups join before anything is mapped, so that no container's ranges shrink later.
    let mut containers: Vec<Arc<Container>> = Vec::new();
    let mut places = Vec::new();
    for bdf in functions {
        let container = opener.container(*bdf)?;
        let known = containers.iter().position(|c| Arc::ptr_eq(c, &container));
        places.push(known.unwrap_or(containers.len()));
        if known.is_none() {
            containers.push(container);
        }
    }
    let mut opened: Vec<(Arc<dyn HostFunction>, usize)> = Vec::new();
    for (bdf, place) in functions.iter().zip(places) {
        let device = opener.device(*bdf)?;
        let is_virtual = Sysfs::default().function_path(*bdf).join("physfn").exists();
        let function = VfioFunction::new(bdf.to_string(), device)?.of_virtual_function(is_virtual);
        opened.push((Arc::new(function), place));
    }
    let mut targets: Vec<Box<dyn DmaTarget>> = Vec::new();
    let mut allowed: Option<Vec<IovaRange>> = None;
    for container in containers {
        let target = target(container);
        let limits: TargetLimits = target
            .limits()
            .context("the kernel does not tell what the IOMMU can map")?;
        allowed = Some(match allowed {
            None => limits.allowed,
            Some(before) => common(&before, &limits.allowed),
        });
        targets.push(Box::new(target));
    }
    Ok(Parts {
        targets,
        functions: opened,
        allowed: allowed.unwrap_or_default(),
        ram: Backing::new(Ram::memfd(c"throughway-ram", memory)?),
        page: Backing::new(Ram::memfd(
            c"throughway-control",
            GRANULE.max(host_memory::page_size()),
        )?),
    })
}

#[expect(unsafe_code, reason = "what the container maps must be real memory")]
fn target(container: Arc<Container>) -> Type1Target<Container> {
    // SAFETY: the map that this target is registered with has two kinds of backing: `Ram` of
    // `host_memory` and the BARs of `VfioFunction`s. Both give the address of a mapping of their
    // own that lives as long as its `HostMapping`, and no reference is ever made into either.
    unsafe { Type1Target::new(container) }
}
