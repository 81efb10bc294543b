//! What a machine holds of a simulated host, and gives back.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Weak};
use std::time::Duration;

use assigned_pci::{AssignedFunction, BarIndex, FunctionOptions};
use iommu::Type1Target;
use machine::{Notices, PulledOut};
use memory_map::{
    Backing, DmaTarget, Errno, Gpa, IovaRange, MapRequest, RegionManager, TargetError,
    TargetLimits, TargetOptions,
};
use sim_host::{Call, CallPoint, FunctionSpec, SimFunction, SimHost};
use vfio_sys::{Bdf, EventFd};

use super::giving_back::GivingBack;
use super::holdings::{Holdings, Member};
use super::narrow_iommu::Narrow;
use crate::host::{Announced, Requests};
use crate::ram::GuestRam;

const NAMES: [&str; 3] = ["0000:01:00.0", "0000:02:00.0", "0000:03:00.0"];
const COMMAND: u16 = 0x04;
const BAR2: u16 = 0x18;
const SIZE: u64 = 0x1_0000;
const RAM_SIZE: u64 = 0x10_0000;
/// Where the BARs are.
const BARS: [u64; 3] = [0x8000_0000, 0x8001_0000, 0x8002_0000];

/// Three functions with 64 KiB of memory each, the first two in one container, the third in another,
/// all running.
struct Rig {
    host: SimHost,
    map: RegionManager,
    functions: Vec<Weak<SimFunction>>,
}

/// What stands between the map and a container.
type Between = fn(Box<dyn DmaTarget>) -> Box<dyn DmaTarget>;

fn bdf(place: usize) -> Bdf {
    NAMES[place].parse().unwrap()
}

#[expect(
    unsafe_code,
    reason = "a simulated container takes any number for an address"
)]
fn container(host: &SimHost, functions: &[&SimFunction]) -> Box<dyn DmaTarget> {
    let container = Arc::new(host.container(functions).unwrap());
    // SAFETY: the container is simulated and follows no address.
    Box::new(unsafe { Type1Target::new(container) })
}

fn rig(between: Between) -> (Rig, Holdings) {
    let host = SimHost::default();
    let functions = NAMES.map(|name| {
        host.add_function(FunctionSpec::shared_memory(name, SIZE))
            .unwrap()
    });
    let map = RegionManager::new();
    let [a, b, c] = &functions;
    let spaces = [("container 0", vec![&**a, &**b]), ("container 1", vec![c])];
    let spaces = spaces.map(|(name, functions)| {
        let target = between(container(&host, &functions));
        let handle = map.register(target, TargetOptions::new(name));
        (name.to_owned(), handle.unwrap())
    });
    let ram = Backing::new(host.ram(RAM_SIZE).unwrap());
    let _region = GuestRam::add(&map, "ram", ram, Gpa::new(0)).unwrap();
    let members = functions.iter().enumerate().map(|(place, function)| {
        let options = FunctionOptions::default();
        let guest = AssignedFunction::new(function.clone(), map.clone(), &options).unwrap();
        let address = u32::try_from(BARS[place]).unwrap();
        for (offset, value) in [(BAR2, address), (BAR2 + 4, 0), (COMMAND, 6)] {
            assert!(guest.config_write(offset, &value.to_le_bytes()).is_ok());
        }
        Member {
            name: format!("device{place}"),
            bdf: bdf(place),
            function: Some(Arc::new(guest)),
            space: place / 2,
        }
    });
    let holdings = Holdings::new(members.collect(), spaces.into(), None);
    let rig = Rig {
        functions: functions.iter().map(Arc::downgrade).collect(),
        host,
        map,
    };
    assert_eq!(rig.mapped(), [(0, vec![0, 1, 2]), (1, vec![0, 1, 2])]);
    (rig, holdings)
}

