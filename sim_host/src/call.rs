//! The calls into the host: how many there were, how they ended, and which are to fail.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use memory_map::{Errno, IovaRange};

/// A kind of call into the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// [`Type1Container::info`](iommu::Type1Container::info).
    Info,
    /// [`Type1Container::map_dma`](iommu::Type1Container::map_dma).
    MapDma,
    /// [`Type1Container::unmap_dma`](iommu::Type1Container::unmap_dma).
    UnmapDma,
    /// [`Type1Container::unmap_all`](iommu::Type1Container::unmap_all).
    UnmapAll,
    /// [`HostFunction::config_read`](assigned_pci::HostFunction::config_read).
    ConfigRead,
    /// [`HostFunction::config_write`](assigned_pci::HostFunction::config_write).
    ConfigWrite,
    /// [`HostFunction::bar`](assigned_pci::HostFunction::bar).
    Bar,
    /// [`HostFunction::bar_read`](assigned_pci::HostFunction::bar_read).
    BarRead,
    /// [`HostFunction::bar_write`](assigned_pci::HostFunction::bar_write).
    BarWrite,
    /// [`HostFunction::reset`](assigned_pci::HostFunction::reset).
    Reset,
    /// [`HostFunction::connect_vectors`](assigned_pci::HostFunction::connect_vectors).
    ConnectVectors,
    /// [`HostFunction::disconnect_vectors`](assigned_pci::HostFunction::disconnect_vectors).
    DisconnectVectors,
    /// [`BackingObject::map_host`](memory_map::BackingObject::map_host).
    MapHost,
    /// [`BackingObject::file`](memory_map::BackingObject::file) of a BAR, the first time.
    ExportDmaBuf,
    /// [`SimIoas::attach`](crate::SimIoas::attach).
    IoasAttach,
    /// [`IoAddressSpace::ranges`](iommu::IoAddressSpace::ranges).
    IoasRanges,
    /// [`IoAddressSpace::allow`](iommu::IoAddressSpace::allow).
    IoasAllow,
    /// [`IoAddressSpace::map_file`](iommu::IoAddressSpace::map_file).
    MapFile,
    /// [`IoAddressSpace::map`](iommu::IoAddressSpace::map).
    IoasMap,
    /// [`IoAddressSpace::copy`](iommu::IoAddressSpace::copy).
    IoasCopy,
    /// [`IoAddressSpace::unmap`](iommu::IoAddressSpace::unmap).
    IoasUnmap,
    /// [`IoAddressSpace::unmap_all`](iommu::IoAddressSpace::unmap_all).
    IoasUnmapAll,
    /// [`IoAddressSpace::huge_pages`](iommu::IoAddressSpace::huge_pages) and
    /// [`set_huge_pages`](iommu::IoAddressSpace::set_huge_pages).
    IoasOption,
}

/// A moment at which something else may happen on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CallPoint {
    /// Before a call does anything.
    Before(Call),
    /// In the middle of [`Call::MapFile`] or [`Call::IoasCopy`]: what is to be mapped has been
    /// found, and is not yet mapped.
    Midway(Call),
    /// When a call is over.
    After(Call),
}

/// One call that was made, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRecord {
    /// What kind.
    pub call: Call,
    /// On which container, function or memory.
    pub on: Arc<str>,
    /// The range, for calls that have one.
    pub iova: Option<IovaRange>,
    /// How it ended, as the caller was told.
    pub result: Result<(), Errno>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// The count that the call will have.
    Count(u64),
    /// From that count on.
    From(u64),
}

#[derive(Debug, Clone, Copy)]
struct Injection {
    call: Call,
    when: When,
    errno: Errno,
    done: bool,
}

/// How a call is to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Injected {
    /// Without doing anything.
    Refused(Errno),
    /// After doing what was asked.
    Done(Errno),
}

/// Counts, records and injections.
#[derive(Debug, Default)]
pub(crate) struct CallBook {
    counts: BTreeMap<Call, u64>,
    injections: Vec<Injection>,
    records: Vec<CallRecord>,
}

impl CallBook {
    /// Counts one call and tells whether it is to fail.
    pub fn begin(&mut self, call: Call) -> Option<Injected> {
        let count = self.counts.entry(call).or_default();
        *count = count.saturating_add(1);
        let count = *count;
        let hit = self.injections.iter().position(|injection| {
            injection.call == call
                && match injection.when {
                    When::Count(at) => at == count,
                    When::From(first) => first <= count,
                }
        })?;
        let injection = *self.injections.get(hit)?;
        if matches!(injection.when, When::Count(_)) {
            self.injections.remove(hit);
        }
        Some(if injection.done {
            Injected::Done(injection.errno)
        } else {
            Injected::Refused(injection.errno)
        })
    }

    pub fn record(
        &mut self,
        call: Call,
        on: &Arc<str>,
        iova: Option<IovaRange>,
        result: Result<(), &io::Error>,
    ) {
        self.records.push(CallRecord {
            call,
            on: Arc::clone(on),
            iova,
            result: result.map_err(Errno::from),
        });
    }

    pub fn count(&self, call: Call) -> u64 {
        self.counts.get(&call).copied().unwrap_or(0)
    }

    pub fn records(&self) -> &[CallRecord] {
        &self.records
    }

    pub fn forget_records(&mut self) {
        self.records.clear();
    }

    /// `nth` counts from now on: 1 is the next call.
    pub fn fail(&mut self, call: Call, nth: u64, errno: Errno, done: bool) {
        let when = When::Count(self.count(call).saturating_add(nth));
        self.injections.push(Injection {
            call,
            when,
            errno,
            done,
        });
    }

    pub fn fail_from_now(&mut self, call: Call, errno: Errno, done: bool) {
        let when = When::From(self.count(call).saturating_add(1));
        self.injections.push(Injection {
            call,
            when,
            errno,
            done,
        });
    }

    pub fn stop_failing(&mut self) {
        self.injections.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_from_now_fails_once() {
        let mut book = CallBook::default();
        assert_eq!(book.begin(Call::MapDma), None);
        book.fail(Call::MapDma, 2, Errno::new(5), false);
        assert_eq!(book.begin(Call::MapDma), None);
        assert_eq!(book.begin(Call::UnmapDma), None);
        assert_eq!(
            book.begin(Call::MapDma),
            Some(Injected::Refused(Errno::new(5)))
        );
        assert_eq!(book.begin(Call::MapDma), None);
        assert_eq!(book.count(Call::MapDma), 4);
    }

    #[test]
    fn failing_from_now_on_ends_when_told() {
        let mut book = CallBook::default();
        book.fail_from_now(Call::Reset, Errno::new(25), true);
        assert_eq!(
            book.begin(Call::Reset),
            Some(Injected::Done(Errno::new(25)))
        );
        assert_eq!(
            book.begin(Call::Reset),
            Some(Injected::Done(Errno::new(25)))
        );
        book.stop_failing();
        assert_eq!(book.begin(Call::Reset), None);
    }
}
