//! What an NVMe controller reaches, on the simulated host.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use assigned_pci::HostFunction;
use contract::CaseResult;
use contract::nvme::{
    Case, FROM_BAR, NvmeHost, Parts, RamAccess, cases, guest_cases, run, word_at, word_from_bar,
};
use iommu::{IoasTarget, RamCopies, Type1Target};
use memory_map::{
    Backing, DmaTarget, Errno, Iova, IovaRange, MapRequest, TargetError, TargetLimits,
};
use sim_host::{BrokenTranslation, FunctionSpec, NvmeFlaw, SimDisk, SimFunction, SimHost, SimRam};

/// A simulated host for each bench.
struct Sim {
    iommufd: bool,
    disk: SimDisk,
    /// The controller and the engine that there may be, changed.
    spec: fn(FunctionSpec) -> FunctionSpec,
    has_engine: bool,
    broken: Option<BrokenTranslation>,
}

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
fn target(host: &SimHost, iommufd: bool, functions: &[&SimFunction]) -> Box<dyn DmaTarget> {
    if iommufd {
        let ioas = Arc::new(host.open_iommufd().ioas());
        for function in functions {
            ioas.attach(function).unwrap();
        }
        // SAFETY: no memory lies behind a simulated host's address, and its files are never read.
        Box::new(unsafe { IoasTarget::new(ioas, RamCopies::new()) })
    } else {
        let container = Arc::new(host.container(functions).unwrap());
        // SAFETY: as above.
        Box::new(unsafe { Type1Target::new(container) })
    }
}

impl NvmeHost for Sim {
    fn parts(&self) -> io::Result<Parts> {
        let host = SimHost::default();
        let add = |spec: FunctionSpec| host.add_function(spec.with_command(6));
        let nvme = FunctionSpec::nvme("0000:01:00.0", self.disk.clone());
        let nvme = add((self.spec)(nvme))?;
        let peer = add(FunctionSpec::shared_memory("0000:00:06.0", 0x40_0000))?;
        let engine = add(FunctionSpec::edu("0000:00:05.0"))?;
        let target = target(&host, self.iommufd, &[&nvme, &peer, &engine]);
        let ram = host.ram(0x20_0000)?;
        host.break_translation(self.broken);
        Ok(Parts {
            target,
            nvme,
            peer,
            engine: self.has_engine.then_some(engine as Arc<dyn HostFunction>),
            ram: Backing::new(ram.clone()),
            access: Arc::new(Access(ram)),
            time_limit: Duration::from_millis(50),
        })
    }
}

fn disk(shift: u8) -> SimDisk {
    let size = 0x50_0000_u64;
    let disk = SimDisk::with_block_shift(size >> shift, shift);
    let words = (0..size)
        .step_by(8)
        .flat_map(|at| word_at(at).to_le_bytes());
    disk.write(0, &words.collect::<Vec<u8>>()).unwrap();
    disk
}

fn sim(iommufd: bool) -> Sim {
    Sim {
        iommufd,
        disk: disk(9),
        spec: |spec| spec.with_controller_memory_buffer(0x10_0000),
        has_engine: true,
        broken: None,
    }
}

fn all() -> Vec<Case> {
    let mut all = cases();
    all.extend(guest_cases());
    all
}

fn tried(sim: &Sim) -> Vec<CaseResult> {
    run(sim, &all(), &mut |_| {})
}

fn failed(results: &[CaseResult]) -> Vec<&'static str> {
    let failed = results.iter().filter(|result| result.verdict.is_err());
    failed.map(|result| result.name).collect()
}

#[test]
fn simulated_host_does_what_is_expected() {
    for iommufd in [false, true] {
        for shift in [9, 12] {
            let sim = Sim {
                disk: disk(shift),
                ..sim(iommufd)
            };
            let results = tried(&sim);
            assert_eq!(results.len(), all().len());
            for result in &results {
                assert_eq!(result.verdict, Ok(()), "{}", result.name);
            }
            let (from, end) = FROM_BAR;
            for offset in (from..end).step_by(8) {
                let mut word = [0; 8];
                sim.disk.read(offset, &mut word).unwrap();
                assert_eq!(u64::from_le_bytes(word), word_from_bar(offset));
            }
        }
    }
}

#[test]
fn without_another_engine_its_cases_are_skipped() {
    let sim = Sim {
        has_engine: false,
        ..sim(false)
    };
    let skipped = tried(&sim).into_iter().filter(|result| {
        matches!(&result.verdict, Err(contract::Complaint::Skipped(why)) if why.contains("engine"))
    });
    assert_eq!(skipped.count(), 5);
}

/// Negative control: an IOMMU that leads elsewhere, or blocks nothing.
#[test]
fn broken_translations_are_noticed() {
    for broken in [
        BrokenTranslation::Shift(0x1000),
        BrokenTranslation::Identity,
    ] {
        let results = tried(&Sim {
            broken: Some(broken),
            ..sim(false)
        });
        let failed = failed(&results);
        for case in [
            "blocks_go_from_the_disk_into_the_peers_bar",
            "blocks_go_from_the_peers_bar_to_the_disk",
            "ram_is_copied_while_a_peers_bar_moves",
            "a_bar_under_ram_is_reached_around_it",
            "a_bar_under_another_is_reached_around_it",
        ] {
            assert!(failed.contains(&case), "{broken:?}: {case} passed");
        }
    }
}

/// A target that takes RAM down for good with the first BAR that goes.
struct Forgetful(Box<dyn DmaTarget>);

impl DmaTarget for Forgetful {
    fn limits(&self) -> Result<TargetLimits, Errno> {
        self.0.limits()
    }
    fn needs_host_address(&self, backing: &Backing) -> bool {
        self.0.needs_host_address(backing)
    }
    fn map(&mut self, request: &MapRequest) -> Result<(), TargetError> {
        self.0.map(request)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<(), TargetError> {
        let ram = IovaRange::new(Iova::new(0x2010_0000), 0x20_0000).unwrap();
        // The second time there is nothing to unmap.
        drop(self.0.unmap(ram));
        self.0.unmap(range)
    }
}

struct WithForgetful(Sim);

impl NvmeHost for WithForgetful {
    fn parts(&self) -> io::Result<Parts> {
        let parts = self.0.parts()?;
        Ok(Parts {
            target: Box::new(Forgetful(parts.target)),
            ..parts
        })
    }
}

/// Negative control: RAM that is gone while a BAR moves is missed by whoever copies it.
#[test]
fn ram_that_is_gone_while_a_bar_moves_is_noticed() {
    for iommufd in [false, true] {
        let host = WithForgetful(sim(iommufd));
        let name = "ram_is_copied_while_a_peers_bar_moves";
        let mut cases = guest_cases();
        cases.retain(|case| case.name == name);
        assert_eq!(failed(&run(&host, &cases, &mut |_| {})), [name]);
    }
}

/// Negative control: a controller that does not do its work.
#[test]
fn a_controller_with_a_flaw_is_noticed() {
    let results = tried(&Sim {
        spec: |spec| spec.with_nvme_flaw(NvmeFlaw::FailsWhenEnabled),
        ..sim(true)
    });
    let passed = results.iter().filter(|result| result.verdict.is_ok());
    let passed: Vec<_> = passed.map(|result| result.name).collect();
    assert_eq!(
        passed,
        [
            "vectors_are_lent_as_the_devices_have_them",
            "vectors_that_there_are_not_are_refused",
            "an_interrupt_needs_bus_mastering",
        ],
        "they do without its commands"
    );
}
