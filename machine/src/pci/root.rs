//! The root complex: which function a config access reaches.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::header::Header;
use super::host_bridge::host_bridge;
use super::root_port::RootPort;

/// How many device numbers a bus has.
const DEVICES: usize = 32;
/// Where a function's header says what kind it is, and whether the device has more functions.
const HEADER_TYPE: u16 = 0x0e;
const MULTIFUNCTION: u8 = 1 << 7;

/// Config space of a function that is not the root's own. Called without a lock held, by all
/// processors at once.
pub trait ConfigSpace: Send + Sync {
    /// The guest reads 1, 2 or 4 bytes, naturally aligned.
    fn read(&self, offset: u16, data: &mut [u8]);

    /// The guest writes 1, 2 or 4 bytes, naturally aligned.
    fn write(&self, offset: u16, data: &[u8]);

    /// The bus that the function is on is reset.
    fn bus_reset(&self);

    /// Whether the function is a PCI Express one, and so has to be behind a port.
    fn is_express(&self) -> bool;
}

/// Where in config space an access begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigAddress {
    /// The bus.
    pub bus: u8,
    /// The device on it, below 32.
    pub device: u8,
    /// The function of it, below 8.
    pub function: u8,
    /// The offset in bytes, below 4096.
    pub offset: u16,
}

impl ConfigAddress {
    /// From an offset in ECAM, in bytes (PCI Express Base 6.0, 7.2.2). `None` past its end.
    #[must_use]
    pub fn from_ecam(offset: u64) -> Option<Self> {
        Some(Self {
            bus: u8::try_from(offset >> 20).ok()?,
            device: bits(offset >> 15, 0x1f),
            function: bits(offset >> 12, 0x7),
            offset: u16::try_from(offset & 0xfff).ok()?,
        })
    }

    /// From the configuration address port's value and an offset into the data port (PCI Local Bus
    /// 3.0, 3.2.2.3.2). `None` unless the value says that it is meant.
    #[must_use]
    pub fn from_ports(address: u32, data_offset: u16) -> Option<Self> {
        let address = u64::from(address);
        let offset = u16::from(bits(address, 0xfc));
        (address & 1 << 31 != 0).then(|| Self {
            bus: bits(address >> 16, 0xff),
            device: bits(address >> 11, 0x1f),
            function: bits(address >> 8, 0x7),
            offset: offset | data_offset & 3,
        })
    }
}

/// The bits of a number that are in `mask`.
fn bits(number: u64, mask: u8) -> u8 {
    let [low, ..] = number.to_le_bytes();
    low & mask
}

/// Where a function was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the root bus, as this device.
    OnRoot(u8),
    /// Behind the root port that is this device of the root bus.
    Behind(u8),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnRoot(device) => write!(f, "00:{device:02x}.0"),
            Self::Behind(port) => write!(f, "behind the root port 00:{port:02x}.0"),
        }
    }
}

/// The root bus is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the root bus has room for {} functions and no more", DEVICES - 1)]
pub struct NoRoom;

/// A root complex with all that is behind it. It shares the functions with whoever made them.
pub struct Root {
    /// By device number. Ports have registers; no function is called while they are locked.
    devices: Mutex<Vec<Device>>,
}

enum Device {
    Bridge(Header),
    Port(RootPort, Arc<dyn ConfigSpace>),
    Function(Arc<dyn ConfigSpace>),
}

/// What a config access reaches.
enum Reached {
    /// One of the root's own functions, by its device number.
    Own(usize),
    /// A function.
    Function(Arc<dyn ConfigSpace>),
}

impl Root {
    /// A root bus with a host bridge.
    #[must_use]
    pub fn new() -> Self {
        Self {
            devices: Mutex::new(vec![Device::Bridge(host_bridge())]),
        }
    }

