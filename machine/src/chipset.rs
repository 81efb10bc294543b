//! The few ports of the machine: a serial port, power and reset, PCI's old way to config space.
//! No KVM, no system calls but those of the interrupt lines.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::Access;
use crate::pci::{ConfigAddress, Root};
use crate::platform::{
    CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, EVENT_PORT, EVENT_POWER_BUTTON, KEYBOARD_COMMAND_PORT,
    KEYBOARD_RESET, PANIC_EVENTS, PANIC_PORT, PANICKED, RESET_PORT, RESET_VALUE, SERIAL_PORT,
    SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
};

/// Of the sleep control register: go to sleep now.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Of the sleep status register: awake again. Always so.
const WAKE_STATUS: u8 = 1 << 7;
/// How much that was typed waits for the guest at the most, in bytes. More is lost, as on any
/// serial line.
const TYPED_AHEAD: usize = 1 << 16;

/// What the guest asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// To be off.
    PowerOff,
    /// To begin again.
    Reset,
    /// Nothing more: its kernel has panicked.
    Panicked,
}

/// An interrupt of the chipset's own.
pub type Line = Box<dyn Trigger<E = io::Error> + Send>;

/// The ports. The machine owns it; all processors call it at once.
pub struct Chipset {
    serial: Mutex<SerialPort>,
    event_line: Mutex<Line>,
    /// What the event port tells at its next read.
    events: AtomicU8,
    config_address: AtomicU32,
}

struct SerialPort {
    registers: Serial<SharedLine, NoEvents, Console>,
    /// What was typed and did not fit into the port's own buffer.
    typed: VecDeque<u8>,
}

/// The serial port's line.
struct SharedLine(Line);

impl Trigger for SharedLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Where the serial port's output goes. That it does not get there is no matter of the guest's.
struct Console(Box<dyn Write + Send>);

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // An error would make the port refuse the guest's access.
        let _lost = self.0.write_all(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _lost = self.0.flush();
        Ok(())
    }
}

impl Chipset {
    /// A chipset whose serial port writes to `console`, and whose interrupts are raised by these
    /// two lines.
    #[must_use]
    pub fn new(serial_line: Line, event_line: Line, console: Box<dyn Write + Send>) -> Self {
        let registers = Serial::new(SharedLine(serial_line), Console(console));
        Self {
            serial: Mutex::new(SerialPort {
                registers,
                typed: VecDeque::new(),
            }),
            event_line: Mutex::new(event_line),
            events: AtomicU8::new(0),
            config_address: AtomicU32::new(0),
        }
    }

    /// The guest accesses a port. What it asks of the machine, if it does. Where there is nothing,
    /// reads give all ones and writes do nothing.
    pub fn port(&self, port: u16, access: Access<'_>, root: &Root) -> Option<Request> {
        match port {
            CONFIG_ADDRESS_PORT => self.config_address(access),
            _ if (CONFIG_DATA_PORT..=CONFIG_DATA_PORT | 3).contains(&port) => {
                self.config_data(port & 3, access, root);
            }
            _ => match access {
                Access::Read(data) => {
                    data.fill(0xff);
                    // The others are registers of one byte.
                    if let [byte] = data {
                        *byte = self.read_byte(port);
                    }
                }
                Access::Write(&[byte]) => return self.write_byte(port, byte),
                Access::Write(_) => {}
            },
        }
        None
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.events.fetch_or(EVENT_POWER_BUTTON, Ordering::AcqRel);
        let line = self
            .event_line
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // It can only fail where it is raised already.
        let _raised = line.trigger();
    }

    /// Types on the serial console.
    pub fn type_in(&self, typed: &[u8]) {
        let mut serial = self.serial();
        let room = TYPED_AHEAD.saturating_sub(serial.typed.len());
        serial.typed.extend(typed.iter().take(room));
        serial.refill();
    }

    /// Makes it what it was at power-on. What was typed is kept.
    pub fn reset(&self) {
        self.events.store(0, Ordering::Release);
        self.config_address.store(0, Ordering::Release);
        // The guest's driver sets the serial port's registers itself, whatever they were.
    }

