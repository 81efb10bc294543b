//! The engine on the simulated controller.

use std::sync::Arc;

use super::*;
use crate::find_engine;
use crate::nvme::test_rig::{BAR, RAM, Rig, disk, text};

const SIZE: u64 = 1024 << 9;

fn rig() -> Rig {
    Rig::new(&disk(1024, 9), |spec| spec)
}

fn engine(rig: &Rig, scratch: &str) -> NvmeEngine {
    NvmeEngine::new(rig.function(), rig.lent(), scratch.parse().unwrap())
        .with_time_limit(Duration::from_millis(30))
}

#[test]
fn copies_and_leaves_the_disk_as_it_was() {
    for (shift, scratch) in [
        (9, "100..101"),
        (9, "100..108"),
        (9, "0..1024"),
        (12, "7..8"),
    ] {
        let rig = Rig::new(&disk(1024, shift), |spec| spec);
        let before = rig.disk_at(0, 1024 << shift);
        rig.ram.write(0, &text(0x5a, 0x1_2000)).unwrap();
        let mut engine = engine(&rig, scratch);
        engine
            .copy(Iova::new(RAM), Iova::new(BAR + 0x1000), 0x1_2000)
            .unwrap();
        assert_eq!(rig.bar_at(BAR + 0x1000, 0x1_2000), text(0x5a, 0x1_2000));
        // Negative control: it did go by way of the disk.
        assert_ne!(rig.disk_at(0, 1024 << shift), before, "{scratch}");
        engine.finish().unwrap();
        assert_eq!(rig.disk_at(0, 1024 << shift), before, "{scratch}");
        // And once more, put back by the drop.
        engine.copy(Iova::new(BAR), Iova::new(RAM), 4096).unwrap();
        assert_ne!(rig.disk_at(0, 1024 << shift), before, "{scratch}");
        drop(engine);
        assert_eq!(rig.disk_at(0, 1024 << shift), before, "{scratch}");
        rig.ensure_clean();
    }
}

#[test]
fn an_unmapped_peer_is_told_and_the_disk_is_put_back() {
    let rig = rig();
    let before = rig.disk_at(0, SIZE);
    let mut engine = engine(&rig, "8..16");
    engine.load(Iova::new(RAM), 4096).unwrap();
    rig.unmap_bar();
    for blocked in [
        engine.store(Iova::new(BAR), 4096),
        engine.load(Iova::new(BAR), 4096),
    ] {
        let error = blocked.unwrap_err();
        assert!(error.is_of_the_bus(), "{error}");
    }
    drop(engine);
    assert_eq!(rig.disk_at(0, SIZE), before);
}

#[test]
fn the_disk_is_put_back_after_a_failure_too() {
    let rig = rig();
    let before = rig.disk_at(0, SIZE);
    let mut engine = engine(&rig, "8..32");
    engine.copy(Iova::new(RAM), Iova::new(BAR), 4096).unwrap();
    let command = |value: u16| {
        rig.controller
            .config_write(4, &value.to_le_bytes())
            .unwrap()
    };
    command(0x2);
    assert!(
        engine
            .store(Iova::new(BAR), 4096)
            .unwrap_err()
            .is_of_the_bus()
    );
    assert!(engine.finish().is_err());
    command(0x6);
    engine.finish().unwrap();
    assert_eq!(rig.disk_at(0, SIZE), before);
}

#[test]
fn a_finished_engine_leaves_memory_alone_and_begins_anew() {
    let rig = rig();
    let before = rig.disk_at(0, SIZE);
    let mut engine = engine(&rig, "8..16");
    // Never started: there is nothing to stop, and nothing is accessed.
    engine.finish().unwrap();
    for _ in 0..2 {
        engine
            .copy(Iova::new(RAM), Iova::new(BAR + 0x1000), 4096)
            .unwrap();
        assert!(rig.is_enabled());
        engine.finish().unwrap();
        assert!(!rig.is_enabled());
        assert_eq!(rig.disk_at(0, SIZE), before);
    }
    rig.ensure_clean();
}

#[test]
fn a_controller_that_somebody_else_reset_says_so_at_once_and_is_used_again() {
    let rig = rig();
    let before = rig.disk_at(0, SIZE);
    // Nobody waits that long.
    let limit = Duration::from_secs(3600);
    let mut engine = NvmeEngine::new(rig.function(), rig.lent(), "8..16".parse().unwrap())
        .with_time_limit(limit);
    let copy = |engine: &mut NvmeEngine| engine.copy(Iova::new(RAM), Iova::new(BAR), 4096);
    copy(&mut engine).unwrap();
    rig.disable();
    let error = copy(&mut engine).unwrap_err();
    assert!(
        matches!(error, EngineError::Nvme(NvmeError::NotReady { .. })),
        "{error}"
    );
    assert!(error.is_of_the_bus(), "no data moved");
    copy(&mut engine).unwrap();
    drop(engine);
    assert_eq!(rig.disk_at(0, SIZE), before);
}

#[test]
fn what_an_engine_cannot_be_asked_is_no_error_of_the_bus() {
    let rig = rig();
    let mut engine = engine(&rig, "8..16");
    for (to, len) in [(BAR, 4), (BAR, 0), (BAR + 2, 512)] {
        let error = engine.store(Iova::new(to), len).unwrap_err();
        assert!(error.is_of_the_request(), "{error}");
        assert!(!error.is_of_the_bus(), "{error}");
    }
    rig.unmap_bar();
    let error = engine.store(Iova::new(BAR), 4096).unwrap_err();
    assert!(!error.is_of_the_request(), "{error}");
}

#[test]
fn nothing_is_written_without_scratch_blocks_that_exist() {
    let rig = rig();
    let before = rig.disk_at(0, SIZE);
    assert!(find_engine(&rig.function()).is_none());
    let mut past_the_end = engine(&rig, "1020..1025");
    let error = past_the_end.load(Iova::new(RAM), 512).unwrap_err();
    assert!(error.to_string().contains("0x5 from 0x3fc"), "{error}");
    let mut small = engine(&rig, "1020..1022");
    for len in [0, 100, 1536] {
        let error = small.load(Iova::new(RAM), len).unwrap_err();
        assert!(
            matches!(
                error,
                EngineError::Nvme(NvmeError::Length { most: 1024, .. })
            ),
            "{error}"
        );
    }
    assert_eq!(rig.disk_at(0, SIZE), before);
    assert_eq!(Arc::strong_count(&rig.controller), 3);
}

#[test]
fn scratch_blocks_are_read_from_text() {
    let blocks: ScratchBlocks = "2048..2056".parse().unwrap();
    assert_eq!(blocks, ScratchBlocks::new(2048, 2056).unwrap());
    assert_eq!(blocks.to_string(), "2048..2056");
    for text in [
        "", "5", "5..", "..5", "5..5", "6..5", "-1..5", "0x5..0x6", "1..2..3",
    ] {
        let error = text.parse::<ScratchBlocks>().unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}
