//! Hot reset: of a whole slot or bus, with every function on it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_DEVID_OWNED, VFIO_PCI_HOT_RESET_FLAG_DEV_ID, VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED,
};

use crate::{Bdf, Device, Group, device_ioctls};

/// How a function that a hot reset would take along stands to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetOwner {
    /// It is in this IOMMU group; the device was opened by its group.
    Group(u32),
    /// It is bound to the same iommufd, under this id.
    Bound(u32),
    /// It is not bound, but the same iommufd owns its group.
    Owned,
    /// It is somebody else's: a hot reset is refused.
    NotOwned,
}

/// A function that a hot reset would take along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResetDependent {
    /// Which one; the device itself is among them.
    pub bdf: Bdf,
    /// How it stands to the caller.
    pub owner: ResetOwner,
}

/// What a hot reset would take along (`VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotResetInfo {
    /// Every function on the slot or bus.
    pub dependents: Vec<ResetDependent>,
    /// For a device that was opened by its character device: whether the iommufd owns them all.
    pub all_owned: bool,
}

/// The words of the fixed struct, and of what follows for each function.
const HEADER: usize = 3;
const DEPENDENT: usize = 2;
/// As many functions as a bus can have.
const MOST: usize = 256;
/// How often functions may be plugged in between two calls.
const ATTEMPTS: usize = 4;

impl HotResetInfo {
    /// Reads the kernel's answer; `None` where it cannot be.
    fn parse(words: &[u32]) -> Option<Self> {
        let [_, flags, count, rest @ ..] = words else {
            return None;
        };
        let length = usize::try_from(*count).ok()?.checked_mul(DEPENDENT)?;
        let (pairs, _) = rest.get(..length)?.as_chunks::<DEPENDENT>();
        let dependents = pairs
            .iter()
            .map(|[id, place]| {
                let [low, high, bus, devfn] = place.to_ne_bytes();
                let domain = u16::from_ne_bytes([low, high]).into();
                Some(ResetDependent {
                    bdf: Bdf::new(domain, bus, devfn >> 3, devfn & 7)?,
                    owner: owner(*flags, *id),
                })
            })
            .collect::<Option<Vec<_>>>()?;
        Some(Self {
            dependents,
            all_owned: flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED != 0,
        })
    }

    /// The functions for which the kernel refuses a hot reset to somebody who holds the groups
    /// `groups`, by number: those of other groups, or of other iommufds. For a device that was
    /// opened by its character device, `groups` is of no account.
    #[must_use]
    pub fn strangers(&self, groups: &[u32]) -> Vec<Bdf> {
        let strange = |dependent: &&ResetDependent| match dependent.owner {
            ResetOwner::Group(group) => !groups.contains(&group),
            ResetOwner::Bound(_) | ResetOwner::Owned => false,
            ResetOwner::NotOwned => true,
        };
        let strangers = self.dependents.iter().filter(strange);
        strangers.map(|dependent| dependent.bdf).collect()
    }
}

fn owner(flags: u32, id: u32) -> ResetOwner {
    /// `VFIO_PCI_DEVID_NOT_OWNED`, -1.
    const NOT_OWNED: u32 = u32::MAX;
    match id {
        group if flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID == 0 => ResetOwner::Group(group),
        VFIO_PCI_DEVID_OWNED => ResetOwner::Owned,
        NOT_OWNED => ResetOwner::NotOwned,
        id => ResetOwner::Bound(id),
    }
}