    /// Puts a function on the root bus, or behind a new root port if it is a PCI Express one.
    ///
    /// # Errors
    /// [`NoRoom`].
    pub fn add(&self, function: Arc<dyn ConfigSpace>) -> Result<Place, NoRoom> {
        let is_express = function.is_express();
        let mut devices = self.devices();
        let device = u8::try_from(devices.len()).map_err(|_| NoRoom)?;
        if devices.len() >= DEVICES {
            return Err(NoRoom);
        }
        if is_express {
            devices.push(Device::Port(RootPort::new(device), function));
            Ok(Place::Behind(device))
        } else {
            devices.push(Device::Function(function));
            Ok(Place::OnRoot(device))
        }
    }

    /// The guest reads config space: 1, 2 or 4 bytes, naturally aligned. Where nobody is, and for
    /// any other access, it reads all ones.
    pub fn read(&self, at: ConfigAddress, data: &mut [u8]) {
        data.fill(0xff);
        if !is_natural(at.offset, data.len()) {
            return;
        }
        match self.reached(at) {
            Some(Reached::Own(device)) => match self.devices().get(device) {
                Some(Device::Bridge(header)) => header.read(at.offset, data),
                Some(Device::Port(port, _)) => port.read(at.offset, data),
                _ => {}
            },
            Some(Reached::Function(function)) => {
                function.read(at.offset, data);
                // Whatever it is on the host, here it is alone.
                let header_type = usize::from(HEADER_TYPE.wrapping_sub(at.offset));
                if let Some(byte) = data.get_mut(header_type)
                    && *byte != 0xff
                {
                    *byte &= !MULTIFUNCTION;
                }
            }
            None => {}
        }
    }

    /// The guest writes config space: 1, 2 or 4 bytes, naturally aligned. Anything else, and what
    /// reaches nobody, is ignored.
    pub fn write(&self, at: ConfigAddress, data: &[u8]) {
        if !is_natural(at.offset, data.len()) {
            return;
        }
        match self.reached(at) {
            Some(Reached::Own(device)) => {
                let reset = match self.devices().get_mut(device) {
                    Some(Device::Port(port, behind)) => {
                        port.write(at.offset, data).then(|| behind.clone())
                    }
                    _ => None,
                };
                if let Some(function) = reset {
                    function.bus_reset();
                }
            }
            Some(Reached::Function(function)) => function.write(at.offset, data),
            None => {}
        }
    }

    /// Makes the ports what they were at power-on. The functions are left to their owner.
    pub fn reset(&self) {
        for device in self.devices().iter_mut() {
            if let Device::Port(port, _) = device {
                port.reset();
            }
        }
    }

    fn reached(&self, at: ConfigAddress) -> Option<Reached> {
        if at.function != 0 {
            return None;
        }
        let devices = self.devices();
        if at.bus == 0 {
            let index = usize::from(at.device);
            return match devices.get(index)? {
                Device::Function(function) => Some(Reached::Function(function.clone())),
                Device::Bridge(_) | Device::Port(..) => Some(Reached::Own(index)),
            };
        }
        // A link has one device at its end.
        let behind = devices.iter().find_map(|device| match device {
            Device::Port(port, function) if port.secondary_bus() == at.bus => Some(function),
            _ => None,
        })?;
        (at.device == 0).then(|| Reached::Function(behind.clone()))
    }

    fn devices(&self) -> MutexGuard<'_, Vec<Device>> {
        // Every change is one of plain bytes, or of one element at the end.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Root {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root")
            .field("devices", &self.devices().len())
            .finish()
    }
}

