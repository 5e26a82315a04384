//! Spaces of which a store that replicas share holds the entries: those of nodes in a tier, and the tier's own.

use std::sync::Arc;

use codec::{FrameView, Kind, Record, RecordHeader};

use super::{BARRIER, Few, Space, Version, lineage::Lineage};
use crate::core::{event::tier::AdoptedSpace, ledger::Ledger};

impl Space {
    /// What is durable of it elsewhere: everything up to a position. Its entries are not needed here: what comes
    /// again is told by its pair.
    pub(in crate::core) fn adopted(&mut self, adopted: &AdoptedSpace) {
        self.at = (adopted.incarnation, adopted.revision);
        self.durable = self.at;
        self.horizon.pair = self.at;
        self.horizon.listed = adopted.listed;
        self.complete_in = adopted.listed;
        self.lineage = Lineage::of(adopted.run);
    }

    /// Nobody's any more.
    pub(in crate::core) fn vacate(&mut self) {
        let (source, index) = (self.source, self.index);
        let nobody = crate::store::Source {
            number: source,
            origin: "".into(),
            kind: crate::store::SourceKind::State,
            name: "".into(),
            class: self.class,
        };
        *self = Self::new(&nobody, index, false);
    }

    /// A durable version of a key that is kept elsewhere: only that nothing older may come again is remembered.
    pub(super) fn forget_durable(&mut self, key: &str, version: &Version) {
        self.horizon.pair = self.horizon.pair.max(version.pair);
        if self.entries.get(key).is_some_and(|entry| entry.latest.local == version.local) {
            self.entries.remove(key);
        }
    }

    /// The owner has listed its source under an incarnation that is new here: what is kept elsewhere of older
    /// ones goes, which only that store can see to.
    pub(in crate::core) fn barrier_elsewhere(&self, ledger: &mut Ledger, record: &Record) {
        if self.horizon.listed != record.header.epoch {
            let header = RecordHeader { source: self.source, class: self.class as u8, ..record.header };
            ledger.write(Record { header, body: record.body.clone() });
        }
    }

    /// The bucket that this is a mirror of is a new one. What stood in the older is not deleted by that: nothing
    /// is said of it until a barrier is.
    pub(in crate::core) fn begin_mirror(&mut self, incarnation: u64) {
        self.entries = Few::new();
        self.changes = Few::new();
        self.tombstones = Few::new();
        self.scopes = None;
        self.at = (incarnation, 0);
        self.durable = (0, 0);
        self.horizon.pair = (0, 0);
        self.horizon.listed = incarnation;
        // Local revisions are those of the bucket; what was watched before is too old.
        self.horizon.local = u64::MAX - 1;
        (self.local, self.seen) = (0, 0);
    }

    /// Of a mirror: everything that there was when it began has been said.
    pub(in crate::core) fn is_whole(&self) -> bool {
        self.durable.0 != 0 && self.durable.0 == self.at.0
    }

    /// Places an entry as the bucket has it, which is durable. None: it is known.
    pub(in crate::core) fn mirror(&mut self, record: &Record) -> Option<(Arc<str>, Version)> {
        let kind = record.header.kind;
        if kind != Kind::PUT && kind != Kind::TOMBSTONE {
            return None;
        }
        let view = FrameView::parse(&record.body).ok()?;
        let pair = (record.header.epoch, record.header.seq);
        if pair.0 != self.at.0 || self.entries.get(view.topic()).is_some_and(|held| held.latest.pair >= pair)
        {
            return None;
        }
        let key = self.key(view.topic());
        let header = RecordHeader { aux: pair.1, ..record.header };
        let version = self.place(&key, header, bytes::Bytes::copy_from_slice(&record.body));
        Some((key, version))
    }

    /// All that the bucket held at this revision has been said.
    pub(in crate::core) fn mirrored_upto(&mut self, revision: u64) {
        let first = !self.is_whole();
        self.at.1 = self.at.1.max(revision);
        self.durable = self.at;
        self.local = self.local.max(revision);
        self.seen = self.local;
        if first {
            self.horizon.local = revision;
            if self.latest(BARRIER).is_some() {
                // What is not there now does not exist: who held it before is told so by name.
                self.horizon.pair = (self.at.0, revision);
            }
        }
    }
}
