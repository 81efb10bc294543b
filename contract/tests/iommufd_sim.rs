//! The contract of iommufd, kept by the simulated host.
#![expect(
    clippy::unwrap_used,
    reason = "a panic here is a failed test and nothing else"
)]

use std::any::Any;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use assigned_pci::{BarIndex, HostFunction};
use contract::iommufd::{
    Bench, Calls, Function, IommufdHost, bar_events, cases, registration, resetting_cases, run,
};
use contract::{CaseResult, Window};
use dma_engine::{DmaEngine, find_engine};
use iommu::IoAddressSpace;
use memory_map::{Access, Backing, BackingObject, Errno, HostMapping, HostVa, IovaRange};
use sim_host::{
    BrokenTranslation, Call, CallPoint, CallRecord, FunctionSpec, GroupId, PowerManagement,
    SimBarArea, SimBus, SimFunction, SimHost, SimIoas, SimIommufd, SimRam,
};

const RAM_SIZE: u64 = 0x4_0000;
const ANONYMOUS_SIZE: u64 = 0x8000;
const BAR_SIZE: u64 = 0x40_0000;
const BAR: BarIndex = BarIndex::ALL[2];

/// A simulated host for each bench.
struct Sim {
    /// Whether both functions are in one group.
    one_group: bool,
    /// Breaks the host, to see whether the contract notices.
    sabotage: fn(&SimHost, &Arc<SimFunction>),
}

struct SimBench {
    host: SimHost,
    iommufd: SimIommufd,
    // The mappings go before the addresses that they were made from.
    ioas: Arc<SimIoas>,
    spares: RefCell<Vec<Arc<SimIoas>>>,
    engine: Box<dyn DmaEngine>,
    peer: Arc<SimFunction>,
    ram: SimRam,
    anonymous: SimRam,
    anonymous_address: Box<dyn HostMapping>,
    bar: Backing,
    bar_address: Box<dyn HostMapping>,
    no_memory: File,
    edu: Arc<SimFunction>,
    one_group: bool,
}

impl Drop for SimBench {
    fn drop(&mut self) {
        self.spares.get_mut().clear();
        self.ioas.unmap_all().unwrap();
        assert_eq!(self.host.violations(), []);
    }
}

impl IommufdHost for Sim {
    fn bench(&self) -> io::Result<Box<dyn Bench>> {
        let host = SimHost::default();
        let mut edu = FunctionSpec::edu("0000:00:05.0").with_command(6);
        let mut peer = FunctionSpec::shared_memory("0000:00:06.0", BAR_SIZE)
            .with_command(6)
            .with_power_management(PowerManagement::NoSoftReset)
            .with_express_flr();
        if self.one_group {
            edu = edu.in_group(GroupId(1));
            peer = peer.in_group(GroupId(1));
        }
        let (edu, peer) = (host.add_function(edu)?, host.add_function(peer)?);
        let iommufd = host.open_iommufd();
        let ioas = Arc::new(iommufd.ioas());
        ioas.attach(&edu)?;
        ioas.attach(&peer)?;
        let (ram, anonymous) = (host.ram(RAM_SIZE)?, host.anonymous_ram(ANONYMOUS_SIZE)?);
        let function = Arc::clone(&edu) as Arc<dyn HostFunction>;
        let bar = peer.bar(BAR)?.unwrap().areas[0].backing.clone();
        let area: &SimBarArea = bar.downcast_ref().unwrap();
        let bar_address = area.map_host()?;
        bar.file().unwrap();
        (self.sabotage)(&host, &peer);
        Ok(Box::new(SimBench {
            iommufd,
            ioas,
            spares: RefCell::default(),
            engine: find_engine(&function).unwrap(),
            peer,
            ram,
            anonymous_address: anonymous.map_host()?,
            anonymous,
            bar,
            bar_address,
            no_memory: File::open("/dev/null")?,
            edu,
            one_group: self.one_group,
            host,
        }))
    }
}

impl SimBench {
    fn function(&self, function: Function) -> &Arc<SimFunction> {
        match function {
            Function::Engine => &self.edu,
            Function::Memory => &self.peer,
        }
    }

    fn known(&self, ioas: &Arc<dyn IoAddressSpace>) -> Arc<SimIoas> {
        let spares = self.spares.borrow();
        let mut known = spares.iter().chain([&self.ioas]);
        Arc::clone(known.find(|known| known.id() == ioas.id()).unwrap())
    }
}

impl Bench for SimBench {
    fn ioas(&self) -> Arc<dyn IoAddressSpace> {
        Arc::clone(&self.ioas) as Arc<dyn IoAddressSpace>
    }

    fn alloc(&self) -> io::Result<Arc<dyn IoAddressSpace>> {
        let ioas = Arc::new(self.iommufd.ioas());
        self.spares.borrow_mut().push(Arc::clone(&ioas));
        Ok(ioas)
    }

