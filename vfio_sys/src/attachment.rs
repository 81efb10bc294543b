//! What devices that are bound to an iommufd are attached to.
//!
//! The kernel attaches an IOMMU group as a whole: its first device attaches it, the others join,
//! and to attach one of them to another address space replaces that under all of them. So what a
//! group is attached to is one value, which the handles of all its devices in an iommufd share:
//!
//! ```text
//! Device ──▶ Binding ──▶ GroupAttachment ◀── Binding ◀── Device (of the same group)
//!               │              └──holds──▶ Ioas, while one of them is attached
//!               └──holds──▶ Iommufd ┄┄finds (weakly)┄┄▶ GroupAttachment
//! ```
//!
//! Two [`Iommufd`]s made of the same file, or two processes with it, do not know of each other.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{CdevError, Device, Ioas, Iommufd, device_ioctls};

/// What the devices of one IOMMU group are attached to.
#[derive(Debug)]
pub(crate) struct GroupAttachment {
    /// Whether all devices of the group share it; not so where nobody said which group it is.
    known: bool,
    now: Mutex<Attached>,
}

/// All who are attached are attached to the same address space.
#[derive(Debug, Default)]
struct Attached {
    ioas: Option<Arc<Ioas>>,
    /// The names of those that are attached, by their ids.
    members: BTreeMap<u32, String>,
}

impl GroupAttachment {
    /// Of a group of which each device will share it.
    pub(crate) fn of_all() -> Arc<Self> {
        Arc::new(Self {
            known: true,
            now: Mutex::default(),
        })
    }

    /// Of a device of which nobody has said in which group it is.
    pub(crate) fn of_one() -> Arc<Self> {
        Arc::new(Self {
            known: false,
            now: Mutex::default(),
        })
    }

    #[cfg(test)]
    pub(crate) fn members(&self) -> Vec<String> {
        self.now.lock().members.values().cloned().collect()
    }
}

impl Attached {
    /// What a device is attached to.
    fn of(&self, id: u32) -> Option<&Arc<Ioas>> {
        self.ioas
            .as_ref()
            .filter(|_| self.members.contains_key(&id))
    }

