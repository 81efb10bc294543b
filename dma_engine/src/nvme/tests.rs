//! The driver on the simulated controller.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use sim_host::{Call, FunctionSpec, NvmeFlaw, SimDisk};

use super::test_rig::{BAR, BAR_SIZE, Lent, RAM, Rig, disk, map_bar, text};
use super::*;

const EIO: i32 = 5;

fn rig() -> Rig {
    Rig::new(&disk(1024, 9), |spec| spec)
}

fn flawed(flaw: NvmeFlaw) -> Rig {
    Rig::new(&disk(1024, 9), |spec| spec.with_nvme_flaw(flaw))
}

fn iova(raw: u64) -> Iova {
    Iova::new(raw)
}

/// The registers' access without a driver.
fn register(rig: &Rig, offset: u64) -> u32 {
    Registers::new(rig.function()).read32(offset).unwrap()
}

#[test]
fn a_controller_tells_what_it_is() {
    for (shift, block_size) in [(9, 512), (12, 4096)] {
        let rig = Rig::new(&disk(1024, shift), |spec| spec);
        let mut nvme = rig.nvme();
        let identity = nvme.enable().unwrap();
        assert_eq!(
            *identity,
            NvmeIdentity {
                model: "simulated  NVMe".into(),
                block_size,
                blocks: 1024,
                max_transfer: 32 * PAGE,
            }
        );
        rig.ensure_clean();
    }
}

#[test]
fn a_block_goes_from_the_disk_into_the_peers_bar_and_back() {
    for shift in [9, 12] {
        let rig = Rig::new(&disk(64, shift), |spec| spec);
        let mut nvme = rig.nvme();
        nvme.read(7, iova(BAR + 0x8000), 4096).unwrap();
        assert_eq!(
            rig.bar_at(BAR + 0x8000, 4096),
            rig.disk_at(7 << shift, 4096)
        );
        rig.bar_write(BAR + 0x3004, &text(0x77, 8192));
        nvme.write(9, iova(BAR + 0x3004), 8192).unwrap();
        assert_eq!(rig.disk_at(9 << shift, 8192), text(0x77, 8192));
        // Nothing else was touched.
        let before = text(0x11, 9 << shift);
        assert_eq!(rig.disk_at(0, 9 << shift), before);
        rig.ensure_clean();
    }
}

#[test]
fn an_unmapped_bar_is_an_error_and_changes_nothing() {
    let rig = rig();
    let mut nvme = rig.nvme();
    nvme.read(7, iova(BAR), 4096).unwrap();
    rig.unmap_bar();
    let (bar, disk) = (rig.bar_at(BAR, 4096), rig.disk_at(0, 1024 << 9));
    for attempt in [
        nvme.read(8, iova(BAR), 4096),
        nvme.write(9, iova(BAR), 4096),
    ] {
        let error = attempt.unwrap_err();
        assert!(
            matches!(&error, NvmeError::Status { status, .. } if status.is_data_transfer_error()),
            "{error}"
        );
        assert!(
            error.to_string().contains("(Data Transfer Error)"),
            "{error}"
        );
        assert!(crate::EngineError::from(error).is_of_the_bus());
    }
    assert_eq!(rig.host.take_faults().len(), 2);
    assert_eq!(
        (rig.bar_at(BAR, 4096), rig.disk_at(0, 1024 << 9)),
        (bar, disk)
    );
    // It goes on where it can.
    nvme.read(8, iova(RAM), 4096).unwrap();
    assert_eq!(rig.ram_at(RAM, 4096), rig.disk_at(8 << 9, 4096));
    rig.ensure_clean();
}

/// Lengths around one page, two pages and a list, however they start.
#[test]
fn every_shape_of_transfer_arrives_whole_and_nowhere_else() {
    let rig = rig();
    let mut nvme = rig.nvme();
    let most = nvme.enable().unwrap().max_transfer;
    for len in [512, 4096, 4608, 8192, 8704, 12288, most - 512, most] {
        for start in [0, 4, 0x200, 0xffc] {
            let at = RAM + 0x4000 + start;
            let around = |rig: &Rig| (rig.ram_at(at - 16, 16), rig.ram_at(at + len, 16));
            rig.ram.write(at - RAM - 16, &text(0xee, len + 32)).unwrap();
            let before = around(&rig);
            nvme.read(3, iova(at), len).unwrap();
            assert!(
                rig.ram_at(at, len) == rig.disk_at(3 << 9, len),
                "{len:#x} bytes to {at:#x}"
            );
            assert_eq!(around(&rig), before);
            let other = text(len.to_le_bytes()[1] ^ 0x42, len);
            rig.ram.write(at - RAM, &other).unwrap();
            nvme.write(400, iova(at), len).unwrap();
            assert!(
                rig.disk_at(400 << 9, len) == other,
                "{len:#x} bytes from {at:#x}"
            );
        }
    }
    rig.ensure_clean();
}

