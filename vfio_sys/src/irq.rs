//! A device's interrupts: what kinds it has, and how they are signalled.
//!
//! The caller owns the eventfds; the kernel takes its own reference to each when it is set, and
//! gives it back when the interrupt is set anew or disabled, or the device is closed.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, vfio_irq_info,
};

use crate::Device;
use crate::ioctls;

/// A kind of interrupt of a PCI device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IrqIndex(pub u32);

impl IrqIndex {
    /// The pin interrupt.
    pub const INTX: Self = Self(VFIO_PCI_INTX_IRQ_INDEX);
    /// MSI.
    pub const MSI: Self = Self(VFIO_PCI_MSI_IRQ_INDEX);
    /// MSI-X.
    pub const MSIX: Self = Self(VFIO_PCI_MSIX_IRQ_INDEX);
    /// An uncorrectable error was reported (AER).
    pub const ERROR: Self = Self(VFIO_PCI_ERR_IRQ_INDEX);
    /// The host wants the device back: it is unbound from its driver, or pulled out. That waits
    /// until the device's file, all mappings and all dma-bufs of it are closed. It is signalled
    /// every ten seconds until then. (Linux 4.0)
    pub const REQUEST: Self = Self(VFIO_PCI_REQ_IRQ_INDEX);
}

/// What there is of one kind of interrupt (`VFIO_DEVICE_GET_IRQ_INFO`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// Which kind.
    pub index: IrqIndex,
    /// How many; zero where the device has none of the kind.
    pub count: u32,
    flags: u32,
}

impl IrqInfo {
    pub(crate) const fn new(info: vfio_irq_info) -> Self {
        Self {
            index: IrqIndex(info.index),
            count: info.count,
            flags: info.flags,
        }
    }

    /// The flags as the kernel gave them (`VFIO_IRQ_INFO_*`).
    #[must_use]
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// Whether they can be signalled by eventfd.
    #[must_use]
    pub const fn eventfd(&self) -> bool {
        self.flags & VFIO_IRQ_INFO_EVENTFD != 0
    }

    /// Whether they can be masked.
    #[must_use]
    pub const fn maskable(&self) -> bool {
        self.flags & VFIO_IRQ_INFO_MASKABLE != 0
    }

    /// Whether the kernel masks one when it fires, as it does for those that are
    /// level-triggered.
    #[must_use]
    pub const fn automasked(&self) -> bool {
        self.flags & VFIO_IRQ_INFO_AUTOMASKED != 0
    }

    /// Whether all must be disabled before more can be enabled.
    #[must_use]
    pub const fn no_resize(&self) -> bool {
        self.flags & VFIO_IRQ_INFO_NORESIZE != 0
    }
}

/// What is done to interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IrqAction {
    /// Masked; with eventfds: masked whenever one is signalled.
    Mask,
    /// Unmasked; with eventfds: unmasked whenever one is signalled.
    Unmask,
    /// Fired, as if the device had; with eventfds: these are signalled when the device fires.
    Trigger,
}

impl IrqAction {
    const fn flag(self) -> u32 {
        match self {
            Self::Mask => VFIO_IRQ_SET_ACTION_MASK,
            Self::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
            Self::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
        }
    }
}

/// To which interrupts it is done, counted from the first one of a call.
#[derive(Debug, Clone, Copy)]
pub enum IrqData<'a> {
    /// To so many. None at all, with [`IrqAction::Trigger`], disables the whole kind.
    All(u32),
    /// To those that are `true`.
    Some(&'a [bool]),
    /// By these eventfds; `None` takes one away.
    EventFds(&'a [Option<BorrowedFd<'a>>]),
}

/// The bytes of a `vfio_irq_set`, with the eventfds in them kept borrowed.
#[derive(Debug)]
pub(crate) struct IrqSet<'a> {
    bytes: Vec<u8>,
    fds: PhantomData<BorrowedFd<'a>>,
}

