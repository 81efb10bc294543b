//! Opens functions by BDF: every group once, every container shared by all groups that can.
//!
//! The embedder makes one, opens its functions with it and may drop it afterwards: what it opened
//! lives on for as long as it is used. While it is kept, later functions join the groups and
//! containers that are there.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Bdf, Container, Device, Group, OpenError, Sysfs};

/// Opens functions by BDF.
///
/// The steps are separate, so that a VMM can register a group's file with KVM before a device of
/// it is opened; each includes those before it that have not been taken. Whoever attaches a group
/// to a container of their own must leave it out of here.
#[derive(Debug)]
pub struct Opener {
    sysfs: Sysfs,
    groups: BTreeMap<u32, Arc<Group>>,
    containers: Vec<Arc<Container>>,
    /// Which container each group is in, by its place in `containers`.
    attached: BTreeMap<u32, usize>,
}

impl Opener {
    /// One that has opened nothing yet.
    #[must_use]
    pub const fn new(sysfs: Sysfs) -> Self {
        Self {
            sysfs,
            groups: BTreeMap::new(),
            containers: Vec::new(),
            attached: BTreeMap::new(),
        }
    }

    /// The containers so far.
    #[must_use]
    pub fn containers(&self) -> &[Arc<Container>] {
        &self.containers
    }

    /// Opens the group of a function, if it is not open yet.
    ///
    /// # Errors
    /// As for [`Sysfs::open_group`].
    pub fn group(&mut self, bdf: Bdf) -> Result<Arc<Group>, OpenError> {
        let number = self.sysfs.check(bdf)?;
        if let Some(group) = self.groups.get(&number) {
            return Ok(group.clone());
        }
        let group = Arc::new(self.sysfs.open_group(bdf)?);
        self.groups.insert(number, group.clone());
        Ok(group)
    }

    /// Attaches the group of a function to the first container that takes it, and to a new one if
    /// none does. The allowed ranges of a container that a group joins may shrink: a target that
    /// is registered with it has to look at its limits again.
    ///
    /// # Errors
    /// As for [`group`](Self::group), [`Container::open`] and [`Container::attach`].
    pub fn container(&mut self, bdf: Bdf) -> Result<Arc<Container>, OpenError> {
        let group = self.group(bdf)?;
        let number = self.sysfs.check(bdf)?;
        if let Some(container) = self
            .attached
            .get(&number)
            .and_then(|place| self.containers.get(*place))
        {
            return Ok(container.clone());
        }
        for (place, container) in self.containers.iter().enumerate() {
            match container.attach(group.clone()) {
                Ok(()) => {
                    self.attached.insert(number, place);
                    return Ok(container.clone());
                }
                Err(OpenError::Incompatible { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let container = Arc::new(self.sysfs.open_container()?);
        container.attach(group)?;
        self.attached.insert(number, self.containers.len());
        self.containers.push(container.clone());
        Ok(container)
    }

    /// Opens a function. Its container is [`container`](Self::container)'s.
    ///
    /// # Errors
    /// As for [`container`](Self::container) and [`Group::open_device`].
    pub fn device(&mut self, bdf: Bdf) -> Result<Device, OpenError> {
        self.container(bdf)?;
        self.group(bdf)?.open_device(&bdf.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_opened_leaves_nothing_behind() {
        let mut opener = Opener::new(Sysfs::new("/nowhere/sys", "/nowhere/dev"));
        let error = opener.device("00:05.0".parse().unwrap()).unwrap_err();
        assert!(matches!(error, OpenError::NoSuchFunction { .. }));
        assert!(opener.groups.is_empty() && opener.containers().is_empty());
    }
}
