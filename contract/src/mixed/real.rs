//! The kernel that this runs on, with two functions that are bound to vfio-pci.

use std::io;
use std::sync::Arc;

use host_memory::Ram;
use memory_map::Backing;
use vfio_sys::Bdf;

use super::bench::RAM_SIZE;
use super::{MixedHost, Parts};
use crate::nvme::{Iommu, RealRam, open};
use crate::real::told;

/// The kernel, and the functions to try it with, which are in different IOMMU groups.
#[derive(Debug, Clone)]
pub struct RealHost {
    /// With a DMA engine.
    pub engine: Bdf,
    /// With a memory BAR.
    pub peer: Bdf,
}

impl MixedHost for RealHost {
    fn parts(&self, engine: Iommu) -> io::Result<Parts> {
        let other = match engine {
            Iommu::Type1 => Iommu::Iommufd,
            Iommu::Iommufd => Iommu::Type1,
        };
        let (engine_target, engine) = open(engine, &[self.engine])?;
        let (peer_target, peer) = open(other, &[self.peer])?;
        let (Some(engine), Some(peer)) = (engine.into_iter().next(), peer.into_iter().next())
        else {
            return Err(io::Error::other("fewer functions than were opened"));
        };
        let ram = Ram::memfd(c"mixed-contract", RAM_SIZE).map_err(|error| told(&error))?;
        let ram = Backing::new(ram);
        Ok(Parts {
            engine,
            engine_target,
            peer,
            peer_target,
            access: Arc::new(RealRam(ram.clone())),
            ram,
        })
    }
}
