//! Cutting devices off, and saying so.

use std::sync::Arc;

use assigned_pci::{AssignedFunction, CutOffSwitch};
use memory_map::{CutOff, Quarantine, TargetName};

/// Cuts off the devices behind an IOMMU that may hold a mapping it should not, and says so.
#[derive(Default)]
pub struct Announced(CutOffSwitch);

impl Announced {
    /// Cuts this function off, too.
    pub fn add(&self, function: &Arc<AssignedFunction>) {
        self.0.add(function);
    }
}

impl CutOff for Announced {
    fn cut_off(&self, target: &TargetName, why: &Quarantine) {
        eprintln!("throughway: {target} is cut off: {why}");
        self.0.cut_off(target, why);
        for (function, error) in self.0.state().into_iter().flat_map(|state| state.failed) {
            eprintln!("throughway: {function} does not stop: {error}");
        }
    }
}
