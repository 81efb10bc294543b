//! The scenarios, by what they are about.

pub mod nested_machine;

use crate::scenario::{Scenario, Shape};

/// One DMA engine and one peer with real memory behind its BAR2, next to each other.
///
/// `0000:00:05.0` is QEMU's edu (its DMA mask opened to 64 bits), `0000:00:06.0` an
/// ivshmem-plain with a 256-byte BAR0 and a 4 MiB BAR2.
pub static EDU_AND_IVSHMEM: Shape = Shape {
    name: "edu and ivshmem",
    objects: &["memory-backend-memfd,id=shm,size=4M,share=on"],
    devices: &[
        "edu,addr=05.0,dma_mask=0xffffffffffffffff",
        "ivshmem-plain,memdev=shm,addr=06.0",
    ],
};

/// All scenarios, in the order in which they are run.
#[must_use]
pub fn all() -> Vec<&'static Scenario> {
    [nested_machine::SCENARIOS].into_iter().flatten().collect()
}
