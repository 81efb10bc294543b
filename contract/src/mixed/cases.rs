//! The cases, and how they are run.

use memory_map::{Iova, Reach};

use super::bench::{Bench, ENGINE, MixedHost, PEER, RAM};
use crate::nvme::Iommu;
use crate::verdict::{other, same};
use crate::{CaseResult, Complaint, Verdict};

/// One thing that two functions behind different targets do.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What.
    pub name: &'static str,
    engine: Iommu,
    run: fn(&mut Bench) -> Verdict,
}

/// Makes two [`Case`]s of each function: one with the engine in a container, one with it in an
/// address space of an iommufd.
macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        vec![$(
            Case {
                name: concat!(stringify!($case), "_from_type1"),
                engine: Iommu::Type1,
                run: $case,
            },
            Case {
                name: concat!(stringify!($case), "_from_iommufd"),
                engine: Iommu::Iommufd,
                run: $case,
            },
        )*]
    };
}

/// All cases, in the order in which they are run.
#[must_use]
pub fn cases() -> Vec<Case> {
    cases![
        every_bar_is_mapped_both_ways,
        data_go_to_the_other_ways_bar_and_back,
        a_bar_of_the_other_way_that_does_not_decode_is_not_reached,
        a_bar_of_the_other_way_is_reached_where_it_was_moved,
    ]
}

/// Runs the cases whose names contain `filter`, each with functions that are opened anew, and
/// tells of each as soon as it has ended.
pub fn run(
    host: &dyn MixedHost,
    filter: &str,
    tell: &mut dyn FnMut(&CaseResult),
) -> Vec<CaseResult> {
    cases()
        .into_iter()
        .filter(|case| case.name.contains(filter))
        .map(|case| {
            let verdict = match host.parts(case.engine).and_then(Bench::new) {
                Ok(mut bench) => (case.run)(&mut bench),
                Err(error) => Err(Complaint::Failed {
                    expected: "functions to try it with".into(),
                    got: error.to_string(),
                }),
            };
            let result = CaseResult {
                name: case.name,
                verdict,
            };
            tell(&result);
            result
        })
        .collect()
}

const TEXT: [u8; 8] = *b"sentinel";
const OTHER: [u8; 8] = *b"someelse";
/// Where in RAM what is read lies, and what is written.
const SOURCE: u64 = 0;
const DESTINATION: u64 = 0x2000;
/// Where in the BAR.
const SPOT: u64 = 0x1000;

fn ram(offset: u64) -> Iova {
    Iova::new(RAM.raw().saturating_add(offset))
}

/// Has the engine write the text from RAM to the BAR at `base`, and tells what is there then.
fn written(bench: &mut Bench, base: u64) -> Result<[u8; 8], Complaint> {
    let bar = bench.bar()?;
    bench.ram_write(SOURCE, TEXT)?;
    bench.bar_write(&bar, SPOT, OTHER)?;
    bench.engine.load(ram(SOURCE), 8)?;
    bench.engine.store(Iova::new(base + SPOT), 8)?;
    bench.bar_read(&bar, SPOT)
}

/// Each target holds the BARs of both functions, its own function's and the other's.
fn every_bar_is_mapped_both_ways(bench: &mut Bench) -> Verdict {
    for function in [ENGINE, PEER] {
        let regions = bench.regions_of(function);
        same("no BAR", regions.is_empty(), false)?;
        for region in regions {
            for target in [ENGINE, PEER] {
                let reach = bench.reach(target, Some(region))?;
                same("the reach", reach, Some(Reach::Mapped))?;
            }
        }
    }
    Ok(())
}

fn data_go_to_the_other_ways_bar_and_back(bench: &mut Bench) -> Verdict {
    let bar = bench.bar()?;
    same("in the BAR", written(bench, bar.address)?, TEXT)?;
    bench.bar_write(&bar, SPOT, OTHER)?;
    bench.ram_write(DESTINATION, [0; 8])?;
    bench.engine.load(Iova::new(bar.address + SPOT), 8)?;
    bench.engine.store(ram(DESTINATION), 8)?;
    same("back in RAM", bench.ram_read(DESTINATION)?, OTHER)
}

/// Whichever way the engine takes, nothing is mapped while the peer does not decode.
fn a_bar_of_the_other_way_that_does_not_decode_is_not_reached(bench: &mut Bench) -> Verdict {
    let bar = bench.bar()?;
    same("before", written(bench, bar.address)?, TEXT)?;
    bench.bar_write(&bar, SPOT, OTHER)?;
    bench.set_decoding(false)?;
    for target in [ENGINE, PEER] {
        let reach = bench.reach(target, bar.region)?;
        other("the reach", reach, Some(Reach::Mapped))?;
    }
    bench.engine.store(Iova::new(bar.address + SPOT), 8)?;
    bench.set_decoding(true)?;
    same("meanwhile", bench.bar_read(&bar, SPOT)?, OTHER)?;
    same("afterwards", written(bench, bar.address)?, TEXT)
}

fn a_bar_of_the_other_way_is_reached_where_it_was_moved(bench: &mut Bench) -> Verdict {
    let bar = bench.bar()?;
    // Both halves change, and nothing is there.
    let to = bar.address.saturating_add(bar.size.saturating_mul(4)) | 1 << 36;
    bench.move_bar(&bar, to)?;
    same("its registers", bench.bar()?.address, to)?;
    same("where it was", written(bench, bar.address)?, OTHER)?;
    same("where it is", written(bench, to)?, TEXT)
}
