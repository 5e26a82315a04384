//! Writing the State of one node: one key after the other, in the order of its pairs.
//!
//! That order is what makes the position exact: what is durable of a space is always a prefix of what its owner
//! wrote, so the pair of the last write tells all. A key is written by compare-and-set on the revision of its last
//! entry; where that is not known, on *absent*. A conflict is settled by a look: what is there is as new, and
//! nothing is to be done, or it is older, and is replaced. Pairs are given once, by the node, so a replica that
//! writes late either writes what is true or finds something newer.
//!
//! A barrier of an incarnation that is new here takes away what an older one left: the keys are listed, and those
//! of an older incarnation deleted, each only as it was found.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use broker::event::Lsn;
use bytes::Bytes;
use codec::{FrameView, Kind, Record, RecordHeader, frame::FrameParts};

use super::message::{self, Headers, LogPlace, Message, SpacePlace, Summary};

/// Revisions of keys that are remembered while a node is here; beyond, they are found out again.
const KNOWN_MAX: usize = 256;

type Pair = (u64, u64);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct StateWriter {
    node: Arc<str>,
    pub(super) summary: Summary,
    /// Marks have moved since the summary was written.
    pub(super) is_late: bool,
    waiting: VecDeque<Waiting>,
    /// Of the first that waits, an operation is under way.
    busy: bool,
    /// Of keys: the revision of the last entry, and the pair that it holds.
    revisions: BTreeMap<String, (u64, Pair)>,
    /// A sweep for a barrier has come to this sequence.
    swept_to: Option<u64>,
}

#[derive(Debug)]
struct Waiting {
    lsn: Lsn,
    space: Arc<str>,
    record: Record,
}

/// What the writer wants done.
#[derive(Debug)]
pub(super) enum Next {
    Nothing,
    /// Write a key.
    Put(Put),
    /// It is there, or something newer is.
    There(Lsn),
    /// Find the next entry of a space from this sequence on.
    Sweep {
        below: String,
        from: u64,
    },
}

/// A key to write.
#[derive(Debug)]
pub(super) struct Put {
    pub(super) key: String,
    /// Revision of its last entry; 0: there is none. `None`: whatever is there.
    pub(super) expected: Option<u64>,
    pub(super) deleted: bool,
    pub(super) headers: Headers,
    pub(super) payload: Bytes,
}

/// What became of the first that waited.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is there, or something newer is.
    Done(Lsn),
    /// It is tried again, as [`StateWriter::next`] says.
    Again,
}

impl StateWriter {
    pub(super) fn at(node: &Arc<str>, summary: Summary) -> Self {
        Self { node: Arc::clone(node), summary, ..Self::default() }
    }

    pub(super) fn push(&mut self, lsn: Lsn, space: &Arc<str>, record: Record) {
        self.waiting.push_back(Waiting { lsn, space: Arc::clone(space), record: message::stored(record) });
    }

    /// Positions of a space from here on are of this run of its owner. It is written with what follows: by
    /// itself it tells nothing, because what is durable was brought by the run before.
    pub(super) fn follow_run(&mut self, space: &Arc<str>, run: u64) {
        self.summary.spaces.entry(Arc::clone(space)).or_default().run = run;
    }

    /// A Log has got further.
    pub(super) fn note_mark(&mut self, stream: &Arc<str>, place: LogPlace) {
        self.summary.logs.insert(Arc::clone(stream), place);
        self.is_late = true;
    }

    pub(super) fn next(&mut self) -> Next {
        if self.busy {
            return Next::Nothing;
        }
        let Some(first) = self.waiting.front() else { return Next::Nothing };
        self.busy = true;
        if first.record.header.kind == Kind::BARRIER {
            let listed = self.summary.spaces.get(&first.space).map_or(0, |at| at.listed);
            if listed != first.record.header.epoch && self.swept_to != Some(u64::MAX) {
                let below = format!("{}/{}", self.node, first.space);
                return Next::Sweep { below, from: self.swept_to.unwrap_or(1) };
            }
            return Next::Put(self.summary_put());
        }
        let Ok(frame) = FrameView::parse(&first.record.body) else {
            // The core lets none of these through; the summary stands for it.
            return Next::Put(self.summary_put());
        };
        let key = format!("{}/{}/{}", self.node, first.space, frame.topic());
        let pair = (first.record.header.epoch, first.record.header.seq);
        let (expected, held) = self.revisions.get(&key).copied().unwrap_or_default();
        if held >= pair {
            // Another replica wrote further than this one knew.
            if let Verdict::Done(lsn) = self.done() {
                return Next::There(lsn);
            }
            return Next::Nothing;
        }
        let mut summary = self.summary.clone();
        let place = summary.spaces.entry(Arc::clone(&first.space)).or_default();
        place.pair = place.pair.max(pair);
        Next::Put(Put {
            expected: Some(expected),
            deleted: first.record.header.kind == Kind::TOMBSTONE,
            headers: summary.headers(),
            payload: message::entry_of(&first.record),
            key,
        })
    }

