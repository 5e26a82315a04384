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

/// What a key holds.
#[derive(Debug, Clone)]
struct Entry {
    latest: Version,
    /// The newest durable version, while `latest` is not. Receivers and watchers see only this one: a
    /// crash must not take back what they were shown, nor hide what they were not.
    durable: Option<Version>,
    latest_is_durable: bool,
}

/// One value of a key.
#[derive(Debug, Clone)]
pub(super) struct Version {
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
        let version = self.place(&key, record.header, record.body.clone());
        self.persisted(&key, version);
    }

    fn place(&mut self, key: &str, header: RecordHeader, frame: Bytes) -> Version {
        let version = Version {
            pair: (header.epoch, header.seq),
            frame,
            flags: header.flags,
            tombstone: header.kind == Kind::TOMBSTONE,
        };
        self.at = self.at.max(version.pair);
        self.local = self.local.max(header.aux);
        match self.entries.get_mut(key) {
            Some(entry) => {
                let older = std::mem::replace(&mut entry.latest, version.clone());
                if std::mem::take(&mut entry.latest_is_durable) {
                    entry.durable = Some(older);
                }
            }
            None => {
                let entry = Entry { latest: version.clone(), durable: None, latest_is_durable: false };
                self.entries.insert(key.to_owned(), entry);
            }
        }
        version
    }

    /// The live entry of a key.
    pub(super) fn get(&self, key: &str) -> Option<StateEntry> {
        let version = &self.entries.get(key)?.latest;
        (!version.tombstone).then(|| version.seen_as(key))
    }

    /// Frames and flags of the live entries whose key passes.
    pub(super) fn frames<'a>(
        &'a self,
        pass: impl Fn(&str) -> bool + 'a,
    ) -> impl Iterator<Item = (Flags, &'a Bytes)> {
        let live = self.entries.iter().filter(move |(key, entry)| !entry.latest.tombstone && pass(key));
        live.map(|(_, entry)| (entry.latest.flags, &entry.latest.frame))
    }

    /// The pair held for a key, tombstones included.
    pub(super) fn pair_of(&self, key: &str) -> Option<Pair> {
        self.entries.get(key).map(|entry| entry.latest.pair)
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
            .filter(|(_, entry)| !entry.latest.tombstone)
            .map(|(key, entry)| entry.latest.seen_as(key))
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
        let version = self.place(key, header, frame.clone());
        ledger.write(Record { header, body: frame });
        ledger.after(Effect::StateDurable { space: self.index, key: key.to_owned(), version });
    }

    /// The owner's source was listed completely under this pair: what an older incarnation left and the
    /// new one did not name is gone.
    pub(super) fn barrier(&mut self, ledger: &mut Ledger, now: Now, pair: Pair) {
        let stale: Vec<String> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.latest.pair.0 < pair.0 && !entry.latest.tombstone)
            .map(|(key, _)| key.clone())
            .collect();
        for key in stale {
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
        self.changes.clear();
        let all: Vec<(String, Version)> =
            self.entries.iter().map(|(key, entry)| (key.clone(), entry.latest.clone())).collect();
        for (key, entry) in all {
            let kind = if entry.tombstone { Kind::TOMBSTONE } else { Kind::PUT };
            let pair = (incarnation, self.at.1 + 1);
            self.apply(ledger, kind, entry.flags, pair, &key, entry.frame);
        }
    }

    /// This version is durable: it may be exported, watched and acknowledged.
    pub(super) fn persisted(&mut self, key: &str, version: Version) -> StateEvent {
        let event = version.event(key);
        let pair = version.pair;
        self.durable = self.durable.max(pair);
        let Some(entry) = self.entries.get_mut(key) else { return event };
        if self.owned {
            // Until now the index named the version that was durable before this one.
            if let Some(older) = &entry.durable {
                self.changes.remove(&older.pair);
            }
            self.changes.insert(pair, key.to_owned());
        }
        if entry.latest.pair == pair {
            entry.latest_is_durable = true;
            entry.durable = None;
        } else {
            entry.durable = Some(version);
        }
        event
    }

    /// What a barrier claims is durable.
    pub(super) fn passed(&mut self, pair: Pair) {
        self.durable = self.durable.max(pair);
    }

    /// The next durable change of an owned space after a position, as a record to send.
    pub(super) fn change_after(&self, position: Pair) -> Option<(Pair, Record)> {
        let (at, key) = self.changes.range((Bound::Excluded(position), Bound::Unbounded)).next()?;
        let entry = &self.entries[key];
        let version = entry.durable.as_ref().unwrap_or(&entry.latest);
        debug_assert_eq!(version.pair, *at, "the index names the durable version");
        Some((*at, self.record_of(version)))
    }

    fn record_of(&self, version: &Version) -> Record {
        let kind = if version.tombstone { Kind::TOMBSTONE } else { Kind::PUT };
        let header = RecordHeader {
            kind,
            class: self.class as u8,
            flags: Flags::default(),
            source: 0,
            epoch: version.pair.0,
            seq: version.pair.1,
            aux: 0,
        };
        Record { header, body: version.frame.clone() }
    }
}

impl Version {
    fn event(&self, key: &str) -> StateEvent {
        if self.tombstone {
            StateEvent::Deleted { key: key.to_owned(), revision: self.pair.1 }
        } else {
            StateEvent::Put(self.seen_as(key))
        }
    }

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
