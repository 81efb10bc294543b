//! A real function: a VFIO device as the host's side of an assigned one.
//!
//! The embedder opens the device and makes a [`VfioFunction`] of it, which owns it. The backings
//! of its BARs are made then, once; regions and mappings hold clones of them, each of which
//! shares the device's file, so the device is given back when the last of them is gone.
//!
//! A host that wants a device back (it is pulled out, or unbound) signals
//! [`IrqIndex::REQUEST`](vfio_sys::IrqIndex::REQUEST) and waits for that. Its embedder then
//! [removes](crate::AssignedFunction::remove) the function from the guest, which takes its BARs out
//! of every target, unregisters a target that nobody else is behind, has KVM forget the device's file
//! if it was told of it, and drops the function.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use host_memory::{DeviceBar, HostMemoryError, page_size};
use memory_map::Backing;
use vfio_sys::{Device, InfoError, IrqIndex, Region, RegionArea, RegionIndex};

use crate::{BarIndex, HostBar, HostBarArea, HostFunction, HostVectors, MsiKind};

/// Why an open device cannot be assigned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioFunctionError {
    /// It is a device of another bus.
    #[error("{name} is not a PCI device")]
    NotPci {
        /// The function's name.
        name: String,
    },
    /// Asking the kernel for one of its regions failed.
    #[error("asking {name} for its region {index} failed")]
    Region {
        /// The function's name.
        name: String,
        /// The region's index.
        index: u32,
        /// Why.
        #[source]
        source: InfoError,
    },
    /// Config space has a size that no function's has.
    #[error("{name} has {size:#x} bytes of config space, instead of 0x100 or 0x1000")]
    ConfigSize {
        /// The function's name.
        name: String,
        /// Its size in bytes.
        size: u64,
    },
    /// Config space could not be read.
    #[error("reading the config space of {name} failed")]
    ConfigRead {
        /// The function's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody answers: every read gives all ones.
    #[error(
        "{name} does not answer (its config space reads all ones): it was removed, has lost power \
         or is stuck in D3cold; as root, remove it (echo 1 > \
         /sys/bus/pci/devices/{name}/remove) and rescan (echo 1 > /sys/bus/pci/rescan), or reboot"
    )]
    AllOnes {
        /// The function's name.
        name: String,
    },
    /// A part of a BAR cannot be a backing.
    #[error("{name} {bar} cannot be mapped")]
    Bar {
        /// The function's name.
        name: String,
        /// Which BAR.
        bar: BarIndex,
        /// Why.
        #[source]
        source: HostMemoryError,
    },
}

/// A PCI function that VFIO lends out.
pub struct VfioFunction {
    name: String,
    device: Device,
    config: Region,
    config_size: u16,
    bars: [Option<VfioBar>; 6],
    is_virtual: bool,
}

#[derive(Debug)]
struct VfioBar {
    region: Region,
    host: HostBar,
}

impl VfioFunction {
    /// Makes an open device an assignable function. `name` is for people: its BDF.
    ///
    /// # Errors
    /// [`VfioFunctionError`]: it is no PCI device, does not answer, or the kernel's description
    /// of it makes no sense.
    pub fn new(name: impl Into<String>, device: Device) -> Result<Self, VfioFunctionError> {
        let name = name.into();
        if !device.info().is_pci() {
            return Err(VfioFunctionError::NotPci { name });
        }
        let region = |index: RegionIndex| {
            device
                .region(index)
                .map_err(|source| VfioFunctionError::Region {
                    name: name.clone(),
                    index: index.0,
                    source,
                })
        };
        let config = region(RegionIndex::CONFIG)?;
        let config_size = match u16::try_from(config.info().size) {
            Ok(size @ (0x100 | 0x1000)) => size,
            _ => {
                return Err(VfioFunctionError::ConfigSize {
                    name,
                    size: config.info().size,
                });
            }
        };
        answers(&name, &config)?;
        let mut bars = [const { None }; 6];
        for (bar, place) in BarIndex::ALL.into_iter().zip(&mut bars) {
            let Some(index) = RegionIndex::bar(bar.get()) else {
                continue;
            };
            let region = region(index)?;
            if region.info().size == 0 {
                continue;
            }
            let host = host_bar(&region).map_err(|source| VfioFunctionError::Bar {
                name: name.clone(),
                bar,
                source,
            })?;
            *place = Some(VfioBar { region, host });
        }
        Ok(Self {
            name,
            device,
            config,
            config_size,
            bars,
            is_virtual: false,
        })
    }

    /// Says that it is a virtual function (SR-IOV), which VFIO does not tell: its directory in
    /// sysfs then has a link `physfn`.
    #[must_use]
    pub fn of_virtual_function(mut self, is_virtual: bool) -> Self {
        self.is_virtual = is_virtual;
        self
    }

