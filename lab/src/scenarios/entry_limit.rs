//! How many mappings a type1 container takes: a parameter of the kernel's module.

use crate::scenario::{Bench, ScenarioError};

const PARAMETER: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// Does something while new containers take only `limit` mappings.
pub fn while_it_is<T>(
    limit: u32,
    bench: &mut Bench,
    act: impl FnOnce(&mut Bench) -> Result<T, ScenarioError>,
) -> Result<T, ScenarioError> {
    let usual = bench.run_ok(&["cat", PARAMETER])?;
    bench.shell(&format!("echo {limit} > {PARAMETER}"))?;
    let done = act(bench);
    bench.shell(&format!("echo {} > {PARAMETER}", usual.trim()))?;
    done
}
