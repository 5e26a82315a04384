//! A space of State: revisioned keys with one owner.
//!
//! Invariant: the pair (incarnation, revision) of a key never decreases, tombstones included. Absence is
//! never deletion: a key goes by a tombstone, or at a barrier of a newer incarnation that did not list it.
//!
//! Every change also has a *local* revision, which counts the changes of this replica and never starts
//! again; in a space that this broker owns it is the same number as the revision of the pair. Readers,
//! watchers and receivers see a key's newest **durable** version: a crash must not take back what they were
//! shown. Only the checks of a compare-and-set look at the newest of all.
//!
//! | file | subject |
//! |---|---|
//! | `window` | the bounded list of recent changes |
//! | `horizon` | which tombstones are no longer kept |
//! | `lineage` | which process wrote which revisions |
//! | `mirror` | spaces whose entries are kept by what replicas share |
//! | `scope` | what concerns one receiver of a space that each sees only in part |

mod horizon;
mod lineage;
mod mirror;
pub(super) mod scope;
mod window;

use std::{collections::BTreeSet, ops::Bound, sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, Flags, FrameView, Kind, Record, RecordHeader, frame::FrameParts};

pub use self::window::WindowBounds;
pub(super) use self::{
    horizon::{Forgettable, Horizon},
    lineage::Lineage,
    window::{Change, Window},
};
use super::{
    event::{Expect, Now, Origin, StateEntry},
    few::Few,
    ledger::{Effect, Ledger},
    watch::WatchId,
};

/// (incarnation, revision) of an entry: assigned once by its owner.
pub(super) type Pair = (u64, u64);

/// The key by which the owner of a scoped space says that it has listed its source completely.
pub(super) const BARRIER: &str = "barrier";

/// Revisions that a new incarnation leaves out: more than could have been assigned between the copy that a
/// store was restored from and its loss.
const INCARNATION_STEP: u64 = 1 << 32;

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
    /// Each receiver gets only what concerns it: `fleet`.
    pub(super) scoped: bool,
    /// Greatest pair seen. For an owner: its incarnation and last revision.
    pub(super) at: Pair,
    /// `at` as far as it is durable.
    pub(super) durable: Pair,
    /// Of a scoped replica: everything that concerns this receiver is held up to here.
    pub(super) synced: Pair,
    /// Local revision of the last change.
    pub(super) local: u64,
    /// `local` as far as it is durable.
    pub(super) seen: u64,
    entries: Few<Arc<str>, Entry>,
    /// Each key once, at the local revision of its newest durable version: a resume costs what changed.
    changes: Few<u64, Arc<str>>,
    /// Durable tombstones in the order of their local revisions, with the time they were noted.
    tombstones: Few<u64, (Arc<str>, Duration)>,
    pub(super) horizon: Horizon,
    pub(super) lineage: Lineage,
    /// The incarnation whose barrier is durable.
    complete_in: u64,
    /// In a tier: what replicas share keeps the entries. Of a node's space one is held until it is durable, and
    /// no longer; an owned one is a mirror.
    pub(super) elsewhere: bool,
    /// Of a scoped space that this broker owns.
    pub(super) scopes: Option<Box<scope::Scopes>>,
    pub(super) window: Option<Box<Window>>,
    pub(super) watchers: BTreeSet<WatchId>,
}

/// What a key holds.
#[derive(Debug, Clone)]
struct Entry {
    latest: Version,
    /// The newest durable version, while `latest` is not.
    durable: Option<Box<Version>>,
    latest_is_durable: bool,
}

impl Entry {
    fn visible(&self) -> Option<&Version> {
        if self.latest_is_durable { Some(&self.latest) } else { self.durable.as_deref() }
    }
}

/// One value of a key.
#[derive(Debug, Clone)]
pub(super) struct Version {
    pub(super) pair: Pair,
    /// Local revision.
    pub(super) local: u64,
    frame: Bytes,
    flags: Flags,
    pub(super) tombstone: bool,
}

impl Space {
    pub(super) fn new(source: &crate::store::Source, index: usize, owned: bool) -> Self {
        Self {
            source: source.number,
            index,
            origin: Arc::clone(&source.origin),
            name: Arc::clone(&source.name),
            class: source.class,
            owned,
            scoped: scope::is_scoped(&source.origin, &source.name),
            at: (0, 0),
            durable: (0, 0),
            synced: (0, 0),
            local: 0,
            seen: 0,
            entries: Few::new(),
            changes: Few::new(),
            tombstones: Few::new(),
            horizon: Horizon::default(),
            lineage: Lineage::default(),
            complete_in: 0,
            elsewhere: false,
            scopes: None,
            window: None,
            watchers: BTreeSet::new(),
        }
    }

