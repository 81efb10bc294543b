//! A guest that writes nonsense wherever it can, while a transfer that it leaves alone goes on.
//!
//! What is spared: the engine and the first peer, with which the transfers are proved, and their
//! places; the serial port; ports that end the machine or that the kernel needs for itself. What
//! takes a function 100 ms (resets, power states) is done a limited number of times. Bridges are
//! put back afterwards, so that what is behind them can be asked where it is; all else stays as it
//! is then.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, anyhow, ensure};
use assigned_pci::HostFunction;
use serde_json::json;

use super::found;
use super::race::run_on;
use crate::function::{COMMAND, Function};
use crate::mapping::Mapping;
use crate::pattern::Numbers;
use crate::peer::Cast;
use crate::place::{ecam, ram};
use crate::ports::Ports;
use crate::report::Findings;

/// Configuration address and data ports.
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
/// How often a function is reset or sent to sleep, at the most.
const SLOW_ACCESSES: u32 = 40;
/// The capability of power management, and its register with the power state.
const POWER_MANAGEMENT: u8 = 0x01;
const PMCSR: u16 = 4;
/// Device control, in the capability of PCI Express.
const DEVICE_CONTROL: u16 = 8;
/// A bridge's control register.
const BRIDGE_CONTROL: u16 = 0x3e;
/// Where the BARs' registers are, and the ROM's of either kind of header.
const BARS: Range<u16> = 0x10..0x28;

/// Ports that are left alone: interrupt controllers, timers, keyboard controller, the system's
/// control ports, delay, the serial port, what ends the machine.
const SPARED: [Range<u16>; 9] = [
    0x20..0x22,
    0x40..0x44,
    0x60..0x65,
    0x80..0x93,
    0xa0..0xa2,
    0x3f8..0x400,
    0x4d0..0x4d2,
    0x600..0x604,
    0xcf9..0xcfa,
];

/// The functions that are written to, and what stays out of reach.
struct Victims {
    functions: Vec<Victim>,
    /// Where BARs must not be put.
    spared: Vec<Range<u64>>,
    /// Whose config space is spared: offsets in ECAM.
    spared_config: Vec<Range<u64>>,
    /// Config space by address.
    ecam: Mapping,
    ecam_size: u64,
    /// Values for BARs that hurt the most.
    chosen: Vec<u64>,
}

/// One function, and which of its registers take long.
struct Victim {
    function: Arc<Function>,
    /// Its place in ECAM.
    ecam: u64,
    slow: Vec<Range<u16>>,
}

/// Where a function's config space is in ECAM.
fn place_in_ecam(function: &Function) -> anyhow::Result<u64> {
    // 0000:01:02.3
    let name = function.name();
    let part = |range: Range<usize>| {
        let digits = name.get(range).unwrap_or_default();
        u64::from_str_radix(digits, 16).with_context(|| format!("{name} is no function's name"))
    };
    Ok((part(5..7)? << 20) | (part(8..10)? << 15) | (part(11..12)? << 12))
}

impl Victims {
    fn new(cast: &Cast) -> anyhow::Result<Self> {
        let first = cast.peers.first().context("there is no peer")?;
        let (ecam, ram) = (ecam()?, ram()?);
        let ecam_size = ecam.end.saturating_sub(ecam.start);
        let mut new = Self {
            functions: vec![],
            spared: vec![],
            spared_config: vec![],
            ecam: Mapping::physical(ecam.start, ecam_size).context("mapping ECAM")?,
            ecam_size,
            chosen: vec![
                0,
                0xffff_ffff,
                u64::MAX,
                u64::MAX << 12,
                // Below 1 MiB, the interrupt controllers, the page before the reset vector.
                0xa_0000,
                0xfec0_0000,
                0xfee0_0000,
                0xffff_f000,
                // AMD's HyperTransport hole, past any address width.
                0xfd_0000_0000,
                1 << 52,
                ecam.start,
                ecam.start | 0x10_0000,
            ],
        };
        for range in &ram {
            new.chosen
                .extend([range.start, range.end, range.end.saturating_sub(0x1000)]);
        }
        for function in &cast.functions {
            let place = place_in_ecam(function)?;
            if function.name() == cast.edu.name() || function.name() == first.function.name() {
                new.spared_config.push(place..place.saturating_add(0x1000));
                for bar in function.bars() {
                    let start = function.address(*bar)?;
                    new.spared.push(start..start.saturating_add(bar.size));
                }
                continue;
            }
            for bar in function.bars() {
                new.chosen.push(function.address(*bar)?);
            }
            function.unbind()?;
            new.functions.push(Victim {
                slow: slow(function)?,
                function: Arc::clone(function),
                ecam: place,
            });
        }
        ensure!(
            !new.functions.is_empty(),
            "there is nothing to write nonsense to"
        );
        Ok(new)
    }