/// The model's queues have 8 entries, so that both ends and the phase come round many times.
#[test]
fn queues_wrap_around() {
    let rig = rig();
    let mut nvme = rig.nvme();
    for block in 0..100 {
        nvme.read(block, iova(RAM), 512).unwrap();
        assert_eq!(
            rig.ram_at(RAM, 512),
            rig.disk_at(block << 9, 512),
            "{block}"
        );
    }
    // It was one session: a command is two doorbells.
    let before = rig.host.count(Call::BarWrite);
    nvme.read(1, iova(RAM), 512).unwrap();
    assert_eq!(rig.host.count(Call::BarWrite), before + 2);
    rig.ensure_clean();
}

#[test]
fn bad_arguments_are_refused_with_their_numbers_and_nothing_moves() {
    let rig = rig();
    let mut nvme = rig.nvme();
    nvme.enable().unwrap();
    let before = rig.host.count(Call::BarWrite);
    for (block, at, len, said) in [
        (0, RAM, 0, "0x0 bytes"),
        (0, RAM, 511, "0x1ff bytes"),
        (0, RAM, 0x2_0200, "0x20200 bytes"),
        (1023, RAM, 1024, "0x2 from 0x3ff"),
        (1024, RAM, 512, "0x400 blocks"),
        (u64::MAX, RAM, 512, "0x1 from 0xffffffffffffffff"),
        (0, RAM + 2, 512, "0x100002"),
        (0, u64::MAX - 0xff, 512, "0xffffffffffffff00"),
    ] {
        let read = nvme.read(block, iova(at), len).unwrap_err().to_string();
        assert!(read.contains(said), "{read}");
        let write = nvme.write(block, iova(at), len).unwrap_err().to_string();
        assert_eq!(write, read);
    }
    assert_eq!(rig.host.count(Call::BarWrite), before);
}

/// A namespace that shrinks behind the driver's back: the controller refuses, and is told so.
#[test]
fn what_the_controller_refuses_is_told_and_the_session_goes_on() {
    let rig = rig();
    let mut nvme = rig.nvme();
    nvme.enable().unwrap();
    nvme.session.as_mut().unwrap().identity.blocks = 2048;
    let error = nvme.read(1024, iova(RAM), 512).unwrap_err();
    assert_eq!(
        error.to_string(),
        "nvme: Read of block 0x400 to 0x100000-0x1001ff ended with status 0/0x80 (LBA Out of Range)"
    );
    assert!(!crate::EngineError::from(error).is_of_the_bus());
    assert!(nvme.session.is_some());
    nvme.read(0, iova(RAM), 512).unwrap();
}