impl Device {
    /// Which functions a hot reset would take along.
    ///
    /// # Errors
    /// `ENODEV` where neither the slot nor the bus can be reset; else the kernel's errno.
    pub fn hot_reset_info(&self) -> io::Result<HotResetInfo> {
        let mut room = 8usize;
        for _ in 0..ATTEMPTS {
            let length = room.saturating_mul(DEPENDENT).saturating_add(HEADER);
            let mut words = vec![0; length];
            match device_ioctls::get_pci_hot_reset_info(self.as_fd(), &mut words) {
                Ok(()) => {
                    return HotResetInfo::parse(&words)
                        .ok_or_else(|| io::Error::from_raw_os_error(libc::EIO));
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    let count = words.get(HEADER - 1).copied().unwrap_or(0);
                    room = usize::try_from(count).unwrap_or(MOST).clamp(room, MOST);
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    /// Resets the slot or bus that the device is on, with every function on it
    /// (`VFIO_DEVICE_PCI_HOT_RESET`). A device that was opened by its group names the groups of
    /// all of them; one that was opened by its character device names none, and all of them must
    /// be its iommufd's (Linux 6.6).
    ///
    /// Mappings of the BARs of **every** function that it takes along are to be taken for dead,
    /// **even if it fails**.
    ///
    /// # Errors
    /// `EBUSY` where somebody is using one of the functions at this moment: it may be tried
    /// again. `EINVAL` where one of them is not ours, or groups are named where none must be, or
    /// the other way about; `ENODEV` where neither the slot nor the bus can be reset.
    pub fn hot_reset(&self, groups: &[&Group]) -> io::Result<()> {
        let groups: Vec<BorrowedFd<'_>> = groups.iter().map(|group| group.as_fd()).collect();
        device_ioctls::pci_hot_reset(self.as_fd(), &groups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(domain: u16, bus: u8, devfn: u8) -> u32 {
        let [low, high] = domain.to_ne_bytes();
        u32::from_ne_bytes([low, high, bus, devfn])
    }

    #[test]
    fn the_answer_for_a_group() {
        let words = [28, 0, 2, 7, place(0, 1, 0), 8, place(2, 1, 0xff)];
        let info = HotResetInfo::parse(&words).unwrap();
        let told: Vec<_> = info
            .dependents
            .iter()
            .map(|it| (it.bdf.to_string(), it.owner))
            .collect();
        assert_eq!(
            told,
            [
                ("0000:01:00.0".to_owned(), ResetOwner::Group(7)),
                ("0002:01:1f.7".to_owned(), ResetOwner::Group(8)),
            ]
        );
        assert!(!info.all_owned);
    }

    #[test]
    fn the_answer_for_a_character_device() {
        let words = [
            36,
            1,
            3,
            5,
            place(0, 1, 0),
            0,
            place(0, 1, 1),
            u32::MAX,
            place(0, 1, 2),
        ];
        let info = HotResetInfo::parse(&words).unwrap();
        let owners: Vec<_> = info.dependents.iter().map(|it| it.owner).collect();
        assert_eq!(
            owners,
            [
                ResetOwner::Bound(5),
                ResetOwner::Owned,
                ResetOwner::NotOwned
            ]
        );
        assert!(!info.all_owned);
        let info = HotResetInfo::parse(&[20, 3, 1, 5, place(0, 1, 0)]).unwrap();
        assert!(info.all_owned);
    }

    #[test]
    fn strangers_are_those_of_other_groups_or_other_iommufds() {
        let strangers = |words: &[u32], groups: &[u32]| -> Vec<String> {
            let info = HotResetInfo::parse(words).unwrap();
            let strangers = info.strangers(groups).into_iter();
            strangers.map(|bdf| bdf.to_string()).collect()
        };
        let by_group = [28, 0, 2, 7, place(0, 1, 0), 8, place(0, 1, 1)];
        assert_eq!(strangers(&by_group, &[7]), ["0000:01:00.1"]);
        assert!(strangers(&by_group, &[8, 7]).is_empty());
        let by_file = [
            36,
            1,
            3,
            5,
            place(0, 1, 0),
            0,
            place(0, 1, 1),
            u32::MAX,
            place(0, 1, 2),
        ];
        assert_eq!(strangers(&by_file, &[]), ["0000:01:00.2"]);
        assert!(strangers(&[28, 3, 2, 5, place(0, 1, 0), 0, place(0, 1, 1)], &[]).is_empty());
    }

    #[test]
    fn an_answer_that_is_too_short_is_none() {
        for words in [
            &[][..],
            &[12, 0],
            &[12, 0, 1],
            &[20, 0, 2, 7, 0],
            &[12, 0, u32::MAX],
        ] {
            assert_eq!(HotResetInfo::parse(words), None, "{words:?}");
        }
    }
}