    /// Whether writing this to one of its BAR registers could put the BAR over what is spared.
    fn hits(&self, victim: &Victim, offset: u16, value: u32) -> anyhow::Result<bool> {
        for bar in victim.function.bars() {
            let register = 0x10 + 4 * u16::from(bar.index.get());
            let now = victim.function.address(*bar)?;
            let [low, high] = [now & 0xffff_ffff, now >> 32];
            let then = if offset == register {
                (high << 32) | u64::from(value)
            } else if bar.wide && offset == register + 4 {
                (u64::from(value) << 32) | low
            } else {
                continue;
            };
            let start = then & !(bar.size.saturating_sub(1));
            let end = start.saturating_add(bar.size);
            if self
                .spared
                .iter()
                .any(|range| range.start < end && start < range.end)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Config registers whose writes take long.
fn slow(function: &Function) -> anyhow::Result<Vec<Range<u16>>> {
    let mut slow = Vec::new();
    if let Some(at) = function.express()? {
        slow.push(at + DEVICE_CONTROL..at + DEVICE_CONTROL + 2);
    }
    if let Some(at) = function.capability(POWER_MANAGEMENT)? {
        slow.push(at + PMCSR..at + PMCSR + 2);
    }
    if function.is_bridge()? {
        slow.push(BRIDGE_CONTROL..BRIDGE_CONTROL + 2);
    }
    Ok(slow)
}

/// How many accesses of each kind were made.
#[derive(Debug, Default)]
struct Count {
    config: u64,
    bars: u64,
    ecam: u64,
    ports: u64,
    slow: u32,
}

impl Count {
    fn all(&self) -> u64 {
        self.config + self.bars + self.ecam + self.ports
    }
}

/// `accesses` of nonsense, on a processor of their own, while the first peer is proved over and
/// over.
pub fn nonsense(cast: &mut Cast, accesses: u64) -> anyhow::Result<Findings> {
    let victims = Victims::new(cast)?;
    let bridges = headers_of_bridges(&victims)?;
    let target = cast.peers.first().cloned().context("there is no peer")?;
    // From now on neither needs config space: the kernel's own accesses would be confused by those
    // to the same ports that it knows nothing of.
    cast.prove_peer(&target)?;
    let done = AtomicBool::new(false);
    let (proved, written) = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let written = write_nonsense(&victims, accesses);
            done.store(true, Ordering::Relaxed);
            written
        });
        let mut prove = || {
            run_on(0)?;
            let mut rounds = 0_u64;
            // Once more after it has ended, and often enough if it has failed.
            loop {
                let last = done.load(Ordering::Relaxed);
                cast.prove_peer(&target)
                    .with_context(|| format!("after {rounds} rounds that went well"))?;
                rounds += 1;
                if last {
                    return Ok(rounds);
                }
            }
        };
        let proved: anyhow::Result<u64> = prove();
        let ended = thread.join();
        let written = ended.unwrap_or_else(|_| Err(anyhow!("the hostile thread panicked")));
        (proved, written)
    });
    let (count, rounds) = (written?, proved?);
    // What is behind them can then be asked again.
    for (function, header) in &bridges {
        restore(function, header)?;
    }
    Ok(found([
        ("accesses", json!(count.all())),
        ("config", json!(count.config)),
        ("bars", json!(count.bars)),
        ("ecam", json!(count.ecam)),
        ("ports", json!(count.ports)),
        ("slow", json!(count.slow)),
        ("rounds", json!(rounds)),
    ]))
}

type Header = [u8; 64];

fn headers_of_bridges(victims: &Victims) -> anyhow::Result<Vec<(Arc<Function>, Header)>> {
    let mut bridges = Vec::new();
    for Victim { function, .. } in &victims.functions {
        if function.is_bridge()? {
            bridges.push((Arc::clone(function), function.header()?));
        }
    }
    Ok(bridges)
}

