//! The scenarios, by what they are about.

/// Scenarios that share their machine with others, by shape, each named like the function that is
/// its check. They run on the stock kernel, unless `on` some kernels is said first.
macro_rules! shared_scenarios {
    (on $kernels:expr; $($shape:ident: $($check:ident),+ $(,)?);+ $(;)?) => {
        &[$($($crate::scenario::Scenario {
            name: stringify!($check),
            shape: &$crate::scenarios::$shape,
            kernels: $kernels,
            sharing: $crate::scenario::Sharing::Shared,
            run: $check,
        }),+),+]
    };
    ($($shapes:tt)+) => {
        shared_scenarios![on &[$crate::kernel::OwnKernel::Stock]; $($shapes)+]
    };
}

mod entry_limit;
mod footprint;
mod guest_lines;
mod kernel_log;
mod p2p_run;
mod pluggable;
mod running_vm;
mod vm_run;

pub mod bad_input;
pub mod contract_suite;
pub mod guest_moves;
pub mod guest_program;
pub mod hotplug;
pub mod iommufd_bad_input;
pub mod iommufd_contract;
pub mod iommufd_kernel;
pub mod nested_machine;
pub mod nvme;
pub mod p2p_iommufd;
pub mod p2p_nvme;
pub mod p2p_policy;
pub mod peer_to_peer;
pub mod process_end;
pub mod resets;
pub mod unprivileged;
pub mod unsuitable_hosts;
pub mod virtual_machine;
pub mod vm_boot;
pub mod vm_hostile;
pub mod vm_hotplug;

use std::borrow::Cow;

use crate::disk::Disk;
use crate::kernel::OwnKernel;
use crate::scenario::{Scenario, Shape};
use crate::spec::Iommu;

/// Where a scenario runs that asks nothing of the kernel that one of them lacks.
const BOTH_KERNELS: &[OwnKernel] = &OwnKernel::ALL;
/// Where a scenario runs that asks for cdev or iommufd.
const IOMMUFD_KERNEL: &[OwnKernel] = &[OwnKernel::Iommufd];

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
    iommu: Iommu::Intel,
    disks: &[],
    objects: &[MEMORY_OF_06],
    devices: &[EDU_05, IVSHMEM_06],
    kernel_options: &[],
    guest: false,
};

/// [`EDU_AND_IVSHMEM`] and a device with three functions, which are one IOMMU group because they
/// have no ACS: another edu, another ivshmem-plain (1 MiB) and a serial port.
pub static TWO_EDUS: Shape = Shape {
    name: "two edus and a group of three",
    iommu: Iommu::Intel,
    disks: &[],
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
    guest: false,
};

/// A device of two functions, which are one IOMMU group because they have no ACS: an edu and an
/// ivshmem-plain.
pub static ONE_GROUP: Shape = Shape {
    name: "edu and ivshmem in one group",
    devices: &[
        "edu,addr=05.0,multifunction=on,dma_mask=0xffffffffffffffff",
        "ivshmem-plain,memdev=shm,addr=05.1",
    ],
    ..EDU_AND_IVSHMEM
};
/// Of [`ONE_GROUP`]: the peer.
const SIBLING_IVSHMEM: &str = "0000:00:05.1";

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

/// [`EDU_AND_IVSHMEM`] behind an IOMMU whose addresses have 39 bits.
pub static NARROW_IOMMU: Shape = Shape {
    name: "IOMMU of 39 bits",
    iommu: Iommu::Intel39Bit,
    ..EDU_AND_IVSHMEM
};

/// [`EDU_AND_IVSHMEM`] behind AMD's IOMMU, with its hole in the addresses that can be mapped.
///
/// Not for DMA, see [`Iommu::Amd`].
pub static AMD_IOMMU: Shape = Shape {
    name: "AMD's IOMMU",
    iommu: Iommu::Amd,
    kernel_options: &[
        "vfio_iommu_type1.allow_unsafe_interrupts=1",
        "iommufd.allow_unsafe_interrupts=1",
    ],
    ..EDU_AND_IVSHMEM
};

