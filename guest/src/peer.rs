//! Who takes part: a DMA engine, peers with memory in a BAR, and what is proved with them.

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use assigned_pci::HostFunction;
use dma_engine::{DmaEngine, Edu, Nvme};
use memory_map::Iova;
use serde_json::{Value, json};

use crate::dma_memory::DmaMemory;
use crate::function::{Bar, Function};
use crate::mapping::Mapping;
use crate::pattern;

/// QEMU's ivshmem: vendor and device id. BAR 2 is its memory.
const IVSHMEM: (u16, u16) = (0x1af4, 0x1110);
/// The class of NVMe controllers.
pub const NVME_CLASS: u32 = 0x01_0802;

/// How much is moved at once: as much as an edu can.
const LEN: u64 = 4096;
/// In the RAM lent for DMA: what is sent, what is received, and an NVMe driver's own.
const SENT: u64 = 0x1_0000;
const RECEIVED: u64 = 0x2_0000;
const QUEUES: u64 = 0x4_0000;
/// Where in a peer's memory the transfers go. The last page is the state's, see `steps`.
pub const WHERE: u64 = 0x3000;

/// A BAR with memory in it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Whose it is.
    pub function: Arc<Function>,
    /// Which.
    pub bar: Bar,
}

impl Peer {
    /// Where it is.
    pub fn address(&self) -> anyhow::Result<u64> {
        Ok(self.function.placed(self.bar)?.0)
    }

    /// Where its registers say that it is.
    pub fn address_in_registers(&self) -> anyhow::Result<u64> {
        self.function.address(self.bar)
    }

    /// The memory, as the processor sees it there.
    pub fn memory(&self) -> anyhow::Result<Arc<Mapping>> {
        Ok(self.function.placed(self.bar)?.1)
    }

    fn fill(&self, at: u64, seed: u64) -> anyhow::Result<()> {
        let memory = self.memory()?;
        for offset in (0..LEN).step_by(8) {
            memory.set_word(at.saturating_add(offset), pattern::word(seed, offset))?;
        }
        Ok(())
    }

    /// How many words from `at` on are the pattern's.
    fn matching(&self, at: u64, seed: u64) -> anyhow::Result<u64> {
        let memory = self.memory()?;
        let mut matching = 0;
        for offset in (0..LEN).step_by(8) {
            let word = memory.word(at.saturating_add(offset))?;
            if word == pattern::word(seed, offset) {
                matching += 1;
            }
        }
        Ok(matching)
    }

    /// What it is called in reports.
    pub fn name(&self) -> String {
        format!("{} {}", self.function.name(), self.bar.index)
    }
}

/// All that takes part.
pub struct Cast {
    /// Every function of the machine.
    pub functions: Vec<Arc<Function>>,
    /// What moves the data.
    engine: Edu,
    /// The engine's function.
    pub edu: Arc<Function>,
    /// The ivshmems' memories.
    pub peers: Vec<Peer>,
    ram: DmaMemory,
    /// Of the next pattern.
    seed: u64,
}

/// What came of one word or all of them.
const WORDS: u64 = LEN / 8;

impl Cast {
    /// Looks for them, and has them decode memory and master the bus.
    pub fn assemble() -> anyhow::Result<Self> {
        let functions = Function::all()?;
        let edu = functions
            .iter()
            .find(|function| function.id() == (Edu::VENDOR, Edu::DEVICE))
            .context("there is no edu (1234:11e8) among the PCI functions")?;
        edu.enable()?;
        let peers = ivshmems(&functions)?;
        ensure!(
            !peers.is_empty(),
            "there is no ivshmem (1af4:1110) with memory among the PCI functions"
        );
        for peer in &peers {
            peer.function.enable()?;
        }
        Ok(Self {
            engine: Edu::new(Arc::clone(edu) as Arc<dyn HostFunction>),
            edu: Arc::clone(edu),
            peers,
            ram: DmaMemory::new()?,
            seed: 1,
            functions: functions.clone(),
        })
    }

    /// An NVMe driver of `function`, with its queues in this RAM.
    pub fn nvme(&self, function: &Arc<Function>) -> anyhow::Result<Nvme> {
        let memory = self.ram.part(QUEUES, Nvme::MEMORY)?;
        Ok(Nvme::new(
            Arc::clone(function) as Arc<dyn HostFunction>,
            Box::new(memory),
        ))
    }

    /// The RAM in which transfers end.
    pub fn received(&self) -> anyhow::Result<DmaMemory> {
        self.ram.part(RECEIVED, LEN)
    }

    /// The RAM from which transfers come.
    pub fn sent(&self) -> anyhow::Result<DmaMemory> {
        self.ram.part(SENT, LEN)
    }

    /// A pattern that was not there before.
    pub fn new_seed(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(1);
        self.seed
    }

    /// RAM to RAM by way of the engine.
    pub fn prove_ram(&mut self) -> anyhow::Result<Value> {
        let (sent, received) = (self.sent()?, self.received()?);
        let (new, old) = (self.new_seed(), self.new_seed());
        sent.fill(new)?;
        received.fill(old)?;
        self.engine.copy(sent.start(), received.start(), LEN)?;
        expect_all("RAM", received.matching(new)?)?;
        Ok(json!({ "from": sent.start().raw(), "to": received.start().raw(), "bytes": LEN }))
    }