impl Rig {
    /// The containers that hold RAM, and whose BARs each holds, by their places.
    fn mapped(&self) -> Vec<(usize, Vec<usize>)> {
        let mut found: Vec<(usize, Vec<usize>)> = Vec::new();
        let mappings = self.host.mappings();
        for container in 0..2 {
            let name = format!("container {container}");
            let ours = mappings
                .iter()
                .filter(|mapping| mapping.container.to_string() == name);
            let starts: Vec<u64> = ours.map(|mapping| mapping.iova.start().raw()).collect();
            let bars = (0..3).filter(|place| starts.contains(&BARS[*place]));
            if starts.contains(&0) {
                found.push((container, bars.collect()));
            } else {
                assert_eq!(starts, Vec::<u64>::new(), "BARs and no RAM");
            }
        }
        found
    }

    /// Which of the functions are still open.
    fn open(&self) -> Vec<usize> {
        let places = 0..self.functions.len();
        places
            .filter(|place| self.functions[*place].upgrade().is_some())
            .collect()
    }
}

/// As the machine does it.
fn pulled_out(function: Arc<AssignedFunction>) -> PulledOut {
    PulledOut {
        outcome: function.remove(),
        function,
    }
}

fn pull_out(holdings: &Holdings, place: usize) -> PulledOut {
    pulled_out(holdings.members[place].function.clone().unwrap())
}

#[test]
fn a_function_that_is_given_back_is_closed_and_the_others_mappings_stay() {
    let (rig, mut holdings) = rig(|target| target);
    let maps = rig.host.count(Call::MapDma);
    let pulled = pull_out(&holdings, 1);
    holdings.give_back(1, pulled).unwrap();
    assert_eq!(rig.open(), [0, 2]);
    assert_eq!(rig.mapped(), [(0, vec![0, 2]), (1, vec![0, 2])]);
    assert_eq!(rig.host.count(Call::MapDma), maps, "nothing was made anew");
    assert_eq!(holdings.functions().count(), 2);
    let left = rig.functions[0].upgrade().unwrap();
    assert!(left.masters_bus() && left.bar_memory(BarIndex::ALL[2]).is_some());
    drop(left);
    holdings.end().unwrap();
    assert_eq!(rig.open(), Vec::<usize>::new());
    assert_eq!(rig.host.mappings(), []);
    assert_eq!(rig.host.violations(), []);
}

#[test]
fn an_address_space_ends_with_its_last_function_and_before_it() {
    let (rig, mut holdings) = rig(|target| target);
    let pulled = pull_out(&holdings, 2);
    // The kernel ends a container with its last function.
    let function = Arc::downgrade(&pulled.function);
    rig.host.set_hook(Some(Arc::new(move |point: CallPoint| {
        if point == CallPoint::Before(Call::UnmapDma) {
            assert!(function.upgrade().is_some(), "closed before it is unmapped");
        }
    })));
    holdings.give_back(2, pulled).unwrap();
    rig.host.set_hook(None);
    assert_eq!(rig.open(), [0, 1]);
    assert_eq!(rig.mapped(), [(0, vec![0, 1])]);
    assert_eq!(holdings.target(1), None);
    assert!(holdings.target(0).is_some());
    for place in [0, 1] {
        let pulled = pull_out(&holdings, place);
        holdings.give_back(place, pulled).unwrap();
    }
    assert_eq!(rig.host.mappings(), []);
    assert_eq!(rig.map.reach(), []);
    holdings.end().unwrap();
}

/// An IOMMU that does not give back the second function's BAR.
struct Clinging(Box<dyn DmaTarget>);

impl DmaTarget for Clinging {
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
        if range.start().raw() == BARS[1] {
            return Err(TargetError::kernel(Errno::new(5)));
        }
        self.0.unmap(range)
    }
}

#[test]
fn what_stays_mapped_is_told_at_once_and_at_the_end() {
    let (rig, mut holdings) = rig(|target| Box::new(Clinging(target)));
    let pulled = pull_out(&holdings, 1);
    let error = holdings.give_back(1, pulled).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("0000:02:00.0 out of an address space"),
        "{said}"
    );
    assert_eq!(rig.open(), [0, 2], "all of ours is closed all the same");
    let error = holdings.end().unwrap_err();
    assert_eq!(format!("{error:#}"), said);
}

