//! Whom nonsense is written to, where each of them belongs, and what stays out of reach.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, ensure};
use assigned_pci::HostFunction;

use crate::function::{Bar, Function, MASTER, MEMORY};
use crate::mapping::Mapping;
use crate::peer::Cast;
use crate::place::{ecam, ram};

/// Device control, in the capability of PCI Express.
const DEVICE_CONTROL: u16 = 8;
/// A bridge's control register.
const BRIDGE_CONTROL: u16 = 0x3e;
/// MSI-X: its capability, and in it its control and where its table is.
const MSIX: u8 = 0x11;
const MSIX_CONTROL: u16 = 2;
const MSIX_TABLE: u16 = 4;
/// Where the BARs' registers are, and the ROM's of either kind of header.
pub const BARS: Range<u16> = 0x10..0x28;

/// The functions that are written to, and what stays out of reach.
pub struct Victims {
    pub functions: Vec<Victim>,
    /// Their BARs where the kernel put them.
    pub homes: Vec<Home>,
    /// The bridges among them, each with its header.
    bridges: Vec<(Arc<Function>, [u8; 64])>,
    /// Where BARs must not be put.
    spared: Vec<Range<u64>>,
    /// Whose config space is spared: offsets in ECAM.
    spared_config: Vec<Range<u64>>,
    /// Config space by address.
    pub ecam: Mapping,
    pub ecam_size: u64,
    /// Values for BARs that hurt the most.
    pub chosen: Vec<u64>,
}

/// One function, and which of its registers take long.
pub struct Victim {
    pub function: Arc<Function>,
    /// Its place in ECAM.
    pub ecam: u64,
    pub slow: Vec<Range<u16>>,
    /// Where the control of MSI-X is.
    pub msix: Option<u16>,
}

/// A BAR at the place that it had at first.
pub struct Home {
    /// Its function's number among the victims.
    pub victim: usize,
    pub bar: Bar,
    pub address: u64,
    /// What is there.
    pub mapping: Mapping,
    /// Where in it the table of MSI-X is.
    pub table: Option<Range<u64>>,
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

/// Where the table of MSI-X is in a BAR, if it is in this one: 16 bytes for each vector.
fn table_in(function: &Function, bar: Bar) -> anyhow::Result<Option<Range<u64>>> {
    let Some(at) = function.capability(MSIX)? else {
        return Ok(None);
    };
    let vectors = u64::from(u16::from_le_bytes(function.read(at + MSIX_CONTROL)?) & 0x7ff) + 1;
    let table = u32::from_le_bytes(function.read(at + MSIX_TABLE)?);
    let start = u64::from(table & !7);
    let is_here = table & 7 == u32::from(bar.index.get());
    Ok(is_here.then(|| start..start.saturating_add(16 * vectors)))
}

impl Victims {
    pub fn new(cast: &Cast) -> anyhow::Result<Self> {
        let first = cast.peers.first().context("there is no peer")?;
        let (ecam, ram) = (ecam()?, ram()?);
        let ecam_size = ecam.end.saturating_sub(ecam.start);
        let mut new = Self {
            functions: vec![],
            homes: vec![],
            bridges: vec![],
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
            new.add(function, place)?;
        }
        ensure!(
            !new.functions.is_empty(),
            "there is nothing to write nonsense to"
        );
        Ok(new)
    }

    fn add(&mut self, function: &Arc<Function>, ecam: u64) -> anyhow::Result<()> {
        function.unbind()?;
        let victim = self.functions.len();
        for bar in function.bars() {
            let address = function.address(*bar)?;
            self.chosen.push(address);
            self.homes.push(Home {
                victim,
                bar: *bar,
                address,
                mapping: Mapping::physical(address, bar.size).context("mapping a BAR")?,
                table: table_in(function, *bar)?,
            });
        }
        if function.is_bridge()? {
            self.bridges
                .push((Arc::clone(function), function.header()?));
        }
        let msix = function.capability(MSIX)?;
        self.functions.push(Victim {
            slow: slow(function)?,
            function: Arc::clone(function),
            ecam,
            msix: msix.map(|at| at + MSIX_CONTROL),
        });
        Ok(())
    }

    /// Puts the bridges' headers back, so that what is behind them is there again.
    pub fn restore_bridges(&self) -> anyhow::Result<()> {
        for (function, header) in &self.bridges {
            restore(function, header)?;
        }
        Ok(())
    }

    /// Wakes all functions and puts their BARs where they were at first, as a driver would: with
    /// decoding off where any of them is elsewhere.
    pub fn go_home(&self) -> anyhow::Result<()> {
        self.restore_bridges()?;
        for (number, Victim { function, .. }) in self.functions.iter().enumerate() {
            function.wake()?;
            let homes = self.homes.iter().filter(|home| home.victim == number);
            let mut astray = Vec::new();
            for home in homes {
                if function.address(home.bar)? != home.address {
                    astray.push(home);
                }
            }
            if !astray.is_empty() {
                function.set_command(0, MEMORY | MASTER)?;
            }
            for home in astray {
                function.set_address(home.bar, home.address)?;
            }
            function.enable()?;
        }
        Ok(())
    }

    /// Whether writing this to one of its BAR registers could put the BAR over what is spared.
    pub fn hits(&self, victim: &Victim, offset: u16, value: u32) -> anyhow::Result<bool> {
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

    /// Whether eight bytes that lie around an offset in ECAM are nobody's whom it would harm.
    pub fn may_be_written(&self, offset: u64) -> bool {
        let around = offset.saturating_sub(8)..offset.saturating_add(16);
        let touches = |range: &Range<u64>| range.start < around.end && around.start < range.end;
        if self.spared_config.iter().any(touches) {
            return false;
        }
        self.functions.iter().all(|victim| {
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
}

/// Config registers whose writes take long.
fn slow(function: &Function) -> anyhow::Result<Vec<Range<u16>>> {
    let mut slow = Vec::new();
    if let Some(at) = function.express()? {
        slow.push(at + DEVICE_CONTROL..at + DEVICE_CONTROL + 2);
    }
    if let Some(at) = function.power_state()? {
        slow.push(at..at + 2);
    }
    if function.is_bridge()? {
        slow.push(BRIDGE_CONTROL..BRIDGE_CONTROL + 2);
    }
    Ok(slow)
}

/// Puts a bridge's header back: its bus numbers and windows, then its command register.
fn restore(function: &Function, header: &[u8; 64]) -> anyhow::Result<()> {
    for range in [0x3c..0x40, 0x10..0x34, 0x04..0x06] {
        for at in range.step_by(2) {
            let bytes = header.get(at..at + 2).unwrap_or_default();
            function.write(u16::try_from(at)?, bytes)?;
        }
    }
    Ok(())
}
