//! Turns: who may change the map. Taken in the order in which they are asked for, so that a long
//! commit that gives its turn up between two steps lets everybody in who was waiting.

use crate::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
struct Tickets {
    next: u64,
    serving: u64,
}

/// Hands out turns, one at a time.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    tickets: Mutex<Tickets>,
    served: Condvar,
}

/// The right to change the map, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a turn.
    pub(crate) fn take(&self) -> Turn<'_> {
        let mut tickets = self.tickets.lock();
        let mine = tickets.next;
        tickets.next = mine.wrapping_add(1);
        while tickets.serving != mine {
            self.served.wait(&mut tickets);
        }
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut tickets = self.0.tickets.lock();
        tickets.serving = tickets.serving.wrapping_add(1);
        let waiting = tickets.serving != tickets.next;
        drop(tickets);
        if waiting {
            self.0.served.notify_all();
        }
    }
}
