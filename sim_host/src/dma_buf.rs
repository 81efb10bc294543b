//! Which functions' dma-bufs are revoked, and how often they have been.
//!
//! The host holds one [`DmaBufs`] for all functions, with a lock of its own that is taken last. A
//! function's code says what happens to it, in the kernel's places (`vfio_pci_dma_buf_move` in
//! Linux 7.3), with the host's state locked for writing, so that no DMA is under way:
//!
//! - [`revoke`](DmaBufs::revoke) when its command register is written without memory decoding,
//!   before it enters D3hot, and before any reset is tried, by whatever means and by whomever, so
//!   that one that then fails has revoked too;
//! - [`restore`](DmaBufs::restore) afterwards, **if** it decodes memory and is awake.
//!
//! What is mapped of a dma-buf remembers how often it had been revoked when it was imported. If
//! that is not how often it has been since, the mapping is dead, for good; mapping the dma-buf
//! while it is revoked is `ENODEV`. Nobody is told.

use std::collections::BTreeMap;
use std::sync::Arc;

use libc::ENODEV;
use memory_map::Errno;
use parking_lot::Mutex;

/// What has become of one function's dma-bufs.
#[derive(Debug, Default)]
struct Revocation {
    now: bool,
    times: u64,
}

/// How often a function's dma-bufs had been revoked when one of them was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Import {
    function: Arc<str>,
    times: u64,
}

/// The revocations of all functions, by name.
#[derive(Debug, Default)]
pub(crate) struct DmaBufs(Mutex<BTreeMap<Arc<str>, Revocation>>);

impl DmaBufs {
    /// Kills what is mapped of a function's dma-bufs; none can be mapped until they are restored.
    pub fn revoke(&self, function: &Arc<str>) {
        let mut functions = self.0.lock();
        let revocation = functions.entry(Arc::clone(function)).or_default();
        if !revocation.now {
            revocation.now = true;
            revocation.times = revocation.times.saturating_add(1);
        }
    }

    /// Has them be mapped again. What was mapped before stays dead.
    pub fn restore(&self, function: &Arc<str>) {
        if let Some(revocation) = self.0.lock().get_mut(function) {
            revocation.now = false;
        }
    }

    /// Attaches to a dma-buf of a function, as an importer does.
    pub fn import(&self, function: &Arc<str>) -> Result<Import, Errno> {
        let functions = self.0.lock();
        let revocation = functions.get(function);
        if revocation.is_some_and(|revocation| revocation.now) {
            return Err(Errno::new(ENODEV));
        }
        Ok(Import {
            function: Arc::clone(function),
            times: revocation.map_or(0, |revocation| revocation.times),
        })
    }

    /// Whether nothing was revoked since.
    pub fn is_live(&self, import: &Import) -> bool {
        let functions = self.0.lock();
        let revocation = functions.get(&import.function);
        revocation.map_or(0, |revocation| revocation.times) == import.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_revoked_once_is_dead_for_good() {
        let function: Arc<str> = "0000:00:06.0".into();
        let dma_bufs = DmaBufs::default();
        let before = dma_bufs.import(&function).unwrap();
        assert!(dma_bufs.is_live(&before));
        dma_bufs.revoke(&function);
        assert_eq!(dma_bufs.import(&function), Err(Errno::new(ENODEV)));
        assert!(!dma_bufs.is_live(&before));
        dma_bufs.restore(&function);
        assert!(!dma_bufs.is_live(&before));
        let after = dma_bufs.import(&function).unwrap();
        assert!(dma_bufs.is_live(&after));
        // Nothing changes for others, nor by restoring what is not revoked.
        dma_bufs.revoke(&"0000:00:07.0".into());
        dma_bufs.restore(&function);
        assert!(dma_bufs.is_live(&after));
    }
}
