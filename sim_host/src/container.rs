//! A simulated VFIO container with a type1 v2 IOMMU.
#![expect(
    unsafe_code,
    reason = "Type1Container::map_dma is unsafe for the sake of real memory; here it is safe"
)]

use std::fmt;
use std::io;
use std::sync::Arc;

use iommu::Type1Container;
use libc::{EBUSY, EINVAL, ENODEV};
use memory_map::{Access, Errno, HostVa, IovaRange};
use vfio_sys::Type1Info;

use crate::SimHost;
use crate::call::Call;
use crate::domain::{Domain, Locked};
use crate::host::{SimMapping, State};
use crate::page::PAGE;

/// Names a container of a simulated host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(pub(crate) u32);

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "container {}", self.0)
    }
}

/// Names an IOMMU group of a simulated host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group {}", self.0)
    }
}

/// A container, open. Clones are handles on the same one; with the last of them it is closed: its
/// mappings go, and its groups are free again.
#[derive(Debug, Clone)]
pub struct SimContainer(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    host: SimHost,
    id: ContainerId,
    label: Arc<str>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut state = self.host.0.state.write();
        state.containers.remove(&self.id);
        for group in state.groups.values_mut() {
            if group.container == Some(self.id) {
                group.container = None;
            }
        }
    }
}

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl SimContainer {
    pub(crate) fn new(host: SimHost, id: ContainerId) -> Self {
        Self(Arc::new(Opened {
            host,
            id,
            label: id.to_string().into(),
        }))
    }

    /// Names it in logs and records.
    #[must_use]
    pub fn id(&self) -> ContainerId {
        self.0.id
    }

    /// Has a group join (`VFIO_GROUP_SET_CONTAINER`). Once the IOMMU is set, the ranges that the
    /// group reserves leave what may be mapped. A group that has joined may join again.
    ///
    /// # Errors
    /// `ENODEV` for a group that does not exist; `EBUSY` where it is in another container, or
    /// attached to an address space of an iommufd;
    /// `EINVAL` where mappings already lie in a range that it reserves.
    pub fn attach(&self, group: GroupId) -> io::Result<()> {
        let mut state = self.0.host.0.state.write();
        let joins = state
            .groups
            .get(&group)
            .ok_or_else(|| io::Error::from_raw_os_error(ENODEV))?;
        match joins.container {
            Some(container) if container == self.0.id => return Ok(()),
            Some(_) => return refused(EBUSY),
            None if joins.ioas.is_some() => return refused(EBUSY),
            None => {}
        }
        let reserved = joins.reserved.clone();
        if let Some(domain) = self.domain_mut(&mut state) {
            domain.reserve(&reserved)?;
        }
        if let Some(joins) = state.groups.get_mut(&group) {
            joins.container = Some(self.0.id);
        }
        Ok(())
    }

    /// Sets the IOMMU (`VFIO_SET_IOMMU` with type1 v2).
    ///
    /// # Errors
    /// `EINVAL` without a group, where it is set already, or where the groups' reserved ranges
    /// leave nothing to be mapped.
    pub fn set_iommu(&self) -> io::Result<()> {
        let host = &self.0.host.0;
        let mut state = host.state.write();
        let reserved: Vec<Vec<IovaRange>> = state
            .groups
            .values()
            .filter(|group| group.container == Some(self.0.id))
            .map(|group| group.reserved.clone())
            .collect();
        let Some(container) = state.containers.get_mut(&self.0.id) else {
            return refused(ENODEV);
        };
        if reserved.is_empty() || container.domain.is_some() {
            return refused(EINVAL);
        }
        let mut domain = Domain::new(host.spec.page(), host.spec.allowed(), host.spec.entry_limit);
        for reserved in reserved {
            domain.reserve(&reserved)?;
        }
        container.domain = Some(domain);
        Ok(())
    }

    /// What is mapped in this container, by address.
    #[must_use]
    pub fn mappings(&self) -> Vec<SimMapping> {
        let mut mappings = self.0.host.mappings();
        mappings.retain(|mapping| mapping.container == self.0.id);
        mappings
    }

    fn domain_mut<'s>(&self, state: &'s mut State) -> Option<&'s mut Domain> {
        state.containers.get_mut(&self.0.id)?.domain.as_mut()
    }

    /// Runs `work` on the domain; without an IOMMU every call is refused, as by the kernel.
    fn with_domain<T>(&self, work: impl FnOnce(&mut Domain) -> Result<T, Errno>) -> io::Result<T> {
        let mut state = self.0.host.0.state.write();
        match self.domain_mut(&mut state) {
            Some(domain) => Ok(work(domain)?),
            None => refused(EINVAL),
        }
    }

    fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        let mut state = self.0.host.0.state.write();
        let state = &mut *state;
        let locked = Locked {
            pages: state.locked_pages(),
            limit: state.locked_limit.map(|bytes| bytes / PAGE),
        };
        let Some(domain) = state
            .containers
            .get_mut(&self.0.id)
            .and_then(|container| container.domain.as_mut())
        else {
            return refused(EINVAL);
        };
        Ok(domain.map(&state.space, locked, iova, vaddr, access)?)
    }
}

impl Type1Container for SimContainer {
    fn info(&self) -> io::Result<Type1Info> {
        let page_sizes = self.0.host.0.spec.page_sizes;
        self.0.host.call(Call::Info, &self.0.label, None, || {
            self.with_domain(|domain| {
                Ok(Type1Info {
                    page_sizes,
                    allowed: domain.allowed().to_vec(),
                    entries_left: Some(domain.entries_left()),
                })
            })
        })
    }

    unsafe fn map_dma(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        // Host addresses are numbers here, and no memory lies behind them: there is nothing that
        // the caller could break.
        self.0
            .host
            .call(Call::MapDma, &self.0.label, Some(iova), || {
                self.map(iova, vaddr, access)
            })
    }

    fn unmap_dma(&self, iova: IovaRange) -> io::Result<u64> {
        self.0
            .host
            .call(Call::UnmapDma, &self.0.label, Some(iova), || {
                self.with_domain(|domain| domain.unmap(iova))
            })
    }

    fn unmap_all(&self) -> io::Result<u64> {
        self.0.host.call(Call::UnmapAll, &self.0.label, None, || {
            self.with_domain(|domain| Ok(domain.unmap_all()))
        })
    }
}