    fn config_address(&self, access: Access<'_>) {
        // Only whole words reach the register.
        match access {
            Access::Read(data) => {
                data.fill(0xff);
                if data.len() == 4 {
                    let address = self.config_address.load(Ordering::Acquire);
                    data.copy_from_slice(&address.to_le_bytes());
                }
            }
            Access::Write(data) => {
                if let Ok(bytes) = data.try_into() {
                    let address = u32::from_le_bytes(bytes);
                    self.config_address.store(address, Ordering::Release);
                }
            }
        }
    }

    fn config_data(&self, offset: u16, access: Access<'_>, root: &Root) {
        let address = self.config_address.load(Ordering::Acquire);
        match (ConfigAddress::from_ports(address, offset), access) {
            (Some(at), Access::Read(data)) => root.read(at, data),
            (Some(at), Access::Write(data)) => root.write(at, data),
            (None, Access::Read(data)) => data.fill(0xff),
            (None, Access::Write(_)) => {}
        }
    }

    fn read_byte(&self, port: u16) -> u8 {
        if let Some(register) = serial_register(port) {
            let mut serial = self.serial();
            let byte = serial.registers.read(register);
            serial.refill();
            return byte;
        }
        match port {
            SLEEP_STATUS_PORT => WAKE_STATUS,
            SLEEP_CONTROL_PORT | RESET_PORT => 0,
            EVENT_PORT => self.events.swap(0, Ordering::AcqRel),
            PANIC_PORT => PANIC_EVENTS,
            // The keyboard controller's status: nothing to read, room to write.
            KEYBOARD_COMMAND_PORT => 0,
            _ => 0xff,
        }
    }

    fn write_byte(&self, port: u16, byte: u8) -> Option<Request> {
        if let Some(register) = serial_register(port) {
            // The interrupt line is the only thing that can fail, when it is raised already.
            let _raised = self.serial().registers.write(register, byte);
            return None;
        }
        match (port, byte) {
            (SLEEP_CONTROL_PORT, _) => {
                let off = byte & SLEEP_ENABLE != 0 && byte >> 2 & 7 == SLEEP_TYPE_S5;
                off.then_some(Request::PowerOff)
            }
            (RESET_PORT, RESET_VALUE) | (KEYBOARD_COMMAND_PORT, KEYBOARD_RESET) => {
                Some(Request::Reset)
            }
            (PANIC_PORT, _) if byte & PANICKED != 0 => Some(Request::Panicked),
            _ => None,
        }
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        // The port's registers are bytes that any value suits.
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SerialPort {
    /// Moves what was typed into the port's buffer, as far as there is room.
    fn refill(&mut self) {
        while self.registers.fifo_capacity() > 0 {
            let Some(byte) = self.typed.pop_front() else {
                return;
            };
            if self.registers.enqueue_raw_bytes(&[byte]).is_err() {
                return;
            }
        }
    }
}

impl fmt::Debug for Chipset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chipset")
            .field("events", &self.events)
            .field("config_address", &self.config_address)
            .finish_non_exhaustive()
    }
}

