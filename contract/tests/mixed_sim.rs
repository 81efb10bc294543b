//! A type1 container beside an iommufd, on the simulated host.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

use std::io;
use std::sync::Arc;

use contract::CaseResult;
use contract::mixed::{MixedHost, Parts, run};
use contract::nvme::{Iommu, RamAccess};
use iommu::{IoasTarget, RamCopies, Type1Target};
use memory_map::{Backing, DmaTarget};
use sim_host::{BrokenTranslation, FunctionSpec, SimFunction, SimHost, SimRam};

/// A simulated host for each bench.
struct Sim(Option<BrokenTranslation>);

struct Access(SimRam);

impl RamAccess for Access {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, data).map_err(io::Error::other)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data).map_err(io::Error::other)
    }
}

#[expect(
    unsafe_code,
    reason = "the simulated host's addresses are only numbers"
)]
fn target(host: &SimHost, iommufd: bool, function: &SimFunction) -> Box<dyn DmaTarget> {
    if iommufd {
        let ioas = Arc::new(host.open_iommufd().ioas());
        ioas.attach(function).unwrap();
        // SAFETY: no memory lies behind a simulated host's address, and its files are never read.
        Box::new(unsafe { IoasTarget::new(ioas, RamCopies::new()) })
    } else {
        let container = Arc::new(host.container(&[function]).unwrap());
        // SAFETY: as above.
        Box::new(unsafe { Type1Target::new(container) })
    }
}

impl MixedHost for Sim {
    fn parts(&self, way: Iommu) -> io::Result<Parts> {
        let host = SimHost::default();
        let engine = host.add_function(FunctionSpec::edu("0000:00:05.0"))?;
        let peer = host.add_function(FunctionSpec::shared_memory("0000:00:06.0", 0x40_0000))?;
        let ram = host.ram(0x20_0000)?;
        host.break_translation(self.0);
        let by_iommufd = way == Iommu::Iommufd;
        Ok(Parts {
            engine_target: target(&host, by_iommufd, &engine),
            peer_target: target(&host, !by_iommufd, &peer),
            engine,
            peer,
            ram: Backing::new(ram.clone()),
            access: Arc::new(Access(ram)),
        })
    }
}

fn failed(broken: Option<BrokenTranslation>) -> Vec<String> {
    let results = run(&Sim(broken), "", &mut |_| ());
    assert!(results.len() >= 8);
    let failed = results.iter().filter(|result| result.verdict.is_err());
    failed.map(CaseResult::to_string).collect()
}

#[test]
fn functions_behind_different_targets_reach_each_other() {
    assert_eq!(failed(None), [""; 0]);
}

/// Negative control: an IOMMU that swallows everything.
#[test]
fn dropped_dma_is_noticed() {
    let failed = failed(Some(BrokenTranslation::Drop));
    for way in ["type1", "iommufd"] {
        let case = format!("data_go_to_the_other_ways_bar_and_back_from_{way}");
        assert!(failed.iter().any(|it| it.contains(&case)), "{failed:?}");
    }
}
