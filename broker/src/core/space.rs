//! A space of State: revisioned keys with one owner.
//!
//! Invariant: the pair (incarnation, revision) of a key never decreases, tombstones included. Absence is
//! never deletion: a key goes by a tombstone, or at a barrier of a newer incarnation that did not list it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use codec::{Class, Flags, FrameView, Kind, Record, RecordHeader, frame::FrameParts};

use super::{
    event::{Expect, Now, Origin, SessionId, StateEntry, StateEvent},
    ledger::{Effect, Ledger},
};

/// (incarnation, revision) of an entry: assigned once by its owner.
pub(super) type Pair = (u64, u64);

#[derive(Debug)]
pub(super) struct Space {
    /// Its number in the store.
    pub(super) source: u32,
    /// Its place in the core's list.
    pub(super) index: usize,
    pub(super) origin: Origin,
    pub(super) name: Arc<str>,
    pub(super) class: Class,
    /// This broker is its only writer.
    pub(super) owned: bool,
    /// Greatest pair seen. For an owner: its incarnation and last revision.
    pub(super) at: Pair,
    /// `at` as far as it is durable.
    pub(super) durable: Pair,
    /// Local revision of the last change.
    pub(super) local: u64,
    entries: BTreeMap<String, Entry>,
    /// Of an owned space: each key once, at its newest pair. A resume costs what changed.
    changes: BTreeMap<Pair, String>,
    pub(super) watchers: BTreeSet<(SessionId, Arc<str>)>,
}

#[derive(Debug, Clone)]
struct Entry {
    pair: Pair,
    frame: Bytes,
    flags: Flags,
    tombstone: bool,
}

impl Space {
    pub(super) fn new(
        source: u32,
        index: usize,
        origin: &Origin,
        name: &Arc<str>,
        class: Class,
        owned: bool,
    ) -> Self {
        Self {
            source,
            index,
            origin: Arc::clone(origin),
            name: Arc::clone(name),
            class,
            owned,
            at: (0, 0),
            durable: (0, 0),
            local: 0,
            entries: BTreeMap::new(),
            changes: BTreeMap::new(),
            watchers: BTreeSet::new(),
        }
    }

    /// Takes over a record that the store recovered.
    pub(super) fn recover(&mut self, record: &Record) {
        let Ok(view) = FrameView::parse(&record.body) else { return };
        let key = view.topic().to_owned();
        self.place(key, record.header, record.body.clone());
        self.durable = self.at;
    }

    fn place(&mut self, key: String, header: RecordHeader, frame: Bytes) {
        let entry = Entry {
            pair: (header.epoch, header.seq),
            frame,
            flags: header.flags,
            tombstone: header.kind == Kind::TOMBSTONE,
        };
        self.at = self.at.max(entry.pair);
        self.local = self.local.max(header.aux);
        if self.owned {
            self.changes.insert(entry.pair, key.clone());
        }
        if let Some(older) = self.entries.insert(key, entry)
            && self.owned
        {
            self.changes.remove(&older.pair);
        }
    }

    /// The live entry of a key.
    pub(super) fn get(&self, key: &str) -> Option<StateEntry> {
        let entry = self.entries.get(key)?;
        (!entry.tombstone).then(|| entry.seen_as(key))
    }

