//! A PCI function, by sysfs and by the physical addresses in its registers.
//!
//! The kernel keeps a copy of where each BAR is, and its files go by that. Here a BAR is where the
//! function's own registers say, so that a BAR that was moved behind the kernel's back is found.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use assigned_pci::{BarIndex, HostBar, HostFunction};

use crate::mapping::Mapping;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Offsets in config space (PCI Local Bus 3.0, 6.1 and 6.2.5).
pub const COMMAND: u16 = 0x04;
const CLASS: u16 = 0x08;
const HEADER: u16 = 0x0e;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
/// The command register: memory decoding and bus mastering.
pub const MEMORY: u16 = 1 << 1;
pub const MASTER: u16 = 1 << 2;
/// The capability of PCI Express, and in it device capabilities and device control.
const EXPRESS: u8 = 0x10;
const DEVICE_CAPABILITIES: u16 = 4;
const DEVICE_CONTROL: u16 = 8;
const HAS_FLR: u32 = 1 << 28;
const INITIATE_FLR: u16 = 1 << 15;
/// The capability of power management, its register with the power state, and the state's bits.
const POWER_MANAGEMENT: u8 = 0x01;
const PMCSR: u16 = 4;
const POWER_STATE: u8 = 0b11;

/// Flags in sysfs's `resource` (`include/linux/ioport.h`).
const IORESOURCE_MEM: u64 = 0x200;
const IORESOURCE_PREFETCH: u64 = 0x2000;
const IORESOURCE_MEM_64: u64 = 0x10_0000;

/// A memory BAR: what does not change when it moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which.
    pub index: BarIndex,
    /// Its size in bytes: a power of two.
    pub size: u64,
    /// Whether it has two registers.
    pub wide: bool,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
}

impl Bar {
    fn register(self) -> u16 {
        BAR0 + 4 * u16::from(self.index.get())
    }
}

/// A function that the kernel knows.
pub struct Function {
    name: String,
    config: File,
    config_size: u16,
    vendor: u16,
    device: u16,
    class: u32,
    bars: Vec<Bar>,
    /// Where BARs were when they were last looked at, and their memory there.
    placed: Mutex<Vec<(BarIndex, u64, Arc<Mapping>)>>,
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Function {
    /// All of them, by name.
    pub fn all() -> anyhow::Result<Vec<Arc<Self>>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(DEVICES).context("looking for PCI functions")? {
            names.extend(entry?.file_name().into_string().ok());
        }
        names.sort();
        names
            .iter()
            .map(|name| Self::open(name).map(Arc::new))
            .collect()
    }