    /// RAM to a peer's memory and back, each compared by the processor's own view of both.
    pub fn prove_peer(&mut self, peer: &Peer) -> anyhow::Result<Value> {
        self.prove_peer_at(peer, WHERE)
    }

    /// The same at an offset of the peer's memory.
    pub fn prove_peer_at(&mut self, peer: &Peer, at: u64) -> anyhow::Result<Value> {
        let bus = peer.address()?;
        let bus_there = Iova::new(bus.wrapping_add(at));
        let (sent, received) = (self.sent()?, self.received()?);

        let (new, old) = (self.new_seed(), self.new_seed());
        sent.fill(new)?;
        peer.fill(at, old)?;
        self.engine.copy(sent.start(), bus_there, LEN)?;
        expect_all(
            &format!("{} at {bus:#x}", peer.name()),
            peer.matching(at, new)?,
        )?;

        let (new, old) = (self.new_seed(), self.new_seed());
        peer.fill(at, new)?;
        received.fill(old)?;
        self.engine.copy(bus_there, received.start(), LEN)?;
        let what = format!("RAM, read from {} at {bus:#x}", peer.name());
        expect_all(&what, received.matching(new)?)?;
        Ok(json!({ "peer": peer.name(), "address": bus, "at": at, "bytes": LEN }))
    }

    /// That nobody is at an address: what is sent there changes no peer's memory, nor the RAM that
    /// was sent, and what is read there is nothing that anybody holds.
    pub fn prove_nobody(&mut self, address: u64) -> anyhow::Result<Value> {
        let (sent, received) = (self.sent()?, self.received()?);
        let there = Iova::new(address);
        let new = self.new_seed();
        let peers = self.peers.clone();
        let mut theirs = Vec::new();
        for peer in &peers {
            // Where it would be if the address were this peer's `WHERE`, and at its start.
            for at in [0, WHERE] {
                let seed = self.new_seed();
                peer.fill(at, seed)?;
                theirs.push((peer, at, seed));
            }
        }
        sent.fill(new)?;
        self.engine.copy(sent.start(), there, LEN)?;
        for (peer, at, seed) in &theirs {
            expect_all(
                &format!("{} at {at:#x}, after a write to {address:#x}", peer.name()),
                peer.matching(*at, *seed)?,
            )?;
        }
        expect_all("the RAM that was sent", sent.matching(new)?)?;

        let old = self.new_seed();
        received.fill(old)?;
        self.engine.copy(there, received.start(), LEN)?;
        let known = theirs.iter().map(|(_, _, seed)| *seed).chain([new, old]);
        for seed in known {
            let matching = received.matching(seed)?;
            ensure!(
                matching == 0,
                "{matching} words that were read from {address:#x}, where nobody is, are known ones"
            );
        }
        Ok(json!({ "address": address, "read": received.word(0)? }))
    }

    /// Sends what is in RAM to an address, whoever may be there.
    pub fn send(&mut self, to: u64) -> anyhow::Result<()> {
        let sent = self.sent()?;
        self.engine.copy(sent.start(), Iova::new(to), LEN)?;
        Ok(())
    }

    /// The peer of that function, with a file of its own: after it was removed and found again, the
    /// old one leads nowhere.
    pub fn reopen(&mut self) -> anyhow::Result<()> {
        let names: Vec<String> = self.peers.iter().map(Peer::name).collect();
        self.functions = Function::all()?;
        self.peers = ivshmems(&self.functions)?;
        let now: Vec<String> = self.peers.iter().map(Peer::name).collect();
        ensure!(
            now == names,
            "there were {names:?}, and now there are {now:?}"
        );
        let name = self.edu.name();
        let edu = self.functions.iter().find(|other| other.name() == name);
        self.edu = Arc::clone(edu.with_context(|| format!("{name} is not there any more"))?);
        self.engine = Edu::new(Arc::clone(&self.edu) as Arc<dyn HostFunction>);
        self.edu.enable()?;
        for peer in &self.peers {
            peer.function.enable()?;
        }
        Ok(())
    }
}

/// The ivshmems' memories.
pub fn ivshmems(functions: &[Arc<Function>]) -> anyhow::Result<Vec<Peer>> {
    let mut peers = Vec::new();
    for function in functions {
        let memory = |bar: &&Bar| bar.index.get() == 2;
        if function.id() != IVSHMEM {
            continue;
        }
        if let Some(bar) = function.bars().iter().find(memory) {
            if bar.size < 4 * LEN {
                bail!(
                    "{}'s memory has only {:#x} bytes",
                    function.name(),
                    bar.size
                );
            }
            peers.push(Peer {
                function: Arc::clone(function),
                bar: *bar,
            });
        }
    }
    Ok(peers)
}

fn expect_all(what: &str, matching: u64) -> anyhow::Result<()> {
    ensure!(
        matching == WORDS,
        "{what}: only {matching} of {WORDS} words are as they should be"
    );
    Ok(())
}
