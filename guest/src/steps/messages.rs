//! Interrupts, as messages that go to somebody or to nobody.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use assigned_pci::{BarIndex, HostFunction};
use serde_json::json;

use super::found;
use crate::function::Function;
use crate::peer::Cast;
use crate::report::Findings;

/// The MSI capability (PCI Local Bus 3.0, 6.8.1): message control behind its header, the address,
/// and where that has 64 bits, the data behind its upper half.
const MSI: u8 = 0x05;
const ENABLE: u16 = 1;
const WIDE: u16 = 1 << 7;
/// edu's registers that raise an interrupt and lower it (QEMU, `docs/specs/edu.rst`).
const RAISE: u64 = 0x60;
const LOWER: u64 = 0x64;
/// The first processor's local APIC, and an address with the same low half where nobody is.
const APIC: u64 = 0xfee0_0000;
const NOBODY: u64 = 0x10_0000_0000;
/// A vector that nobody waits for: the kernel says so when it comes.
const VECTOR: u16 = 0xd1;
const SAID: &str = "No irq handler for";
const SETTLED: Duration = Duration::from_millis(500);

/// The engine's interrupt comes where its message goes to a local APIC, and only there.
pub fn to_nobody(cast: &Cast) -> anyhow::Result<Findings> {
    let mut log = KernelLog::open()?;
    for (address, comes) in [(NOBODY, false), (APIC, true), (NOBODY, false)] {
        send(&cast.edu, address)?;
        let said = log.says(SAID)?;
        ensure!(
            said == comes,
            "an interrupt that was sent to {address:#x}: {SAID:?} was said: {said}"
        );
    }
    Ok(found([("nobody", json!(format!("{NOBODY:#x}")))]))
}

/// Has the engine raise an interrupt by a message to `address`.
fn send(edu: &Function, address: u64) -> anyhow::Result<()> {
    let msi = edu.capability(MSI)?;
    let msi = msi.with_context(|| format!("{} has no MSI", edu.name()))?;
    let control = u16::from_le_bytes(edu.read(msi + 2)?);
    ensure!(control & WIDE != 0, "{}: 32-bit messages", edu.name());
    let bar = edu.bars().iter().find(|bar| bar.index == BarIndex::ALL[0]);
    let (_, registers) = edu.placed(*bar.context("an edu without registers")?)?;
    edu.write(msi + 4, &address.to_le_bytes()[..4])?;
    edu.write(msi + 8, &address.to_le_bytes()[4..])?;
    edu.write(msi + 12, &VECTOR.to_le_bytes())?;
    edu.write(msi + 2, &(control | ENABLE).to_le_bytes())?;
    registers.write(RAISE, &1_u32.to_le_bytes())?;
    thread::sleep(SETTLED);
    registers.write(LOWER, &1_u32.to_le_bytes())?;
    edu.write(msi + 2, &(control & !ENABLE).to_le_bytes())
}

/// What the kernel says from now on.
struct KernelLog(File);

impl KernelLog {
    fn open() -> anyhow::Result<Self> {
        let path = "/dev/kmsg";
        let mut options = OpenOptions::new();
        let log = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let mut log = log.with_context(|| format!("opening {path}"))?;
        log.seek(SeekFrom::End(0))
            .with_context(|| format!("going to the end of {path}"))?;
        Ok(Self(log))
    }

    /// Whether one of the messages since the last look has `text` in it.
    fn says(&mut self, text: &str) -> anyhow::Result<bool> {
        let mut says = false;
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(length) => {
                    let record = record.get(..length).unwrap_or_default();
                    says |= String::from_utf8_lossy(record).contains(text);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(says),
                Err(error) => return Err(error).context("reading the kernel's messages"),
            }
        }
    }
}
