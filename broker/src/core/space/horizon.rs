//! Which tombstones are no longer kept.
//!
//! A tombstone is for receivers that still hold what it removed. Once every known receiver has acknowledged
//! a later position, and a while has passed, it is forgotten; beyond a bound the oldest are forgotten all
//! the same. The horizon says up to where: a receiver from before it is told everything again, under a new
//! incarnation, and a barrier then takes away what it alone still holds.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Kind, proto};

use super::{Pair, Space};
use crate::{
    core::{ledger::Ledger, restore::Metas},
    limits,
};

/// A stored fact of a space: what its entries alone do not tell after a restart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::core) struct Horizon {
    /// Greatest pair of a forgotten tombstone.
    pub(in crate::core) pair: Pair,
    /// Greatest local revision of one.
    pub(in crate::core) local: u64,
    /// The incarnation whose barrier came last. Of an owned space: its own.
    pub(in crate::core) listed: u64,
}

/// Which tombstones may go.
#[derive(Debug)]
pub(in crate::core) struct Forgettable {
    /// Noted before this time.
    pub(in crate::core) before: Duration,
    /// Up to this local revision: every receiver has it.
    pub(in crate::core) up_to: u64,
    /// But none of these.
    pub(in crate::core) not: BTreeSet<String>,
}

impl Space {
    /// Forgets tombstones, oldest first, at most [`limits::TOMBSTONES_FORGOTTEN`] of them. Returns how many.
    pub(in crate::core) fn collect(&mut self, ledger: &mut Ledger, which: &Forgettable) -> usize {
        let surplus = self.tombstones.len().saturating_sub(limits::TOMBSTONES_MAX);
        let due: Vec<u64> = self
            .tombstones
            .iter()
            .enumerate()
            .take_while(|(nth, (local, (_, noted)))| {
                *nth < surplus || (**local <= which.up_to && *noted < which.before)
            })
            .filter(|(nth, (_, (key, _)))| *nth < surplus || !which.not.contains(&**key))
            .map(|(_, (local, _))| *local)
            .take(limits::TOMBSTONES_FORGOTTEN)
            .collect();
        let mut forgotten = 0;
        for local in due {
            forgotten += usize::from(self.forget(ledger, local));
        }
        if forgotten > 0 {
            self.write_horizon(ledger);
        }
        forgotten
    }

    /// True if there are tombstones beyond what is kept in any case.
    pub(in crate::core) fn is_littered(&self) -> bool {
        self.tombstones.len() > limits::TOMBSTONES_MAX + limits::TOMBSTONES_MAX / 8
    }

    /// True if there is anything to forget, now or later.
    pub(in crate::core) fn has_tombstones(&self) -> bool {
        !self.tombstones.is_empty()
    }

    /// Forgets one durable tombstone, unless its key has a newer version on the way to the disk.
    pub(super) fn forget(&mut self, ledger: &mut Ledger, local: u64) -> bool {
        let Some((key, _)) = self.tombstones.get(&local) else { return false };
        let key = Arc::clone(key);
        let Some(entry) = self.entries.get(&key).filter(|entry| entry.latest.local == local) else {
            return false;
        };
        self.horizon.pair = self.horizon.pair.max(entry.latest.pair);
        self.horizon.local = self.horizon.local.max(local);
        self.entries.remove(&key);
        self.changes.remove(&local);
        self.tombstones.remove(&local);
        let key = Bytes::copy_from_slice(key.as_bytes());
        ledger.write_local_of(Kind::FORGET, self.source, 0, key, None);
        true
    }

    pub(in crate::core) fn write_horizon(&self, ledger: &mut Ledger) {
        let value = codec::encode(&proto::SpaceFacts {
            incarnation: self.horizon.pair.0,
            revision: self.horizon.pair.1,
            local: self.local,
            forgotten_local: self.horizon.local,
            listed: self.horizon.listed,
            synced_incarnation: self.synced.0,
            synced_revision: self.synced.1,
        });
        ledger.write_local(Kind::META, fact_key(self.source), Some(value));
    }

    /// Takes over the stored fact, after the entries.
    pub(in crate::core) fn recover_horizon(&mut self, facts: &Metas<'_>) {
        let fact = facts.get(&*fact_key(self.source));
        let stored = fact.and_then(|value| codec::decode::<proto::SpaceFacts>((*value).clone()).ok());
        let Some(stored) = stored else { return };
        self.horizon = Horizon {
            pair: (stored.incarnation, stored.revision),
            local: stored.forgotten_local,
            listed: stored.listed,
        };
        self.complete_in = stored.listed;
        self.synced = (stored.synced_incarnation, stored.synced_revision);
        self.at = self.at.max(self.horizon.pair);
        self.durable = self.durable.max(self.horizon.pair);
        self.local = self.local.max(stored.local);
        self.seen = self.local;
    }
}

/// The key of the fact in the store.
fn fact_key(source: u32) -> Bytes {
    let mut key = b"space/".to_vec();
    key.extend_from_slice(&source.to_be_bytes());
    key.into()
}
