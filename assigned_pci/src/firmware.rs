//! What a guest's firmware does with its PCI functions before anything else runs: it sizes their
//! BARs, gives each an address, and turns decoding and bus mastering on.
//!
//! It goes through the guest's side of a function and nothing else, so that it may stand in for a
//! guest: in the demonstration, in tests, and where a virtual machine boots without firmware.

use memory_map::{Gpa, GpaRange};

use crate::command::Command;
use crate::config_space::{BARS, COMMAND};
use crate::{AssignedFunction, BarIndex, BarKind, BarProblem, Outcome};

/// Where BARs may be put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// For 32-bit BARs, and for 64-bit ones that the other window has no room for. What lies
    /// above 4 GiB of it is not used for 32-bit BARs.
    pub low: GpaRange,
    /// For 64-bit BARs, prefetchable or not.
    pub high: GpaRange,
}

/// Where a BAR was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The function's name.
    pub function: String,
    /// Which BAR.
    pub bar: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Where it lies now. It starts on a multiple of its size.
    pub range: GpaRange,
}

/// What came of placing BARs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "the outcome says what the map could not do"]
pub struct Placed {
    /// The memory BARs, function by function in the order given, each by index.
    pub placements: Vec<Placement>,
    /// What all the writes did to the map.
    pub outcome: Outcome,
}

/// Why BARs could not be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// There is no room for one of them. Nothing has been placed; all functions are as they were.
    #[error(
        "no room for {function} {bar}, which needs {size:#x} bytes aligned to as many, in what is \
         left of {window}: make the window larger"
    )]
    WindowExhausted {
        /// Which function.
        function: String,
        /// Which of its BARs.
        bar: BarIndex,
        /// Its size in bytes.
        size: u64,
        /// The window that has no room.
        window: GpaRange,
    },
    /// What a BAR reads back when it is sized makes no sense.
    #[error("{function} {bar} cannot be sized: {problem}")]
    Sizing {
        /// Which function.
        function: String,
        /// Which of its BARs.
        bar: BarIndex,
        /// What is wrong with it.
        problem: BarProblem,
    },
    /// A BAR that the function does not have.
    #[error("{function} has no {bar}")]
    NoSuchBar {
        /// Which function.
        function: String,
        /// Which BAR.
        bar: BarIndex,
    },
    /// A function's command register does not keep the bit that turns decoding on.
    #[error("{function} does not turn memory decoding on")]
    DecodingRefused {
        /// Which function.
        function: String,
        /// What the host and the map said.
        outcome: Box<Outcome>,
    },
}

/// Places the memory BARs of `functions` in `windows` and turns their decoding and bus mastering
/// on. Functions that have been placed are placed anew. I/O BARs are left at 0, and I/O decoding
/// off.
///
/// # Errors
/// See [`PlaceError`].
pub fn place_bars(functions: &[&AssignedFunction], windows: Windows) -> Result<Placed, PlaceError> {
    let mut outcome = Outcome::default();
    let guests: Vec<_> = functions
        .iter()
        .map(|function| Guest::stop(function, &mut outcome))
        .collect();
    let mut placements = match plan(&guests, windows, &mut outcome) {
        Ok(placements) => placements,
        Err(error) => {
            for guest in &guests {
                guest.write_command(guest.command, &mut outcome);
            }
            return Err(error);
        }
    };
    for (index, placement) in &placements {
        if let Some(guest) = guests.get(*index) {
            let address = placement.range.start();
            guest.write_bar(placement.bar, placement.kind, address, &mut outcome);
        }
    }
    let outcome = start(&guests, outcome)?;
    placements.sort_by_key(|(index, placement)| (*index, placement.bar));
    Ok(Placed {
        placements: placements
            .into_iter()
            .map(|(_, placement)| placement)
            .collect(),
        outcome,
    })
}

/// Puts each function's BARs where it is said, and turns decoding and bus mastering on: for whoever
/// knows where. BARs that are not named stay where they are, and I/O decoding is off.
///
/// # Errors
/// [`PlaceError::NoSuchBar`], before anything is changed, and [`PlaceError::DecodingRefused`].
pub fn put_bars(
    functions: &[(&AssignedFunction, Vec<(BarIndex, Gpa)>)],
) -> Result<Outcome, PlaceError> {
    let mut wanted = Vec::new();
    for (function, bars) in functions {
        let there = function.bars();
        let with_kind = |(bar, address): &(BarIndex, Gpa)| {
            let info = there.iter().find(|info| info.index == *bar);
            let info = info.ok_or_else(|| PlaceError::NoSuchBar {
                function: function.name().to_owned(),
                bar: *bar,
            })?;
            Ok((*bar, info.kind, *address))
        };
        let bars: Vec<_> = bars.iter().map(with_kind).collect::<Result<_, _>>()?;
        wanted.push((*function, bars));
    }
    let mut outcome = Outcome::default();
    let mut guests = Vec::new();
    for (function, bars) in wanted {
        let guest = Guest::stop(function, &mut outcome);
        for (bar, kind, address) in bars {
            guest.write_bar(bar, kind, address, &mut outcome);
        }
        guests.push(guest);
    }
    start(&guests, outcome)
}