    /// Takes over a record that the store recovered.
    pub(super) fn recover(&mut self, record: &Record) {
        let Ok(view) = FrameView::parse(&record.body) else { return };
        let key: Arc<str> = view.topic().into();
        let version = self.place(&key, record.header, record.body.clone());
        self.persisted(&key, version, Duration::ZERO);
    }

    fn place(&mut self, key: &Arc<str>, header: RecordHeader, frame: Bytes) -> Version {
        let version = Version {
            pair: (header.epoch, header.seq),
            local: header.aux,
            frame,
            flags: header.flags,
            tombstone: header.kind == Kind::TOMBSTONE,
        };
        self.at = self.at.max(version.pair);
        self.local = self.local.max(version.local);
        match self.entries.get_mut(key) {
            Some(entry) => {
                let older = std::mem::replace(&mut entry.latest, version.clone());
                if std::mem::take(&mut entry.latest_is_durable) {
                    entry.durable = Some(Box::new(older));
                }
            }
            None => {
                let entry = Entry { latest: version.clone(), durable: None, latest_is_durable: false };
                self.entries.insert(Arc::clone(key), entry);
            }
        }
        version
    }

    /// The live entry of a key, durable or not: for the owner's own decisions.
    pub(super) fn latest(&self, key: &str) -> Option<&Version> {
        self.entries.get(key).map(|entry| &entry.latest).filter(|version| !version.tombstone)
    }