#[test]
fn devices_are_cut_off_before_that_is_said() {
    let (rig, holdings) = rig(|target| target);
    let host = rig.functions[0].upgrade().unwrap();
    let (say, lines) = mpsc::channel();
    let announced = Announced::new(move |line| {
        say.send((line.to_string(), host.masters_bus())).unwrap();
        panic!("whoever says it fails");
    });
    announced.add(holdings.functions().next().unwrap());
    let mut options = TargetOptions::new("stuck");
    options.cut_off = Some(Arc::new(announced));
    let stuck = Box::new(Clinging(Box::new(Narrow)));
    let _stuck = rig.map.register(stuck, options).unwrap();
    let moved = holdings.members[1].function.as_ref().unwrap();
    let off = || moved.config_write(COMMAND, &[0, 0]);
    let _panicked = catch_unwind(AssertUnwindSafe(off));
    let (line, masters_bus) = lines.try_recv().unwrap();
    assert!(line.starts_with("stuck is cut off: "), "{line}");
    assert!(!masters_bus);
}

/// Waits for the next line that was said.
fn heard(lines: &Receiver<String>) -> String {
    lines.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn a_mistake_of_ours_takes_no_iommu_from_the_guest() {
    let (rig, holdings) = rig(|target| target);
    let event = EventFd::new().unwrap();
    let ask = File::from(event.as_fd().try_clone_to_owned().unwrap());
    let (say, lines) = mpsc::channel();
    let notices = Notices::new(move |line| say.send(line.to_owned()).unwrap());
    let requests = Requests::by(vec![(bdf(2), event)]);
    let pull_out = |_| panic!("the test's own");
    let giving_back = GivingBack::start(holdings, requests, pull_out, Arc::new(notices)).unwrap();
    (&ask).write_all(&1_u64.to_ne_bytes()).unwrap();
    let said = heard(&lines);
    assert!(said.contains("cannot be heard any more"), "{said}");
    let all = [(0, vec![0, 1, 2]), (1, vec![0, 1, 2])];
    assert_eq!(rig.mapped(), all);
    let holdings = giving_back.end().unwrap();
    assert_eq!(rig.mapped(), all);
    holdings.end().unwrap();
    assert_eq!(rig.host.mappings(), []);
}

#[test]
fn what_the_host_asks_for_is_given_back_and_said_once() {
    let (rig, holdings) = rig(|target| target);
    let events = [(); 3].map(|()| EventFd::new().unwrap());
    let asks = events.each_ref().map(|event| {
        let file = event.as_fd().try_clone_to_owned().unwrap();
        File::from(file)
    });
    let ask = |place: usize| (&asks[place]).write_all(&1_u64.to_ne_bytes()).unwrap();
    let requests = events.into_iter().enumerate();
    let requests = requests.map(|(place, event)| (bdf(place), event)).collect();
    let functions: Vec<Weak<AssignedFunction>> = holdings.functions().map(Arc::downgrade).collect();
    let pull_out = move |place: usize| functions[place].upgrade().map(pulled_out);
    let (say, lines) = mpsc::channel();
    let notices = Notices::new(move |line| say.send(line.to_owned()).unwrap());
    let requests = Requests::by(requests);
    let giving_back = GivingBack::start(holdings, requests, pull_out, Arc::new(notices)).unwrap();
    // It asks again for as long as it waits.
    ask(2);
    ask(2);
    assert_eq!(
        heard(&lines),
        "device2: the host wanted it back: it has left the machine"
    );
    assert_eq!(rig.open(), [0, 1]);
    ask(2);
    ask(0);
    assert_eq!(
        heard(&lines),
        "device0: the host wanted it back: it has left the machine"
    );
    let holdings = giving_back.end().unwrap();
    assert!(lines.try_recv().is_err());
    assert_eq!(rig.open(), [1]);
    assert_eq!(rig.mapped(), [(0, vec![1])]);
    holdings.end().unwrap();
    assert_eq!(rig.host.mappings(), []);
}
