//! Accesses to a BAR that are trapped: carried out by the host's side, piece by piece, but for what
//! MSI-X has there, which is emulated.

use crate::{AssignedFunction, BarIndex, HostCall, HostError, MsixStructure, Outcome};

impl AssignedFunction {
    /// Reads `data.len()` bytes at `offset` of a BAR, as many as there are, in naturally aligned
    /// pieces of at most 8 bytes. What the host refuses, what lies past the BAR's end and what is
    /// not decoded reads all ones. Returns the first refusal.
    ///
    /// Where in the BAR an access lies is what the map's view says
    /// ([`RegionManager::lookup`](memory_map::RegionManager::lookup), [`Self::bar_of`]) or
    /// [`Self::cpu_access`].
    pub fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> Option<HostError> {
        data.fill(0xff);
        let size = self.decoded_size(bar)?;
        let mut refused = None;
        let mut at = offset;
        let mut rest = data;
        while let Some(length) = piece(at, rest.len(), size) {
            let Some((now, later)) = std::mem::take(&mut rest).split_at_mut_checked(length) else {
                break;
            };
            if let Some(structure) = self.emulated_at(bar, at) {
                self.read_structure(structure, now);
            } else if let Err(error) = self.host.bar_read(bar, at, now) {
                now.fill(0xff);
                let call = HostCall::BarRead(bar, at);
                refused.get_or_insert_with(|| HostError::new(call, &error));
            }
            rest = later;
            at = after(at, length);
        }
        refused
    }

    /// Writes `data` at `offset` of a BAR, as far as there is any, in naturally aligned pieces of
    /// at most 8 bytes. What lies past the BAR's end and what is not decoded is ignored. Returns
    /// the first refusal; the pieces after it are written all the same, as on the bus.
    pub fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) -> Option<HostError> {
        let size = self.decoded_size(bar)?;
        let mut refused = None;
        let mut at = offset;
        let mut rest = data;
        while let Some(length) = piece(at, rest.len(), size) {
            let Some((now, later)) = rest.split_at_checked(length) else {
                break;
            };
            if let Some(structure) = self.emulated_at(bar, at) {
                refused = refused.or(self.write_structure(structure, now));
            } else if let Err(error) = self.host.bar_write(bar, at, now) {
                let call = HostCall::BarWrite(bar, at);
                refused.get_or_insert_with(|| HostError::new(call, &error));
            }
            rest = later;
            at = after(at, length);
        }
        refused
    }

    /// What of MSI-X is emulated at an offset of a BAR, and where in it that is. Both structures are
    /// aligned to eight bytes and as long as that, so a piece is in one of them or in none.
    fn emulated_at(&self, bar: BarIndex, offset: u64) -> Option<(MsixStructure, u64)> {
        let msix = self.msix().filter(|_| self.emulates_msix)?;
        msix.structure_at(bar, offset)
    }

    fn read_structure(&self, structure: (MsixStructure, u64), data: &mut [u8]) {
        let state = self.lock();
        if let Some(interrupts) = state.interrupts.as_ref().filter(|_| !state.removed) {
            interrupts.read_structure(structure, data);
        }
    }

    fn write_structure(&self, structure: (MsixStructure, u64), data: &[u8]) -> Option<HostError> {
        let mut outcome = Outcome::default();
        let mut state = self.lock();
        if !state.removed
            && let Some(interrupts) = &mut state.interrupts
        {
            interrupts.write_structure(&*self.host, structure, data, &mut outcome);
        }
        drop(state);
        outcome.host_errors.into_iter().next()
    }

    /// The size of a BAR that answers: while the function is awake, an I/O BAR, for which the host's
    /// side decides, and a memory BAR if decoding is on.
    fn decoded_size(&self, bar: BarIndex) -> Option<u64> {
        let state = self.lock();
        let assigned = state.bars.iter().find(|a| a.bar.index() == bar)?;
        let answers = !state.removed
            && state.power.is_awake()
            && (state.decoding || !assigned.bar.kind().is_memory());
        answers.then(|| assigned.bar.size())
    }
}

/// How many bytes at `at` go in one piece, of `left` that are to go: the largest power of two, up
/// to 8, that is aligned and ends before `size`. None where nothing can go.
fn piece(at: u64, left: usize, size: u64) -> Option<usize> {
    let room = size.checked_sub(at)?;
    [8_u8, 4, 2, 1]
        .into_iter()
        .find(|length| {
            let length = *length;
            usize::from(length) <= left
                && u64::from(length) <= room
                && at.is_multiple_of(length.into())
        })
        .map(usize::from)
}

/// Past a piece of `length` bytes, which is at most 8 and ends within a BAR.
fn after(at: u64, length: usize) -> u64 {
    at.saturating_add(u64::try_from(length).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(mut at: u64, mut left: usize, size: u64) -> Vec<(u64, usize)> {
        let mut found = Vec::new();
        while let Some(length) = piece(at, left, size) {
            found.push((at, length));
            at = after(at, length);
            left -= length;
        }
        found
    }

    #[test]
    fn accesses_are_cut_at_their_natural_alignment() {
        assert_eq!(pieces(0, 8, 256), [(0, 8)]);
        assert_eq!(pieces(0, 16, 256), [(0, 8), (8, 8)]);
        assert_eq!(pieces(1, 8, 256), [(1, 1), (2, 2), (4, 4), (8, 1)]);
        assert_eq!(pieces(6, 4, 256), [(6, 2), (8, 2)]);
        assert_eq!(pieces(0, 3, 256), [(0, 2), (2, 1)]);
        assert_eq!(pieces(254, 4, 256), [(254, 2)]);
        assert_eq!(pieces(256, 4, 256), []);
        assert_eq!(pieces(u64::MAX, 4, 256), []);
        assert_eq!(pieces(0, 0, 256), []);
    }
}