/// Puts a bridge's header back: its bus numbers and windows, then its command register.
fn restore(function: &Function, header: &Header) -> anyhow::Result<()> {
    for range in [0x3c..0x40, 0x10..0x34, 0x04..0x06] {
        for at in range.step_by(2) {
            let bytes = header.get(at..at + 2).unwrap_or_default();
            function.write(u16::try_from(at)?, bytes)?;
        }
    }
    Ok(())
}

fn write_nonsense(victims: &Victims, accesses: u64) -> anyhow::Result<Count> {
    run_on(1)?;
    let ports = Ports::open().context("asking for the right to access ports")?;
    let mut numbers = Numbers::new(0x6861_7a61);
    let mut count = Count::default();
    while count.all() < accesses {
        match numbers.below(100) {
            0..45 => {
                config(victims, &mut numbers, &mut count)?;
                count.config += 1;
            }
            45..50 => {
                bar(victims, &mut numbers)?;
                count.bars += 1;
            }
            50..75 => {
                by_address(victims, &mut numbers)?;
                count.ecam += 1;
            }
            _ => {
                by_port(victims, &ports, &mut numbers);
                count.ports += 1;
            }
        }
    }
    Ok(count)
}

/// The bytes of a number.
fn bytes(number: u64) -> [u8; 8] {
    number.to_le_bytes()
}

/// The lower half of a number.
fn word(number: u64) -> u32 {
    let [a, b, c, d, ..] = bytes(number);
    u32::from_le_bytes([a, b, c, d])
}

/// A number that is more often one of those that mean something.
fn value(numbers: &mut Numbers) -> u32 {
    match numbers.below(8) {
        0 => 0,
        1 => u32::MAX,
        2 => 1_u32.rotate_left(word(numbers.below(32))),
        _ => word(numbers.next()),
    }
}

/// By the kernel's file: 1, 2 or 4 bytes anywhere in a function's config space.
fn config(victims: &Victims, numbers: &mut Numbers, count: &mut Count) -> anyhow::Result<()> {
    let Some(victim) = numbers.pick(&victims.functions) else {
        return Ok(());
    };
    // Most of what means anything is in the first 256 bytes.
    let space = if numbers.below(4) == 0 {
        victim.function.config_size()
    } else {
        256
    };
    let len = 1_u16 << numbers.below(3);
    let offset = u16::try_from(numbers.below(space.into()))? / len * len;
    let value = value(numbers);
    let data = &value.to_le_bytes()[..usize::from(len)];
    // The kernel refuses nothing but what is not there.
    if numbers.below(3) == 0 {
        let mut read = [0; 4];
        let _refused = victim
            .function
            .config_read(offset, &mut read[..usize::from(len)]);
        return Ok(());
    }
    let end = offset + len;
    if victim
        .slow
        .iter()
        .any(|slow| slow.start < end && offset < slow.end)
    {
        if count.slow >= SLOW_ACCESSES {
            return Ok(());
        }
        count.slow += 1;
    }
    if BARS.start < end && offset < BARS.end {
        // Whole registers, so that what comes of it is known beforehand.
        let offset = offset & !3;
        if victims.hits(victim, offset, value)? {
            return Ok(());
        }
        let _refused = victim.function.config_write(offset, &value.to_le_bytes());
        return Ok(());
    }
    let _refused = victim.function.config_write(offset, data);
    Ok(())
}

/// One BAR, or decoding.
fn bar(victims: &Victims, numbers: &mut Numbers) -> anyhow::Result<()> {
    let Some(victim) = numbers.pick(&victims.functions) else {
        return Ok(());
    };
    if numbers.below(3) == 0 {
        let [low, high, ..] = bytes(numbers.below(8));
        let _refused = victim.function.config_write(COMMAND, &[low, high]);
        return Ok(());
    }
    let address = match numbers.pick(&victims.chosen) {
        Some(address) if numbers.below(4) > 0 => *address,
        _ => numbers.next() >> numbers.below(64),
    };
    let register = BARS.start + 4 * u16::try_from(numbers.below(6))?;
    let [a, b, c, d, e, f, g, h] = bytes(address);
    for (register, half) in [(register, [a, b, c, d]), (register + 4, [e, f, g, h])] {
        if BARS.contains(&register) && !victims.hits(victim, register, u32::from_le_bytes(half))? {
            let _refused = victim.function.config_write(register, &half);
        }
    }
    Ok(())
}

