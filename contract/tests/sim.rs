//! The contract, tried on the simulated host.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex};

use assigned_pci::{BarIndex, HostFunction};
use contract::{Bench, Type1Host, Window, run};
use dma_engine::{DmaEngine, find_engine};
use iommu::Type1Container;
use memory_map::{Access, BackingObject, Errno, HostMapping, HostVa, IovaRange};
use sim_host::{
    BrokenTranslation, Call, CallRecord, FunctionSpec, SimBarArea, SimContainer, SimFunction,
    SimHost, SimRam, Violation,
};

const RAM_SIZE: u64 = 0x4_0000;
const BAR_SIZE: u64 = 0x40_0000;
const BAR: BarIndex = BarIndex::ALL[2];

/// A simulated host for each bench.
struct Sim {
    /// Breaks the host, to see whether the contract notices.
    sabotage: fn(&SimHost),
}

struct SimBench {
    host: SimHost,
    // The mappings go before the addresses that they were made from.
    container: SimContainer,
    engine: Box<dyn DmaEngine>,
    peer: Arc<SimFunction>,
    ram: SimRam,
    ram_address: Box<dyn HostMapping>,
    bar_address: Box<dyn HostMapping>,
    edu: Arc<SimFunction>,
}

impl Drop for SimBench {
    fn drop(&mut self) {
        self.container.unmap_all().unwrap();
        // Some cases do on purpose what a VMM must not: they take decoding away from a mapped BAR.
        let mut freed = self.host.violations().into_iter();
        let freed = freed.find(|it| !matches!(it, Violation::DecodingOffWhileMapped { .. }));
        assert_eq!(freed, None);
    }
}

impl Type1Host for Sim {
    fn bench(&self) -> io::Result<Box<dyn Bench>> {
        let host = SimHost::default();
        let edu = host.add_function(FunctionSpec::edu("0000:00:05.0").with_command(6))?;
        let spec = FunctionSpec::shared_memory("0000:00:06.0", BAR_SIZE).with_command(6);
        let peer = host.add_function(spec)?;
        let container = host.container(&[&edu, &peer])?;
        let ram = host.ram(RAM_SIZE)?;
        let function = Arc::clone(&edu) as Arc<dyn HostFunction>;
        let bar = peer.bar(BAR)?.unwrap();
        let area: &SimBarArea = bar.areas[0].backing.downcast_ref().unwrap();
        let bench = SimBench {
            container,
            engine: find_engine(&function).unwrap(),
            ram_address: ram.map_host()?,
            bar_address: area.map_host()?,
            peer,
            ram,
            edu,
            host,
        };
        (self.sabotage)(&bench.host);
        Ok(Box::new(bench))
    }
}

impl Bench for SimBench {
    fn container(&self) -> &dyn Type1Container {
        &self.container
    }

    fn map(&self, iova: IovaRange, vaddr: HostVa, access: Access) -> io::Result<()> {
        #[expect(
            unsafe_code,
            reason = "the simulated host's addresses are only numbers"
        )]
        // SAFETY: no memory lies behind a simulated host's address.
        unsafe {
            self.container.map_dma(iova, vaddr, access)
        }
    }

    fn ram(&self) -> Window {
        Window {
            address: self.ram_address.address(),
            size: RAM_SIZE,
        }
    }

    fn ram_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.ram.read(offset, data).map_err(io::Error::other)
    }

    fn ram_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ram.write(offset, data).map_err(io::Error::other)
    }

    fn bar(&self) -> Window {
        Window {
            address: self.bar_address.address(),
            size: BAR_SIZE,
        }
    }

    fn bar_read(&self, offset: u64) -> io::Result<[u8; 8]> {
        let mut data = [0; 8];
        self.peer.bar_read(BAR, offset, &mut data)?;
        Ok(data)
    }

    fn bar_write(&self, offset: u64, data: [u8; 8]) -> io::Result<()> {
        self.peer.bar_write(BAR, offset, &data)
    }

    fn set_decoding(&self, on: bool) -> io::Result<()> {
        let command: u16 = if on { 6 } else { 4 };
        self.peer.config_write(4, &command.to_le_bytes())
    }

    fn set_mastering(&self, on: bool) -> io::Result<()> {
        let command: u16 = if on { 6 } else { 2 };
        self.edu.config_write(4, &command.to_le_bytes())
    }

    fn without_iommu(&self) -> io::Result<Box<dyn Type1Container>> {
        Ok(Box::new(self.host.open_container()))
    }

    fn engine(&mut self) -> &mut dyn DmaEngine {
        &mut *self.engine
    }

    fn limit_locked_memory(&self, bytes: u64) -> io::Result<Box<dyn Any>> {
        self.host.set_locked_limit(Some(bytes));
        Ok(Box::new(Unlimited(self.host.clone())))
    }
}