    fn destroy(&self, ioas: Arc<dyn IoAddressSpace>) {
        let id = ioas.id();
        self.spares.borrow_mut().retain(|spare| spare.id() != id);
    }

    fn attach(&self, function: Function, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<()> {
        self.known(ioas).attach(self.function(function))
    }

    fn attach_group(&self, function: Function, ioas: &Arc<dyn IoAddressSpace>) -> io::Result<()> {
        self.known(ioas).attach_group(self.function(function))
    }

    fn detach(&self, function: Function) -> io::Result<()> {
        let function = self.function(function);
        for ioas in self.spares.borrow().iter().chain([&self.ioas]) {
            ioas.detach(function);
        }
        Ok(())
    }

    fn share_a_group(&self) -> bool {
        self.one_group
    }

    fn ram(&self) -> BorrowedFd<'_> {
        self.ram.file().unwrap().fd
    }

    fn ram_backing(&self) -> Backing {
        Backing::new(self.ram.clone())
    }

    fn ram_size(&self) -> u64 {
        RAM_SIZE
    }

    fn ram_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.ram.read(offset, data).map_err(io::Error::other)
    }

    fn ram_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ram.write(offset, data).map_err(io::Error::other)
    }

    fn no_memory(&self) -> BorrowedFd<'_> {
        self.no_memory.as_fd()
    }

    fn anonymous(&self) -> Window {
        Window {
            address: self.anonymous_address.address(),
            size: ANONYMOUS_SIZE,
        }
    }

    fn anonymous_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.anonymous.read(offset, data).map_err(io::Error::other)
    }

    fn map_address(
        &self,
        ioas: &Arc<dyn IoAddressSpace>,
        iova: IovaRange,
        vaddr: HostVa,
        access: Access,
    ) -> io::Result<()> {
        #[expect(
            unsafe_code,
            reason = "the simulated host's addresses are only numbers"
        )]
        // SAFETY: no memory lies behind a simulated host's address.
        unsafe {
            ioas.map(iova, vaddr, access)
        }
    }

    fn bar(&self) -> Window {
        Window {
            address: self.bar_address.address(),
            size: BAR_SIZE,
        }
    }

    fn dma_buf(&self) -> BorrowedFd<'_> {
        self.bar.file().unwrap().fd
    }

    fn bar_backing(&self) -> Backing {
        self.bar.clone()
    }

    fn bar_read(&self, offset: u64) -> io::Result<[u8; 8]> {
        let mut data = [0; 8];
        self.peer.bar_read(BAR, offset, &mut data)?;
        Ok(data)
    }

    fn bar_write(&self, offset: u64, data: [u8; 8]) -> io::Result<()> {
        self.peer.bar_write(BAR, offset, &data)
    }

    fn memory(&self) -> Arc<dyn HostFunction> {
        Arc::clone(&self.peer) as Arc<dyn HostFunction>
    }

    fn hot_reset(&self) -> io::Result<()> {
        SimBus::new([Arc::clone(&self.peer)]).hot_reset()
    }

    fn set_decoding(&self, on: bool) -> io::Result<()> {
        let command: u16 = if on { 6 } else { 4 };
        self.peer.config_write(4, &command.to_le_bytes())
    }

    fn set_mastering(&self, on: bool) -> io::Result<()> {
        let command: u16 = if on { 6 } else { 2 };
        self.edu.config_write(4, &command.to_le_bytes())
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

fn results(sim: &Sim) -> Vec<CaseResult> {
    let all: Vec<_> = cases().into_iter().chain(resetting_cases()).collect();
    run(sim, &all, |_| ())
}

fn failures(results: &[CaseResult]) -> Vec<String> {
    let failed = results.iter().filter(|result| result.verdict.is_err());
    failed.map(CaseResult::to_string).collect()
}

/// The cases that a host does not pass.
fn failed_on(sabotage: fn(&SimHost, &Arc<SimFunction>)) -> Vec<&'static str> {
    results(&Sim {
        one_group: false,
        sabotage,
    })
    .into_iter()
    .filter(|result| result.verdict.is_err())
    .map(|result| result.name)
    .collect()
}

#[test]
fn the_simulated_host_keeps_the_contract() {
    for one_group in [false, true] {
        let results = results(&Sim {
            one_group,
            sabotage: |_, _| (),
        });
        assert_eq!(failures(&results), [""; 0], "in one group: {one_group}");
        assert!(results.len() > 90);
    }
}

/// What the tables of figures tell: each event takes as few kernel calls as there can be.
#[test]
fn events_take_the_fewest_calls() {
    let sim = Sim {
        one_group: false,
        sabotage: |_, _| (),
    };
    let bench = sim.bench().unwrap();
    for figure in bar_events(&*bench, 2, 3).unwrap() {
        let calls = (figure.calls.maps, figure.calls.unmaps, figure.calls.total());
        assert_eq!(calls, (1, 1, 2), "{figure:?}");
        assert_eq!(figure.bare.len(), 2);
    }
    let regions = bench.ram_size() / 0x1000;
    let figure = registration(&*bench, &bench.ram_backing(), 0x1000, 2).unwrap();
    let expected = Calls {
        maps: regions,
        unmaps: regions,
        // Where it may map.
        others: 1,
        copies: 0,
    };
    assert_eq!(figure.calls, expected);
}

