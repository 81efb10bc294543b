//! Cutting devices off, and saying so.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use assigned_pci::{AssignedFunction, CutOffSwitch};
use memory_map::{CutOff, Quarantine, TargetName};

/// Cuts off the devices behind an IOMMU that may hold a mapping it should not, and then says so.
pub struct Announced {
    switch: CutOffSwitch,
    say: Box<dyn Fn(fmt::Arguments<'_>) + Send + Sync>,
}

impl Announced {
    /// Says it by `say`, a line at a time. It is called in the middle of a change of the map.
    pub fn new(say: impl Fn(fmt::Arguments<'_>) + Send + Sync + 'static) -> Self {
        Self {
            switch: CutOffSwitch::new(),
            say: Box::new(say),
        }
    }

    /// Says it on standard error, if anybody listens.
    pub fn on_standard_error() -> Self {
        Self::new(|line| {
            let _unheard = writeln!(io::stderr(), "throughway: {line}");
        })
    }

    /// Cuts this function off, too.
    pub fn add(&self, function: &Arc<AssignedFunction>) {
        self.switch.add(function);
    }
}

impl CutOff for Announced {
    fn cut_off(&self, target: &TargetName, why: &Quarantine) {
        // Whoever says it may be slow, or fail.
        self.switch.cut_off(target, why);
        (self.say)(format_args!("{target} is cut off: {why}"));
        for (function, error) in self
            .switch
            .state()
            .into_iter()
            .flat_map(|state| state.failed)
        {
            (self.say)(format_args!("{function} does not stop: {error}"));
        }
    }
}