    /// The one of that name.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let folder = Path::new(DEVICES).join(name);
        let path = folder.join("config");
        let mut options = OpenOptions::new();
        let config = options.read(true).write(true).open(&path);
        let config = config.with_context(|| format!("opening {}", path.display()))?;
        let config_size = u16::try_from(config.metadata()?.len()).unwrap_or(256);
        let resources = folder.join("resource");
        let resources = fs::read_to_string(&resources)
            .with_context(|| format!("reading {}", resources.display()))?;
        let mut new = Self {
            name: name.to_owned(),
            config,
            config_size,
            vendor: 0,
            device: 0,
            class: 0,
            bars: bars(&resources),
            placed: Mutex::default(),
        };
        let [vendor_low, vendor_high, device_low, device_high] = new.read(0)?;
        new.vendor = u16::from_le_bytes([vendor_low, vendor_high]);
        new.device = u16::from_le_bytes([device_low, device_high]);
        new.class = u32::from_le_bytes(new.read(CLASS)?) >> 8;
        Ok(new)
    }

    /// Its folder in sysfs.
    pub fn folder(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.name)
    }

    /// Vendor and device id.
    pub fn id(&self) -> (u16, u16) {
        (self.vendor, self.device)
    }

    /// Its class: three bytes.
    pub fn class(&self) -> u32 {
        self.class
    }

    /// Its memory BARs.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Whether it is a bridge to another bus.
    pub fn is_bridge(&self) -> anyhow::Result<bool> {
        let [header] = self.read(HEADER)?;
        Ok(header & 0x7f == 1)
    }

    /// The bus it is on, as the kernel writes it: `0000:00`.
    pub fn bus(&self) -> &str {
        self.name.get(..7).unwrap_or_default()
    }

    /// The kernel's driver that has it.
    pub fn driver(&self) -> Option<String> {
        let driver = fs::read_link(self.folder().join("driver")).ok()?;
        Some(driver.file_name()?.to_str()?.to_owned())
    }

    /// Takes it from its driver, if it has one.
    pub fn unbind(&self) -> anyhow::Result<()> {
        let driver = self.folder().join("driver");
        if driver.exists() {
            fs::write(driver.join("unbind"), &self.name)
                .with_context(|| format!("taking {} from its driver", self.name))?;
        }
        Ok(())
    }

    /// Reads config space.
    pub fn read<const N: usize>(&self, offset: u16) -> anyhow::Result<[u8; N]> {
        let mut data = [0; N];
        self.config_read(offset, &mut data)
            .with_context(|| format!("reading {} at {offset:#x}", self.name))?;
        Ok(data)
    }

    /// Writes config space.
    pub fn write(&self, offset: u16, data: &[u8]) -> anyhow::Result<()> {
        self.config_write(offset, data)
            .with_context(|| format!("writing {} at {offset:#x}", self.name))
    }

    /// The command register.
    pub fn command(&self) -> anyhow::Result<u16> {
        Ok(u16::from_le_bytes(self.read(COMMAND)?))
    }

    /// Turns bits of the command register on and off.
    pub fn set_command(&self, on: u16, off: u16) -> anyhow::Result<()> {
        let command = (self.command()? | on) & !off;
        self.write(COMMAND, &command.to_le_bytes())
    }

    /// Has it decode memory and master the bus.
    pub fn enable(&self) -> anyhow::Result<()> {
        self.set_command(MEMORY | MASTER, 0)
    }

    /// Where a BAR is by its registers.
    pub fn address(&self, bar: Bar) -> anyhow::Result<u64> {
        let low = u32::from_le_bytes(self.read(bar.register())?) & !0xf;
        let high = if bar.wide {
            u32::from_le_bytes(self.read(bar.register() + 4)?)
        } else {
            0
        };
        Ok((u64::from(high) << 32) | u64::from(low))
    }

    /// Writes a BAR's registers, the lower first, whatever decoding is.
    pub fn set_address(&self, bar: Bar, address: u64) -> anyhow::Result<()> {
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        self.write(bar.register(), &[a, b, c, d])?;
        if bar.wide {
            self.write(bar.register() + 4, &[e, f, g, h])?;
        }
        self.forget_places();
        Ok(())
    }

    /// Where a BAR is, and its memory there. Its registers are read at the first call, and at the
    /// next one after it was moved by this value or the function was reset.
    pub fn placed(&self, bar: Bar) -> anyhow::Result<(u64, Arc<Mapping>)> {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let found = placed.iter().find(|(index, ..)| *index == bar.index);
        if let Some((_, address, mapping)) = found {
            return Ok((*address, Arc::clone(mapping)));
        }
        let address = self.address(bar)?;
        let mapping = Mapping::physical(address, bar.size)
            .with_context(|| format!("mapping {} of {} at {address:#x}", bar.index, self.name))?;
        let mapping = Arc::new(mapping);
        placed.push((bar.index, address, Arc::clone(&mapping)));
        Ok((address, mapping))
    }

    /// What is known of its BARs' places is not true any more.
    fn forget_places(&self) {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        placed.clear();
    }

    /// Where its capability of PCI Express is.
    pub fn express(&self) -> anyhow::Result<Option<u16>> {
        self.capability(EXPRESS)
    }

    /// Where a capability is.
    pub fn capability(&self, wanted: u8) -> anyhow::Result<Option<u16>> {
        let [mut at] = self.read(CAPABILITIES)?;
        // There is room for no more than 48.
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            let offset = u16::from(at & !3);
            let [id, next] = self.read(offset)?;
            if id == wanted {
                return Ok(Some(offset));
            }
            at = next;
        }
        Ok(None)
    }

    /// Where its register with the power state is.
    pub fn power_state(&self) -> anyhow::Result<Option<u16>> {
        let at = self.capability(POWER_MANAGEMENT)?;
        Ok(at.map(|at| at + PMCSR))
    }

    /// Has it leave any power state in which it does not answer.
    pub fn wake(&self) -> anyhow::Result<()> {
        let Some(at) = self.power_state()? else {
            return Ok(());
        };
        let [state] = self.read(at)?;
        if state & POWER_STATE != 0 {
            self.write(at, &[state & !POWER_STATE])?;
        }
        Ok(())
    }

    /// Whether it says that it can be reset by itself.
    pub fn has_flr(&self) -> anyhow::Result<bool> {
        let Some(express) = self.express()? else {
            return Ok(false);
        };
        let capabilities = u32::from_le_bytes(self.read(express + DEVICE_CAPABILITIES)?);
        Ok(capabilities & HAS_FLR != 0)
    }

    /// Initiates a function-level reset by its register, and waits as long as the function may
    /// take. What it costs is not put back.
    pub fn initiate_flr(&self) -> anyhow::Result<()> {
        let express = self.express()?;
        ensure!(self.has_flr()?, "{} has no function-level reset", self.name);
        let at = express.unwrap_or_default() + DEVICE_CONTROL;
        let control = u16::from_le_bytes(self.read(at)?) | INITIATE_FLR;
        self.write(at, &control.to_le_bytes())?;
        self.forget_places();
        // PCI Express Base 6.0, 6.6.2: 100 ms.
        std::thread::sleep(std::time::Duration::from_millis(100));
        Ok(())
    }

    /// Has the kernel reset it by this method, as its `reset_method` names them.
    pub fn reset_by_kernel(&self, method: &str) -> anyhow::Result<()> {
        for (file, content) in [("reset_method", method), ("reset", "1")] {
            let path = self.folder().join(file);
            fs::write(&path, content)
                .with_context(|| format!("writing {content:?} to {}", path.display()))?;
        }
        Ok(())
    }

    /// All of config space's first 64 bytes.
    pub fn header(&self) -> anyhow::Result<[u8; 64]> {
        self.read(0)
    }

    /// Has the kernel forget it.
    pub fn remove(&self) -> anyhow::Result<()> {
        fs::write(self.folder().join("remove"), "1")
            .with_context(|| format!("removing {}", self.name))
    }
}