/// Takes the limit away when it is dropped.
struct Unlimited(SimHost);

impl Drop for Unlimited {
    fn drop(&mut self) {
        self.0.set_locked_limit(None);
    }
}

/// The cases that a host does not pass.
fn failed_on(sabotage: fn(&SimHost)) -> Vec<&'static str> {
    run(&Sim { sabotage }, "", |_| ())
        .into_iter()
        .filter(|result| result.verdict.is_err())
        .map(|result| result.name)
        .collect()
}

#[test]
fn the_simulated_host_keeps_the_contract() {
    let mut lines = Vec::new();
    let results = run(&Sim { sabotage: |_| () }, "", |result| {
        lines.push(result.to_string());
    });
    let failed: Vec<_> = results.iter().filter(|r| r.verdict.is_err()).collect();
    assert!(failed.is_empty(), "{}", lines.join("\n"));
    assert!(results.len() > 50);
}

#[test]
fn the_filter_chooses_by_name() {
    let results = run(&Sim { sabotage: |_| () }, "eexist", |_| ());
    assert!(results.len() > 3 && results.iter().all(|r| r.name.contains("eexist")));
}

/// Negative control: an IOMMU that swallows everything.
#[test]
fn dropped_dma_is_noticed() {
    let failed = failed_on(|host| host.break_translation(Some(BrokenTranslation::Drop)));
    for case in [
        "bytes_move_through_mappings",
        "transfers_cross_mappings",
        "read_only_memory_takes_no_writes",
        "another_page_at_the_same_address_shows",
        "ram_reaches_the_bar_and_back",
    ] {
        assert!(failed.contains(&case), "{case} passed; failed: {failed:?}");
    }
}

/// Negative control: an IOMMU that is a page off.
#[test]
fn shifted_dma_is_noticed() {
    let failed = failed_on(|host| host.break_translation(Some(BrokenTranslation::Shift(0x1000))));
    assert!(
        failed.contains(&"bytes_move_through_mappings"),
        "{failed:?}"
    );
    assert!(
        failed.contains(&"ram_reaches_the_bar_and_back"),
        "{failed:?}"
    );
}

/// Negative control: unmaps that say they were done and were not, or the other way about.
#[test]
fn lying_unmaps_are_noticed() {
    let failed = failed_on(|host| host.fail_from_now_though_done(Call::UnmapDma, libc::EINVAL));
    assert!(
        failed.contains(&"cutting_off_the_front_is_einval"),
        "{failed:?}"
    );
    assert!(failed.contains(&"unmap_returns_the_bytes"), "{failed:?}");
}

/// Negative control: a kernel that answers every map with the same errno.
#[test]
fn wrong_errnos_are_noticed() {
    let failed = failed_on(|host| host.fail_from_now(Call::MapDma, libc::EINVAL));
    for case in [
        "same_range_again_is_eexist",
        "nothing_at_the_address_is_efault",
        "entry_limit_is_enospc",
        "locked_memory_limit_is_enomem",
        "neighbours_are_no_overlap",
    ] {
        assert!(failed.contains(&case), "{case} passed; failed: {failed:?}");
    }
}

/// Negative control: one map in thousands goes wrong.
#[test]
fn one_wrong_answer_among_thousands_is_noticed() {
    let failed = failed_on(|host| host.fail(Call::MapDma, 1_000, libc::EIO));
    assert!(
        failed.contains(&"random_calls_end_as_the_model_says"),
        "{failed:?}"
    );
}

/// The random calls meet every rule that they are to meet, many times.
#[test]
fn random_calls_end_in_every_way() {
    static HOST: Mutex<Option<SimHost>> = Mutex::new(None);
    let sim = Sim {
        sabotage: |host| *HOST.lock().unwrap() = Some(host.clone()),
    };
    let results = run(&sim, "random_calls", |_| ());
    assert!(results.iter().all(|result| result.verdict.is_ok()));
    let calls = HOST.lock().unwrap().take().unwrap().calls();
    let count = |call: Call, errno: Option<i32>| {
        let ended = |record: &&CallRecord| {
            record.call == call && record.result.err().map(Errno::raw) == errno
        };
        calls.iter().filter(ended).count()
    };
    for errno in [libc::EINVAL, libc::EEXIST, libc::EFAULT, libc::ENOMEM] {
        let times = count(Call::MapDma, Some(errno));
        assert!(times >= 20, "errno {errno}: only {times} times");
    }
    assert!(count(Call::MapDma, None) >= 200);
    assert!(count(Call::UnmapDma, None) >= 200);
    assert!(count(Call::UnmapDma, Some(libc::EINVAL)) >= 200);
    assert!(count(Call::UnmapAll, None) >= 10);
}
