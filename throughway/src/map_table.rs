//! The map as it stands, with the reach of each target, as data and as text.

use std::collections::BTreeMap;
use std::fmt;

use memory_map::{Reach, RegionKind, RegionManager};
use serde::Serialize;

/// One region of the map.
#[derive(Debug, Serialize)]
pub struct MapRow {
    /// Where it lies; null where it would wrap past the end of the address space.
    pub gpa: Option<u64>,
    /// In bytes.
    pub size: u64,
    /// `ram` or `device`.
    pub kind: &'static str,
    pub name: String,
    /// For each target `mapped`, `partly` or the reason why not.
    pub reach: BTreeMap<String, String>,
}

/// The whole map.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct MapTable(pub Vec<MapRow>);

impl MapTable {
    /// The map as it stands now, by address.
    pub fn of(map: &RegionManager) -> Self {
        let reach = map.reach();
        let mut rows: Vec<MapRow> = map
            .regions()
            .into_iter()
            .map(|region| MapRow {
                gpa: region.range.map(|range| range.start().raw()),
                size: region.size,
                kind: match region.kind {
                    RegionKind::Ram => "ram",
                    RegionKind::DeviceMemory => "device",
                },
                name: region.name.to_string(),
                reach: reach
                    .iter()
                    .filter(|entry| entry.region == region.id)
                    .map(|entry| (entry.target_name.to_string(), in_a_word(&entry.reach)))
                    .collect(),
            })
            .collect();
        rows.sort_by_key(|row| row.gpa);
        Self(rows)
    }
}

fn in_a_word(reach: &Reach) -> String {
    match reach {
        Reach::Mapped => "mapped".into(),
        Reach::Partly { .. } => "partly".into(),
        Reach::Unavailable(reason) => reason.to_string(),
    }
}

impl fmt::Display for MapTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.0 {
            match row.gpa {
                Some(gpa) => write!(f, "  {gpa:#014x}")?,
                None => write!(f, "  {:14}", "nowhere")?,
            }
            write!(f, "  {:>#11x}  {:<6}  {:<18}", row.size, row.kind, row.name)?;
            for (target, reach) in &row.reach {
                write!(f, "  {target}: {reach}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
