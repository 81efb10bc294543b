//! Which functions a hot reset takes along, and how the kernel is asked for it.

use std::sync::Arc;

use assigned_pci::VfioFunction;
use vfio_sys::{Bdf, Group, ResetOwner};

use super::Bus;

/// The slots and buses of `functions`, which are all that are open, by their places. `groups` are
/// those that they were opened by, with their numbers; none of them where it was by character
/// devices.
///
/// Left out is what cannot be reset (on the root bus), and where the kernel would refuse because
/// somebody else holds one of the functions.
pub fn buses(functions: &[(Bdf, Arc<VfioFunction>)], groups: &[(u32, Arc<Group>)]) -> Vec<Bus> {
    let mut buses: Vec<Bus> = Vec::new();
    let numbers: Vec<u32> = groups.iter().map(|(number, _)| *number).collect();
    for (place, (_, function)) in functions.iter().enumerate() {
        if buses.iter().any(|bus| bus.members.contains(&place)) {
            continue;
        }
        let Ok(info) = function.device().hot_reset_info() else {
            continue;
        };
        if !info.strangers(&numbers).is_empty() {
            continue;
        }
        let takes = |bdf: &Bdf| info.dependents.iter().any(|taken| taken.bdf == *bdf);
        let members = functions.iter().enumerate();
        let members = members.filter(|(_, (bdf, _))| takes(bdf));
        let function = Arc::clone(function);
        // The kernel takes no more groups than there are functions that are reset.
        let owners: Vec<ResetOwner> = info.dependents.iter().map(|taken| taken.owner).collect();
        let groups = groups.iter();
        let groups = groups.filter(|(number, _)| owners.contains(&ResetOwner::Group(*number)));
        let groups: Vec<Arc<Group>> = groups.map(|(_, group)| Arc::clone(group)).collect();
        buses.push(Bus {
            members: members.map(|(place, _)| place).collect(),
            reset: Arc::new(move || {
                let groups: Vec<&Group> = groups.iter().map(|group| &**group).collect();
                function.device().hot_reset(&groups)
            }),
        });
    }
    buses
}