#[test]
fn a_controller_that_never_becomes_ready_or_never_stops_is_given_up() {
    for (flaw, wanted) in [
        (NvmeFlaw::NeverReady, "not ready after"),
        (NvmeFlaw::NeverStops, "not disabled after"),
    ] {
        let rig = flawed(flaw);
        let mut nvme = rig.nvme();
        if flaw == NvmeFlaw::NeverStops {
            nvme.enable().unwrap();
            nvme.session = None;
        }
        let error = nvme.enable().unwrap_err();
        assert!(matches!(error, NvmeError::NotReady { .. }), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn a_controller_that_fails_says_so() {
    let rig = flawed(NvmeFlaw::FailsWhenEnabled);
    let error = rig.nvme().enable().unwrap_err();
    assert!(
        matches!(error, NvmeError::Fatal { status: 2, .. }),
        "{error}"
    );
}

#[test]
fn memory_that_the_controller_cannot_reach_makes_it_fail_and_mapping_it_again_revives_it() {
    let rig = rig();
    let mut nvme = rig.nvme();
    nvme.enable().unwrap();
    // Bus mastering off, as in a function that was cut off.
    let command = |value: u16| {
        rig.controller
            .config_write(4, &value.to_le_bytes())
            .unwrap()
    };
    command(0x2);
    let error = nvme.read(0, iova(RAM), 512).unwrap_err();
    assert!(matches!(error, NvmeError::Fatal { .. }), "{error}");
    assert!(crate::EngineError::from(error).is_of_the_bus());
    command(0x6);
    nvme.read(0, iova(RAM), 512).unwrap();
    assert_eq!(rig.ram_at(RAM, 512), rig.disk_at(0, 512));
}

#[test]
fn a_command_that_is_never_completed_ends_the_wait_and_the_session() {
    let rig = flawed(NvmeFlaw::Silent);
    let mut nvme = rig.nvme();
    let error = nvme.read(0, iova(RAM), 512).unwrap_err();
    assert!(
        matches!(
            error,
            NvmeError::Timeout {
                command: NvmeCommand::Read { .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(nvme.session.is_none());
}

#[test]
fn a_completion_of_another_command_is_noticed() {
    let error = flawed(NvmeFlaw::WrongIdentifier)
        .nvme()
        .enable()
        .unwrap_err();
    let NvmeError::Completion {
        expected, found, ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(found, expected ^ 0x5555);
}

/// Memory of which a reader sees the lower half of four bytes later than the upper one: how it was
/// when they were last read.
struct Torn {
    lent: Box<Lent>,
    seen: Mutex<BTreeMap<u64, [u8; 2]>>,
}

impl EngineMemory for Torn {
    fn iova(&self) -> IovaRange {
        self.lent.iova()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.lent.read(offset, data)?;
        if let [a, b, _, _] = data {
            let now = [*a, *b];
            let before = self.seen.lock().unwrap().insert(offset, now);
            [*a, *b] = before.unwrap_or_default();
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.lent.write(offset, data)
    }
}

#[test]
fn a_completion_that_is_read_while_it_is_written_is_read_again() {
    let rig = rig();
    let torn = Torn {
        lent: rig.lent(),
        seen: Mutex::default(),
    };
    let mut nvme =
        Nvme::new(rig.function(), Box::new(torn)).with_time_limit(Duration::from_millis(30));
    // More than a turn of the queues.
    for block in 0..40 {
        nvme.read(block, iova(BAR), 4096).unwrap();
        assert_eq!(rig.bar_at(BAR, 4096), rig.disk_at(block << 9, 4096));
    }
    rig.ensure_clean();
}

#[test]
fn nonsense_in_identify_is_refused() {
    let error = flawed(NvmeFlaw::NonsenseIdentity)
        .nvme()
        .enable()
        .unwrap_err();
    assert!(matches!(error, NvmeError::Unsupported { .. }), "{error}");
    for shift in [8, 13, 16] {
        let rig = Rig::new(&SimDisk::with_block_shift(8, shift), |spec| spec);
        let error = rig.nvme().enable().unwrap_err().to_string();
        assert!(error.contains(&format!("2^{shift} bytes")), "{error}");
    }
}

#[test]
fn a_function_that_is_gone_is_told_whenever_it_goes() {
    let rig = rig();
    rig.controller.set_gone(true);
    let mut nvme = rig.nvme();
    let error = nvme.enable().unwrap_err();
    assert!(matches!(error, NvmeError::Gone { .. }), "{error}");
    rig.controller.set_gone(false);
    nvme.enable().unwrap();
    rig.controller.set_gone(true);
    let error = nvme.read(0, iova(RAM), 512).unwrap_err();
    assert!(matches!(error, NvmeError::Gone { .. }), "{error}");
    drop(nvme);
}

#[test]
fn another_function_is_no_controller() {
    let rig = rig();
    let peer = Arc::clone(&rig.peer) as Arc<dyn HostFunction>;
    let error = Nvme::new(peer, rig.lent()).enable().unwrap_err();
    assert!(
        matches!(
            error,
            NvmeError::Class {
                class: 0x05_0000,
                ..
            }
        ),
        "{error}"
    );
    let small = FunctionSpec::new("small", 1, 1).with_config_bytes(0x09, [0x02, 0x08, 0x01]);
    let small = rig.host.add_function(small).unwrap();
    let error = Nvme::new(small, rig.lent()).enable().unwrap_err();
    assert!(matches!(error, NvmeError::NoRegisters { .. }), "{error}");
}

#[test]
fn memory_that_does_not_serve_is_refused() {
    let rig = rig();
    for (start, size) in [(RAM + 0x200, Nvme::MEMORY), (RAM, Nvme::MEMORY - 1)] {
        let lent = Lent {
            ram: rig.ram.clone(),
            range: IovaRange::new(iova(start), size).unwrap(),
        };
        let error = Nvme::new(rig.function(), Box::new(lent))
            .enable()
            .unwrap_err();
        assert!(matches!(error, NvmeError::Memory { .. }), "{error}");
    }
    assert_eq!(rig.host.count(Call::BarWrite), 0);
}

/// Every access in turn is refused; what the driver then says has the host's errno, and the next
/// attempt works.
#[test]
fn every_refused_access_is_told_and_recovered_from() {
    let rig = rig();
    rig.nvme().read(5, iova(RAM), 512).unwrap();
    let all = rig.host.count(Call::BarRead) + rig.host.count(Call::BarWrite);
    assert!(all > 20, "{all}");
    for call in [Call::BarRead, Call::BarWrite, Call::ConfigRead, Call::Bar] {
        let mut failed = 0;
        for nth in 1..=all {
            rig.host.fail(call, nth, EIO);
            let mut nvme = rig.nvme();
            if let Err(error) = nvme.read(5, iova(RAM), 512) {
                let NvmeError::Access { source, .. } = &error else {
                    panic!("{call:?} {nth}: {error}");
                };
                assert_eq!(source.raw_os_error(), Some(EIO));
                failed += 1;
                rig.host.stop_failing();
                nvme.read(5, iova(RAM), 512).unwrap();
            }
            rig.host.stop_failing();
        }
        assert!(failed > 0, "{call:?}");
    }
}

#[test]
fn dropping_the_driver_disables_the_controller() {
    let rig = rig();
    let mut nvme = rig.nvme();
    nvme.enable().unwrap();
    assert_eq!(register(&rig, CC) & ENABLE, 1);
    assert_eq!(register(&rig, registers::CSTS) & READY, 1);
    drop(nvme);
    assert_eq!(register(&rig, CC) & ENABLE, 0);
    assert_eq!(register(&rig, registers::CSTS) & READY, 0);
}

fn with_buffer(size: u64) -> Rig {
    Rig::new(&disk(64, 9), |spec| {
        spec.with_controller_memory_buffer(size)
    })
}

#[test]
fn a_memory_buffer_is_shown_once_it_is_enabled() {
    let rig = with_buffer(0x1_0000);
    assert_eq!(register(&rig, registers::CMBSZ), 0);
    let buffer = ControllerMemoryBuffer::enable(&rig.function(), iova(BAR)).unwrap();
    assert_eq!(
        (buffer.bar.get(), buffer.offset, buffer.size),
        (2, 0, 0x1_0000)
    );
    let control = Registers::new(rig.function())
        .read64(registers::CMBMSC)
        .unwrap();
    assert_eq!(control, BAR | 3);
    // Enabling the controller leaves it so.
    rig.nvme().enable().unwrap();
    assert_ne!(register(&rig, registers::CMBSZ), 0);
}

#[test]
fn a_missing_or_nonsensical_memory_buffer_is_refused() {
    let refused =
        |rig: &Rig, base: u64| match ControllerMemoryBuffer::enable(&rig.function(), iova(base))
            .unwrap_err()
        {
            NvmeError::NoBuffer { why, .. } => why,
            error => panic!("{error}"),
        };
    assert_eq!(refused(&rig(), BAR), BufferProblem::None);
    let address = BAR + 0x10;
    assert_eq!(
        refused(&with_buffer(0x1000), address),
        BufferProblem::Unaligned { address }
    );
    let rig = Rig::new(&disk(64, 9), |spec| {
        spec.with_controller_memory_buffer(0x1000)
            .with_nvme_flaw(NvmeFlaw::NonsenseBuffer)
    });
    assert!(matches!(
        refused(&rig, BAR),
        BufferProblem::OutsideBar { bar: 7, .. }
    ));
    rig.controller.set_gone(true);
    let error = ControllerMemoryBuffer::enable(&rig.function(), iova(BAR)).unwrap_err();
    assert!(matches!(error, NvmeError::Gone { .. }), "{error}");
}

/// A peer's blocks go into the buffer as into any other BAR.
#[test]
fn a_memory_buffer_is_a_peer() {
    let rig = Rig::new(&disk(64, 9), |spec| spec);
    let spec = FunctionSpec::nvme("other", SimDisk::new(8)).with_controller_memory_buffer(BAR_SIZE);
    let other = rig.host.add_function(spec).unwrap();
    let function = Arc::clone(&other) as Arc<dyn HostFunction>;
    let at = iova(0x5000_0000);
    let buffer = ControllerMemoryBuffer::enable(&function, at).unwrap();
    let _mapping = map_bar(&rig.container, at.raw(), &other);
    rig.nvme().read(3, at, 4096).unwrap();
    let mut found = vec![0; 4096];
    other
        .bar_memory(buffer.bar)
        .unwrap()
        .read(buffer.offset, &mut found)
        .unwrap();
    assert_eq!(found, rig.disk_at(3 << 9, 4096));
    rig.ensure_clean();
}
