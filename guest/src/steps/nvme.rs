//! An NVMe controller, by the kernel's driver and without it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use assigned_pci::HostFunction;
use memory_map::Iova;
use serde_json::json;

use super::found;
use crate::function::Function;
use crate::pattern;
use crate::peer::{Cast, NVME_CLASS, WHERE};
use crate::place::free_places;
use crate::report::Findings;

/// How long the kernel may take to find the disk.
const LIMIT: Duration = Duration::from_secs(20);

/// What the lab's disks hold: each eight bytes their offset.
fn word_of_disk(offset: u64) -> u64 {
    offset ^ 0x7477_0000_0000_0000
}

/// Where the disk is read and compared, in bytes.
const READ: Range<u64> = 0x10_0000..0x20_0000;
/// Where the kernel's driver writes the pattern numbered by this.
const WRITTEN: Range<u64> = 0x30_0000..0x34_0000;
const WRITTEN_SEED: u64 = 0x6b65_726e;
/// Where blocks come from a peer.
const FROM_PEER: Range<u64> = 0x40_0000..0x40_1000;
const FROM_PEER_SEED: u64 = 0x7065_6572;
const BLOCK: u64 = 512;
/// How much goes by the peers at once.
const LEN: u64 = FROM_PEER.end - FROM_PEER.start;
/// How much the kernel's driver is asked for at once.
const PIECE: usize = 0x1_0000;