    /// The device, for what is not in [`HostFunction`]: its other interrupts, a hot reset.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    fn bar_region(&self, bar: BarIndex) -> io::Result<&Region> {
        match self.bars.get(usize::from(bar.get())) {
            Some(Some(bar)) => Ok(&bar.region),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

/// Reads the header's first and last words. A function that is there has a vendor.
fn answers(name: &str, config: &Region) -> Result<(), VfioFunctionError> {
    let read = |offset| {
        config
            .read_u32(offset)
            .map_err(|source| VfioFunctionError::ConfigRead {
                name: name.to_owned(),
                source,
            })
    };
    // The vendor alone would not do: VFIO itself makes it up for virtual functions, whose own
    // config space has none. The class and the header type are always the device's.
    let (vendor, class, header) = (read(0x00)?, read(0x08)?, read(0x0c)?);
    if vendor == u32::MAX || (class == u32::MAX && header == u32::MAX) {
        return Err(VfioFunctionError::AllOnes {
            name: name.to_owned(),
        });
    }
    Ok(())
}

/// What there is of a BAR, with a backing for each part that can be mapped.
fn host_bar(region: &Region) -> Result<HostBar, HostMemoryError> {
    let info = region.info();
    let mut areas = Vec::new();
    for area in info.mappable() {
        if !is_mappable(area, info.file_offset) {
            continue;
        }
        // `RegionInfo` has seen to it that the area ends inside the region, but the region's
        // place in the file is the kernel's word.
        let at = info
            .file_offset
            .checked_add(area.offset)
            .ok_or(HostMemoryError::TooLarge {
                offset: area.offset,
                size: area.size,
            })?;
        let exporter = region.clone();
        let object = DeviceBar::new(region.file().clone(), at, area.size, info.access())?
            .with_dma_buf(move || {
                let exported = exporter.export_dma_buf(area);
                exported.map_err(|error| error.to_string().into())
            });
        areas.push(HostBarArea {
            offset: area.offset,
            size: area.size,
            backing: Backing::new(object),
        });
    }
    Ok(HostBar {
        size: info.size,
        areas,
    })
}

/// Whether an area is made of whole pages. What is not (a BAR smaller than a page) shares its
/// page with who knows what.
fn is_mappable(area: RegionArea, file_offset: u64) -> bool {
    let page = page_size();
    area.size != 0
        && [area.offset, area.size, file_offset]
            .iter()
            .all(|number| number.is_multiple_of(page))
}

const fn irq_index(kind: MsiKind) -> IrqIndex {
    match kind {
        MsiKind::Msi => IrqIndex::MSI,
        MsiKind::MsiX => IrqIndex::MSIX,
    }
}

/// The upper byte of the command register, and *interrupt disable* in it.
const COMMAND_HIGH: u64 = 5;
const INTX_DISABLE: u8 = 1 << 2;

/// Linux clears the physical *interrupt disable* when it disables MSI or MSI-X, and vfio-pci, whose
/// own is still set, makes the physical one follow changes only. So where it is set, it is changed.
fn hold_intx_off_again(config: &Region) -> io::Result<()> {
    let mut high = [0];
    config.read(COMMAND_HIGH, &mut high)?;
    let [set] = high;
    if set & INTX_DISABLE != 0 {
        config.write(COMMAND_HIGH, &[set & !INTX_DISABLE])?;
        config.write(COMMAND_HIGH, &[set])?;
    }
    Ok(())
}

/// Whether an access is one that a bus makes in one piece.
fn is_natural(offset: u64, length: usize) -> bool {
    matches!(length, 1 | 2 | 4 | 8) && offset.is_multiple_of(length as u64)
}

impl HostFunction for VfioFunction {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn config_size(&self) -> u16 {
        self.config_size
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.config.read(offset.into(), data)
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.config.write(offset.into(), data)
    }

    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>> {
        let found = self.bars.get(usize::from(bar.get()));
        Ok(found
            .and_then(Option::as_ref)
            .map(|found| found.host.clone()))
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if !is_natural(offset, data.len()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.bar_region(bar)?.read(offset, data)
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        if !is_natural(offset, data.len()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.bar_region(bar)?.write(offset, data)
    }

    fn reset(&self) -> io::Result<()> {
        self.device.reset()
    }

    fn vectors(&self, kind: MsiKind) -> io::Result<HostVectors> {
        let info = self.device.irq_info(irq_index(kind))?;
        if !info.eventfd() {
            return Ok(HostVectors::default());
        }
        Ok(HostVectors {
            count: u16::try_from(info.count).unwrap_or(u16::MAX),
            dynamic: !info.no_resize(),
        })
    }

    fn connect_vectors(
        &self,
        kind: MsiKind,
        first: u16,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let index = irq_index(kind);
        self.device.enable_irqs(index, first.into(), eventfds)
    }

    fn disconnect_vectors(&self, kind: MsiKind) -> io::Result<()> {
        self.device.disable_irqs(irq_index(kind))?;
        hold_intx_off_again(&self.config)
    }

    fn is_virtual(&self) -> bool {
        self.is_virtual
    }
}

impl fmt::Debug for VfioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioFunction")
            .field("name", &self.name)
            .field("config_size", &self.config_size)
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::BorrowedFd;
    use std::sync::Arc;

    use host_memory::Ram;
    use memory_map::{Access, NoFile};
    use vfio_sys::RegionInfo;

    use super::*;

    const READ: u32 = 1;
    const WRITE: u32 = 2;
    const MMAP: u32 = 4;

    /// A region of a memfd that stands for the device's file, one page into it.
    fn region(flags: u32, size: u64, sparse: Option<Vec<RegionArea>>) -> Region {
        let page = page_size();
        let ram = Ram::memfd(c"device", size.next_multiple_of(page) + page).unwrap();
        let fd: BorrowedFd<'_> = ram.file().unwrap();
        let file = File::from(fd.try_clone_to_owned().unwrap());
        let mut info = RegionInfo::new(RegionIndex(0), flags, size, page);
        info.sparse = sparse;
        Region::new(Arc::new(file), info)
    }

    fn area(offset: u64, size: u64) -> RegionArea {
        RegionArea { offset, size }
    }

    fn areas(region: &Region) -> Vec<(u64, u64)> {
        let bar = host_bar(region).unwrap();
        assert_eq!(bar.size, region.info().size);
        bar.areas
            .iter()
            .map(|area| {
                assert_eq!(area.backing.size(), area.size);
                let object: &DeviceBar = area.backing.downcast_ref().unwrap();
                assert_eq!(
                    object.file_offset(),
                    region.info().file_offset + area.offset
                );
                (area.offset, area.size)
            })
            .collect()
    }

    #[test]
    fn the_whole_bar_without_sparse_areas() {
        let size = 4 * page_size();
        assert_eq!(areas(&region(READ | WRITE | MMAP, size, None)), [(0, size)]);
    }

    #[test]
    fn sparse_areas_one_by_one() {
        let page = page_size();
        let sparse = vec![area(0, page), area(2 * page, 2 * page)];
        assert_eq!(
            areas(&region(READ | WRITE | MMAP, 4 * page, Some(sparse))),
            [(0, page), (2 * page, 2 * page)]
        );
        let none = region(READ | WRITE | MMAP, 4 * page, Some(vec![]));
        assert_eq!(areas(&none), []);
    }

    #[test]
    fn what_is_not_whole_pages_is_left_out() {
        let page = page_size();
        // ivshmem's BAR0.
        assert_eq!(areas(&region(READ | WRITE | MMAP, 256, None)), []);
        let sparse = vec![
            area(0x100, page),
            area(page * 2, page / 2),
            area(3 * page, page),
        ];
        assert_eq!(
            areas(&region(READ | WRITE | MMAP, 4 * page, Some(sparse))),
            [(3 * page, page)]
        );
    }

    #[test]
    fn a_bar_that_cannot_be_mapped_is_still_there() {
        // An I/O BAR.
        assert_eq!(areas(&region(READ | WRITE, 0x20, None)), []);
    }

    #[test]
    fn a_read_only_bar_is_mapped_for_reading() {
        let bar = host_bar(&region(READ | MMAP, page_size(), None)).unwrap();
        let object: &DeviceBar = bar.areas[0].backing.downcast_ref().unwrap();
        assert_eq!(object.access(), Access::ReadOnly);
    }

    #[test]
    fn a_bar_that_cannot_be_exported_says_what_is_missing() {
        let bar = host_bar(&region(READ | WRITE | MMAP, page_size(), None)).unwrap();
        let NoFile::NotExported(why) = bar.areas[0].backing.file().unwrap_err() else {
            panic!("a BAR is no anonymous memory");
        };
        assert!(why.contains("VFIO_DEVICE_FEATURE_DMA_BUF"), "{why}");
    }

    #[test]
    fn a_device_that_reads_all_ones_is_refused() {
        let config = region(READ | WRITE, 0x100, None);
        answers("0000:00:05.0", &config).unwrap();
        config.write(0, &[0xff; 0x100]).unwrap();
        let error = answers("0000:00:05.0", &config).unwrap_err();
        assert!(matches!(error, VfioFunctionError::AllOnes { .. }));
        let text = error.to_string();
        assert!(text.contains("all ones"), "{text}");
        assert!(text.contains("/0000:00:05.0/remove"), "{text}");
        // A virtual function, whose vendor VFIO makes up.
        config.write_u32(0, 0x10ed_8086).unwrap();
        assert!(answers("0000:00:05.0", &config).is_err());
        config.write_u32(8, 0x0200_0001).unwrap();
        answers("0000:00:05.0", &config).unwrap();
    }

    #[test]
    fn intx_is_held_off_where_it_was() {
        let config = region(READ | WRITE, 0x100, None);
        for command in [0x0406, 0x0507, 0x0002] {
            config.write_u32(4, 0x0010_0000 | command).unwrap();
            hold_intx_off_again(&config).unwrap();
            assert_eq!(config.read_u32(4).unwrap(), 0x0010_0000 | command);
        }
    }

    #[test]
    fn accesses_that_no_bus_makes_are_einval() {
        for (offset, length) in [(0, 0), (0, 3), (2, 4), (4, 8), (1, 2), (0, 16)] {
            assert!(!is_natural(offset, length), "{length} at {offset}");
        }
        for (offset, length) in [(0, 8), (8, 8), (4, 4), (2, 2), (3, 1)] {
            assert!(is_natural(offset, length), "{length} at {offset}");
        }
    }
}
