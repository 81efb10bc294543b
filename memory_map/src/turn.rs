//! Turns: who may change the map. Taken in the order in which they are asked for, so that a long
//! commit that gives its turn up between two steps lets everybody in who was waiting.

use crate::sync::{AtomicU64, Condvar, Mutex, Ordering};

/// Hands out turns, one at a time.
///
/// A ticket is drawn from `next` and waits until `serving` has come to it. Both are read and
/// written in one order that all threads agree on: of one who ends a turn and looks whether
/// somebody waits, and one who draws a ticket and looks whether it is served already, at least one
/// sees the other. `waiting` is held for looking before sleeping, and for waking.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    next: AtomicU64,
    serving: AtomicU64,
    waiting: Mutex<()>,
    served: Condvar,
}

/// The right to change the map, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    ticket: u64,
}

impl Turns {
    /// Waits for a turn.
    pub(crate) fn take(&self) -> Turn<'_> {
        let ticket = self.next.fetch_add(1, Ordering::SeqCst);
        if self.serving.load(Ordering::SeqCst) != ticket {
            let mut waiting = self.waiting.lock();
            while self.serving.load(Ordering::SeqCst) != ticket {
                self.served.wait(&mut waiting);
            }
        }
        Turn {
            turns: self,
            ticket,
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let next = self.ticket.wrapping_add(1);
        self.turns.serving.store(next, Ordering::SeqCst);
        if self.turns.next.load(Ordering::SeqCst) != next {
            // Whoever has looked and is about to sleep holds this until it sleeps.
            drop(self.turns.waiting.lock());
            self.turns.served.notify_all();
        }
    }
}