/// Reads and writes the disk through the kernel's driver, and sees that interrupts came for it, also
/// after they were moved to another processor.
pub fn by_the_kernels_driver() -> anyhow::Result<Findings> {
    let functions = Function::all()?;
    let controller = functions
        .iter()
        .find(|function| function.class() == NVME_CLASS)
        .context("there is no NVMe controller among the PCI functions")?;
    if controller.driver().is_none() {
        fs::write("/sys/bus/pci/drivers_probe", controller.name())
            .with_context(|| format!("giving {} to its driver", controller.name()))?;
    }
    let path = "/dev/nvme0n1";
    let start = Instant::now();
    while !fs::exists(path)? {
        ensure!(
            start.elapsed() < LIMIT,
            "there is no {path} after {LIMIT:?}; the driver is {:?}",
            controller.driver()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let disk = OpenOptions::new().read(true).write(true).open(path);
    let disk = disk.with_context(|| format!("opening {path}"))?;

    let before = interrupts()?;
    compare(&disk, READ, word_of_disk)?;
    let word = |offset| pattern::word(WRITTEN_SEED, offset);
    write(&disk, WRITTEN, word)?;
    compare(&disk, WRITTEN, word)?;
    let after = interrupts()?;
    let came = total(&after).saturating_sub(total(&before));
    ensure!(came > 0, "no interrupt came: {after:?}");
    let kinds: Vec<&String> = after.iter().map(|line| &line.kind).collect();
    let moved = move_interrupt(&controller.name())?;
    Ok(found([
        ("function", json!(controller.name())),
        ("read", json!(READ.end - READ.start)),
        ("written", json!([WRITTEN.start, WRITTEN.end])),
        ("interrupts", json!(came)),
        ("kinds", json!(kinds)),
        ("moved interrupt", moved),
    ]))
}

/// The admin queue's interrupt, whose processor may be chosen, goes to each processor in turn.
fn move_interrupt(controller: &str) -> anyhow::Result<serde_json::Value> {
    let lines = interrupts()?;
    let admin = lines.iter().find(|line| line.name == "nvme0q0");
    let number = &admin.context("the admin queue has no interrupt")?.number;
    let cpus = lines.first().map_or(0, |line| line.counts.len());
    let mut moved = Vec::new();
    for cpu in 0..cpus {
        let path = format!("/proc/irq/{number}/smp_affinity_list");
        fs::write(&path, cpu.to_string()).with_context(|| format!("writing {path}"))?;
        let count = |lines: &[InterruptLine]| {
            let admin = lines.iter().find(|line| line.name == "nvme0q0");
            admin
                .and_then(|line| line.counts.get(cpu).copied())
                .unwrap_or(0)
        };
        let before = count(&interrupts()?);
        // Identify, over and over; the interrupt itself moves with the first one that comes.
        for _ in 0..4 {
            fs::write("/sys/class/nvme/nvme0/rescan_controller", "1")
                .with_context(|| format!("having {controller} asked what it is"))?;
            std::thread::sleep(Duration::from_millis(50));
        }
        let came = count(&interrupts()?).saturating_sub(before);
        ensure!(came > 0, "no interrupt {number} came to processor {cpu}");
        moved.push(came);
    }
    Ok(json!(moved))
}

/// A line of `/proc/interrupts`.
#[derive(Debug)]
struct InterruptLine {
    number: String,
    counts: Vec<u64>,
    kind: String,
    name: String,
}

/// Those of NVMe controllers.
fn interrupts() -> anyhow::Result<Vec<InterruptLine>> {
    let text = fs::read_to_string("/proc/interrupts").context("reading /proc/interrupts")?;
    Ok(text.lines().filter_map(interrupt).collect())
}

fn interrupt(line: &str) -> Option<InterruptLine> {
    let (number, rest) = line.trim_start().split_once(':')?;
    let name = rest.split_whitespace().next_back()?;
    if !name.starts_with("nvme") {
        return None;
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    let counts: Vec<u64> = words.iter().map_while(|word| word.parse().ok()).collect();
    Some(InterruptLine {
        number: number.to_owned(),
        kind: words
            .get(counts.len())
            .map_or(String::new(), ToString::to_string),
        counts,
        name: name.to_owned(),
    })
}

fn total(lines: &[InterruptLine]) -> u64 {
    lines.iter().flat_map(|line| &line.counts).sum()
}

/// Has the kernel forget what it has read, so that the disk is asked.
fn forget() -> anyhow::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "1").context("having the page cache dropped")
}

fn compare(disk: &File, range: Range<u64>, word: impl Fn(u64) -> u64) -> anyhow::Result<()> {
    forget()?;
    let mut data = vec![0; PIECE];
    for at in range.step_by(PIECE) {
        disk.read_exact_at(&mut data, at)
            .with_context(|| format!("reading the disk at {at:#x}"))?;
        for (found, offset) in data.chunks_exact(8).zip((at..).step_by(8)) {
            ensure!(
                found == word(offset).to_le_bytes(),
                "the disk holds {found:02x?} at {offset:#x}"
            );
        }
    }
    Ok(())
}

fn write(disk: &File, range: Range<u64>, word: impl Fn(u64) -> u64) -> anyhow::Result<()> {
    for at in range.step_by(PIECE) {
        let words = (0..PIECE).step_by(8).zip((at..).step_by(8));
        let data: Vec<u8> = words
            .flat_map(|(_, offset)| word(offset).to_le_bytes())
            .collect();
        disk.write_all_at(&data, at)
            .with_context(|| format!("writing the disk at {at:#x}"))?;
    }
    disk.sync_all().context("having the disk written")
}

/// Without a driver of the kernel's: blocks of the disk go into a peer's memory and come from there.
pub fn to_and_from_a_peer(cast: &mut Cast) -> anyhow::Result<Findings> {
    let function = cast.functions.iter();
    let function = function.filter(|function| function.class() == NVME_CLASS);
    let function = Arc::clone(
        function
            .clone()
            .next()
            .context("there is no NVMe controller")?,
    );
    function.unbind()?;
    function.enable()?;
    let mut nvme = cast.nvme(&function)?;
    let mut moved = Vec::new();
    for peer in cast.peers.clone() {
        let bus = peer.address()?;
        let there = Iova::new(bus.saturating_add(WHERE));
        let memory = peer.memory()?;
        let holds = |word: &dyn Fn(u64) -> u64| -> io::Result<u64> {
            let mut holds = 0;
            for at in (0..LEN).step_by(8) {
                holds += u64::from(memory.word(WHERE + at)? == word(at));
            }
            Ok(holds)
        };
        let expect = |what: &str, matching: u64| {
            ensure!(
                matching == LEN / 8,
                "{what}: only {matching} of {} words are as they should be",
                LEN / 8
            );
            Ok(())
        };
        let fill = |seed: u64| -> io::Result<()> {
            (0..LEN)
                .step_by(8)
                .try_for_each(|at| memory.set_word(WHERE + at, pattern::word(seed, at)))
        };
        // The disk, to the peer.
        fill(cast.new_seed())?;
        nvme.read(READ.start / BLOCK, there, LEN)?;
        let of_disk = |at| word_of_disk(READ.start + at);
        expect(&format!("{} at {bus:#x}", peer.name()), holds(&of_disk)?)?;
        // To where nobody is: the peer keeps what it has, whatever the controller says of it.
        let seed = cast.new_seed();
        fill(seed)?;
        let places = free_places(&peer.function, peer.bar, &cast.functions, &[])?;
        let nobody = places.first().context("no window has a free place")?;
        let told = nvme.read(READ.start / BLOCK, Iova::new(nobody + WHERE), LEN);
        let told = told.map_or_else(|error| error.to_string(), |()| "done".to_owned());
        expect(
            "a peer that was not written to",
            holds(&|at| pattern::word(seed, at))?,
        )?;
        // The peer, to the disk, and from there to RAM.
        fill(FROM_PEER_SEED)?;
        nvme.write(FROM_PEER.start / BLOCK, there, LEN)?;
        let received = cast.received()?;
        received.fill(cast.new_seed())?;
        nvme.read(FROM_PEER.start / BLOCK, received.start(), LEN)?;
        expect(
            "the disk, written from a peer",
            received.matching(FROM_PEER_SEED)?,
        )?;
        moved.push(json!({
            "peer": peer.name(),
            "address": bus,
            "bytes": LEN,
            "nobody": nobody,
            "told of nobody": told,
        }));
    }
    Ok(found([
        ("function", json!(function.name())),
        ("moved", json!(moved)),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_interrupts_are_read() {
        let line = " 27:         12          3  PCI-MSIX-0000:01:00.0    0-edge      nvme0q0";
        let read = interrupt(line).unwrap();
        assert_eq!(
            (read.number.as_str(), read.name.as_str()),
            ("27", "nvme0q0")
        );
        assert_eq!(read.counts, [12, 3]);
        assert_eq!(read.kind, "PCI-MSIX-0000:01:00.0");
        assert!(interrupt("  4:  7  0  IO-APIC  4-edge  ttyS0").is_none());
        assert!(interrupt("           CPU0       CPU1").is_none());
    }
}
