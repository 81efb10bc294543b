//! The driver on the simulated edu.

use iommu::Type1Container;
use memory_map::{Access, BackingObject};
use sim_host::{Call, FunctionSpec, SimFunction, SimHost, SimRam};

use super::*;
use crate::find_engine;

const EIO: i32 = 5;
const RAM: u64 = 0x10_0000;
const HIGH: u64 = 0x12_3456_7000;

struct Bench {
    host: SimHost,
    edu: Arc<SimFunction>,
    ram: SimRam,
    _container: sim_host::SimContainer,
    _mapping: Box<dyn memory_map::HostMapping>,
}

/// An edu that masters the bus, with 64 KiB of RAM at two addresses.
fn bench(spec: FunctionSpec) -> Bench {
    let host = SimHost::default();
    let edu = host.add_function(spec.with_command(0x6)).unwrap();
    let container = host.container(&[&edu]).unwrap();
    let ram = host.ram(0x1_0000).unwrap();
    let mapping = ram.map_host().unwrap();
    for iova in [RAM, HIGH] {
        let range = IovaRange::new(Iova::new(iova), 0x1_0000).unwrap();
        #[expect(
            unsafe_code,
            reason = "the simulated host's addresses are only numbers"
        )]
        // SAFETY: no memory lies behind a simulated host's address.
        unsafe { container.map_dma(range, mapping.address(), Access::ReadWrite) }.unwrap();
    }
    Bench {
        host,
        edu,
        ram,
        _container: container,
        _mapping: mapping,
    }
}

fn function(bench: &Bench) -> Arc<dyn HostFunction> {
    Arc::clone(&bench.edu) as Arc<dyn HostFunction>
}

fn engine(bench: &Bench) -> Edu {
    Edu::new(function(bench)).with_time_limit(Duration::from_millis(50))
}

#[test]
fn copies_more_than_its_buffer_holds() {
    let bench = bench(FunctionSpec::edu("edu"));
    let text: Vec<u8> = (0..251).cycle().take(0x2801).collect();
    bench.ram.write(0, &text).unwrap();
    let mut engine = find_engine(&function(&bench)).unwrap();
    engine
        .copy(Iova::new(RAM), Iova::new(HIGH + 0x8000), 0x2801)
        .unwrap();
    let mut back = vec![0; text.len()];
    bench.ram.read(0x8000, &mut back).unwrap();
    assert_eq!(back, text);
    assert_eq!(engine.last_address(), LAST_64);
    assert!(bench.host.faults().is_empty() && bench.host.bus_errors().is_empty());
}

#[test]
fn an_unmapped_address_moves_nothing() {
    let bench = bench(FunctionSpec::edu("edu"));
    bench.ram.write(0, b"here").unwrap();
    let mut engine = engine(&bench);
    engine.load(Iova::new(RAM), 4).unwrap();
    engine.store(Iova::new(0x900_0000), 4).unwrap();
    let faults = bench.host.faults();
    assert_eq!(faults.len(), 1);
    assert_eq!(
        (faults[0].iova, faults[0].write),
        (Iova::new(0x900_0000), true)
    );
}

#[test]
fn a_kernel_that_cuts_accesses_is_found_out() {
    let bench = bench(FunctionSpec::edu("edu").with_split_wide_accesses());
    bench.ram.write(0, b"low").unwrap();
    let mut engine = engine(&bench);
    engine
        .copy(Iova::new(RAM), Iova::new(RAM + 0x100), 3)
        .unwrap();
    let mut back = [0; 3];
    bench.ram.read(0x100, &mut back).unwrap();
    assert_eq!(&back, b"low");
    assert_eq!(engine.last_address(), LAST_32);
    assert!(matches!(
        engine.load(Iova::new(HIGH), 4),
        Err(EngineError::OutOfReach { .. })
    ));
    assert!(matches!(
        engine.load(Iova::new(0xffff_fffe), 4),
        Err(EngineError::OutOfReach { .. })
    ));
    assert!(bench.host.faults().is_empty());
}

