//! How many calls of the host each event of a guest takes: the numbers of `docs/performance.md`.

use std::collections::BTreeMap;
use std::sync::Arc;

use assigned_pci::{AssignedFunction, BarIndex, FunctionOptions, HostFunction};
use iommu::{IoasTarget, RamCopies};
use memory_map::{RegionManager, TargetHandle, TargetOptions};
use sim_host::{
    BarKind, BarSpec, Call, FunctionSpec, PowerManagement, SimFunction, SimHost, SimIoas,
};

const COMMAND: u16 = 0x04;
const PMCSR: u16 = 0xc4;
const DEVICE_CONTROL: u16 = 0xd0;
const BAR: BarIndex = BarIndex::ALL[2];

/// A peer with a BAR in as many address spaces as are wanted, each with a function of its own.
struct Machine {
    host: SimHost,
    function: AssignedFunction,
    _targets: Vec<TargetHandle>,
    _spaces: Vec<(Arc<SimIoas>, Arc<SimFunction>)>,
}

impl Machine {
    fn new(targets: usize) -> Self {
        let host = SimHost::default();
        let map = RegionManager::new();
        let spec = FunctionSpec::new("0000:00:06.0", 0x1234, 0x5678)
            .with_bar(BAR, BarSpec::new(BarKind::Memory64Prefetchable, 0x1_0000))
            .with_power_management(PowerManagement::NoSoftReset)
            .with_express_flr();
        let peer = host.add_function(spec).unwrap();
        let iommufd = host.open_iommufd();
        let copies = RamCopies::new();
        let mut spaces = Vec::new();
        let mut handles = Vec::new();
        for nth in 0..targets {
            let space = Arc::new(iommufd.ioas());
            let writer = FunctionSpec::edu(format!("0000:00:1{nth}.0"));
            let writer = host.add_function(writer).unwrap();
            space.attach(&writer).unwrap();
            #[expect(
                unsafe_code,
                reason = "the simulated host's addresses are only numbers"
            )]
            // SAFETY: no memory lies behind a simulated host's address, and its files are never
            // read.
            let target = unsafe { IoasTarget::new(Arc::clone(&space), copies.clone()) };
            let options = TargetOptions::new(format!("ioas {nth}"));
            handles.push(map.register(Box::new(target), options).unwrap());
            spaces.push((space, writer));
        }
        let options = FunctionOptions::default();
        let peer: Arc<dyn HostFunction> = peer;
        let function = AssignedFunction::new(peer, map, &options).unwrap();
        let machine = Self {
            host,
            function,
            _targets: handles,
            _spaces: spaces,
        };
        machine.place(8);
        machine.write(COMMAND, &[6, 0]);
        machine
    }

    fn write(&self, at: u16, data: &[u8]) {
        let outcome = self.function.config_write(at, data);
        assert!(outcome.host_errors.is_empty(), "{outcome:?}");
    }

    /// Writes both halves of the BAR, which change.
    fn place(&self, value: u8) {
        self.write(0x18, &[0, 0, value, 0]);
        self.write(0x1c, &[value, 0, 0, 0]);
    }

    /// The calls that an event takes, by what they are.
    fn calls(&self, event: impl FnOnce(&Self)) -> BTreeMap<Call, usize> {
        self.host.forget_calls();
        event(self);
        let mut calls = BTreeMap::new();
        for record in self.host.calls() {
            let count: &mut usize = calls.entry(record.call).or_default();
            *count += 1;
        }
        calls
    }
}

/// Calls of the host, of each kind that there are any of.
fn counts(list: &[(Call, usize)]) -> BTreeMap<Call, usize> {
    list.iter()
        .copied()
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// Each line is one of the table.
#[test]
fn each_event_takes_as_many_calls_as_the_table_says() {
    use Call::{ConfigRead, ConfigWrite, IoasUnmap, MapFile, Reset};
    for targets in [1, 3] {
        let machine = Machine::new(targets);
        let config = |address: u16, data: &'static [u8]| {
            machine.calls(|machine| machine.write(address, data))
        };
        let place = |value| machine.calls(|machine| machine.place(value));

        let moved = counts(&[(IoasUnmap, targets), (MapFile, targets)]);
        assert_eq!(place(9), moved, "moved while it decodes");
        let off = counts(&[(ConfigWrite, 1), (IoasUnmap, targets)]);
        assert_eq!(config(COMMAND, &[4, 0]), off, "decoding off");
        assert_eq!(place(8), counts(&[]), "moved while it does not");
        let on = counts(&[(ConfigWrite, 1), (MapFile, targets)]);
        assert_eq!(config(COMMAND, &[6, 0]), on, "decoding on");
        let other_bits = counts(&[(ConfigWrite, 1)]);
        assert_eq!(config(COMMAND, &[2, 0]), other_bits, "bus mastering off");

        let awake = [(ConfigRead, 1), (ConfigWrite, 1)];
        let sleep = counts(&[&awake[..], &[(IoasUnmap, targets)]].concat());
        assert_eq!(config(PMCSR, &[3]), sleep, "D3hot");
        let wake = counts(&[&awake[..], &[(MapFile, targets)]].concat());
        assert_eq!(config(PMCSR, &[0]), wake, "and back");

        let flr = [(ConfigRead, 3), (ConfigWrite, 2), (IoasUnmap, targets)];
        let flr_event = config(DEVICE_CONTROL + 1, &[0x80]);
        assert_eq!(flr_event, counts(&flr), "function-level reset");
        assert_eq!(place(8), counts(&[]), "its driver places the BAR");
        assert_eq!(config(COMMAND, &[6, 0]), on, "and has it decode");

        let reset = [
            (ConfigRead, 4),
            (ConfigWrite, 1),
            (Reset, 1),
            (IoasUnmap, targets),
        ];
        let reset_event = machine.calls(|machine| drop(machine.function.reset()));
        assert_eq!(reset_event, counts(&reset), "VFIO_DEVICE_RESET");
    }
}
