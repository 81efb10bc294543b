//! A simulated iommufd, and its I/O address spaces.
//!
//! The order of what a call does is that of the kernel's (`drivers/iommu/iommufd`): a dma-buf is
//! imported before the range is even looked at, pages are pinned last, and only once a device is
//! attached.
#![expect(
    unsafe_code,
    reason = "IoAddressSpace::map is unsafe for the sake of real memory; here it is safe"
)]

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iommu::IoAddressSpace;
use libc::{EFAULT, EINVAL, ENOENT, EOVERFLOW};
use memory_map::{Access, Errno, HostVa, Iova, IovaRange};
use vfio_sys::{IoasId, IoasRanges, IommufdId};

use crate::call::Call;
use crate::host::State;
use crate::io_page_table::{Pages, Source};
use crate::ioas_state::{IoasKey, Parts};
use crate::page::PAGE;
use crate::{CallPoint, SimFunction, SimHost};

/// An open iommufd. Clones are handles on the same one.
#[derive(Debug, Clone)]
pub struct SimIommufd {
    host: SimHost,
    id: IommufdId,
}

/// An I/O address space. Clones are handles on the same one; with the last of them it is
/// destroyed: its mappings go, and its devices are detached.
#[derive(Debug, Clone)]
pub struct SimIoas(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    host: SimHost,
    key: IoasKey,
    label: Arc<str>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.host.0.state.write().remove_ioas(self.key);
    }
}

/// A mapping in a simulated IOAS, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimIoasMapping {
    /// Whose.
    pub ioas: IoasId,
    /// Where.
    pub iova: IovaRange,
    /// What devices may do there.
    pub access: Access,
    /// Of what: `ram0`, or a function's name and BAR.
    pub object: Arc<str>,
    /// Where in that object it starts.
    pub offset: u64,
    /// Whether its dma-buf was revoked since it was imported: it leads nowhere, for good.
    pub dead: bool,
}

impl SimIommufd {
    pub(crate) fn new(host: SimHost) -> Self {
        Self {
            host,
            id: IommufdId::fresh(),
        }
    }

    /// Makes an empty address space (`IOMMU_IOAS_ALLOC`).
    #[must_use]
    pub fn ioas(&self) -> SimIoas {
        let key = self.host.0.state.write().add_ioas(self.id);
        SimIoas(Arc::new(Opened {
            host: self.host.clone(),
            key,
            label: format!("ioas {}", key.ioas.raw()).into(),
        }))
    }
}

impl fmt::Display for SimIoas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.label)
    }
}

impl SimIoas {
    /// Attaches a function (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`). If it is attached to another
    /// address space, that is replaced in one step.
    ///
    /// # Errors
    /// `EBUSY` where its group is in a container; `EINVAL` where another function of its group is
    /// attached to another address space, or would move along (which is `vfio_sys`'s refusal, not
    /// the kernel's), or something that is mapped cannot be pinned; `ENOMEM` past the limit on
    /// locked memory; `EADDRINUSE` where something is mapped or promised in what the function
    /// reserves. Nothing has changed then.
    pub fn attach(&self, function: &SimFunction) -> io::Result<()> {
        self.attach_or_move(function, true)
    }

    /// The same for all functions of its group that are attached.
    ///
    /// # Errors
    /// As for [`attach`](Self::attach); nobody is in the way of moving along.
    pub fn attach_group(&self, function: &SimFunction) -> io::Result<()> {
        self.attach_or_move(function, false)
    }

    fn attach_or_move(&self, function: &SimFunction, alone: bool) -> io::Result<()> {
        let host = &self.0.host;
        host.call(Call::IoasAttach, &self.0.label, None, || {
            let mut state = host.0.state.write();
            Ok(state.attach(&host.0.spec, self.0.key, &function.name, alone)?)
        })
    }

    /// Detaches a function (`VFIO_DEVICE_DETACH_IOMMUFD_PT`): with the last one of its group that
    /// is attached, all of that reach nothing any more.
    pub fn detach(&self, function: &SimFunction) {
        let mut state = self.0.host.0.state.write();
        state.detach(self.0.key, &function.name);
    }

    /// What is mapped in it, by address.
    #[must_use]
    pub fn mappings(&self) -> Vec<SimIoasMapping> {
        self.0.host.0.state.read().ioas_mappings(self.0.key)
    }

    fn with_state<T>(&self, work: impl FnOnce(&mut State) -> Result<T, Errno>) -> io::Result<T> {
        Ok(work(&mut self.0.host.0.state.write())?)
    }

    fn call<T>(
        &self,
        call: Call,
        iova: Option<IovaRange>,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.0.host.call(call, &self.0.label, iova, work)
    }

    /// Enters what has been imported, and fills the IOMMU's page table with it.
    fn enter(&self, iova: IovaRange, access: Access, parts: Parts) -> io::Result<()> {
        let spec = &self.0.host.0.spec;
        self.with_state(|state| state.enter(spec, self.0.key, iova, access, parts))
    }