/// Negative control: an IOMMU that swallows everything.
#[test]
fn dropped_dma_is_noticed() {
    let failed = failed_on(|host, _| host.break_translation(Some(BrokenTranslation::Drop)));
    for case in [
        "bytes_move_through_mappings",
        "copies_lead_to_the_same_memory",
        "ram_reaches_the_bar_and_back",
        "a_mapping_made_anew_leads_to_the_bar",
    ] {
        assert!(failed.contains(&case), "{case} passed; failed: {failed:?}");
    }
}

/// Negative control: an IOMMU that is a page off.
#[test]
fn shifted_dma_is_noticed() {
    let failed = failed_on(|host, _| {
        host.break_translation(Some(BrokenTranslation::Shift(0x1000)));
    });
    for case in [
        "bytes_move_through_mappings",
        "a_slice_shows_its_part_of_the_bar",
    ] {
        assert!(failed.contains(&case), "{case} passed; failed: {failed:?}");
    }
}

/// Negative control: a kernel that answers every map of a file with the same errno.
#[test]
fn wrong_errnos_are_noticed() {
    let failed = failed_on(|host, _| host.fail_from_now(Call::MapFile, libc::EINVAL));
    for case in [
        "same_range_again_is_eexist",
        "a_revoked_bar_is_enodev",
        "locked_memory_limit_is_enomem",
        "neighbours_are_no_overlap",
    ] {
        assert!(failed.contains(&case), "{case} passed; failed: {failed:?}");
    }
}

/// Negative control: unmaps that say that they failed and were done.
#[test]
fn lying_unmaps_are_noticed() {
    let failed = failed_on(|host, _| host.fail_from_now_though_done(Call::IoasUnmap, libc::ENOENT));
    for case in [
        "unmap_returns_the_bytes",
        "cutting_out_the_middle_is_enoent",
    ] {
        assert!(failed.contains(&case), "{case} passed; failed: {failed:?}");
    }
}

/// Negative control: one map in thousands goes wrong.
#[test]
fn one_wrong_answer_among_thousands_is_noticed() {
    let failed = failed_on(|host, _| host.fail(Call::MapFile, 1_000, libc::EIO));
    assert_eq!(failed, ["random_calls_end_as_the_model_says"]);
}

/// The random calls meet every rule that they are to meet, many times.
#[test]
fn random_calls_end_in_every_way() {
    static HOST: Mutex<Option<SimHost>> = Mutex::new(None);
    let sim = Sim {
        one_group: false,
        sabotage: |host, _| *HOST.lock().unwrap() = Some(host.clone()),
    };
    let mut random = cases();
    random.retain(|case| case.name.contains("random_calls"));
    assert_eq!(failures(&run(&sim, &random, |_| ())), [""; 0]);
    let calls = HOST.lock().unwrap().take().unwrap().calls();
    let count = |call: Call, errno: Option<i32>| {
        let ended = |record: &&CallRecord| {
            record.call == call && record.result.err().map(Errno::raw) == errno
        };
        calls.iter().filter(ended).count()
    };
    for errno in [libc::EINVAL, libc::EEXIST, libc::ENOMEM, libc::ENODEV] {
        let times = count(Call::MapFile, Some(errno));
        assert!(times >= 20, "map, errno {errno}: only {times} times");
    }
    for errno in [libc::EINVAL, libc::EEXIST, libc::ENOENT, libc::EPERM] {
        let times = count(Call::IoasCopy, Some(errno));
        assert!(times >= 10, "copy, errno {errno}: only {times} times");
    }
    for call in [Call::MapFile, Call::IoasUnmap] {
        assert!(count(call, None) >= 200);
    }
    assert!(count(Call::IoasCopy, None) >= 50);
    assert!(count(Call::IoasUnmap, Some(libc::ENOENT)) >= 200);
}

/// The silent success: a BAR that is revoked between being found and being mapped.
#[test]
fn a_revocation_in_the_middle_of_a_map_succeeds_and_leads_nowhere() {
    let failed = failed_on(|host, peer| {
        let (there, peer) = (host.clone(), Arc::downgrade(peer));
        host.set_hook(Some(Arc::new(move |point| {
            let Some(peer) = peer.upgrade() else { return };
            if point == CallPoint::Midway(Call::MapFile) && peer.decodes_memory() {
                there.revoke_dma_bufs(&peer);
                there.restore_dma_bufs(&peer);
            }
        })));
    });
    assert!(failed.contains(&"ram_reaches_the_bar_and_back"));
    // Each map succeeds, and RAM is not concerned.
    for case in ["a_bar_maps_as_a_whole_and_in_slices", "ram_is_not_revoked"] {
        assert!(!failed.contains(&case), "{case} failed");
    }
}
