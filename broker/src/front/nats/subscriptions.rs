//! The subscriptions of one client, by the names that the client and the core have for them.
//!
//! One NATS subscription is up to two of the core's: one in the broker's own topic space and, at a hub,
//! one in the nodes'. The core's numbers are twice the entry's number, plus one for the nodes' part.

use std::collections::HashMap;

use super::subject::Interest;
use crate::core::event::SubId;

/// Most subscriptions of one connection.
pub(super) const SUBSCRIPTIONS_MAX: usize = 16_384;
/// Most bytes of their names and patterns: with patterns of 3 KiB that is some 1 300.
pub(super) const SUBSCRIPTIONS_BYTES_MAX: usize = 4 << 20;

/// What one `SUB` asked for.
#[derive(Debug)]
pub(super) struct Entry {
    /// The client's name for it.
    pub sid: Box<[u8]>,
    /// What it sees.
    pub interest: Interest,
    /// Messages delivered so far.
    pub delivered: u64,
    /// It ends when so many were delivered.
    pub max: Option<u64>,
    /// Not reused, so that a late delivery cannot hit a newer subscription.
    pub number: u32,
    bytes: usize,
}

impl Entry {
    /// The core's number of the part in the own topic space.
    pub(super) fn own_id(&self) -> Option<SubId> {
        self.interest.own.as_ref().map(|_| self.number << 1)
    }

    /// The core's number of the part in the topic spaces of nodes.
    pub(super) fn up_id(&self) -> Option<SubId> {
        self.interest.up.as_ref().map(|_| self.number << 1 | 1)
    }

    /// True once no more may be delivered.
    pub(super) fn is_done(&self) -> bool {
        self.max.is_some_and(|max| self.delivered >= max)
    }
}

/// No room for one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many subscriptions")]
pub(super) struct Full;

/// All subscriptions of one client.
#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    numbers: HashMap<Box<[u8]>, u32>,
    entries: HashMap<u32, Entry>,
    next: u32,
    bytes: usize,
}

impl Subscriptions {
    /// True if the client uses this name.
    pub(super) fn contains(&self, sid: &[u8]) -> bool {
        self.numbers.contains_key(sid)
    }

    /// Adds one under a name that is free.
    ///
    /// # Errors
    /// A limit is reached.
    pub(super) fn add(&mut self, sid: &[u8], interest: Interest, bytes: usize) -> Result<&Entry, Full> {
        let bytes = bytes + 2 * sid.len();
        let number = self.next;
        let is_full = self.entries.len() >= SUBSCRIPTIONS_MAX || number > SubId::MAX >> 1;
        if is_full || self.bytes + bytes > SUBSCRIPTIONS_BYTES_MAX {
            return Err(Full);
        }
        self.next += 1;
        self.bytes += bytes;
        self.numbers.insert(sid.into(), number);
        let entry = Entry { sid: sid.into(), interest, delivered: 0, max: None, number, bytes };
        Ok(self.entries.entry(number).or_insert(entry))
    }

    /// By the client's name.
    pub(super) fn by_sid(&mut self, sid: &[u8]) -> Option<&mut Entry> {
        self.numbers.get(sid).and_then(|number| self.entries.get_mut(number))
    }

    /// By the core's number; true if it is the part in the topic spaces of nodes.
    pub(super) fn by_id(&mut self, id: SubId) -> Option<(&mut Entry, bool)> {
        self.entries.get_mut(&(id >> 1)).map(|entry| (entry, id & 1 == 1))
    }

    /// The first that sees this own topic: where an answer to a request would arrive.
    pub(super) fn by_topic(&self, topic: &str) -> Option<&Entry> {
        let sees = |entry: &&Entry| entry.interest.own.as_ref().is_some_and(|own| own.matches(topic, true));
        self.entries.values().find(sees)
    }

    /// Frees the client's name. Deliveries that are on their way still find the entry, until it is forgotten.
    pub(super) fn retire(&mut self, sid: &[u8]) -> Option<&Entry> {
        let number = self.numbers.remove(sid)?;
        self.entries.get(&number)
    }

    /// The core has no more deliveries for this entry.
    pub(super) fn forget(&mut self, number: u32) {
        if let Some(entry) = self.entries.remove(&number) {
            self.bytes -= entry.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscriptions_are_bounded_in_number_and_in_bytes() {
        let mut many = Subscriptions::default();
        for sid in 0..SUBSCRIPTIONS_MAX {
            many.add(sid.to_string().as_bytes(), Interest::default(), 10).unwrap();
        }
        assert!(many.add(b"x", Interest::default(), 10).is_err());
        many.retire(b"0").unwrap();
        assert!(many.add(b"x", Interest::default(), 10).is_err(), "it still counts");
        many.forget(0);
        many.add(b"x", Interest::default(), 10).unwrap();

        let mut large = Subscriptions::default();
        large.add(b"1", Interest::default(), SUBSCRIPTIONS_BYTES_MAX / 2).unwrap();
        assert!(large.add(b"2", Interest::default(), SUBSCRIPTIONS_BYTES_MAX / 2).is_err());
        large.retire(b"1").unwrap();
        large.forget(0);
        large.add(b"2", Interest::default(), SUBSCRIPTIONS_BYTES_MAX / 2).unwrap();
    }

    #[test]
    fn numbers_are_not_reused() {
        let mut subscriptions = Subscriptions::default();
        let first = subscriptions.add(b"1", Interest::default(), 1).unwrap().number;
        subscriptions.retire(b"1").unwrap();
        subscriptions.forget(first);
        assert_ne!(subscriptions.add(b"1", Interest::default(), 1).unwrap().number, first);
    }
}