    /// Frames and flags of the live entries whose key passes.
    pub(super) fn frames<'a>(
        &'a self,
        pass: impl Fn(&str) -> bool + 'a,
    ) -> impl Iterator<Item = (Flags, &'a Bytes)> {
        let live = self.entries.iter().filter(move |(key, entry)| !entry.tombstone && pass(key));
        live.map(|(_, entry)| (entry.flags, &entry.frame))
    }

    /// The pair held for a key, tombstones included.
    pub(super) fn pair_of(&self, key: &str) -> Option<Pair> {
        self.entries.get(key).map(|entry| entry.pair)
    }

    /// Live entries by prefix, in key order.
    pub(super) fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&str>,
    ) -> impl Iterator<Item = StateEntry> + 'a {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after.to_owned()),
            _ => Bound::Included(prefix.to_owned()),
        };
        self.entries
            .range((from, Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .filter(|(_, entry)| !entry.tombstone)
            .map(|(key, entry)| entry.seen_as(key))
    }

    /// Whether a write may happen; else the revision that was found (0 = absent).
    pub(super) fn check(&self, key: &str, expect: Expect) -> Result<(), u64> {
        let found = self.get(key).map(|entry| entry.revision);
        match (expect, found) {
            (Expect::Any, _) | (Expect::Absent, None) => Ok(()),
            (Expect::Revision(wanted), Some(found)) if wanted == found => Ok(()),
            (_, found) => Err(found.unwrap_or(0)),
        }
    }

    /// The owner sets or deletes a key. Deleting what is not there changes nothing.
    pub(super) fn write(&mut self, ledger: &mut Ledger, now: Now, key: &str, value: Option<&[u8]>) {
        let parts = FrameParts {
            topic: key,
            time_us: now.wall_us,
            time_trusted: now.trusted,
            payload: value.unwrap_or_default(),
            ..FrameParts::default()
        };
        self.write_frame(ledger, key, value.is_none(), Flags::default(), parts.encode());
    }

    /// The owner sets a key to a frame that exists already. The frame is copied: State outlives the
    /// buffer that a message came in.
    pub(super) fn write_frame(
        &mut self,
        ledger: &mut Ledger,
        key: &str,
        tombstone: bool,
        flags: Flags,
        frame: Bytes,
    ) {
        if tombstone && self.get(key).is_none() {
            return;
        }
        let kind = if tombstone { Kind::TOMBSTONE } else { Kind::PUT };
        let pair = (self.at.0, self.at.1 + 1);
        self.apply(ledger, kind, flags, pair, key, frame);
    }

    /// An entry from the owner, over a link. False: what is held is as new or newer.
    pub(super) fn import(&mut self, ledger: &mut Ledger, record: &Record) -> bool {
        let Ok(view) = FrameView::parse(&record.body) else { return false };
        let key = view.topic();
        let pair = (record.header.epoch, record.header.seq);
        if self.pair_of(key).is_some_and(|held| held >= pair) {
            return false;
        }
        let frame = Bytes::copy_from_slice(&record.body);
        self.apply(ledger, record.header.kind, Flags::IMPORTED, pair, key, frame);
        true
    }

    fn apply(&mut self, ledger: &mut Ledger, kind: Kind, flags: Flags, pair: Pair, key: &str, frame: Bytes) {
        let header = RecordHeader {
            kind,
            class: self.class as u8,
            flags,
            source: self.source,
            epoch: pair.0,
            seq: pair.1,
            aux: self.local + 1,
        };
        self.place(key.to_owned(), header, frame.clone());
        ledger.write(Record { header, body: frame });
        ledger.after(Effect::StateDurable { space: self.index, key: key.to_owned(), pair });
    }

    /// The owner's source was listed completely under this pair: what an older incarnation left and the
    /// new one did not name is gone.
    pub(super) fn barrier(&mut self, ledger: &mut Ledger, now: Now, pair: Pair) {
        let stale: Vec<(String, u64)> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.pair.0 < pair.0 && !entry.tombstone)
            .map(|(key, entry)| (key.clone(), entry.pair.1))
            .collect();
        for (key, _) in stale {
            let parts = FrameParts { topic: &key, time_us: now.wall_us, ..FrameParts::default() };
            // Below every revision that the new incarnation will assign.
            self.apply(ledger, Kind::TOMBSTONE, Flags::IMPORTED, (pair.0, 0), &key, parts.encode());
        }
        self.at = self.at.max(pair);
    }

    /// The owner begins a new incarnation: every entry gets a revision of it, so that every receiver
    /// takes it again.
    pub(super) fn mint(&mut self, ledger: &mut Ledger, incarnation: u64) {
        self.at = (incarnation, 0);
        let all: Vec<(String, Entry)> = self.entries.iter().map(|(k, e)| (k.clone(), e.clone())).collect();
        for (key, entry) in all {
            let kind = if entry.tombstone { Kind::TOMBSTONE } else { Kind::PUT };
            let pair = (incarnation, self.at.1 + 1);
            self.apply(ledger, kind, entry.flags, pair, &key, entry.frame);
        }
    }

    /// This change is durable: it may be exported and acknowledged.
    pub(super) fn persisted(&mut self, pair: Pair) {
        self.durable = self.durable.max(pair);
    }

    /// The next durable change of an owned space after a position, as a record to send.
    pub(super) fn change_after(&self, position: Pair) -> Option<(Pair, Record)> {
        let range = (Bound::Excluded(position), Bound::Included(self.durable));
        if position >= self.durable {
            return None;
        }
        let (at, key) = self.changes.range(range).next()?;
        Some((*at, self.record_of(&self.entries[key])))
    }

    /// The event that a watcher of this key gets now.
    pub(super) fn event_of(&self, key: &str) -> Option<StateEvent> {
        let entry = self.entries.get(key)?;
        Some(if entry.tombstone {
            StateEvent::Deleted { key: key.to_owned(), revision: entry.pair.1 }
        } else {
            StateEvent::Put(entry.seen_as(key))
        })
    }

    fn record_of(&self, entry: &Entry) -> Record {
        let kind = if entry.tombstone { Kind::TOMBSTONE } else { Kind::PUT };
        let header = RecordHeader {
            kind,
            class: self.class as u8,
            flags: Flags::default(),
            source: 0,
            epoch: entry.pair.0,
            seq: entry.pair.1,
            aux: 0,
        };
        Record { header, body: entry.frame.clone() }
    }
}

impl Entry {
    fn seen_as(&self, key: &str) -> StateEntry {
        StateEntry {
            key: key.to_owned(),
            frame: self.frame.clone(),
            incarnation: self.pair.0,
            revision: self.pair.1,
            time_us: FrameView::parse(&self.frame).map_or(0, |view| view.time_us()),
        }
    }
}
