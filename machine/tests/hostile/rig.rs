//! A machine on a simulated host: functions that the guest abuses, and a pair that it leaves alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use assigned_pci::{
    AssignedFunction, BarIndex, CutOffSwitch, FunctionOptions, HostFunction, MsiController,
    MsiMessage, MsiVector,
};
use iommu::{IoasTarget, RamCopies, Type1Target};
use machine::layout::RamPiece;
use machine::pci::Place;
use machine::{Access, Board as _, Chipset, Hardware, Line, Notices};
use memory_map::{
    Backing, DmaTarget, Gpa, GpaRange, Iova, IovaRange, Priority, RegionId, RegionManager,
    TargetHandle, TargetOptions,
};
use rustix::event::{EventfdFlags, eventfd};
use sim_host::{
    BarKind, BarSpec, FunctionSpec, HostSpec, PowerManagement, Revocation, SimFunction, SimHost,
    SimRam,
};
use vm_superio::Trigger;

pub const PAGE: u64 = 0x1000;
/// How much RAM there is below and above 4 GiB each.
pub const RAM_SIZE: u64 = 0x10_0000;
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// AMD's HyperTransport hole, and the window for MSIs.
pub const RESERVED: [(u64, u64); 2] = [(0xfee0_0000, 0x10_0000), (0xfd_0000_0000, 0x3_0000_0000)];
pub const APERTURE_LAST: u64 = 0xffff_ffff_ffff;
/// Where the pair's BARs are.
pub const ENGINES: [u64; 2] = [0xc000_0000, 0xc010_0000];
pub const PEER: u64 = 0x8_0000_0000;
const PEER_REGISTERS: u64 = 0xc020_0000;
const PEER_SIZE: u64 = 0x4_0000;
/// How many functions the pair is, which come before the others.
pub const PAIR: usize = 3;
/// What the engines move, in the upper half of high RAM: four pages.
const PATTERN: u64 = HIGH_RAM + RAM_SIZE / 2;
/// Of edu: where its buffer is, to its registers.
const BUFFER: u64 = 0x4_0000;
const COMMAND: u16 = 0x04;
const BAR0: BarIndex = BarIndex::ALL[0];
const BAR2: BarIndex = BarIndex::ALL[2];
const BAR4: BarIndex = BarIndex::ALL[4];

/// Where a part of a BAR begins and, exclusive, ends.
pub type Part = (u64, u64);
/// Which parts of a function's memory BARs can be mapped.
type Mappable = Vec<(BarIndex, Vec<Part>)>;

/// A function that the guest abuses.
pub struct Abused {
    pub host: Arc<SimFunction>,
    pub function: Arc<AssignedFunction>,
    pub place: Place,
}

/// What lies behind a region: of which object, and which parts of it can be mapped.
pub struct Behind {
    pub label: String,
    pub mappable: Vec<Part>,
    /// Where in the object the region begins.
    pub offset: u64,
}

pub struct Rig {
    pub host: SimHost,
    pub map: RegionManager,
    pub board: Hardware,
    pub abused: Vec<Abused>,
    pub behind: BTreeMap<RegionId, Behind>,
    /// Those of type1 and of iommufd.
    pub targets: [TargetHandle; 2],
    pub switch: Arc<CutOffSwitch>,
    /// How many lines were said.
    pub lines: Arc<AtomicUsize>,
    /// Why which abused function revoked what was mapped of it.
    pub causes: Arc<Mutex<BTreeSet<(String, String)>>>,
    /// How often the machine was asked to be off, or to begin again.
    pub asked: Arc<AtomicUsize>,
    pair: Pair,
}

/// Two engines, one in each address space, and what they write to.
struct Pair {
    _functions: Vec<Arc<AssignedFunction>>,
    peer: Arc<SimFunction>,
    ram: SimRam,
    places: Vec<Place>,
}

/// What stands between the map and the type1 container.
pub type Between = fn(Box<dyn DmaTarget>) -> Box<dyn DmaTarget>;

