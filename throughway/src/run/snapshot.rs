//! The map of a running machine and who reaches whom in it, as they are when somebody asks.

use std::fmt;

use anyhow::{Result, ensure};
use memory_map::{RegionId, RegionKind, RegionManager, TargetId};
use serde::Serialize;

use super::report::{Function, Pair};
use crate::host::Bypasses;

/// A function by its name, its address space and its BARs: nothing that would keep it open.
#[derive(Debug, Clone)]
pub struct Enlisted {
    pub name: String,
    /// Its address space's name.
    pub space: String,
    pub target: TargetId,
    /// The numbers of its memory BARs, with their regions.
    pub bars: Vec<(u8, RegionId)>,
}

/// Whom to ask the map about.
#[derive(Debug)]
pub struct Roster {
    pub map: RegionManager,
    pub functions: Vec<Enlisted>,
    pub bypasses: Bypasses,
}

/// A stretch of addresses in which the guest sees one region.
#[derive(Debug, Serialize)]
pub struct Segment {
    pub first: u64,
    /// Inclusive.
    pub last: u64,
    pub region: String,
    /// `ram` or `device`. What the platform keeps to itself is a device without memory.
    pub kind: &'static str,
    /// Where in the region it starts, in bytes.
    pub offset: u64,
}

/// What there is at a moment.
#[derive(Debug, Serialize)]
pub struct Snapshot {
    /// What the guest sees, by address.
    pub view: Vec<Segment>,
    pub functions: Vec<Function>,
    /// Who reaches whose BARs. A guest that moves them meanwhile may have done so since the view
    /// was taken.
    pub pairs: Vec<Pair>,
}

impl Roster {
    /// Those that are there, by their number. One whose regions have left the map has left.
    fn present(&self) -> Vec<(usize, &Enlisted)> {
        let here = |(_, function): &(usize, &Enlisted)| {
            let mut bars = function.bars.iter();
            function.bars.is_empty() || bars.any(|(_, region)| self.map.region(*region).is_ok())
        };
        self.functions.iter().enumerate().filter(here).collect()
    }

    /// Who reaches whose BARs, of everybody.
    ///
    /// # Errors
    /// Where somebody has left.
    pub fn all_pairs(&self) -> Result<Vec<Pair>> {
        let pairs = self.pairs();
        let bars = self.functions.iter().map(|function| function.bars.len());
        let others = self.functions.len().saturating_sub(1);
        let all = bars.sum::<usize>().saturating_mul(others);
        ensure!(
            pairs.len() == all,
            "the map knows {} pairs of functions and BARs, not {all}",
            pairs.len()
        );
        Ok(pairs)
    }

    /// Who reaches whose BARs, of those that are there.
    fn pairs(&self) -> Vec<Pair> {
        let present = self.present();
        let mut pairs = Vec::new();
        for (from, who) in &present {
            for (to, whose) in &present {
                if from == to {
                    continue;
                }
                let bypass = self.bypasses.get(&(*from, *to));
                for (bar, region) in &whose.bars {
                    // It may have left since.
                    if let Ok(reach) = self.map.reach_of(who.target, *region) {
                        pairs.push(Pair::new(&who.name, &whose.name, *bar, &reach, bypass));
                    }
                }
            }
        }
        pairs
    }

    /// All of it, now.
    pub fn look(&self) -> Snapshot {
        let view = self.map.view().into_iter().map(|seen| Segment {
            first: seen.range.start().raw(),
            last: seen.range.last().raw(),
            region: seen.name.to_string(),
            kind: match seen.kind {
                RegionKind::Ram => "ram",
                RegionKind::DeviceMemory => "device",
            },
            offset: seen.offset,
        });
        let present = self.present().into_iter();
        let functions = present.map(|(_, function)| Function {
            name: function.name.clone(),
            space: function.space.clone(),
        });
        Snapshot {
            view: view.collect(),
            functions: functions.collect(),
            pairs: self.pairs(),
        }
    }
}