    /// Where the node stands, by itself.
    pub(super) fn summary_put(&self) -> Put {
        let mut summary = self.summary.clone();
        if let Some(first) = self.waiting.front().filter(|first| first.record.header.kind == Kind::BARRIER) {
            let place = summary.spaces.entry(Arc::clone(&first.space)).or_default();
            let pair = (first.record.header.epoch, first.record.header.seq);
            *place = SpacePlace { pair: place.pair.max(pair), listed: pair.0, ..*place };
        }
        // A late one says less than is true, and costs a repetition.
        let key = format!("{}/summary", self.node);
        Put { key, expected: None, deleted: false, headers: summary.headers(), payload: Bytes::new() }
    }

    /// The key was written, with this revision.
    pub(super) fn written(&mut self, key: String, revision: u64) -> Verdict {
        if self.revisions.len() >= KNOWN_MAX {
            self.revisions.clear();
        }
        let first = self.waiting.front().map(|first| first.record.header);
        let pair = first.map_or((0, 0), |header| (header.epoch, header.seq));
        self.revisions.insert(key, (revision, pair));
        self.done()
    }

    fn done(&mut self) -> Verdict {
        self.busy = false;
        self.is_late = false;
        self.swept_to = None;
        let Some(first) = self.waiting.pop_front() else { return Verdict::Again };
        let place = self.summary.spaces.entry(first.space).or_default();
        let pair = (first.record.header.epoch, first.record.header.seq);
        place.pair = place.pair.max(pair);
        if first.record.header.kind == Kind::BARRIER {
            place.listed = pair.0;
        }
        Verdict::Done(first.lsn)
    }

    /// It did not happen: the same again, later.
    pub(super) fn not_now(&mut self) {
        self.busy = false;
    }

    /// The server refuses it for what it is: what is put aside, and that the rest goes on.
    pub(super) fn refused(&mut self) -> (Verdict, Option<Record>) {
        let record = self.waiting.front().map(|first| first.record.clone());
        (self.done(), record)
    }

    /// What the key holds, because it was not what was expected, or nobody knows what became of the write.
    pub(super) fn found(&mut self, key: &str, found: Option<&Message>) -> Verdict {
        self.busy = false;
        let revision = found.map_or(0, |message| message.sequence);
        let held = found.and_then(|message| message::record_of(&message.payload));
        let held = held.map(|record| (record.header.epoch, record.header.seq));
        self.revisions.insert(key.to_owned(), (revision, held.unwrap_or_default()));
        let Some(first) = self.waiting.front() else { return Verdict::Again };
        let is_entry = matches!(first.record.header.kind, Kind::PUT | Kind::TOMBSTONE);
        let pair = (first.record.header.epoch, first.record.header.seq);
        if is_entry && held.is_some_and(|held| held >= pair) {
            return self.done();
        }
        Verdict::Again
    }

    /// A sweep found this entry, or none any more: the tombstone that is to take its place, if it is stale.
    pub(super) fn swept(&mut self, found: Option<(String, &Message)>) -> Option<Put> {
        let Some((key, message)) = found else {
            self.swept_to = Some(u64::MAX);
            self.busy = false;
            return None;
        };
        self.swept_to = Some(message.sequence + 1);
        let put = self.sweep_put(key, message);
        self.busy = put.is_some();
        put
    }

    /// The tombstone of a sweep was written, or something newer is there; or neither, and it is looked for again.
    pub(super) fn sweep_written(&mut self, expected: u64, settled: bool) {
        self.busy = false;
        if !settled {
            self.swept_to = Some(expected);
        }
    }

    fn sweep_put(&self, key: String, message: &Message) -> Option<Put> {
        let barrier = self.waiting.front()?.record.header;
        let stale = message::record_of(&message.payload)
            .filter(|record| record.header.kind == Kind::PUT && record.header.epoch < barrier.epoch)?;
        let topic = FrameView::parse(&stale.body).ok()?.topic().to_owned();
        let body = FrameParts { topic: &topic, ..FrameParts::default() }.encode();
        // Below every revision that the new incarnation assigns.
        let header = RecordHeader { kind: Kind::TOMBSTONE, epoch: barrier.epoch, seq: 0, ..stale.header };
        Some(Put {
            key,
            expected: Some(message.sequence),
            deleted: true,
            headers: self.summary.headers(),
            payload: message::entry_of(&Record { header, body }),
        })
    }
}