/// Of [`ROOT_PORTS`]: the functions behind root ports, each with its reset methods. One that is not
/// alone on its bus when the kernel finds it has no `bus`.
const BEHIND_PORTS: [(&str, &str); 7] = [
    (NVME, "flr bus"),
    (IGB, "flr pm bus"),
    (E1000E, "pm bus"),
    (FAR_EDU, "bus"),
    (FAR_IVSHMEM, "bus"),
    (ONE_SLOT[0], "flr pm bus"),
    (ONE_SLOT[1], "flr"),
];
/// Of [`ROOT_PORTS`]: an NVMe with a controller memory buffer of 16 MiB and a disk of 16 MiB.
const NVME: &str = "0000:01:00.0";
/// Of [`ROOT_PORTS`]: an Intel 82576.
const IGB: &str = "0000:02:00.0";
/// Of [`ROOT_PORTS`]: an Intel 82574L.
const E1000E: &str = "0000:03:00.0";
/// Of [`ROOT_PORTS`]: another DMA engine.
const FAR_EDU: &str = "0000:04:00.0";
/// Of [`ROOT_PORTS`]: another peer with real memory.
const FAR_IVSHMEM: &str = "0000:05:00.0";

/// Of [`ROOT_PORTS`]: the functions of one slot, an igb and an NVMe (controller memory buffer of
/// 1 MiB, no disk). They are two IOMMU groups, because an igb is known to keep its traffic to itself.
const ONE_SLOT: [&str; 2] = ["0000:07:00.0", "0000:07:00.1"];

/// [`EDU_AND_IVSHMEM`] and one root port for each of an NVMe (with a controller memory buffer, and
/// a disk whose words tell their offsets, see [`crate::disk`]), an igb, an e1000e, another edu and
/// another ivshmem-plain (1 MiB); one with nothing behind it, `port-d`; and one with a slot of two
/// functions, an igb and an NVMe, of which the first one has to name the second one.
///
/// Behind a port a function can be pulled out and reset with its bus. Of a port that is faster than
/// 5 GT/s the kernel wants to see the link come up after that, which QEMU does not report where
/// devices are plugged in by ACPI: behind `port-8` a reset of the bus is done, and then fails. The
/// ports are `port-8` to `port-e` and sit at `0000:00:08.0` to `0000:00:0e.0`.
pub static ROOT_PORTS: Shape = Shape {
    name: "devices behind root ports",
    iommu: Iommu::Intel,
    disks: &[Disk {
        id: Cow::Borrowed("disk0"),
        mib: 16,
    }],
    objects: &[MEMORY_OF_06, "memory-backend-memfd,id=far,size=1M,share=on"],
    devices: &[
        EDU_05,
        IVSHMEM_06,
        "pcie-root-port,id=port-8,slot=8,chassis=8,addr=08.0",
        "pcie-root-port,id=port-9,slot=9,chassis=9,addr=09.0,x-speed=5",
        "pcie-root-port,id=port-a,slot=10,chassis=10,addr=0a.0,x-speed=5",
        "pcie-root-port,id=port-b,slot=11,chassis=11,addr=0b.0,x-speed=5",
        "pcie-root-port,id=port-c,slot=12,chassis=12,addr=0c.0",
        "pcie-root-port,id=port-d,slot=13,chassis=13,addr=0d.0",
        "pcie-root-port,id=port-e,slot=14,chassis=14,addr=0e.0,x-speed=5",
        "nvme,id=nvme,bus=port-8,serial=lab,drive=disk0,cmb_size_mb=16",
        "igb,id=igb,bus=port-9",
        "e1000e,id=e1000e,bus=port-a",
        "edu,id=far-edu,bus=port-b,dma_mask=0xffffffffffffffff",
        "ivshmem-plain,id=far-ivshmem,bus=port-c,memdev=far",
        "igb,bus=port-e,addr=00.0,multifunction=on,x-pcie-ari-nextfn-1=on",
        "nvme,bus=port-e,addr=00.1,serial=slot,cmb_size_mb=1",
    ],
    kernel_options: &[],
    guest: false,
};