#[expect(
    unsafe_code,
    reason = "the simulated host's addresses are only numbers"
)]
fn targets(
    host: &SimHost,
    type1: &[&SimFunction],
    iommufd: &[&SimFunction],
) -> [Box<dyn DmaTarget>; 2] {
    let container = Arc::new(host.container(type1).unwrap());
    let ioas = host.open_iommufd().ioas();
    for function in iommufd {
        ioas.attach(function).unwrap();
    }
    // SAFETY: no memory lies behind a simulated host's address.
    let container = unsafe { Type1Target::new(container) };
    // SAFETY: no memory lies behind a simulated host's address, and its files are never read.
    let ioas = unsafe { IoasTarget::new(Arc::new(ioas), RamCopies::new()) };
    [Box::new(container), Box::new(ioas)]
}

/// The functions that are abused, and which parts of their BARs can be mapped.
fn abused_specs() -> Vec<(FunctionSpec, Mappable)> {
    let bar = |kind, size| BarSpec::new(kind, size);
    vec![
        // Everything at once, behind a root port. The table and the pending bits share a BAR with
        // memory.
        (
            FunctionSpec::new("everything", 0x1234, 1)
                .with_bar(BAR0, bar(BarKind::Memory64, 0x8000))
                .with_bar(BAR2, bar(BarKind::Memory64Prefetchable, 0x8_0000))
                .with_bar(BAR4, bar(BarKind::Io, 0x100))
                .with_power_management(PowerManagement::SoftReset)
                .with_express_flr()
                .with_msix(16, BAR0, 0x4000, 0x6000),
            vec![
                (BAR0, vec![(0, 0x4000), (0x5000, 0x6000), (0x7000, 0x8000)]),
                (BAR2, vec![(0, 0x8_0000)]),
            ],
        ),
        // Smaller than a page, and larger.
        (
            FunctionSpec::shared_memory("shared", 0x10_0000)
                .with_power_management(PowerManagement::NoSoftReset)
                .with_advanced_flr()
                .with_msi(4, true),
            vec![(BAR0, vec![]), (BAR2, vec![(0, 0x10_0000)])],
        ),
        (
            FunctionSpec::edu("engine"),
            vec![(BAR0, vec![(0, 0x10_0000)])],
        ),
        (
            FunctionSpec::new("virtual", 0x1234, 4)
                .with_bar(BAR0, bar(BarKind::Memory32Prefetchable, 0x2000))
                .with_bar(BAR2, bar(BarKind::Memory64Prefetchable, 0x2_0000))
                .of_virtual_function()
                .with_express_flr()
                .with_msix(4, BAR0, 0x1000, 0x1800),
            vec![(BAR0, vec![(0, 0x1000)]), (BAR2, vec![(0, 0x2_0000)])],
        ),
        // Its resets fail.
        (
            FunctionSpec::new("stubborn", 0x1234, 5)
                .with_bar(BAR0, bar(BarKind::Memory32, 0x4000))
                .with_power_management(PowerManagement::SoftReset)
                .with_express_flr()
                .with_failing_reset(libc::EAGAIN),
            vec![(BAR0, vec![(0, 0x4000)])],
        ),
    ]
}