/// Whether an access is one that a bus makes in one piece.
fn is_natural(offset: u16, length: usize) -> bool {
    matches!(length, 1 | 2 | 4) && usize::from(offset).is_multiple_of(length)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A function whose config space tells the offset, and that counts.
    #[derive(Default)]
    struct Counting {
        express: bool,
        writes: AtomicUsize,
        resets: AtomicUsize,
    }

    impl ConfigSpace for Counting {
        fn read(&self, offset: u16, data: &mut [u8]) {
            data.fill(0x80 | u8::try_from(offset & 0x3f).unwrap());
        }
        fn write(&self, _: u16, _: &[u8]) {
            self.writes.fetch_add(1, Ordering::Relaxed);
        }
        fn bus_reset(&self) {
            self.resets.fetch_add(1, Ordering::Relaxed);
        }
        fn is_express(&self) -> bool {
            self.express
        }
    }

    const fn at(bus: u8, device: u8, offset: u16) -> ConfigAddress {
        ConfigAddress {
            bus,
            device,
            function: 0,
            offset,
        }
    }

    fn read(root: &Root, at: ConfigAddress) -> u8 {
        let mut byte = [0];
        root.read(at, &mut byte);
        byte[0]
    }

    #[test]
    fn addresses_are_taken_apart_as_ecam_and_the_old_ports_do() {
        let found = ConfigAddress::from_ecam(0x12f_f0ab).unwrap();
        let parts = (found.bus, found.device, found.function, found.offset);
        assert_eq!(parts, (0x12, 0x1f, 7, 0x0ab));
        assert_eq!(ConfigAddress::from_ecam(0x1000_0000), None);
        let found = ConfigAddress::from_ports(0x8012_fffc, 3).unwrap();
        let parts = (found.bus, found.device, found.function, found.offset);
        assert_eq!(parts, (0x12, 0x1f, 7, 0xff));
        assert_eq!(ConfigAddress::from_ports(0x0012_fffc, 0), None);
    }

    #[test]
    fn express_functions_are_behind_ports_and_others_on_the_root_bus() {
        let root = Root::new();
        let old = Arc::new(Counting::default());
        let new = Arc::new(Counting {
            express: true,
            ..Counting::default()
        });
        assert_eq!(root.add(old.clone()), Ok(Place::OnRoot(1)));
        assert_eq!(root.add(new.clone()), Ok(Place::Behind(2)));
        assert_eq!(read(&root, at(0, 0, 0)), 0x36, "the host bridge");
        assert_eq!(read(&root, at(0, 1, 8)), 0x88);
        assert_eq!(read(&root, at(0, 1, HEADER_TYPE)), 0x0e, "one function");
        assert_eq!(read(&root, at(0, 3, 0)), 0xff, "nobody");
        assert_eq!(read(&root, at(5, 0, 8)), 0xff, "no such bus yet");
        root.write(at(0, 2, 0x18), &[0, 5, 5, 0]);
        assert_eq!(read(&root, at(5, 0, 8)), 0x88);
        assert_eq!(read(&root, at(5, 1, 8)), 0xff, "one device at a link");
        root.write(at(5, 0, 4), &[1]);
        assert_eq!(new.writes.load(Ordering::Relaxed), 1);
        root.write(at(0, 2, 0x3e), &[0x40]);
        assert_eq!(new.resets.load(Ordering::Relaxed), 1);
        assert_eq!(old.resets.load(Ordering::Relaxed), 0);
        root.reset();
        assert_eq!(read(&root, at(5, 0, 8)), 0xff, "not numbered any more");
    }

    #[test]
    fn odd_accesses_reach_nobody() {
        let root = Root::new();
        let function = Arc::new(Counting::default());
        root.add(function.clone()).unwrap();
        root.write(at(0, 1, 5), &[0; 2]);
        root.write(at(0, 1, 4), &[0; 3]);
        root.write(at(0, 1, 4), &[0; 8]);
        root.write(at(0, 1, 4), &[]);
        assert_eq!(function.writes.load(Ordering::Relaxed), 0);
        let mut word = [0; 4];
        root.read(at(0, 1, 2), &mut word);
        assert_eq!(word, [0xff; 4]);
    }

    #[test]
    fn the_root_bus_has_room_for_31() {
        let root = Root::new();
        for _ in 1..DEVICES {
            root.add(Arc::new(Counting::default())).unwrap();
        }
        assert_eq!(root.add(Arc::new(Counting::default())), Err(NoRoom));
    }
}