/// Of [`VIRTUAL_MACHINE`]: another peer with real memory.
const VM_IVSHMEM: &str = "0000:00:07.0";

/// For a guest of `throughway run`: [`EDU_AND_IVSHMEM`], another ivshmem-plain (1 MiB), and behind
/// root ports an NVMe as in [`ROOT_PORTS`] and an igb. It holds what a guest boots from.
pub static VIRTUAL_MACHINE: Shape = Shape {
    name: "for a virtual machine",
    iommu: Iommu::Intel,
    disks: &[Disk {
        id: Cow::Borrowed("disk0"),
        mib: 16,
    }],
    objects: &[
        MEMORY_OF_06,
        "memory-backend-memfd,id=other,size=1M,share=on",
    ],
    devices: &[
        EDU_05,
        IVSHMEM_06,
        "ivshmem-plain,memdev=other,addr=07.0",
        "pcie-root-port,id=port-8,slot=8,chassis=8,addr=08.0",
        "pcie-root-port,id=port-9,slot=9,chassis=9,addr=09.0",
        "nvme,id=nvme,bus=port-8,serial=lab,drive=disk0,cmb_size_mb=16",
        "igb,id=igb,bus=port-9",
    ],
    kernel_options: &[],
    guest: true,
};

/// Of [`VM_AND_PORT`]: another peer with real memory, which can be pulled out.
const VM_FAR_IVSHMEM: &str = "0000:01:00.0";

/// For a guest of `throughway run`: [`EDU_AND_IVSHMEM`] and another ivshmem-plain (1 MiB) behind a
/// root port. It holds what a guest boots from.
pub static VM_AND_PORT: Shape = Shape {
    name: "for a virtual machine, one device behind a root port",
    objects: &[MEMORY_OF_06, "memory-backend-memfd,id=far,size=1M,share=on"],
    devices: &[
        EDU_05,
        IVSHMEM_06,
        "pcie-root-port,id=port-c,slot=12,chassis=12,addr=0c.0",
        "ivshmem-plain,id=far-ivshmem,bus=port-c,memdev=far",
    ],
    guest: true,
    ..EDU_AND_IVSHMEM
};

/// All scenarios, in the order in which they are run.
#[must_use]
pub fn all() -> Vec<&'static Scenario> {
    [
        nested_machine::SCENARIOS,
        peer_to_peer::SCENARIOS,
        p2p_iommufd::SCENARIOS,
        p2p_iommufd::ON_BOTH_KERNELS,
        p2p_nvme::SCENARIOS,
        p2p_policy::SCENARIOS,
        contract_suite::SCENARIOS,
        iommufd_kernel::SCENARIOS,
        iommufd_contract::SCENARIOS,
        resets::SCENARIOS,
        hotplug::SCENARIOS,
        guest_moves::SCENARIOS,
        nvme::SCENARIOS,
        bad_input::SCENARIOS,
        iommufd_bad_input::SCENARIOS,
        iommufd_bad_input::ON_THE_STOCK_KERNEL,
        unprivileged::SCENARIOS,
        unsuitable_hosts::SCENARIOS,
        unsuitable_hosts::BY_IOMMUFD,
        guest_program::SCENARIOS,
        virtual_machine::SCENARIOS,
        vm_boot::SCENARIOS,
        vm_boot::ON_THE_STOCK_KERNEL,
        vm_hostile::SCENARIOS,
        vm_hotplug::SCENARIOS,
        process_end::SCENARIOS,
    ]
    .into_iter()
    .flatten()
    .collect()
}