impl Rig {
    pub fn new(between: Between) -> Self {
        let reserved =
            RESERVED.map(|(start, size)| IovaRange::new(Iova::new(start), size).unwrap());
        let host = SimHost::new(HostSpec {
            reserved: reserved.into(),
            aperture_last: Iova::new(APERTURE_LAST),
            ..HostSpec::default()
        });
        let add = |spec: FunctionSpec| host.add_function(spec).unwrap();
        let engines = ["engine 1", "engine 2"].map(|name| add(FunctionSpec::edu(name)));
        let peer = add(FunctionSpec::shared_memory("peer", PEER_SIZE));
        let (specs, mappable): (Vec<_>, Vec<_>) = abused_specs().into_iter().unzip();
        let abused: Vec<_> = specs.into_iter().map(add).collect();
        let causes = Arc::new(Mutex::new(BTreeSet::new()));
        for function in &abused {
            let (causes, name) = (causes.clone(), HostFunction::name(&**function));
            function.on_revocation(move |revocation| {
                if let Revocation::Revoked(cause) = revocation {
                    let cause = (name.clone(), format!("{cause:?}"));
                    causes.lock().unwrap().insert(cause);
                }
            });
        }
        let of = |numbers: &[usize]| -> Vec<&SimFunction> {
            numbers.iter().map(|number| &*abused[*number]).collect()
        };
        let mut type1 = vec![&*engines[0], &*peer];
        type1.extend(of(&[0, 2]));
        let mut iommufd = vec![&*engines[1]];
        iommufd.extend(of(&[1, 3, 4]));
        let [container, ioas] = targets(&host, &type1, &iommufd);

        let map = RegionManager::new();
        let switch = Arc::new(CutOffSwitch::new());
        let options = |name: &str| {
            let mut options = TargetOptions::new(name);
            options.cut_off = Some(switch.clone());
            options
        };
        let targets = [
            map.register(between(container), options("type1")).unwrap(),
            map.register(ioas, options("iommufd")).unwrap(),
        ];
        let assign = |function: &Arc<SimFunction>| {
            let options = FunctionOptions {
                priority: Priority(0),
                interrupts: Some(Arc::new(Controller)),
            };
            let function = AssignedFunction::new(function.clone(), map.clone(), &options);
            let function = Arc::new(function.unwrap());
            switch.add(&function);
            function
        };
        // Of two BARs at one address, the one that was there first is seen.
        let pair: Vec<_> = engines.iter().chain([&peer]).map(assign).collect();
        let functions: Vec<_> = abused.iter().map(assign).collect();

        let ram = host.ram(2 * RAM_SIZE).unwrap();
        let pieces = [(0, 0), (HIGH_RAM, RAM_SIZE)].map(|(start, offset)| RamPiece {
            range: GpaRange::new(Gpa::new(start), RAM_SIZE).unwrap(),
            offset,
        });
        let lines = Arc::<AtomicUsize>::default();
        let asked = Arc::<AtomicUsize>::default();
        let said = lines.clone();
        let line = || -> Line { Box::new(NoLine) };
        let requests = asked.clone();
        let board = Hardware::new(
            map.clone(),
            Backing::new(ram.clone()),
            &pieces,
            pair.iter().chain(&functions).cloned().collect(),
            Chipset::new(line(), line(), Box::new(io::sink())),
            Box::new(move |_| {
                requests.fetch_add(1, Ordering::Relaxed);
            }),
            Arc::new(Notices::new(move |_| {
                said.fetch_add(1, Ordering::Relaxed);
            })),
        )
        .unwrap();

        let mut behind = BTreeMap::new();
        for (number, piece) in pieces.iter().enumerate() {
            let regions = map.regions();
            let name = format!("RAM {number}");
            let region = regions
                .iter()
                .find(|region| region.name.to_string() == name);
            behind.insert(
                region.unwrap().id,
                Behind {
                    label: "ram0".into(),
                    mappable: vec![(0, RAM_SIZE)],
                    offset: piece.offset,
                },
            );
        }
        let mut tell = |function: &AssignedFunction, bar: BarIndex, mappable: &[Part]| {
            behind.insert(
                function.region_of(bar).unwrap(),
                Behind {
                    label: format!("{} {bar}", function.name()),
                    mappable: mappable.to_vec(),
                    offset: 0,
                },
            );
        };
        for (function, bars) in functions.iter().zip(&mappable) {
            for (bar, mappable) in bars {
                tell(function, *bar, mappable);
            }
        }
        let edu = [(BAR0, (0, 0x10_0000))];
        let memory = [(BAR0, (0, 0)), (BAR2, (0, PEER_SIZE))];
        for (function, bars) in pair.iter().zip([&edu[..], &edu, &memory]) {
            for (bar, all) in bars {
                let whole = (all.1 > 0).then_some(*all);
                tell(function, *bar, whole.as_slice());
            }
        }

        let places = board.places().to_vec();
        let (of_pair, others) = places.split_at(pair.len());
        let abused = abused.into_iter().zip(functions).zip(others);
        let rig = Self {
            abused: abused
                .map(|((host, function), place)| Abused {
                    host,
                    function,
                    place: *place,
                })
                .collect(),
            pair: Pair {
                places: of_pair.to_vec(),
                peer,
                ram,
                _functions: pair,
            },
            host,
            map,
            behind,
            targets,
            switch,
            lines,
            asked,
            causes,
            board,
        };
        rig.set_pair_up();
        rig
    }

