//! The scenarios, by what they are about.

/// Scenarios that share their machine with others, by shape, each named like the function that is
/// its check.
macro_rules! shared_scenarios {
    ($($shape:ident: $($check:ident),+ $(,)?);+ $(;)?) => {
        &[$($($crate::scenario::Scenario {
            name: stringify!($check),
            shape: &$crate::scenarios::$shape,
            sharing: $crate::scenario::Sharing::Shared,
            run: $check,
        }),+),+]
    };
}

mod entry_limit;
mod footprint;
mod p2p_run;

pub mod bad_input;
pub mod contract_suite;
pub mod nested_machine;
pub mod peer_to_peer;
pub mod process_end;
pub mod unprivileged;
pub mod unsuitable_hosts;

use crate::scenario::{Scenario, Shape};

/// QEMU's edu with its DMA mask opened to 64 bits, and an ivshmem-plain with a 256-byte BAR0 and a
/// BAR2 of real memory.
const EDU_05: &str = "edu,addr=05.0,dma_mask=0xffffffffffffffff";
const IVSHMEM_06: &str = "ivshmem-plain,memdev=shm,addr=06.0";
const MEMORY_OF_06: &str = "memory-backend-memfd,id=shm,size=4M,share=on";

/// The DMA engine of every shape.
const EDU: &str = "0000:00:05.0";
/// The peer with real memory behind its BAR2 of every shape.
const IVSHMEM: &str = "0000:00:06.0";
/// Of [`TWO_EDUS`]: another DMA engine.
const SECOND_EDU: &str = "0000:00:07.0";
/// Of [`TWO_EDUS`]: another peer with real memory, in the second engine's group.
const SECOND_IVSHMEM: &str = "0000:00:07.1";
/// Of [`TWO_EDUS`]: a serial port in the second engine's group, for which the kernel has a driver.
const SERIAL: &str = "0000:00:07.2";

/// One DMA engine and one peer with real memory behind its BAR2, next to each other.
///
/// `0000:00:05.0` is QEMU's edu (its DMA mask opened to 64 bits), `0000:00:06.0` an
/// ivshmem-plain with a 256-byte BAR0 and a 4 MiB BAR2.
pub static EDU_AND_IVSHMEM: Shape = Shape {
    name: "edu and ivshmem",
    objects: &[MEMORY_OF_06],
    devices: &[EDU_05, IVSHMEM_06],
    kernel_options: &[],
};

/// [`EDU_AND_IVSHMEM`] and a device with three functions, which are one IOMMU group because they
/// have no ACS: another edu, another ivshmem-plain (1 MiB) and a serial port.
pub static TWO_EDUS: Shape = Shape {
    name: "two edus and a group of three",
    objects: &[
        MEMORY_OF_06,
        "memory-backend-memfd,id=other,size=1M,share=on",
    ],
    devices: &[
        EDU_05,
        IVSHMEM_06,
        "edu,addr=07.0,multifunction=on,dma_mask=0xffffffffffffffff",
        "ivshmem-plain,memdev=other,addr=07.1",
        "pci-serial,addr=07.2",
    ],
    kernel_options: &[],
};

/// [`EDU_AND_IVSHMEM`] on a host whose IOMMU is off. Nothing can be bound to vfio-pci there.
pub static NO_IOMMU: Shape = Shape {
    name: "no IOMMU",
    kernel_options: &["intel_iommu=off"],
    ..EDU_AND_IVSHMEM
};

/// [`EDU_AND_IVSHMEM`] on a host that does not remap interrupts.
pub static NO_INTERRUPT_REMAPPING: Shape = Shape {
    name: "no interrupt remapping",
    kernel_options: &["intremap=off"],
    ..EDU_AND_IVSHMEM
};

/// All scenarios, in the order in which they are run.
#[must_use]
pub fn all() -> Vec<&'static Scenario> {
    [
        nested_machine::SCENARIOS,
        peer_to_peer::SCENARIOS,
        contract_suite::SCENARIOS,
        bad_input::SCENARIOS,
        unprivileged::SCENARIOS,
        unsuitable_hosts::SCENARIOS,
        process_end::SCENARIOS,
    ]
    .into_iter()
    .flatten()
    .collect()
}