    /// What `IOMMU_IOAS_MAP_FILE` does before it looks at the address space.
    fn import(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        access: Access,
    ) -> io::Result<Pages> {
        let refused = |errno| io::Error::from_raw_os_error(errno);
        let Some(last) = offset.checked_add(size.saturating_sub(1)) else {
            return Err(refused(EOVERFLOW));
        };
        let state = self.0.host.0.state.read();
        let named = state.files.find(file)?;
        let inside = named.as_ref().is_some_and(|named| last < named.size);
        let owner = named.as_ref().and_then(|named| named.object.owner.as_ref());
        let source = match owner {
            Some(_) if !inside => return Err(refused(EINVAL)),
            Some(owner) => Source::DmaBuf(state.dma_bufs.import(&owner.function)?),
            None if inside => Source::File,
            // Found only when it is to be pinned.
            None => Source::Nothing(Errno::new(EINVAL)),
        };
        let start = named.as_ref().map_or(0, |named| named.offset);
        Ok(Pages {
            source,
            offset: start.saturating_add(offset),
            object: named.map(|named| named.object),
            writable: access == Access::ReadWrite,
        })
    }

    /// The same of `IOMMU_IOAS_MAP`.
    fn import_address(&self, vaddr: HostVa, size: u64, access: Access) -> io::Result<Pages> {
        if vaddr.checked_add(size).is_none() {
            return Err(io::Error::from_raw_os_error(EOVERFLOW));
        }
        let state = self.0.host.0.state.read();
        let shown = state.space.find(vaddr);
        let pinnable = shown
            .as_ref()
            .filter(|shown| shown.object.is_ram() && shown.left >= size);
        let source = match pinnable {
            Some(shown) => Source::Address(shown.window),
            None => Source::Nothing(Errno::new(EFAULT)),
        };
        Ok(Pages {
            source,
            offset: shown.as_ref().map_or(0, |shown| shown.offset),
            object: shown.map(|shown| shown.object),
            writable: access == Access::ReadWrite,
        })
    }
}

/// What was imported from `at` on, an address or an offset in a file, as a part of pages that
/// start where the processor's do.
fn from_page(pages: Pages, at: u64, size: u64) -> Parts {
    let start = at % PAGE;
    let pages = Pages {
        offset: pages.offset.saturating_sub(start),
        ..pages
    };
    vec![(Arc::new(pages), start, size)]
}

impl IoAddressSpace for SimIoas {
    fn id(&self) -> IoasId {
        self.0.key.ioas
    }

    fn iommufd(&self) -> IommufdId {
        self.0.key.iommufd
    }

    fn ranges(&self) -> io::Result<IoasRanges> {
        let spec = &self.0.host.0.spec;
        self.call(Call::IoasRanges, None, || {
            self.with_state(|state| {
                let limits = state.ioas_limits(spec, self.0.key)?;
                Ok(IoasRanges {
                    allowed: limits.allowed,
                    alignment: limits.alignment,
                })
            })
        })
    }

    fn allow(&self, ranges: &[IovaRange]) -> io::Result<()> {
        let spec = &self.0.host.0.spec;
        self.call(Call::IoasAllow, None, || {
            self.with_state(|state| {
                let limits = state.ioas_limits(spec, self.0.key)?;
                state.ioas_mut(self.0.key)?.promise(ranges, &limits)
            })
        })
    }

    fn map_file(
        &self,
        iova: IovaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        access: Access,
    ) -> io::Result<()> {
        self.call(Call::MapFile, Some(iova), || {
            let pages = self.import(file, offset, iova.size(), access)?;
            self.0.host.reach_point(CallPoint::Midway(Call::MapFile));
            self.enter(iova, access, from_page(pages, offset, iova.size()))
        })
    }

    unsafe fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        // Host addresses are numbers here, and no memory lies behind them: there is nothing that
        // the caller could break.
        self.call(Call::IoasMap, Some(iova), || {
            let pages = self.import_address(vaddr, iova.size(), access)?;
            self.enter(iova, access, from_page(pages, vaddr.raw(), iova.size()))
        })
    }

    fn copy(&self, iova: IovaRange, source: IoasId, from: Iova, access: Access) -> io::Result<()> {
        self.call(Call::IoasCopy, Some(iova), || {
            let from = IovaRange::new(from, iova.size())
                .map_err(|_| io::Error::from_raw_os_error(EOVERFLOW))?;
            let key = IoasKey {
                ioas: source,
                ..self.0.key
            };
            let parts = self.with_state(|state| state.ioas_mut(key)?.pages(from))?;
            self.0.host.reach_point(CallPoint::Midway(Call::IoasCopy));
            self.enter(iova, access, parts)
        })
    }

    fn unmap(&self, iova: IovaRange) -> io::Result<u64> {
        self.call(Call::IoasUnmap, Some(iova), || {
            self.with_state(|state| match state.ioas_mut(self.0.key)?.unmap(iova)? {
                0 => Err(Errno::new(ENOENT)),
                bytes => Ok(bytes),
            })
        })
    }

    fn unmap_all(&self) -> io::Result<u64> {
        self.call(Call::IoasUnmapAll, None, || {
            self.with_state(|state| Ok(state.ioas_mut(self.0.key)?.unmap_all()))
        })
    }

    fn huge_pages(&self) -> io::Result<bool> {
        self.call(Call::IoasOption, None, || {
            self.with_state(|state| Ok(state.ioas_mut(self.0.key)?.large_pages()))
        })
    }

    fn set_huge_pages(&self, on: bool) -> io::Result<()> {
        self.call(Call::IoasOption, None, || {
            self.with_state(|state| {
                let attached = state.is_attached(self.0.key);
                state.ioas_mut(self.0.key)?.set_large_pages(on, attached)
            })
        })
    }
}