    /// Whether anything is known of a key, a tombstone included.
    pub(super) fn knows(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The newest durable version of a key, tombstones included.
    pub(super) fn visible(&self, key: &str) -> Option<&Version> {
        self.entries.get(key)?.visible()
    }

    /// The live entry of a key, as far as it is durable.
    pub(super) fn get(&self, key: &str) -> Option<StateEntry> {
        let version = self.visible(key)?;
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

    /// Keys and newest durable versions by prefix, tombstones included, in key order.
    pub(super) fn range<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Version)> + 'a {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        self.entries
            .range::<str>((from, Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
            .filter_map(|(key, entry)| Some((key, entry.visible()?)))
    }

    /// Local revisions and keys of the newest live entries under a prefix, oldest first.
    pub(super) fn live(&self, prefix: &str) -> Vec<(u64, Arc<str>)> {
        let mut found: Vec<(u64, Arc<str>)> =
            self.newest(prefix).map(|(key, version)| (version.local, Arc::clone(key))).collect();
        found.sort_unstable();
        found
    }

    /// Keys and times of the newest live entries under a prefix.
    pub(super) fn timed(&self, prefix: &str) -> Vec<(Arc<str>, u64)> {
        let time = |version: &Version| FrameView::parse(&version.frame).map_or(0, |view| view.time_us());
        self.newest(prefix).map(|(key, version)| (Arc::clone(key), time(version))).collect()
    }

    fn newest<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a Arc<str>, &'a Version)> {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        let within = self.entries.range::<str>(from).take_while(move |(key, _)| key.starts_with(prefix));
        within.map(|(key, entry)| (key, &entry.latest)).filter(|(_, version)| !version.tombstone)
    }

    /// Whether a write may happen; else the revision that was found (0 = absent).
    pub(super) fn check(&self, key: &str, expect: Expect) -> Result<(), u64> {
        let found = self.latest(key).map(|version| version.pair.1);
        match (expect, found) {
            (Expect::Any, _) | (Expect::Absent, None) => Ok(()),
            (Expect::Revision(wanted), Some(found)) if wanted == found => Ok(()),
            (_, found) => Err(found.unwrap_or(0)),
        }
    }

    /// The owner sets or deletes a key. Deleting what is not there changes nothing and has no revision.
    pub(super) fn write(&mut self, ledger: &mut Ledger, now: Now, key: &str, value: Option<&[u8]>) -> u64 {
        let parts = FrameParts {
            topic: key,
            time_us: now.wall_us,
            time_trusted: now.trusted,
            payload: value.unwrap_or_default(),
            ..FrameParts::default()
        };
        self.write_frame(ledger, key, value.is_none(), Flags::default(), parts.encode())
    }

    /// The owner sets a key to a frame that exists already, which must not share a large buffer: State
    /// outlives the one that a message came in.
    pub(super) fn write_frame(
        &mut self,
        ledger: &mut Ledger,
        key: &str,
        tombstone: bool,
        flags: Flags,
        frame: Bytes,
    ) -> u64 {
        if tombstone && self.latest(key).is_none() {
            return 0;
        }
        let kind = if tombstone { Kind::TOMBSTONE } else { Kind::PUT };
        let pair = (self.at.0, self.local + 1);
        self.apply(ledger, kind, flags, pair, &self.key(key), frame);
        pair.1
    }

    /// An entry from the owner, over a link. False: what is held is as new or newer.
    pub(super) fn import(&mut self, ledger: &mut Ledger, record: &Record) -> bool {
        let Ok(view) = FrameView::parse(&record.body) else { return false };
        let pair = (record.header.epoch, record.header.seq);
        let newer = match self.entries.get(view.topic()).map(|entry| &entry.latest) {
            Some(held) if held.flags.contains(Flags::UNLISTED) => pair >= held.pair,
            Some(held) => pair > held.pair,
            // An owner sends a whole space in the order of its pairs: this is a repetition of what was
            // removed so long ago that no tombstone tells.
            None => self.scoped || pair > self.horizon.pair,
        };
        if !newer {
            return false;
        }
        let key = self.key(view.topic());
        let frame = Bytes::copy_from_slice(&record.body);
        self.apply(ledger, record.header.kind, Flags::IMPORTED, pair, &key, frame);
        true
    }

    /// What a scope no longer lists leaves this replica, at the revision that it had.
    pub(super) fn unlist(&mut self, ledger: &mut Ledger, now: Now, key: &str) {
        let Some(pair) = self.entries.get(key).map(|entry| entry.latest.pair) else { return };
        let frame = FrameParts { topic: key, time_us: now.wall_us, ..FrameParts::default() }.encode();
        let flags = Flags::IMPORTED.union(Flags::UNLISTED);
        self.apply(ledger, Kind::TOMBSTONE, flags, pair, &self.key(key), frame);
    }

    /// The key as it is held, if it is.
    fn key(&self, key: &str) -> Arc<str> {
        self.entries.get_key_value(key).map_or_else(|| key.into(), |(held, _)| Arc::clone(held))
    }

    fn apply(
        &mut self,
        ledger: &mut Ledger,
        kind: Kind,
        flags: Flags,
        pair: Pair,
        key: &Arc<str>,
        frame: Bytes,
    ) {
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
        ledger.after(Effect::StateDurable { space: self.index, key: Arc::clone(key), version });
    }

    /// The owner's source was listed completely under this pair: what an older incarnation left and the
    /// new one did not name is gone.
    pub(super) fn barrier(&mut self, ledger: &mut Ledger, now: Now, pair: Pair) {
        let stale: Vec<Arc<str>> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.latest.pair.0 < pair.0 && !entry.latest.tombstone)
            .map(|(key, _)| Arc::clone(key))
            .collect();
        for key in stale {
            let parts = FrameParts { topic: &key, time_us: now.wall_us, ..FrameParts::default() };
            // Below every revision that the new incarnation will assign.
            self.apply(ledger, Kind::TOMBSTONE, Flags::IMPORTED, (pair.0, 0), &key, parts.encode());
        }
        self.at = self.at.max(pair);
        if self.horizon.listed != pair.0 {
            self.horizon.listed = pair.0;
            self.write_horizon(ledger);
        }
    }

    /// The owner begins a new incarnation: every live entry gets a revision of it, so that every receiver
    /// takes it again. Two things are not told again, because a store that was rolled back may be wrong
    /// about them, and the comparison at the next barrier finds out: what was deleted, and that all of the
    /// source is listed.
    pub(super) fn mint(&mut self, ledger: &mut Ledger, now: Now, incarnation: u64) {
        let restored = self.local > 0;
        self.at.0 = incarnation;
        self.local += if restored { INCARNATION_STEP } else { 0 };
        self.at.1 = self.local;
        let tombstones: Vec<u64> = self.tombstones.keys().copied().collect();
        for local in tombstones {
            self.forget(ledger, local);
        }
        if self.scoped {
            self.write(ledger, now, BARRIER, None);
        }
        let all: Vec<(Arc<str>, Version)> =
            self.entries.iter().map(|(key, entry)| (Arc::clone(key), entry.latest.clone())).collect();
        for (key, entry) in all.into_iter().filter(|(_, entry)| entry.pair.0 != incarnation) {
            let kind = if entry.tombstone { Kind::TOMBSTONE } else { Kind::PUT };
            let pair = (incarnation, self.local + 1);
            self.apply(ledger, kind, entry.flags, pair, &key, entry.frame);
        }
        self.horizon.listed = incarnation;
        self.write_horizon(ledger);
        self.forget_runs(ledger);
        ledger.after(Effect::BarrierDurable { space: self.index, pair: self.at });
    }

