//! A guest whose device interrupts it: the simulated device raises a vector, and what the guest
//! wrote arrives.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use assigned_pci::{
    AssignedFunction, BarIndex, FunctionOptions, HostFunction, MsiController, MsiKind, MsiMessage,
    MsiVector,
};
use memory_map::RegionManager;
use sim_host::{BarKind, BarSpec, Call, FunctionSpec, SimFunction, SimHost};

const COMMAND: u16 = 4;
const BAR: BarIndex = BarIndex::ALL[0];

/// One vector: its signals, and how they are delivered.
#[derive(Debug)]
struct Line {
    signals: UnixStream,
    kept: bool,
    route: Option<MsiMessage>,
}

/// Delivers what was signalled when somebody looks. Sockets stand for eventfds.
#[derive(Debug, Clone, Default)]
struct Controller(Arc<Mutex<Vec<Line>>>);

impl Controller {
    fn look(&self) -> Vec<MsiMessage> {
        let mut lines = self.0.lock().unwrap();
        let lines = lines.iter_mut();
        lines
            .filter_map(|line| line.take().then_some(line.route).flatten())
            .collect()
    }
}

impl Line {
    /// Whether a signal is to be delivered now.
    fn take(&mut self) -> bool {
        let mut signal = [0; 8];
        while self.signals.read_exact(&mut signal).is_ok() {
            self.kept = true;
        }
        self.kept && self.route.is_some() && std::mem::take(&mut self.kept)
    }
}

impl MsiController for Controller {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let (eventfd, signals) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        let mut lines = self.0.lock().unwrap();
        let number = lines.len();
        lines.push(Line {
            signals,
            kept: false,
            route: None,
        });
        Ok(Box::new(Vector {
            eventfd,
            number,
            lines: self.0.clone(),
        }))
    }
}

#[derive(Debug)]
struct Vector {
    eventfd: UnixStream,
    number: usize,
    lines: Arc<Mutex<Vec<Line>>>,
}

impl MsiVector for Vector {
    fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    fn route(&mut self, message: MsiMessage) -> io::Result<()> {
        self.lines.lock().unwrap()[self.number].route = Some(message);
        Ok(())
    }

    fn mask(&mut self) -> io::Result<()> {
        self.lines.lock().unwrap()[self.number].route = None;
        Ok(())
    }

    fn is_pending(&self) -> bool {
        let mut lines = self.lines.lock().unwrap();
        let line = &mut lines[self.number];
        line.take() || line.kept
    }
}

struct Guest {
    host: SimHost,
    device: Arc<SimFunction>,
    function: AssignedFunction,
    controller: Controller,
}

impl Guest {
    fn new(spec: FunctionSpec) -> Self {
        let host = SimHost::default();
        let device = host.add_function(spec).unwrap();
        let controller = Controller::default();
        let options = FunctionOptions {
            interrupts: Some(Arc::new(controller.clone())),
            ..FunctionOptions::default()
        };
        let lent: Arc<dyn HostFunction> = device.clone();
        let function = AssignedFunction::new(lent, RegionManager::new(), &options).unwrap();
        assert!(function.config_write(0x10, &[0, 0, 0, 0x10]).is_ok());
        assert!(function.config_write(COMMAND, &[6, 0]).is_ok());
        Self {
            host,
            device,
            function,
            controller,
        }
    }

    fn config(&self, offset: u16, value: u32) {
        let written = self.function.config_write(offset, &value.to_le_bytes());
        assert!(written.is_ok(), "{written:?}");
    }

    fn bar(&self, offset: u64, value: u32) {
        let written = self.function.bar_write(BAR, offset, &value.to_le_bytes());
        assert_eq!(written, None);
    }

    /// Finds a capability of the standard list.
    fn capability(&self, id: u8) -> u16 {
        let mut at = [0];
        assert_eq!(self.function.config_read(0x34, &mut at), None);
        loop {
            assert_ne!(at, [0], "not in the list");
            let offset = u16::from(at[0]);
            let mut header = [0; 2];
            assert_eq!(self.function.config_read(offset, &mut header), None);
            if header[0] == id {
                return offset;
            }
            at = [header[1]];
        }
    }
}

