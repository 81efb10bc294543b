//! Moving data from one device into another, and back.

use anyhow::{Context, Result};
use memory_map::{Gpa, Iova};

use super::assembly::{Assembly, Member, MemberBar, RAM};
use super::report::{Exercised, Pair};
use super::spot::Spot;
use crate::pattern::{comparison, pattern, read_bar};
use crate::ram::GuestRam;

/// What is moved at once, in bytes; also a page.
pub const LEN: usize = 4096;
const LEN_64: u64 = 4096;
/// Where in RAM data come from and go to.
pub const SOURCE: Gpa = Gpa::new(RAM.raw() + 0x1_0000);
pub const MAILBOX: Gpa = Gpa::new(RAM.raw() + 0x2_0000);

/// Exercises every pair whose BAR is mapped and can be written without harm, by every engine
/// there is. A pair that has failed before keeps its verdict.
pub fn all(assembly: &mut Assembly, pairs: &mut [Pair]) -> Result<()> {
    for (number, pair) in (1_u64..).zip(pairs.iter_mut()) {
        if pair.removed || pair.reach != "mapped" || pair.exercised == Some(Exercised::Mismatch) {
            continue;
        }
        exercise(assembly, pair, number)?;
    }
    Ok(())
}

fn exercise(assembly: &mut Assembly, pair: &mut Pair, number: u64) -> Result<()> {
    let (from, to, ram) = two(assembly, pair.from_member, pair.to_member)?;
    let bar = to.bar(pair.index).context("a BAR is gone")?;
    if from.engine.is_none() {
        pair.note = Some(from.no_engine());
        return Ok(());
    }
    let Some(spot) = Spot::of(to, &bar) else {
        pair.note = Some("not prefetchable: reading or writing it could do harm".into());
        return Ok(());
    };
    match one(from, to, &bar, spot, ram, number)? {
        Exercise::Done => {
            pair.exercised = Some(Exercised::Ok);
            pair.at.push(bar.info.address);
        }
        Exercise::Differs(how) => {
            pair.exercised = Some(Exercised::Mismatch);
            pair.note = Some(how);
        }
        Exercise::NotAsked(why) => pair.note = Some(why),
    }
    Ok(())
}

/// Moves data once more between a pair that was exercised.
pub fn again(assembly: &mut Assembly, pair: &Pair) -> Result<Exercised> {
    /// Unlike the number of any pair.
    const SEED: u64 = 1 << 32;
    let (from, to, ram) = two(assembly, pair.from_member, pair.to_member)?;
    let bar = to.bar(pair.index).context("a BAR is gone")?;
    let spot = Spot::of(to, &bar).context("a BAR has changed")?;
    Ok(match one(from, to, &bar, spot, ram, SEED)? {
        Exercise::Done => Exercised::Ok,
        Exercise::Differs(_) | Exercise::NotAsked(_) => Exercised::Mismatch,
    })
}

/// Two different members, and RAM.
pub fn two(
    assembly: &mut Assembly,
    from: usize,
    to: usize,
) -> Result<(&mut Member, &Member, &GuestRam)> {
    let members = assembly
        .members
        .get_disjoint_mut([from, to])
        .ok()
        .context("a pair is of two functions")?;
    let [from, to] = members;
    Ok((from, to, &assembly.ram))
}

/// Where in a prefetchable BAR the data go: a page in its middle.
pub fn offset_in(bar: &MemberBar) -> u64 {
    (bar.info.size / 2) & !(LEN_64 - 1)
}

enum Exercise {
    Done,
    Differs(String),
    /// The engine cannot be asked for it; that says nothing of the IOMMU.
    NotAsked(String),
}

/// RAM to BAR by the engine, looked at by the processor; then, with other bytes put there by the
/// processor, BAR to RAM by the engine.
fn one(
    from: &mut Member,
    to: &Member,
    bar: &MemberBar,
    spot: Spot,
    ram: &GuestRam,
    seed: u64,
) -> Result<Exercise> {
    let index = bar.info.index;
    let Spot { offset, len, .. } = spot;
    let len_64 = u64::try_from(len)?;
    let at = Iova::new(bar.range()?.start().raw().saturating_add(offset));
    let engine = from.engine.as_mut().context("an engine is gone")?;

    let before = read_bar(&to.function, index, offset, len);
    let there = pattern(seed.wrapping_mul(2), len);
    ram.write(SOURCE, &there)?;
    match engine.copy(Iova::new(SOURCE.raw()), at, len_64) {
        Ok(()) => {}
        Err(error) if error.is_of_the_request() => {
            return Ok(Exercise::NotAsked(error.to_string()));
        }
        Err(error) if error.is_of_the_bus() => {
            return Ok(Exercise::Differs(format!("RAM to BAR: {error}")));
        }
        Err(error) => return Err(error.into()),
    }
    let (found, there) = (
        read_bar(&to.function, index, offset, len),
        spot.read_back(there),
    );
    if found != there {
        let how = comparison(&found, &there);
        return Ok(Exercise::Differs(format!("RAM to BAR: {how}")));
    }

    // Other bytes: those of the first half are still in the engine's buffer.
    let back = pattern(seed.wrapping_mul(2).wrapping_add(1), len);
    let mut refused = to.function.bar_write(index, offset, &back);
    ram.write(MAILBOX, &vec![0; len])?;
    let copied = engine.copy(at, Iova::new(MAILBOX.raw()), len_64);
    let found = ram.read(MAILBOX, len)?;
    // What was written to have it read as it did.
    let before = spot.read_back(before);
    refused = to.function.bar_write(index, offset, &before).or(refused);
    if let Some(error) = refused {
        return Err(error).with_context(|| format!("writing {} {index}", to.function.name()));
    }
    match copied {
        Ok(()) => {}
        Err(error) if error.is_of_the_bus() => {
            return Ok(Exercise::Differs(format!("BAR to RAM: {error}")));
        }
        Err(error) => return Err(error.into()),
    }
    let back = spot.read_back(back);
    if found != back {
        let how = comparison(&found, &back);
        return Ok(Exercise::Differs(format!("BAR to RAM: {how}")));
    }
    Ok(Exercise::Done)
}