/// Anywhere in ECAM, with any alignment: mostly where no function is. Of the functions that are
/// there, registers that take long and BARs are left to [`config`] and [`bar`].
fn by_address(victims: &Victims, numbers: &mut Numbers) -> anyhow::Result<()> {
    let offset = if numbers.below(2) == 0 {
        match numbers.pick(&victims.functions) {
            Some(victim) => victim.ecam.saturating_add(numbers.below(0x1000 - 8)),
            None => 0,
        }
    } else {
        numbers.below(victims.ecam_size.saturating_sub(8))
    };
    let anything = numbers.next();
    let reads = numbers.below(2) == 0 || !may_be_written(victims, offset);
    if reads {
        let _anything = victims.ecam.read_anywhere(offset)?;
        return Ok(());
    }
    match numbers.below(3) {
        0 => victims.ecam.write_anywhere(offset, word(anything))?,
        1 => victims.ecam.set_word(offset & !7, anything)?,
        _ => victims.ecam.write(offset, &[bytes(anything)[0]])?,
    }
    Ok(())
}

/// Whether eight bytes that lie around an offset in ECAM are nobody's whom it would harm.
fn may_be_written(victims: &Victims, offset: u64) -> bool {
    let around = offset.saturating_sub(8)..offset.saturating_add(16);
    let touches = |range: &Range<u64>| range.start < around.end && around.start < range.end;
    if victims.spared_config.iter().any(touches) {
        return false;
    }
    victims.functions.iter().all(|victim| {
        let at = |range: &Range<u16>| {
            let start = victim.ecam.saturating_add(range.start.into());
            start..victim.ecam.saturating_add(range.end.into())
        };
        !victim
            .slow
            .iter()
            .chain([&(BARS.start..BARS.end + 0x18)])
            .map(at)
            .any(|range| touches(&range))
    })
}

/// A port: the configuration mechanism in all sizes, or any other one.
fn by_port(victims: &Victims, ports: &Ports, numbers: &mut Numbers) {
    if numbers.below(2) == 0 {
        let [low, high, ..] = bytes(numbers.next());
        let port = u16::from_le_bytes([low, high]);
        let spared = SPARED
            .iter()
            .any(|range| range.start < port.saturating_add(4) && port < range.end);
        let config = (ADDRESS..DATA + 4).contains(&port.saturating_add(3))
            || (ADDRESS..DATA + 4).contains(&port);
        if spared || config {
            return;
        }
        match numbers.below(6) {
            0 => drop(ports.read8(port)),
            1 => drop(ports.read16(port)),
            2 => drop(ports.read32(port)),
            3 => ports.write8(port, bytes(numbers.next())[0]),
            4 => ports.write16(port, u16::from_le_bytes([low, high])),
            _ => ports.write32(port, word(numbers.next())),
        }
        return;
    }
    // A function, or nobody; then the data ports in a size and at a place of any kind.
    let address = word(numbers.next());
    let offset = u64::from(address & 0xff_ff00) << 4 | u64::from(address & 0xfc);
    let write = numbers.below(2) == 0 && may_be_written(victims, offset);
    match numbers.below(4) {
        0 => ports.write8(ADDRESS, bytes(numbers.next())[0]),
        1 => ports.write16(ADDRESS, 0xffff),
        2 => ports.write32(ADDRESS, address & !(1 << 31)),
        _ => ports.write32(ADDRESS, address | 1 << 31),
    }
    let whole = ports.read32(ADDRESS) == address | 1 << 31;
    let place = u16::from(bytes(numbers.below(4))[0]);
    match (write && whole, numbers.below(3)) {
        (true, 0) => ports.write8(DATA + place, bytes(numbers.next())[0]),
        (true, 1) => ports.write16(DATA + (place & 2), 0xffff),
        (true, _) => ports.write32(DATA, word(numbers.next())),
        (false, 0) => drop(ports.read8(DATA + place)),
        (false, 1) => drop(ports.read16(DATA + place)),
        (false, _) => drop(ports.read32(DATA)),
    }
}
