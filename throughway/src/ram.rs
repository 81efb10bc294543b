//! The guest's memory, as the one who stands in for a guest's processor sees it.

use anyhow::{Context, Result, anyhow};
use host_memory::Ram;
use memory_map::{
    Access, Backing, Gpa, GpaRange, Priority, RegionId, RegionKind, RegionManager, RegionSpec,
    SubMapping,
};
use sim_host::SimRam;

/// RAM wins over every BAR that is placed on it.
const PRIORITY: Priority = Priority(100);

/// One region of RAM.
#[derive(Debug, Clone)]
pub struct GuestRam {
    backing: Backing,
    region: RegionId,
    range: GpaRange,
}

impl GuestRam {
    /// Adds all of `backing` to the map, enabled, at `start`.
    pub fn add(map: &RegionManager, name: &str, backing: Backing, start: Gpa) -> Result<Self> {
        let range = GpaRange::new(start, backing.size())?;
        let mut change = map.change();
        let region = change.add(RegionSpec {
            name: name.into(),
            range,
            priority: PRIORITY,
            kind: RegionKind::Ram,
            access: Access::ReadWrite,
            shareable: true,
            label: None,
            sub_mappings: vec![SubMapping {
                offset: 0,
                size: backing.size(),
                backing: backing.clone(),
                backing_offset: 0,
            }],
        });
        change.enable(region);
        change
            .commit()
            .with_context(|| format!("adding {name} to the map"))?;
        Ok(Self {
            backing,
            region,
            range,
        })
    }

    /// Its region in the map.
    pub const fn region(&self) -> RegionId {
        self.region
    }

    /// Where it lies.
    pub const fn range(&self) -> GpaRange {
        self.range
    }

    /// Reads `len` bytes at a guest-physical address.
    pub fn read(&self, at: Gpa, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        let offset = self.offset(at)?;
        if let Some(ram) = self.backing.downcast_ref::<SimRam>() {
            ram.read(offset, &mut data)?;
        } else if let Some(ram) = self.backing.downcast_ref::<Ram>() {
            ram.read(offset, &mut data)?;
        }
        Ok(data)
    }

    /// Writes bytes at a guest-physical address.
    pub fn write(&self, at: Gpa, data: &[u8]) -> Result<()> {
        let offset = self.offset(at)?;
        if let Some(ram) = self.backing.downcast_ref::<SimRam>() {
            ram.write(offset, data)?;
        } else if let Some(ram) = self.backing.downcast_ref::<Ram>() {
            ram.write(offset, data)?;
        }
        Ok(())
    }

    fn offset(&self, at: Gpa) -> Result<u64> {
        at.raw()
            .checked_sub(self.range.start().raw())
            .ok_or_else(|| anyhow!("{at} lies below the RAM at {}", self.range))
    }
}