#[test]
fn edu_interrupts_by_msi_while_it_masters_the_bus() {
    let guest = Guest::new(FunctionSpec::edu("edu"));
    let msi = guest.capability(5);
    let message = MsiMessage {
        address: 0xfee0_1000,
        data: 0x31,
    };
    guest.config(msi + 4, 0xfee0_1000);
    guest.config(msi + 12, 0x31);
    guest.bar(0x60, 1);
    assert_eq!(guest.controller.look(), [], "not enabled yet");
    guest.config(msi, 0x0001_0000);
    guest.bar(0x60, 2);
    assert_eq!(guest.controller.look(), [message]);
    let mut status = [0; 4];
    assert_eq!(guest.function.bar_read(BAR, 0x24, &mut status), None);
    assert_eq!(status, [3, 0, 0, 0]);
    assert!(guest.function.config_write(COMMAND, &[2, 0]).is_ok());
    guest.bar(0x60, 1);
    assert_eq!(guest.controller.look(), [], "no bus mastering");
    assert!(guest.function.config_write(COMMAND, &[6, 0]).is_ok());
    guest.bar(0x60, 1);
    assert_eq!(guest.controller.look(), [message]);
    assert_eq!(
        guest.device.connected_vectors(),
        Some((MsiKind::Msi, vec![0]))
    );
    let _ = guest.function.reset();
    assert_eq!(guest.device.connected_vectors(), None);
}

/// MSI-X in the middle of a BAR that has other registers on the same page.
fn msix() -> FunctionSpec {
    FunctionSpec::new("msix", 0x1234, 0x5678)
        .with_bar(BAR, BarSpec::new(BarKind::Memory32, 0x4000))
        .with_msix(8, BAR, 0x1100, 0x1200)
        // One that nobody knows, after it in the list.
        .with_capability_list(0x80, [0xee, 0, 0x34, 0x12])
}

#[test]
fn vectors_follow_the_table_on_every_kind_of_host() {
    for spec in [
        msix(),
        msix().with_fixed_vectors(),
        msix().with_fixed_vectors().with_host_vectors(3),
    ] {
        let guest = Guest::new(spec);
        let mut unknown = [0; 4];
        let at = guest.capability(0xee);
        assert_eq!(guest.function.config_read(at, &mut unknown), None);
        assert_eq!(unknown, [0xee, 0, 0x34, 0x12]);
        let cap = guest.capability(0x11);
        guest.config(cap, 0x8000_0000);
        let mut expected = Vec::new();
        for vector in 0..3_u16 {
            let entry = 0x1100 + u64::from(vector) * 16;
            guest.bar(entry, 0xfee0_0000);
            guest.bar(entry + 8, u32::from(vector) + 0x50);
            guest.bar(entry + 12, 0);
            expected.push(MsiMessage {
                address: 0xfee0_0000,
                data: u32::from(vector) + 0x50,
            });
        }
        guest.controller.look();
        for vector in 0..3 {
            assert!(guest.device.raise(vector));
        }
        assert_eq!(guest.controller.look(), expected);
        guest.bar(0x1100 + 12, 1);
        assert!(guest.device.raise(0));
        let mut pending = [0; 8];
        assert_eq!(guest.function.bar_read(BAR, 0x1200, &mut pending), None);
        assert_eq!((pending[0], guest.controller.look()), (1, vec![]));
        guest.bar(0x1100 + 12, 0);
        assert_eq!(guest.controller.look(), expected[..1]);
        // The registers beside the table are memory of the device's.
        guest.bar(0x1000, 0x5555);
        let memory = guest.device.bar_memory(BAR).unwrap();
        let mut word = [0; 2];
        memory.read(0x1000, &mut word).unwrap();
        assert_eq!(word, [0x55; 2]);
        memory.read(0x1108, &mut word).unwrap();
        assert_eq!(word, [0; 2], "nothing of the table got there");
        assert!(guest.function.config_write(cap + 2, &[0, 0]).is_ok());
        assert!(!guest.device.raise(1));
    }
}

#[test]
fn a_host_that_fails_is_told_and_tried_again() {
    let guest = Guest::new(msix());
    let cap = guest.capability(0x11);
    guest.config(cap, 0x8000_0000);
    guest.host.fail_from_now(Call::ConnectVectors, 5);
    let refused = guest.function.bar_write(BAR, 0x110c, &[0; 4]).unwrap();
    assert_eq!(refused.to_string(), "connecting MSI-X vector 0 failed");
    guest.host.stop_failing();
    guest.bar(0x110c, 0);
    assert!(guest.device.raise(0));
}