#[test]
fn a_length_that_leaves_the_buffer_never_reaches_the_device() {
    let bench = bench(FunctionSpec::edu("edu"));
    let mut engine = engine(&bench);
    for len in [0, 4097, u64::MAX] {
        assert!(matches!(
            engine.store(Iova::new(RAM), len),
            Err(EngineError::Length { .. })
        ));
    }
    assert!(matches!(
        engine.store(Iova::new(u64::MAX), 2),
        Err(EngineError::Range { .. })
    ));
    assert_eq!(bench.host.count(Call::BarWrite), 0);
}

#[test]
fn what_is_no_edu_is_told_apart() {
    let memory = bench(FunctionSpec::shared_memory("memory", 0x1000));
    assert!(find_engine(&function(&memory)).is_none());
    assert!(matches!(
        engine(&memory).probe(),
        Err(EngineError::Identification { found: 0, .. })
    ));
    let bare = bench(FunctionSpec::new("bare", Edu::VENDOR, Edu::DEVICE));
    assert!(matches!(
        engine(&bare).probe(),
        Err(EngineError::NoRegisters { .. })
    ));
    let gone = bench(FunctionSpec::edu("gone").all_ones());
    assert!(find_engine(&function(&gone)).is_none());
    assert!(matches!(
        engine(&gone).probe(),
        Err(EngineError::Identification {
            found: u32::MAX,
            ..
        })
    ));
}

#[test]
fn without_memory_decoding_every_access_fails() {
    let bench = bench(FunctionSpec::edu("edu"));
    bench.edu.config_write(4, &[0, 0]).unwrap();
    let error = engine(&bench).load(Iova::new(RAM), 4).unwrap_err();
    let EngineError::Access { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.raw_os_error(), Some(EIO));
}

#[test]
fn without_bus_mastering_nothing_moves() {
    let bench = bench(FunctionSpec::edu("edu"));
    bench.edu.config_write(4, &[2, 0]).unwrap();
    bench.ram.write(0, b"text").unwrap();
    engine(&bench).store(Iova::new(RAM), 4).unwrap();
    let mut back = [0; 4];
    bench.ram.read(0, &mut back).unwrap();
    assert_eq!(&back, b"text");
    assert_eq!(bench.host.bus_errors().len(), 1);
}

/// A function whose engine never finishes, or never answers.
#[derive(Debug)]
struct Stuck {
    inner: Arc<SimFunction>,
    busy: bool,
}

impl HostFunction for Stuck {
    fn name(&self) -> String {
        "stuck".into()
    }
    fn config_size(&self) -> u16 {
        self.inner.config_size()
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) -> std::io::Result<()> {
        self.inner.config_read(offset, data)
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> std::io::Result<()> {
        self.inner.config_write(offset, data)
    }
    fn bar(&self, bar: BarIndex) -> std::io::Result<Option<assigned_pci::HostBar>> {
        self.inner.bar(bar)
    }
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        self.inner.bar_read(bar, offset, data)?;
        match (offset, self.busy) {
            (COMMAND, true) => data.fill(1),
            (LIVENESS, false) => data.fill(0),
            _ => {}
        }
        Ok(())
    }
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.inner.bar_write(bar, offset, data)
    }
    fn reset(&self) -> std::io::Result<()> {
        self.inner.reset()
    }
}

#[test]
fn an_engine_that_never_finishes_or_answers_is_given_up() {
    let bench = bench(FunctionSpec::edu("edu"));
    let stuck = |busy| {
        let inner = Arc::clone(&bench.edu);
        Edu::new(Arc::new(Stuck { inner, busy })).with_time_limit(Duration::from_millis(20))
    };
    assert!(matches!(
        stuck(true).load(Iova::new(RAM), 4),
        Err(EngineError::Timeout { .. })
    ));
    assert!(matches!(
        stuck(false).probe(),
        Err(EngineError::NotAlive { .. })
    ));
}
