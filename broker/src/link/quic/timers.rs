//! Deadlines of all connections of a port, in one heap.
//!
//! A connection's deadline moves with nearly every packet, mostly further away, and few deadlines are ever
//! reached. So an entry is left where it is and looked at when its time comes: whoever has a later deadline
//! by then goes back into the heap. Each connection knows its entries ([`Armed`]): a deadline that
//! one of them precedes needs no other.

use std::{cmp::Reverse, collections::BinaryHeap};

/// Microseconds since the port was opened.
pub(super) type Tick = u64;

/// One heap for a port.
#[derive(Debug, Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Tick, u32)>>);

/// A connection's entries, the earliest first. A heartbeat arms for an acknowledgement, for a loss and for
/// silence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Armed([Tick; 3]);

const NEVER: Tick = Tick::MAX;

impl Default for Armed {
    fn default() -> Self {
        Self([NEVER; 3])
    }
}

impl Timers {
    /// The connection has to be looked at by `deadline`.
    pub(super) fn arm(&mut self, key: u32, armed: &mut Armed, deadline: Tick) {
        if armed.0[0] <= deadline {
            return;
        }
        armed.0 = [deadline, armed.0[0], armed.0[1]];
        self.0.push(Reverse((deadline, key)));
    }

    /// The earliest entry.
    pub(super) fn next(&self) -> Option<Tick> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes an entry whose time has come.
    pub(super) fn pop(&mut self, now: Tick) -> Option<(Tick, u32)> {
        if self.next()? > now {
            return None;
        }
        self.0.pop().map(|Reverse(entry)| entry)
    }
}

impl Armed {
    /// An entry was taken. False: it was forgotten, and an earlier one has done its work.
    pub(super) fn is_due(&mut self, at: Tick) -> bool {
        let due = self.0[0] == at;
        if due {
            self.0 = [self.0[1], self.0[2], NEVER];
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_moves_away_costs_no_entry_and_is_still_met() {
        let (mut timers, mut armed) = (Timers::default(), Armed::default());
        timers.arm(7, &mut armed, 100);
        (101..200).for_each(|later| timers.arm(7, &mut armed, later));
        assert_eq!(timers.0.len(), 1);
        assert_eq!(timers.pop(99), None);
        assert_eq!(timers.pop(100), Some((100, 7)));
        assert!(armed.is_due(100));
        timers.arm(7, &mut armed, 199);
        assert_eq!(timers.next(), Some(199));
    }

    #[test]
    fn a_rhythm_of_short_deadlines_before_a_long_one_keeps_the_heap_small() {
        let (mut timers, mut armed) = (Timers::default(), Armed::default());
        let mut largest = 0;
        for beat in 0..1000 {
            let now = beat * 10_000;
            for deadline in [now + 1000, now + 25] {
                timers.arm(0, &mut armed, deadline);
            }
            largest = largest.max(timers.0.len());
            while let Some((at, _)) = timers.pop(now + 9_999) {
                if armed.is_due(at) {
                    timers.arm(0, &mut armed, now + 45_000);
                }
            }
        }
        assert!(largest <= 6, "{largest}");
        assert!(timers.next().is_some_and(|next| next <= 999 * 10_000 + 45_000));
    }
}