    /// This version is durable: it may be exported, watched and acknowledged.
    pub(super) fn persisted(&mut self, key: &Arc<str>, version: Version, mono: Duration) {
        if !(self.elsewhere && self.owned) {
            self.durable = self.durable.max(version.pair);
            self.seen = self.seen.max(version.local);
        }
        let Some(entry) = self.entries.get_mut(key) else { return };
        // Until now the index named the version that was durable before this one.
        let previous = entry.durable.take().map(|held| *held);
        if let Some(previous) = &previous {
            self.changes.remove(&previous.local);
            self.tombstones.remove(&previous.local);
        }
        self.changes.insert(version.local, Arc::clone(key));
        if version.tombstone {
            self.tombstones.insert(version.local, (Arc::clone(key), mono));
        }
        if entry.latest.local == version.local {
            entry.latest_is_durable = true;
        } else {
            entry.durable = Some(Box::new(version.clone()));
        }
        self.follow_want(key, &version);
        if self.elsewhere && !self.owned {
            self.changes.remove(&version.local);
            self.tombstones.remove(&version.local);
            return self.forget_durable(key, &version);
        }
        if let Some(window) = &mut self.window {
            window.push(Change { key: Arc::clone(key), previous, new: version });
        }
    }

    /// A barrier, and all that it claims, is durable.
    pub(super) fn passed(&mut self, pair: Pair) {
        self.durable = self.durable.max(pair);
        self.complete_in = self.complete_in.max(pair.0);
    }

    /// The newest durable version of the key that changed first after a local revision.
    pub(super) fn change_after(&self, local: u64) -> Option<(&Arc<str>, &Version)> {
        let (at, key) = self.changes.range((Bound::Excluded(&local), Bound::Unbounded)).next()?;
        let version = self.entries.get(key)?.visible()?;
        debug_assert_eq!(version.local, *at, "the index names the durable version");
        Some((key, version))
    }

    /// The local revision after which a receiver needs changes that holds everything up to this pair.
    pub(super) fn resume_after(&self, position: Pair) -> u64 {
        if self.owned {
            return if position.0 == self.at.0 { position.1 } else { 0 };
        }
        // A replica that is passed on has revisions of its own; what came first is before what came later.
        let newer = self
            .changes
            .iter()
            .find(|(_, key)| self.visible(key).is_some_and(|version| version.pair > position));
        newer.map_or(self.seen, |(local, _)| local - 1)
    }

    /// What this replica holds, as its owner wants to know it. Not only what is durable: while the disk is
    /// full the two differ, and the owner must hear of all that its new history may contradict. It keeps
    /// what a crash takes here.
    pub(super) fn position(&self) -> Pair {
        if self.scoped { self.synced } else { self.at }
    }

    /// Live entries, tombstones, and bytes of frames and keys.
    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize, usize) {
        let bytes = self.entries.iter().map(|(key, entry)| key.len() + entry.latest.frame.len()).sum();
        (self.entries.len() - self.tombstones.len(), self.tombstones.len(), bytes)
    }

    pub(super) fn record_of(&self, version: &Version) -> Record {
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
    /// What a reader is shown of it, unless it is a tombstone.
    pub(super) fn seen_as(&self, key: &str) -> StateEntry {
        StateEntry {
            key: key.to_owned(),
            frame: self.frame.clone(),
            incarnation: self.pair.0,
            revision: self.pair.1,
            local: self.local,
            time_us: FrameView::parse(&self.frame).map_or(0, |view| view.time_us()),
        }
    }

    /// The value.
    pub(super) fn payload(&self) -> &[u8] {
        FrameView::parse(&self.frame).map_or(&[], |view| view.payload())
    }

    fn bytes(&self) -> usize {
        self.frame.len()
    }
}
