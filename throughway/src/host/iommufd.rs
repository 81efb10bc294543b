//! By character devices and address spaces of one iommufd.

use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result};
use assigned_pci::{BarIndex, HostFunction, VfioFunction};
use iommu::{IoasTarget, RamCopies};
use memory_map::NoFile;
use vfio_sys::Ioas;

use super::choice::BarNotExported;
use super::space::{PartFunction, Space};
use super::{Host, Opened, hot_reset};

/// Opens them: an address space for all that may see the same. RAM is pinned once for all.
pub fn open(host: &Host<'_>, every_bar: bool) -> Result<Opened> {
    // Everything that can be wrong with any of them is said before one is bound.
    for bdf in host.functions {
        host.sysfs.cdev_path(*bdf)?;
    }
    let iommufd = Arc::new(host.sysfs.open_iommufd()?);
    iommufd.check_map_file()?;
    let mut cdevs = Vec::new();
    for bdf in host.functions {
        cdevs.push(host.sysfs.open_cdev(*bdf)?);
    }
    let mut bound = Vec::new();
    for (bdf, cdev) in host.functions.iter().zip(cdevs) {
        host.announce(&[*bdf], cdev.as_fd())?;
        let device = cdev.bind(Arc::clone(&iommufd))?;
        bound.push((*bdf, host.function(*bdf, device)?));
    }
    if every_bar {
        for (_, function) in &bound {
            exports_every_bar(function)?;
        }
    }
    let (classes, places) = host.by_filter();
    let mut ioases = Vec::new();
    for _ in &classes {
        let ioas = Ioas::alloc(Arc::clone(&iommufd)).context("making an address space failed")?;
        ioases.push(Arc::new(ioas));
    }
    // All functions are attached before anything is mapped: each takes away from what the address
    // space allows, and would be refused if something was there.
    let mut functions: Vec<PartFunction> = Vec::new();
    for ((_, function), space) in bound.iter().zip(places) {
        let ioas = ioases.get(space).context("no such address space")?;
        function.device().attach(Arc::clone(ioas))?;
        let host: Arc<dyn HostFunction> = Arc::<VfioFunction>::clone(function);
        functions.push(PartFunction { host, space });
    }
    let copies = RamCopies::new();
    let mut spaces = Vec::new();
    for (number, ((filter, _), ioas)) in classes.into_iter().zip(ioases).enumerate() {
        // What is chosen from now on is not to be taken away by whoever is attached next.
        let ranges = ioas
            .ranges()
            .context("the kernel does not tell what the IOMMU can map")?;
        ioas.allow(&ranges.allowed)
            .context("claiming what the IOMMU can map failed")?;
        let copies = copies.clone();
        spaces.push(Space {
            name: format!("IOAS {number}"),
            filter,
            target: Box::new(move || Box::new(target(Arc::clone(&ioas), copies.clone()))),
        });
    }
    Ok(Opened {
        spaces,
        functions,
        buses: hot_reset::buses(&bound, &[]),
        devices: bound,
    })
}

/// Insists that every part of a BAR that can be mapped at all can be by iommufd.
fn exports_every_bar(function: &VfioFunction) -> Result<()> {
    for index in BarIndex::ALL {
        let Some(bar) = function.bar(index)? else {
            continue;
        };
        for area in bar.areas {
            if let Err(NoFile::NotExported(why)) = area.backing.file() {
                let name = function.name();
                return Err(BarNotExported(format!("{name} {index}: {why}")).into());
            }
        }
    }
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "what the address space maps must be real memory"
)]
fn target(ioas: Arc<Ioas>, copies: RamCopies) -> IoasTarget<Ioas> {
    // SAFETY: the map that this target is registered with has two kinds of backing: `Ram` of
    // `host_memory`, which no reference is ever made into, and the BARs of `VfioFunction`s, which
    // are no memory of this process at all. Both are mapped by their files; should RAM be without
    // one, its address is that of a mapping that lives as long as its `HostMapping`.
    unsafe { IoasTarget::new(ioas, copies) }
}