impl<'a> IrqSet<'a> {
    /// `None` for more interrupts than the kernel can be told of.
    fn new(index: IrqIndex, action: IrqAction, start: u32, data: IrqData<'a>) -> Option<Self> {
        let (kind, count, payload) = match data {
            IrqData::All(count) => (VFIO_IRQ_SET_DATA_NONE, count, Vec::new()),
            IrqData::Some(chosen) => (
                VFIO_IRQ_SET_DATA_BOOL,
                u32::try_from(chosen.len()).ok()?,
                chosen.iter().copied().map(u8::from).collect(),
            ),
            IrqData::EventFds(fds) => (
                VFIO_IRQ_SET_DATA_EVENTFD,
                u32::try_from(fds.len()).ok()?,
                fds.iter()
                    .map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()))
                    .flat_map(i32::to_ne_bytes)
                    .collect(),
            ),
        };
        let argsz = u32::try_from(HEADER.checked_add(payload.len())?).ok()?;
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        for word in [argsz, kind | action.flag(), index.0, start, count] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(payload);
        Some(Self {
            bytes,
            fds: PhantomData,
        })
    }

    /// The struct for the kernel; its first word says how many bytes it has.
    pub(crate) fn as_ptr(&self) -> *const c_void {
        self.bytes.as_ptr().cast()
    }
}

/// The struct without what follows it: argsz, flags, index, start, count.
const HEADER: usize = 5 * size_of::<u32>();

impl Device {
    /// What there is of one kind of interrupt.
    ///
    /// # Errors
    /// The kernel's errno: `EINVAL` for a kind past the last, and for
    /// [`IrqIndex::ERROR`] of what is no PCI Express device.
    pub fn irq_info(&self, index: IrqIndex) -> io::Result<IrqInfo> {
        let mut info = vfio_irq_info {
            index: index.0,
            ..Default::default()
        };
        ioctls::device_get_irq_info(self.fd(), &mut info)?;
        Ok(IrqInfo::new(info))
    }

    /// Does something to the interrupts of one kind, from the one numbered `start` on
    /// (`VFIO_DEVICE_SET_IRQS`).
    ///
    /// # Errors
    /// The kernel's errno: `EINVAL` for interrupts that do not exist, or for an action that they
    /// do not support or that does not suit their state. `ENOSPC` where the host has fewer MSI or
    /// MSI-X vectors left than are to be enabled; none is then (the ioctl returns how many there
    /// are, which is no error of its own).
    pub fn set_irqs(
        &self,
        index: IrqIndex,
        action: IrqAction,
        start: u32,
        data: IrqData<'_>,
    ) -> io::Result<()> {
        let set = IrqSet::new(index, action, start, data)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        match ioctls::device_set_irqs(self.fd(), &set)? {
            0 => Ok(()),
            _fewer => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Has the device's interrupts from `start` on signalled by eventfd, and thereby enables
    /// them. MSI and MSI-X are enabled with as many vectors as the first such call has.
    ///
    /// # Errors
    /// As for [`set_irqs`](Self::set_irqs).
    pub fn enable_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        self.set_irqs(
            index,
            IrqAction::Trigger,
            start,
            IrqData::EventFds(eventfds),
        )
    }

    /// Disables all interrupts of one kind.
    ///
    /// # Errors
    /// As for [`set_irqs`](Self::set_irqs).
    pub fn disable_irqs(&self, index: IrqIndex) -> io::Result<()> {
        self.set_irqs(index, IrqAction::Trigger, 0, IrqData::All(0))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn words(set: &IrqSet<'_>) -> Vec<i32> {
        let (words, rest) = set.bytes.as_chunks();
        assert!(rest.is_empty());
        words.iter().map(|word| i32::from_ne_bytes(*word)).collect()
    }

    #[test]
    fn eventfds_follow_the_header() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = [Some(file.as_fd()), None];
        let set = IrqSet::new(
            IrqIndex::MSIX,
            IrqAction::Trigger,
            3,
            IrqData::EventFds(&fds),
        )
        .unwrap();
        assert_eq!(
            words(&set),
            [28, 4 | 32, 2, 3, 2, file.as_raw_fd(), -1],
            "argsz, DATA_EVENTFD | ACTION_TRIGGER, index, start, count, fds"
        );
    }

    #[test]
    fn disabling_is_a_trigger_of_none() {
        let set = IrqSet::new(IrqIndex::MSI, IrqAction::Trigger, 0, IrqData::All(0)).unwrap();
        assert_eq!(words(&set), [20, 1 | 32, 1, 0, 0]);
    }

    #[test]
    fn masking_chosen_ones() {
        let set = IrqSet::new(
            IrqIndex::INTX,
            IrqAction::Mask,
            0,
            IrqData::Some(&[true, false, true]),
        )
        .unwrap();
        assert_eq!(set.bytes.len(), 23);
        assert_eq!(&set.bytes[20..], [1, 0, 1]);
        assert_eq!(set.bytes[..8], [23, 0, 0, 0, 2 | 8, 0, 0, 0]);
    }
}
