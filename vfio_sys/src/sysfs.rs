//! What sysfs tells of PCI functions and their groups.
//!
//! A [`Sysfs`] holds two paths and nothing else, so it can be made wherever it is needed. The
//! paths are parameters so that a test can show it a tree of its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::open_error::is_vfio_driver;
use crate::{Bdf, Container, Group, GroupMember, OpenError};

/// Where the host shows its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs {
    sys: PathBuf,
    dev: PathBuf,
}

/// A PCI function as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciFunction {
    /// Its address.
    pub bdf: Bdf,
    /// The driver that has it, if one does.
    pub driver: Option<String>,
    /// The number of its IOMMU group; `None` where no IOMMU translates for it.
    pub group: Option<u32>,
}

impl PciFunction {
    /// Whether VFIO has it: `vfio-pci` or one of its variants.
    #[must_use]
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }
}

impl Default for Sysfs {
    /// `/sys` and `/dev`.
    fn default() -> Self {
        Self::new("/sys", "/dev")
    }
}

impl Sysfs {
    /// Looks for sysfs at `sys` and for device files at `dev`.
    #[must_use]
    pub fn new(sys: impl Into<PathBuf>, dev: impl Into<PathBuf>) -> Self {
        Self {
            sys: sys.into(),
            dev: dev.into(),
        }
    }

    /// Where a function's directory is.
    #[must_use]
    pub fn function_path(&self, bdf: Bdf) -> PathBuf {
        self.sys.join("bus/pci/devices").join(bdf.to_string())
    }

    /// VFIO's own file, which every container is opened from.
    #[must_use]
    pub fn container_path(&self) -> PathBuf {
        self.dev.join("vfio/vfio")
    }

    /// A group's file.
    #[must_use]
    pub fn group_path(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    /// What there is to know of a function.
    ///
    /// # Errors
    /// [`OpenError::NoSuchFunction`]; [`OpenError::Sysfs`] where it cannot be read.
    pub fn function(&self, bdf: Bdf) -> Result<PciFunction, OpenError> {
        let path = self.function_path(bdf);
        match path.try_exists() {
            Ok(true) => {}
            Ok(false) => return Err(OpenError::NoSuchFunction { bdf, path }),
            Err(source) => return Err(OpenError::Sysfs { path, source }),
        }
        Ok(PciFunction {
            bdf,
            driver: link_name(&path.join("driver"))?,
            group: self.group_of(&path)?,
        })
    }

    /// The group's number, if a real IOMMU is behind it: VFIO can be told to make up groups for
    /// devices without one.
    fn group_of(&self, function: &Path) -> Result<Option<u32>, OpenError> {
        let link = function.join("iommu_group");
        let Some(name) = link_name(&link)? else {
            return Ok(None);
        };
        match fs::read_to_string(link.join("name")) {
            Ok(name) if name.trim_end() == "vfio-noiommu" => return Ok(None),
            // Most groups have no name.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(OpenError::Sysfs {
                    path: link.join("name"),
                    source,
                });
            }
        }
        match name.parse() {
            Ok(number) => Ok(Some(number)),
            Err(error) => Err(OpenError::Sysfs {
                path: link,
                source: io::Error::new(io::ErrorKind::InvalidData, error),
            }),
        }
    }

    /// The devices of a group, sorted by name.
    ///
    /// # Errors
    /// [`OpenError::Sysfs`] where it cannot be read.
    pub fn group_members(&self, group: u32) -> Result<Vec<GroupMember>, OpenError> {
        let path = self
            .sys
            .join("kernel/iommu_groups")
            .join(group.to_string())
            .join("devices");
        let unreadable = |source| OpenError::Sysfs {
            path: path.clone(),
            source,
        };
        let mut members = Vec::new();
        for entry in fs::read_dir(&path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            members.push(GroupMember {
                name: entry.file_name().to_string_lossy().into_owned(),
                driver: link_name(&entry.path().join("driver"))?,
            });
        }
        members.sort_unstable();
        Ok(members)
    }

    /// Where device files are.
    pub(crate) fn dev(&self) -> &Path {
        &self.dev
    }

    /// The number of a function's group, once an IOMMU is behind the function and VFIO has it.
    ///
    /// # Errors
    /// [`OpenError`], in this order: there is no such function, no IOMMU, VFIO does not have it.
    pub(crate) fn check_bound(&self, bdf: Bdf) -> Result<u32, OpenError> {
        let function = self.function(bdf)?;
        // Without an IOMMU it could not be bound either, so this comes first.
        let Some(group) = function.group else {
            return Err(OpenError::NoIommu { bdf });
        };
        if !function.is_bound_to_vfio() {
            return Err(OpenError::NotBound {
                bdf,
                driver: function.driver,
                sys: self.sys.clone(),
            });
        }
        Ok(group)
    }

    /// The number of a function's group, once everything is as it must be for the group to be
    /// opened.
    ///
    /// # Errors
    /// [`OpenError`], in this order: there is no such function, no IOMMU, VFIO does not have it,
    /// VFIO's file is missing.
    pub fn check(&self, bdf: Bdf) -> Result<u32, OpenError> {
        let group = self.check_bound(bdf)?;
        let path = self.container_path();
        fs::metadata(&path).map_err(|source| OpenError::of_container_file(&path, source))?;
        Ok(group)
    }

    /// Opens the group of a function, and sees that it can be used.
    ///
    /// # Errors
    /// [`OpenError`], in the order of [`check`](Self::check), and then: the group's file is
    /// missing, must not be opened, or is in use; the group is not viable.
    pub fn open_group(&self, bdf: Bdf) -> Result<Group, OpenError> {
        let number = self.check(bdf)?;
        let group = Group::open(&self.group_path(number))?;
        let status = group
            .status()
            .map_err(|source| OpenError::of_group_status(&group, source))?;
        if !status.viable() {
            return Err(self.not_viable(bdf, number, &group));
        }
        Ok(group)
    }

    fn not_viable(&self, bdf: Bdf, number: u32, group: &Group) -> OpenError {
        // Without their names the diagnosis is still right.
        let mut members = self.group_members(number).unwrap_or_default();
        let own = bdf.to_string();
        members.retain(|member| member.name != own);
        OpenError::NotViable {
            group: group.name().to_owned(),
            members,
        }
    }

    /// Opens a fresh container.
    ///
    /// # Errors
    /// As for [`Container::open`].
    pub fn open_container(&self) -> Result<Container, OpenError> {
        Container::open(&self.container_path())
    }
}

/// The last component of what a link points to; `None` where there is no link.
fn link_name(path: &Path) -> Result<Option<String>, OpenError> {
    match fs::read_link(path) {
        Ok(target) => Ok(target
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(OpenError::Sysfs {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
#[path = "sysfs_tests.rs"]
mod tests;