    fn set_pair_up(&self) {
        let pair = &self.pair;
        let addresses = [
            vec![(0x10, ENGINES[0])],
            vec![(0x10, ENGINES[1])],
            vec![(0x10, PEER_REGISTERS), (0x18, PEER)],
        ];
        for (place, addresses) in pair.places.iter().zip(addresses) {
            let Place::OnRoot(device) = *place else {
                panic!("the pair is on the root bus");
            };
            let base = machine::platform::ECAM.raw() + (u64::from(device) << 15);
            let write = |offset: u16, value: u32| {
                let at = Gpa::new(base + u64::from(offset));
                self.board.memory(at, Access::Write(&value.to_le_bytes()));
            };
            for (register, address) in addresses {
                write(register, u32::try_from(address & 0xffff_ffff).unwrap());
                if address >> 32 != 0 {
                    write(register + 4, u32::try_from(address >> 32).unwrap());
                }
            }
            write(COMMAND, 6);
        }
    }

    /// Whether any of it is what the guest leaves alone, in memory or in ECAM.
    pub fn is_of_pair(&self, at: u64, size: u64) -> bool {
        let last = at.saturating_add(size);
        let overlaps = |start: u64, size: u64| at < start + size && last > start;
        let ecam = machine::platform::ECAM.raw();
        overlaps(PATTERN, 4 * PAGE)
            || overlaps(ENGINES[0], 0x20_0000)
            || overlaps(PEER_REGISTERS, 0x1000)
            || overlaps(PEER, PEER_SIZE)
            || self.pair.places.iter().any(|place| match place {
                Place::OnRoot(device) => overlaps(ecam + (u64::from(*device) << 15), 0x1000),
                Place::Behind(_) => false,
            })
    }

    /// Has both engines move data to the peer and back, as the guest's driver does, and compares.
    pub fn verify_pair(&self, seed: u64) {
        let memory = self.pair.peer.bar_memory(BAR2).unwrap();
        for (number, engine) in (0..).zip(ENGINES) {
            let salt = seed.wrapping_mul(2).wrapping_add(number);
            let data: Vec<u8> = (0..64_u64)
                .flat_map(|word| {
                    let mixed = (salt << 8 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    mixed.to_le_bytes()
                })
                .collect();
            let size = data.len() as u64;
            let into = salt % (PEER_SIZE / PAGE) * PAGE;
            let offset = PATTERN - HIGH_RAM + RAM_SIZE;
            self.pair.ram.write(offset, &data).unwrap();
            self.pair.ram.write(offset + PAGE, &[0; 512]).unwrap();
            self.transfer(engine, PATTERN, BUFFER, size, 1);
            self.transfer(engine, BUFFER, PEER + into, size, 3);
            let mut seen = vec![0; data.len()];
            memory.read(into, &mut seen).unwrap();
            assert!(
                seen == data,
                "engine {number} wrote something else to the peer"
            );
            self.transfer(engine, PEER + into, BUFFER, size, 1);
            self.transfer(engine, BUFFER, PATTERN + PAGE, size, 3);
            seen.fill(0);
            self.pair.ram.read(offset + PAGE, &mut seen).unwrap();
            assert!(seen == data, "engine {number} read something else from it");
        }
    }

    fn transfer(&self, engine: u64, from: u64, to: u64, count: u64, command: u64) {
        for (register, value) in [(0x80, from), (0x88, to), (0x90, count), (0x98, command)] {
            let at = Gpa::new(engine + register);
            self.board.memory(at, Access::Write(&value.to_le_bytes()));
        }
    }
}

/// A line that nobody listens to.
struct NoLine;

impl Trigger for NoLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Vectors that nobody listens to.
#[derive(Debug)]
struct Controller;

#[derive(Debug)]
struct Vector(OwnedFd);

impl MsiController for Controller {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector(eventfd(0, EventfdFlags::NONBLOCK)?)))
    }
}

impl MsiVector for Vector {
    fn eventfd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn route(&mut self, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn mask(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn is_pending(&self) -> bool {
        false
    }
}