impl Snapshot {
    /// As lines for a terminal that may be raw, or as one line with a JSON object.
    pub fn lines(&self, json: bool) -> serde_json::Result<String> {
        let text = if json {
            serde_json::to_string(self)?
        } else {
            self.to_string()
        };
        Ok(text.lines().flat_map(|line| [line, "\r\n"]).collect())
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.view {
            let Segment {
                first,
                last,
                region,
                offset,
                ..
            } = segment;
            write!(f, "  {first:#014x}-{last:#014x}  {region}")?;
            if *offset > 0 {
                write!(f, " from {offset:#x}")?;
            }
            writeln!(f)?;
        }
        for Function { name, space } in &self.functions {
            writeln!(f, "{name} in {space}")?;
        }
        for pair in &self.pairs {
            writeln!(f, "{pair}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use host_memory::Ram;
    use memory_map::{
        Access, Backing, Gpa, GpaRange, Priority, RegionSpec, SubMapping, TargetOptions,
    };

    use super::*;
    use crate::run::narrow_iommu::Narrow;

    fn region(
        name: &str,
        kind: RegionKind,
        (start, size): (u64, u64),
        priority: i32,
    ) -> RegionSpec {
        RegionSpec {
            name: name.into(),
            range: GpaRange::new(Gpa::new(start), size).unwrap(),
            priority: Priority(priority),
            kind,
            access: Access::ReadWrite,
            shareable: false,
            label: None,
            sub_mappings: vec![SubMapping {
                offset: 0,
                size,
                backing: Backing::new(Ram::memfd(c"region", size).unwrap()),
                backing_offset: 0,
            }],
        }
    }

    #[test]
    fn a_snapshot_tells_what_is_seen_where_and_who_reaches_it() {
        let map = RegionManager::new();
        let options = TargetOptions::new("IOAS 0");
        let space = map.register(Box::new(Narrow), options).unwrap();
        let mut change = map.change();
        let ram = change.add(region("RAM 0", RegionKind::Ram, (0, 0x4000), 100));
        let bar = change.add(region(
            "b BAR2",
            RegionKind::DeviceMemory,
            (0x2000, 0x4000),
            0,
        ));
        let gone = change.add(region(
            "c BAR0",
            RegionKind::DeviceMemory,
            (0x8000, 0x1000),
            0,
        ));
        for region in [ram, bar, gone] {
            change.enable(region);
        }
        change.commit().unwrap();
        let enlisted = |name: &str, bars: &[(u8, RegionId)]| Enlisted {
            name: name.to_owned(),
            space: "IOAS 0".to_owned(),
            target: space.id(),
            bars: bars.to_vec(),
        };
        let roster = Roster {
            map: map.clone(),
            functions: vec![
                enlisted("a", &[]),
                enlisted("b", &[(2, bar)]),
                enlisted("c", &[(0, gone)]),
            ],
            bypasses: Bypasses::new(),
        };
        assert!(roster.look().to_string().contains("a -> c BAR0: mapped\n"));
        assert_eq!(roster.all_pairs().unwrap().len(), 4);

        // A function that has left is not told of, and keeps nobody from looking.
        let mut change = map.change();
        change.remove(gone);
        change.commit().unwrap();
        assert!(roster.all_pairs().is_err());
        let snapshot = roster.look();
        let expected = "  \
  0x000000000000-0x000000003fff  RAM 0
  0x000000004000-0x000000005fff  b BAR2 from 0x2000
a in IOAS 0
b in IOAS 0
a -> b BAR2: partly (0x2000 bytes; not 0x2000-0x3fff: covered by RAM 0)
";
        assert_eq!(snapshot.to_string(), expected);
        let line = snapshot.lines(true).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["view"][1]["offset"], 0x2000);
        assert_eq!(value["view"][1]["kind"], "device");
        assert_eq!(value["pairs"][0]["reach"], "partly");
    }
}