    /// The names of the others, sorted.
    fn others(&self, id: u32) -> Vec<String> {
        let others = self.members.iter().filter(|(other, _)| **other != id);
        let mut names: Vec<String> = others.map(|(_, name)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// The last one that leaves lets go of the address space.
    fn remove(&mut self, id: u32) {
        self.members.remove(&id);
        if self.members.is_empty() {
            self.ioas = None;
        }
    }
}

/// What a device that is bound to an iommufd holds of it.
#[derive(Debug)]
pub(crate) struct Binding {
    /// The device's own file.
    file: Arc<File>,
    pub(crate) name: String,
    iommufd: Arc<Iommufd>,
    id: u32,
    group: Arc<GroupAttachment>,
}

impl Binding {
    /// Of a device that has just been bound, with the number of its IOMMU group if that is known.
    pub(crate) fn new(
        file: Arc<File>,
        name: String,
        iommufd: Arc<Iommufd>,
        id: u32,
        group: Option<u32>,
    ) -> Self {
        let group = iommufd.group(group);
        Self {
            file,
            name,
            iommufd,
            id,
            group,
        }
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        let mut attached = self.group.now.lock();
        // The device's file may stay open for its mappings, and with it the attachment, which
        // would keep the address space. Nothing better can be done should this fail: the kernel
        // detaches it when the file is closed.
        if attached.of(self.id).is_some() {
            let _ = device_ioctls::detach_iommufd_pt(self.file.as_fd());
        }
        attached.remove(self.id);
    }
}

impl Device {
    /// The iommufd that it is bound to; none for a device that was opened by its group.
    #[must_use]
    pub fn iommufd(&self) -> Option<&Arc<Iommufd>> {
        self.binding().map(|binding| &binding.iommufd)
    }

    /// Its id in that iommufd.
    #[must_use]
    pub fn iommufd_device_id(&self) -> Option<u32> {
        self.binding().map(|binding| binding.id)
    }

    /// The address space that it is attached to, if it is.
    #[must_use]
    pub fn ioas(&self) -> Option<Arc<Ioas>> {
        let binding = self.binding()?;
        binding.group.now.lock().of(binding.id).cloned()
    }

    /// Attaches it to an address space of its iommufd, whose mappings it then reaches
    /// (`VFIO_DEVICE_ATTACH_IOMMUFD_PT`). What the address space allows may shrink: ask for its
    /// [`ranges`](Ioas::ranges) again.
    ///
    /// If it is attached to another one, the kernel replaces that in one step: everything that is
    /// mapped in the new one is pinned before the old one is left, and counts besides what the old
    /// one has pinned. What the device does meanwhile is blocked for as long as the IOMMU's driver
    /// takes to change an entry of its table, which Intel's and AMD's first clear; it is never
    /// translated by half of each. Should it fail, the device is where it was. One of which it is
    /// not known [in which group](crate::Cdev::in_group) it is, is detached first, and attached again
    /// where it was should it fail; [`ioas`](Self::ioas) tells where it is if the kernel refuses
    /// that as well.
    ///
    /// # Errors
    /// [`CdevError::Attach`]: `EADDRINUSE` where something is mapped, or promised to be allowed,
    /// where the device reserves addresses; `EINVAL` where another device of its group is
    /// attached to another address space; `ENOMEM` where what is mapped cannot be pinned.
    /// [`CdevError::GroupWouldMove`] where it is not the only one of its group that would leave an
    /// address space. [`CdevError::OtherIommufd`]. Nothing has changed then, see above.
    pub fn attach(&self, ioas: Arc<Ioas>) -> Result<(), CdevError> {
        self.attach_or_move(ioas, Along::Nobody)
    }

    /// The same for it and all others of its IOMMU group that are attached: all of them move to
    /// the other address space in one step, or none. Their handles know of it. Those that are not
    /// attached are left alone.
    ///
    /// # Errors
    /// As for [`attach`](Self::attach), without [`CdevError::GroupWouldMove`].
    pub fn attach_group(&self, ioas: Arc<Ioas>) -> Result<(), CdevError> {
        self.attach_or_move(ioas, Along::TheGroup)
    }

    fn attach_or_move(&self, ioas: Arc<Ioas>, along: Along) -> Result<(), CdevError> {
        let Some(binding) = self
            .binding()
            .filter(|binding| Arc::ptr_eq(&binding.iommufd, ioas.iommufd()))
        else {
            let name = self.binding().map(|binding| binding.name.clone());
            return Err(CdevError::OtherIommufd {
                name: name.unwrap_or_else(|| "the device".to_owned()),
            });
        };
        let refused = |source| CdevError::Attach {
            name: binding.name.clone(),
            source,
        };
        let mut attached = binding.group.now.lock();
        match attached.of(binding.id) {
            Some(now) if Arc::ptr_eq(now, &ioas) => return Ok(()),
            Some(now) if !binding.group.known => {
                let now = now.clone();
                device_ioctls::detach_iommufd_pt(self.as_fd()).map_err(refused)?;
                attached.remove(binding.id);
                let attach = |to: &Ioas| {
                    device_ioctls::attach_iommufd_pt(self.as_fd(), to.id().raw()).map(drop)
                };
                let moved = attach(&ioas);
                let is_at = match &moved {
                    Ok(()) => Some(ioas),
                    Err(_) => attach(&now).is_ok().then(|| now.clone()),
                };
                if let Some(is_at) = is_at {
                    attached.members.insert(binding.id, binding.name.clone());
                    attached.ioas = Some(is_at);
                }
                drop(attached);
                drop(now);
                return moved.map_err(refused);
            }
            Some(_) if along == Along::Nobody => {
                let others = attached.others(binding.id);
                if !others.is_empty() {
                    let name = binding.name.clone();
                    return Err(CdevError::GroupWouldMove { name, others });
                }
            }
            Some(_) | None => {}
        }
        device_ioctls::attach_iommufd_pt(self.as_fd(), ioas.id().raw()).map_err(refused)?;
        attached.members.insert(binding.id, binding.name.clone());
        // Of an address space that was left this may be the last handle: it goes last of all.
        let left = attached.ioas.replace(ioas);
        drop(attached);
        drop(left);
        Ok(())
    }

    /// Detaches it: it reaches nothing by DMA any more (`VFIO_DEVICE_DETACH_IOMMUFD_PT`).
    /// Detaching what is not attached does nothing. Of several of one IOMMU group that are
    /// attached, the last one has to be detached before the hardware blocks any of them.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn detach(&self) -> io::Result<()> {
        let Some(binding) = self.binding() else {
            return Ok(());
        };
        let mut attached = binding.group.now.lock();
        if attached.of(binding.id).is_some() {
            device_ioctls::detach_iommufd_pt(self.as_fd())?;
            attached.remove(binding.id);
        }
        Ok(())
    }
}

/// Who may move along with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Along {
    Nobody,
    TheGroup,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_would_move_along_is_named() {
        let mut attached = Attached::default();
        for (id, name) in [
            (3, "0000:00:05.2"),
            (1, "0000:00:05.0"),
            (2, "0000:00:05.1"),
        ] {
            attached.members.insert(id, name.to_owned());
        }
        let others = attached.others(1);
        assert_eq!(others, ["0000:00:05.1", "0000:00:05.2"]);
        let error = CdevError::GroupWouldMove {
            name: "0000:00:05.0".to_owned(),
            others,
        };
        let text = error.to_string();
        assert!(text.contains("0000:00:05.1, 0000:00:05.2"), "{text}");
        attached.remove(2);
        attached.remove(3);
        assert!(attached.others(1).is_empty());
    }
}