/// Which of the serial port's registers a port is.
fn serial_register(port: u16) -> Option<u8> {
    let register = u8::try_from(port.checked_sub(SERIAL_PORT)?).ok()?;
    (register < 8).then_some(register)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    struct Counted(Arc<AtomicUsize>);

    impl Trigger for Counted {
        type E = io::Error;
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Rig {
        chipset: Chipset,
        root: Root,
        screen: Screen,
        serial_raised: Arc<AtomicUsize>,
        events_raised: Arc<AtomicUsize>,
    }

    impl Rig {
        fn new() -> Self {
            let [serial_raised, events_raised] = [(), ()].map(|()| Arc::<AtomicUsize>::default());
            let screen = Screen::default();
            Self {
                chipset: Chipset::new(
                    Box::new(Counted(serial_raised.clone())),
                    Box::new(Counted(events_raised.clone())),
                    Box::new(screen.clone()),
                ),
                root: Root::new(),
                screen,
                serial_raised,
                events_raised,
            }
        }

        fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
            self.chipset.port(port, Access::Write(data), &self.root)
        }

        fn read<const N: usize>(&self, port: u16) -> [u8; N] {
            let mut data = [0; N];
            let asked = self.chipset.port(port, Access::Read(&mut data), &self.root);
            assert_eq!(asked, None, "a read asks for nothing");
            data
        }
    }

    #[test]
    fn what_the_guest_prints_is_seen_and_what_is_typed_arrives_whole() {
        let rig = Rig::new();
        for byte in b"hello" {
            assert_eq!(rig.write(SERIAL_PORT, &[*byte]), None);
        }
        assert_eq!(*rig.screen.0.lock().unwrap(), b"hello");
        // Interrupts on.
        rig.write(SERIAL_PORT + 1, &[1]);
        let typed: Vec<u8> = (0..=255).cycle().take(1000).collect();
        rig.chipset.type_in(&typed);
        assert!(rig.serial_raised.load(Ordering::Relaxed) > 0);
        let mut arrived = Vec::new();
        while rig.read::<1>(SERIAL_PORT + 5)[0] & 1 != 0 {
            arrived.push(rig.read::<1>(SERIAL_PORT)[0]);
        }
        assert_eq!(arrived, typed);
    }

    #[test]
    fn what_is_typed_ahead_is_bounded() {
        let rig = Rig::new();
        for _ in 0..100 {
            rig.chipset.type_in(&[7; 10_000]);
        }
        assert!(rig.chipset.serial().typed.len() <= TYPED_AHEAD);
    }

    #[test]
    fn power_reset_and_panic_are_asked_for_by_their_ports_only() {
        let rig = Rig::new();
        assert_eq!(rig.write(SLEEP_CONTROL_PORT, &[5 << 2]), None);
        assert_eq!(rig.write(SLEEP_CONTROL_PORT, &[3 << 2 | 1 << 5]), None);
        let off = rig.write(SLEEP_CONTROL_PORT, &[5 << 2 | 1 << 5]);
        assert_eq!(off, Some(Request::PowerOff));
        assert_eq!(rig.write(RESET_PORT, &[0]), None);
        assert_eq!(rig.write(RESET_PORT, &[1, 1]), None);
        assert_eq!(rig.write(RESET_PORT, &[1]), Some(Request::Reset));
        assert_eq!(rig.write(0x64, &[0xfe]), Some(Request::Reset));
        assert_eq!(rig.read(PANIC_PORT), [3]);
        assert_eq!(rig.write(PANIC_PORT, &[2]), None);
        assert_eq!(rig.write(PANIC_PORT, &[1]), Some(Request::Panicked));
        assert_eq!(rig.read(SLEEP_STATUS_PORT), [0x80]);
    }

    #[test]
    fn the_power_button_is_told_once() {
        let rig = Rig::new();
        rig.chipset.press_power_button();
        assert_eq!(rig.events_raised.load(Ordering::Relaxed), 1);
        assert_eq!(rig.read(EVENT_PORT), [EVENT_POWER_BUTTON]);
        assert_eq!(rig.read(EVENT_PORT), [0]);
    }

    #[test]
    fn config_space_is_behind_the_two_old_ports() {
        let rig = Rig::new();
        rig.write(CONFIG_ADDRESS_PORT, &0x8000_0000_u32.to_le_bytes());
        assert_eq!(rig.read(CONFIG_DATA_PORT), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(rig.read(CONFIG_DATA_PORT + 2), [0x08, 0x00]);
        assert_eq!(rig.read(CONFIG_DATA_PORT + 1), [0x1b]);
        assert_eq!(rig.read(CONFIG_ADDRESS_PORT), 0x8000_0000_u32.to_le_bytes());
        rig.write(CONFIG_ADDRESS_PORT, &0_u32.to_le_bytes());
        assert_eq!(rig.read(CONFIG_DATA_PORT), [0xff; 4]);
    }

    #[test]
    fn nothing_answers_elsewhere() {
        let rig = Rig::new();
        for port in 0..=u16::MAX {
            let _asked: Option<Request> = rig.write(port, &[0; 4]);
            let _read: [u8; 4] = rig.read(port);
        }
        assert_eq!(rig.read(0x60), [0xff]);
        assert_eq!(rig.read(0x70), [0xff]);
    }
}