/// Turns decoding and bus mastering on.
fn start(guests: &[Guest<'_>], mut outcome: Outcome) -> Result<Outcome, PlaceError> {
    for guest in guests {
        let on = guest.command | Command::MEMORY | Command::BUS_MASTER;
        guest.write_command(on, &mut outcome);
        if guest.read_command() & Command::MEMORY == 0 {
            return Err(PlaceError::DecodingRefused {
                function: guest.function.name().to_owned(),
                outcome: Box::new(outcome),
            });
        }
    }
    Ok(outcome)
}

/// Sizes all BARs and finds each a place, the largest first, so that no room is lost between
/// them. Each is with the index of its function.
fn plan(
    guests: &[Guest<'_>],
    windows: Windows,
    outcome: &mut Outcome,
) -> Result<Vec<(usize, Placement)>, PlaceError> {
    let mut sized = Vec::new();
    for (index, guest) in guests.iter().enumerate() {
        for (bar, kind, size) in guest.size_bars(outcome)? {
            sized.push((index, guest, bar, kind, size));
        }
    }
    sized.sort_by_key(|(index, _, bar, _, size)| (std::cmp::Reverse(*size), *index, *bar));

    let mut low = Room::new(windows.low);
    let mut high = Room::new(windows.high);
    let mut placements = Vec::new();
    for (index, guest, bar, kind, size) in sized {
        let found = if kind.is_64_bit() {
            high.take(size, u64::MAX)
                .or_else(|| low.take(size, u64::MAX))
        } else {
            low.take(size, u32::MAX.into())
        };
        let function = guest.function.name().to_owned();
        let range = found.ok_or_else(|| PlaceError::WindowExhausted {
            function: function.clone(),
            bar,
            size,
            window: if kind.is_64_bit() {
                windows.high
            } else {
                windows.low
            },
        })?;
        placements.push((
            index,
            Placement {
                function,
                bar,
                kind,
                range,
            },
        ));
    }
    Ok(placements)
}

/// What is left of a window: everything from `next` on.
struct Room {
    window: GpaRange,
    next: Option<u64>,
}

impl Room {
    fn new(window: GpaRange) -> Self {
        Self {
            window,
            next: Some(window.start().raw()),
        }
    }

    /// Takes `size` bytes (a power of two), aligned to as many, that end at `last` at the latest.
    fn take(&mut self, size: u64, last: u64) -> Option<GpaRange> {
        let start = self.next?.checked_next_multiple_of(size)?;
        let range = GpaRange::new(Gpa::new(start), size).ok()?;
        if !self.window.covers(&range) || range.last().raw() > last {
            return None;
        }
        self.next = range.last().raw().checked_add(1);
        Some(range)
    }
}

/// A function as seen by software in the guest: config space and nothing else.
struct Guest<'f> {
    function: &'f AssignedFunction,
    /// The command register as it was found.
    command: u16,
}

impl<'f> Guest<'f> {
    /// Turns decoding off, as everybody should who sizes BARs.
    fn stop(function: &'f AssignedFunction, outcome: &mut Outcome) -> Self {
        let mut guest = Self {
            function,
            command: 0,
        };
        guest.command = guest.read_command();
        guest.write_command(guest.command & !(Command::IO | Command::MEMORY), outcome);
        guest
    }

    fn read_command(&self) -> u16 {
        let mut bytes = [0; 2];
        match self.function.config_read(COMMAND, &mut bytes) {
            None => u16::from_le_bytes(bytes),
            // All ones would say that everything is on.
            Some(_) => 0,
        }
    }

    fn write_command(&self, command: u16, outcome: &mut Outcome) {
        outcome.append(self.function.config_write(COMMAND, &command.to_le_bytes()));
    }

    /// The memory BARs, with their sizes. Their registers are as they were.
    fn size_bars(
        &self,
        outcome: &mut Outcome,
    ) -> Result<Vec<(BarIndex, BarKind, u64)>, PlaceError> {
        let mut found = Vec::new();
        let mut upper_half = false;
        for bar in BarIndex::ALL {
            if std::mem::take(&mut upper_half) {
                continue;
            }
            let before = self.read(register(bar));
            self.write(register(bar), u32::MAX, outcome);
            let low = self.read(register(bar));
            self.write(register(bar), before, outcome);
            if low == 0 {
                continue;
            }
            let refuse = |problem| PlaceError::Sizing {
                function: self.function.name().to_owned(),
                bar,
                problem,
            };
            let kind = BarKind::from_register(low).map_err(refuse)?;
            if !kind.is_memory() {
                continue;
            }
            upper_half = kind.is_64_bit();
            let high = if upper_half {
                let register = register(bar).saturating_add(4);
                let before = self.read(register);
                self.write(register, u32::MAX, outcome);
                let high = self.read(register);
                self.write(register, before, outcome);
                high
            } else {
                u32::MAX
            };
            let mask = u64::from(high) << 32 | u64::from(low & !0xf);
            let size = mask.wrapping_neg();
            if !size.is_power_of_two() {
                return Err(refuse(BarProblem::NotPowerOfTwo { size }));
            }
            found.push((bar, kind, size));
        }
        Ok(found)
    }

    fn write_bar(&self, bar: BarIndex, kind: BarKind, address: Gpa, outcome: &mut Outcome) {
        let [a, b, c, d, e, f, g, h] = address.raw().to_le_bytes();
        let register = register(bar);
        self.write(register, u32::from_le_bytes([a, b, c, d]), outcome);
        if kind.is_64_bit() {
            let upper = u32::from_le_bytes([e, f, g, h]);
            self.write(register.saturating_add(4), upper, outcome);
        }
    }

    fn read(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        // BARs are emulated: the host is not asked.
        let _: Option<crate::HostError> = self.function.config_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, offset: u16, value: u32, outcome: &mut Outcome) {
        outcome.append(self.function.config_write(offset, &value.to_le_bytes()));
    }
}

/// Where a BAR's register lies.
fn register(bar: BarIndex) -> u16 {
    u16::from(bar.get()).saturating_mul(4).saturating_add(BARS)
}