/// Has the kernel look for functions that it does not know.
pub fn rescan() -> anyhow::Result<()> {
    fs::write("/sys/bus/pci/rescan", "1").context("looking for functions anew")
}

/// The memory BARs in sysfs's `resource`: start, end and flags, a line for each.
fn bars(resources: &str) -> Vec<Bar> {
    let mut bars = Vec::new();
    for (index, line) in BarIndex::ALL.into_iter().zip(resources.lines()) {
        let mut numbers = line
            .split_whitespace()
            .filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok());
        let (Some(start), Some(end), Some(flags)) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            continue;
        };
        let size = end.wrapping_sub(start).wrapping_add(1);
        if flags & IORESOURCE_MEM != 0 && size > 1 {
            bars.push(Bar {
                index,
                size,
                wide: flags & IORESOURCE_MEM_64 != 0,
                prefetchable: flags & IORESOURCE_PREFETCH != 0,
            });
        }
    }
    bars
}

impl HostFunction for Function {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn config_size(&self) -> u16 {
        self.config_size
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
        self.config.read_exact_at(data, offset.into())
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
        self.config.write_all_at(data, offset.into())
    }

    fn bar(&self, bar: BarIndex) -> io::Result<Option<HostBar>> {
        let found = self.bars.iter().find(|known| known.index == bar);
        Ok(found.map(|known| HostBar {
            size: known.size,
            areas: vec![],
        }))
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.mapped_bar(bar)?.read(offset, data)
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        self.mapped_bar(bar)?.write(offset, data)
    }

    fn reset(&self) -> io::Result<()> {
        fs::write(self.folder().join("reset"), "1")
    }
}

impl Function {
    fn mapped_bar(&self, bar: BarIndex) -> io::Result<Arc<Mapping>> {
        let known = self.bars.iter().find(|known| known.index == bar);
        let known = known.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let placed = self.placed(*known).map_err(io::Error::other);
        Ok(placed?.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_bars_are_read_from_what_sysfs_says() {
        // QEMU's ivshmem-plain, and an I/O BAR.
        let text = "\
0x00000000febf1000 0x00000000febf10ff 0x0000000000040200
0x000000000000c000 0x000000000000c01f 0x0000000000040101
0x000000fc00000000 0x000000fc003fffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x00000000feb00000 0x00000000feb0ffff 0x0000000000046200
";
        let [zero, _, two, ..] = BarIndex::ALL;
        assert_eq!(
            bars(text),
            [
                Bar {
                    index: zero,
                    size: 0x100,
                    wide: false,
                    prefetchable: false,
                },
                Bar {
                    index: two,
                    size: 4 << 20,
                    wide: true,
                    prefetchable: true,
                },
            ]
        );
    }
}
