//! Where in a BAR bytes may be written and put back without harm.

use assigned_pci::{BarIndex, VendorDevice};
use dma_engine::Edu;

use super::assembly::{Member, MemberBar};
use super::exercise::{LEN, offset_in};

/// A stretch of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: usize,
    /// Whether what is written reads back with every bit inverted.
    inverts: bool,
}

impl Spot {
    /// A page in the middle of a prefetchable BAR; of others, a register that is known to be there
    /// for this: edu's liveness check, in its BAR0.
    pub fn of(member: &Member, bar: &MemberBar) -> Option<Self> {
        const EDU: VendorDevice = VendorDevice {
            vendor: Edu::VENDOR,
            device: Edu::DEVICE,
        };
        if bar.is_prefetchable() {
            return Some(Self {
                offset: offset_in(bar),
                len: LEN,
                inverts: false,
            });
        }
        let is_edu = member.function.vendor_device() == EDU;
        (is_edu && bar.info.index == BarIndex::ALL[0]).then_some(Self {
            offset: 0x04,
            len: 4,
            inverts: true,
        })
    }

    /// What reads back after `written` was written, and the other way about.
    pub fn read_back(self, written: Vec<u8>) -> Vec<u8> {
        if self.inverts {
            written.into_iter().map(|byte| !byte).collect()
        } else {
            written
        }
    }
}
