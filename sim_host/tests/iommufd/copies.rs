//! RAM that is in one address space is pinned once, however many it is in.

use memory_map::Iova;
use sim_host::Call;

use crate::rig::{BAR_AT, RAM_SIZE, Rig};

#[test]
fn ram_is_pinned_once_for_both_and_bars_are_mapped_twice() {
    let rig = Rig::new();
    let first = rig.register(0);
    rig.enable();
    let host_mappings = rig.host.host_mappings();
    let before = rig.host.count(Call::MapFile);
    let second = rig.register(1);
    assert_eq!(rig.host.count(Call::IoasCopy), 1, "the RAM");
    assert_eq!(rig.host.count(Call::MapFile), before + 1, "the BAR");
    assert_eq!(rig.host.count(Call::ExportDmaBuf), 1, "exported once");
    assert_eq!(rig.host.iommufd_locked_bytes(), RAM_SIZE);
    assert_eq!(rig.host.host_mappings(), host_mappings, "no host address");
    assert_eq!(host_mappings, 0);
    for (writer, target) in [(0, &first), (1, &second)] {
        assert!(rig.is_mapped(target));
        assert!(rig.arrives(writer, BAR_AT));
        rig.writers[writer].dma_write(Iova::new(0x2000), b"to RAM");
        let mut seen = [0; 6];
        rig.ram.read(0x2000, &mut seen).unwrap();
        assert_eq!(&seen, b"to RAM");
        rig.ram.write(0x2000, &[0; 6]).unwrap();
    }
    // The one that was mapped goes; the copy stays, and is pinned.
    drop(first);
    assert_eq!(rig.host.iommufd_locked_bytes(), RAM_SIZE);
    rig.writers[1].dma_write(Iova::new(0x2000), b"again");
    let mut seen = [0; 5];
    rig.ram.read(0x2000, &mut seen).unwrap();
    assert_eq!(&seen, b"again");
    drop(second);
    assert_eq!(rig.host.iommufd_locked_bytes(), 0);
    assert_eq!(rig.host.ioas_mappings(), []);
    assert_eq!(rig.copies.offers(), 0);
}

/// The negative control: without copying, the same RAM counts twice.
#[test]
fn without_copies_ram_is_pinned_twice() {
    let rig = Rig::new();
    rig.host.fail_from_now(Call::IoasCopy, libc::ENOENT);
    let _targets = [rig.register(0), rig.register(1)];
    assert_eq!(rig.host.iommufd_locked_bytes(), 2 * RAM_SIZE);
}

#[test]
fn a_limit_that_holds_the_ram_once_is_enough_for_both() {
    let rig = Rig::new();
    rig.host.set_locked_limit(Some(RAM_SIZE));
    let _targets = [rig.register(0), rig.register(1)];
    assert_eq!(rig.host.iommufd_locked_bytes(), RAM_SIZE);
}
