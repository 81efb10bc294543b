//! Accesses that make no sense.

use std::ops::Range;

use assigned_pci::HostFunction;

use super::Count;
use super::victims::{BARS, Home, Victims};
use crate::function::COMMAND;
use crate::pattern::Numbers;
use crate::ports::Ports;

/// Configuration address and data ports.
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
/// How often a function is reset or sent to sleep, at the most.
const SLOW_ACCESSES: u32 = 40;
/// In how many accesses decoding is turned on or off once, at the most: the host's machine may have
/// to lay its addresses out anew each time, which takes an emulated one long.
const BETWEEN_DECODINGS: u64 = 300;
/// How many accesses to what is in BARs are made in a row.
pub const IN_A_ROW: u64 = 256;

/// Ports that are left alone: interrupt controllers, timers, keyboard controller, the system's
/// control ports, delay, the serial port, what ends the machine.
const SPARED: [Range<u16>; 10] = [
    0x20..0x22,
    0x40..0x44,
    0x60..0x65,
    0x80..0x93,
    0xa0..0xa2,
    0x3f8..0x400,
    0x4d0..0x4d2,
    0x505..0x506,
    0x600..0x604,
    0xcf9..0xcfa,
];

impl Count {
    /// Whether decoding may be turned on or off now, which is then counted.
    fn may_decode(&mut self) -> bool {
        let may = self.decodings <= self.all() / BETWEEN_DECODINGS;
        self.decodings += u64::from(may);
        may
    }
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

/// By the kernel's file: 1, 2 or 4 bytes anywhere in a function's config space. Whether it was made.
pub fn config(victims: &Victims, numbers: &mut Numbers, count: &mut Count) -> anyhow::Result<bool> {
    let Some(victim) = numbers.pick(&victims.functions) else {
        return Ok(false);
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
        return Ok(true);
    }
    let end = offset + len;
    if offset <= COMMAND && COMMAND < end && !count.may_decode() {
        return Ok(false);
    }
    if victim
        .slow
        .iter()
        .any(|slow| slow.start < end && offset < slow.end)
    {
        if count.slow >= SLOW_ACCESSES {
            return Ok(false);
        }
        count.slow += 1;
    }
    if BARS.start < end && offset < BARS.end {
        // Whole registers, so that what comes of it is known beforehand.
        let offset = offset & !3;
        if victims.hits(victim, offset, value)? {
            return Ok(false);
        }
        let _refused = victim.function.config_write(offset, &value.to_le_bytes());
        return Ok(true);
    }
    let _refused = victim.function.config_write(offset, data);
    Ok(true)
}

/// One BAR, or decoding: how many accesses were made.
pub fn bar(victims: &Victims, numbers: &mut Numbers, count: &mut Count) -> anyhow::Result<u64> {
    let Some(victim) = numbers.pick(&victims.functions) else {
        return Ok(0);
    };
    if numbers.below(3) == 0 && count.may_decode() {
        let [low, high, ..] = bytes(numbers.below(8));
        let _refused = victim.function.config_write(COMMAND, &[low, high]);
        return Ok(1);
    }
    let address = match numbers.pick(&victims.chosen) {
        Some(address) if numbers.below(4) > 0 => *address,
        _ => numbers.next() >> numbers.below(64),
    };
    let register = BARS.start + 4 * u16::try_from(numbers.below(6))?;
    let [a, b, c, d, e, f, g, h] = bytes(address);
    let mut made = 0;
    for (register, half) in [(register, [a, b, c, d]), (register + 4, [e, f, g, h])] {
        if BARS.contains(&register) && !victims.hits(victim, register, u32::from_le_bytes(half))? {
            let _refused = victim.function.config_write(register, &half);
            made += 1;
        }
    }
    Ok(made)
}

/// Anywhere in ECAM, with any alignment: mostly where no function is. Of the functions that are
/// there, registers that take long and BARs are left to [`config`] and [`bar`].
pub fn by_address(victims: &Victims, numbers: &mut Numbers) -> anyhow::Result<()> {
    let offset = if numbers.below(2) == 0 {
        match numbers.pick(&victims.functions) {
            Some(victim) => victim.ecam.saturating_add(numbers.below(0x1000 - 8)),
            None => 0,
        }
    } else {
        numbers.below(victims.ecam_size.saturating_sub(8))
    };
    let anything = numbers.next();
    let reads = numbers.below(2) == 0 || !victims.may_be_written(offset);
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

/// A port: the configuration mechanism in all sizes, or any other one. Whether it was accessed.
pub fn by_port(victims: &Victims, ports: &Ports, numbers: &mut Numbers) -> bool {
    if numbers.below(2) == 0 {
        let [low, high, ..] = bytes(numbers.next());
        let port = u16::from_le_bytes([low, high]);
        // The processor lets nobody access what ends past the last one.
        let Some(last) = port.checked_add(3) else {
            return false;
        };
        let spared = SPARED
            .iter()
            .any(|range| range.start <= last && port < range.end);
        let config = (ADDRESS..DATA + 4).contains(&last) || (ADDRESS..DATA + 4).contains(&port);
        if spared || config {
            return false;
        }
        match numbers.below(6) {
            0 => drop(ports.read8(port)),
            1 => drop(ports.read16(port)),
            2 => drop(ports.read32(port)),
            3 => ports.write8(port, bytes(numbers.next())[0]),
            4 => ports.write16(port, u16::from_le_bytes([low, high])),
            _ => ports.write32(port, word(numbers.next())),
        }
        return true;
    }
    // A function, or nobody; then the data ports in a size and at a place of any kind.
    let address = word(numbers.next());
    let offset = u64::from(address & 0xff_ff00) << 4 | u64::from(address & 0xfc);
    let write = numbers.below(2) == 0 && victims.may_be_written(offset);
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
    true
}

/// What is in the BARs, once all of them are back where the kernel put them: messages of MSI-X are
/// written, masked and unmasked, memory is written and read. Registers are only read: an engine that
/// takes nonsense for a command writes to this program's own RAM.
pub fn contents(victims: &Victims, numbers: &mut Numbers, count: &mut Count) -> anyhow::Result<()> {
    victims.go_home()?;
    if let Some(victim) = numbers.pick(&victims.functions)
        && let Some(at) = victim.msix
    {
        let control = [0, 0x40, 0x80, 0xc0];
        let control = numbers.pick(&control).copied().unwrap_or_default();
        let _refused = victim.function.config_write(at + 1, &[control]);
    }
    for _ in 0..IN_A_ROW {
        let Some(home) = numbers.pick(&victims.homes) else {
            return Ok(());
        };
        if numbers.below(64) == 0
            && count.may_decode()
            && let Some(victim) = victims.functions.get(home.victim)
        {
            let [command, ..] = bytes(numbers.below(8));
            let _refused = victim.function.config_write(COMMAND, &[command]);
        }
        one_of_contents(home, numbers)?;
    }
    Ok(())
}

fn one_of_contents(home: &Home, numbers: &mut Numbers) -> anyhow::Result<()> {
    if let Some(table) = &home.table
        && numbers.below(2) == 0
    {
        let words = (table.end - table.start) / 4;
        let word = numbers.below(words);
        let value = match word % 4 {
            0 | 1 => message_address(word % 4 == 1, numbers),
            // Delivered to whatever driver there may be: another kind could stop a processor.
            2 => 0x22 + numbers.below(0x50),
            _ => numbers.below(2),
        };
        let at = table.start.saturating_add(4 * word);
        let [a, b, c, d, ..] = bytes(value);
        home.mapping.write(at, &[a, b, c, d])?;
        return Ok(());
    }
    let offset = numbers.below(home.bar.size - 4);
    if home.bar.prefetchable && numbers.below(2) == 0 {
        home.mapping.write_anywhere(offset, word(numbers.next()))?;
    } else {
        let _anything = home.mapping.read_anywhere(offset)?;
    }
    Ok(())
}

/// Half of a message's address: mostly one of the local APICs'.
fn message_address(upper: bool, numbers: &mut Numbers) -> u64 {
    match (numbers.below(4), upper) {
        (0, _) => numbers.next() & 0xffff_ffff,
        (_, false) => 0xfee0_0000 | numbers.below(2) << 12,
        (_, true) => 0,
    }
}
