//! The steps, by name.

mod bars;
mod hostile;
mod machine;
mod messages;
mod move_time;
mod nvme;
mod pile;
mod pulled;
mod race;
mod resets;

use std::time::Instant;

use anyhow::{Context, bail};
use rustix::system::RebootCommand;
use serde_json::json;

use crate::function::Function;
use crate::peer::{Cast, Peer, ivshmems};
use crate::plan::{Plan, Step};
use crate::report::{Findings, failed, say};

/// How a boot ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By turning the machine off.
    PowerOff,
    /// By starting it anew.
    Reboot,
    /// By a panic of the kernel's.
    Panic,
    /// By waiting for somebody to end it.
    Wait,
}

/// What came of all steps.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Whether all went well.
    pub ok: bool,
    /// The ending that was asked for.
    pub ending: Option<Ending>,
}

/// Does this boot's steps, each reported; one that fails does not keep the next from being done.
pub fn run_all(plan: &Plan) -> Outcome {
    let mut outcome = Outcome {
        ok: true,
        ending: None,
    };
    let boot = match count_boot(plan) {
        Ok(boot) => boot,
        Err(error) => {
            failed("boot", &error);
            outcome.ok = false;
            return outcome;
        }
    };
    say("boot", true, found([("boot", json!(boot))]));
    let steps = plan.boots.get(boot).map_or(&[][..], Vec::as_slice);
    let mut cast = None;
    for step in steps {
        if let Some(ending) = ending(&step.name) {
            outcome.ending = Some(ending);
            break;
        }
        let start = Instant::now();
        match run(step, &mut cast) {
            Ok(mut findings) => {
                let seconds = start.elapsed().as_secs_f64();
                findings.insert("seconds".into(), json!(seconds));
                say(&step.name, true, findings);
            }
            Err(error) => {
                failed(&step.name, &error);
                outcome.ok = false;
            }
        }
    }
    outcome
}

fn ending(name: &str) -> Option<Ending> {
    match name {
        "poweroff" => Some(Ending::PowerOff),
        "reboot" => Some(Ending::Reboot),
        "panic" => Some(Ending::Panic),
        "wait" => Some(Ending::Wait),
        _ => None,
    }
}

/// Ends the boot. It says so first, since afterwards it cannot.
pub fn end(ending: Ending) -> ! {
    let name = match ending {
        Ending::PowerOff => "poweroff",
        Ending::Reboot => "reboot",
        Ending::Panic => "panic",
        Ending::Wait => "wait",
    };
    say("end", true, found([("how", json!(name))]));
    rustix::fs::sync();
    let done = match ending {
        Ending::PowerOff => rustix::system::reboot(RebootCommand::PowerOff).map_err(Into::into),
        Ending::Reboot => rustix::system::reboot(RebootCommand::Restart).map_err(Into::into),
        Ending::Panic => std::fs::write("/proc/sysrq-trigger", "c"),
        Ending::Wait => Ok(()),
    };
    if let Err(error) = done {
        failed("end", &error.into());
    }
    loop {
        std::thread::park();
    }
}

/// Does one step.
fn run(step: &Step, cast: &mut Option<Cast>) -> anyhow::Result<Findings> {
    let number = step.number;
    match step.name.as_str() {
        "devices" => return machine::devices(),
        "machine" => return machine::machine(),
        "button" => return machine::power_button(),
        "enter" => return machine::enter(),
        "nvme-driver" => return nvme::by_the_kernels_driver(),
        "move-time" => return move_time::moves_alone(number.unwrap_or(100)),
        _ => {}
    }
    let cast = match cast {
        Some(cast) => cast,
        empty => empty.insert(Cast::assemble()?),
    };
    match step.name.as_str() {
        "ram" => Ok(found([("moved", cast.prove_ram()?)])),
        "p2p" => every_peer(cast, number.unwrap_or(1)),
        "nobody" => bars::nobody(cast),
        "move" => bars::moved_by_hand(cast, number.unwrap_or(1)),
        "rescan" => bars::removed_and_found(cast),
        "msi" => messages::to_nobody(cast),
        "race" => race::moves_and_transfers(cast, number.unwrap_or(10)),
        "pulled" => pulled::pulled_out(cast),
        "hostile" => hostile::nonsense(cast, number.unwrap_or(100_000)),
        "pile" => pile::lay_over_one_another(cast),
        "flr" => resets::by_register(cast),
        "reset" => resets::by_the_kernel(cast),
        "nvme-peer" => nvme::to_and_from_a_peer(cast),
        other => bail!("there is no step {other:?}"),
    }
}

/// RAM to each peer and back, `times` over.
fn every_peer(cast: &mut Cast, times: u64) -> anyhow::Result<Findings> {
    let mut moved = Vec::new();
    for _ in 0..times {
        moved.clear();
        for peer in cast.peers.clone() {
            moved.push(cast.prove_peer(&peer)?);
        }
    }
    Ok(found([("moved", json!(moved))]))
}

/// Findings of these names.
fn found<const N: usize>(findings: [(&str, serde_json::Value); N]) -> Findings {
    findings
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
}

/// What the last page of the first ivshmem's memory holds: a mark, the run's number, and how many
/// boots it has had.
const STATE_MARK: u64 = 0x7477_2d62_6f6f_7473;

/// Which boot of this run this is, from zero. A run of one boot needs no ivshmem.
fn count_boot(plan: &Plan) -> anyhow::Result<usize> {
    if plan.boots.len() < 2 {
        return Ok(0);
    }
    let peers = ivshmems(&Function::all()?)?;
    let peer: &Peer = peers
        .first()
        .context("there is no ivshmem (1af4:1110), in whose memory the boots would be counted")?;
    peer.function.enable()?;
    let memory = peer.memory()?;
    let page = peer.bar.size.saturating_sub(0x1000);
    let [mark, run, count] = [page, page + 8, page + 16];
    let same = memory.word(mark)? == STATE_MARK && memory.word(run)? == plan.run;
    let boot = if same { memory.word(count)? } else { 0 };
    memory.set_word(mark, STATE_MARK)?;
    memory.set_word(run, plan.run)?;
    memory.set_word(count, boot.wrapping_add(1))?;
    Ok(usize::try_from(boot)?)
}
