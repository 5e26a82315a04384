//! What is durable in the journal and not yet in the checkpoint, in memory.
//!
//! Changes gather in an active [`Layer`]. A checkpoint freezes it, commits it while the next layer gathers,
//! and then forgets it. Each layer knows its last lsn, and the commit writes `applied_lsn` with the rest, so
//! a reader that compares the two never applies a layer to a checkpoint that has it already.
//!
//! A layer keeps the last value of each key only: what is overwritten between two checkpoints never
//! reaches the flash. Of Logs it keeps runs, not records.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use codec::{Kind, Record};

use super::{
    index::{self, Key, Run, Runs},
    topics::Topics,
};
use crate::{
    core::event::Lsn,
    store::{
        Source,
        facts::{self, Span},
        journal::Place,
    },
};

/// Changes between two checkpoints.
#[derive(Debug, Default)]
pub(super) struct Layer {
    /// Of the last group in it; 0 when there is none.
    pub(super) last_lsn: Lsn,
    /// Bytes of journal that it covers.
    pub(super) journal_bytes: u64,
    /// Bytes of memory that it holds, about.
    pub(super) cost: usize,
    pub(super) sources: BTreeMap<u32, (Source, Record)>,
    /// A `forget` record stands for a key that the checkpoint is to drop.
    pub(super) state: BTreeMap<(u32, Bytes), Record>,
    /// The body of the last record of each key, and whether it has a value.
    pub(super) locals: BTreeMap<(Kind, Bytes), (Bytes, bool)>,
    pub(super) logs: BTreeMap<u32, LogChanges>,
}

impl Layer {
    fn log(&mut self, source: u32, end: LogEnd) -> &mut LogChanges {
        self.logs.entry(source).or_insert_with(|| LogChanges { end, ..LogChanges::default() })
    }

    /// Keeps the topics of a run that grows no more.
    fn close(&mut self, source: u32, end: LogEnd, Tail { start, run, topics }: Tail) {
        if topics.is_worth_keeping(&run) {
            self.cost += ENTRY_COST + topics.cost();
            self.log(source, end).topics.push((start, run, topics));
        }
    }
}

/// What a layer does to the index of one Log, in the order of the fields.
#[derive(Debug, Clone, Default)]
pub(super) struct LogChanges {
    /// Drop what is below.
    pub(super) first: u64,
    /// Take these ranges out.
    pub(super) cuts: Vec<(u64, u64)>,
    /// Put these in.
    pub(super) runs: Runs,
    /// Topics of runs that grow no more, with their starts, in the order of the journal. Only the checkpoint has a use
    /// for them: what is in memory alone is never left out.
    pub(super) topics: Vec<(u64, Run, Topics)>,
    /// The end of the Log after this layer.
    pub(super) end: LogEnd,
}

impl LogChanges {
    /// Applies the changes to the entries below `until` of older layers and of the checkpoint.
    pub(super) fn apply(&self, runs: &mut Runs, until: Key) {
        self.prune(runs);
        runs.extend(self.runs.range(..until).map(|(key, run)| (*key, *run)));
    }

    /// The first half of [`LogChanges::apply`].
    pub(super) fn prune(&self, runs: &mut Runs) {
        index::raise(runs, self.first);
        for (from, to) in &self.cuts {
            index::cut(runs, *from, *to);
        }
    }
}

/// What is kept of each Log besides its index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LogEnd {
    pub(super) last: u64,
    pub(super) last_epoch: u64,
    pub(super) last_crc: u32,
}

/// A run that may grow, and the topics of its records.
#[derive(Debug)]
struct Tail {
    start: u64,
    run: Run,
    topics: Topics,
}

/// Both layers, and what the next change must know of all before.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    pub(super) active: Layer,
    /// Being committed.
    pub(super) frozen: Option<Arc<Layer>>,
    pub(super) ends: HashMap<u32, LogEnd>,
    /// The run of each Log that the next record may extend: the one at its end, if it was not cut.
    tails: HashMap<u32, Tail>,
    /// Where the last group stands; no run goes on in another segment.
    segment: u64,
    /// Groups that can no longer be read stood here: seqs that are missing behind it were in them.
    lost: Option<Place>,
}

impl Overlay {
    pub(super) fn new(ends: HashMap<u32, LogEnd>) -> Self {
        Self { ends, ..Self::default() }
    }

    /// Groups of which nothing is known any more stood at this place.
    pub(super) fn lose(&mut self, place: Place) {
        self.lost = Some(place);
        // What follows is not behind the last run.
        self.tails.clear();
    }

    /// Takes the effects of a durable group.
    pub(super) fn apply(&mut self, lsn: Lsn, place: Place, records: impl IntoIterator<Item = Record>) {
        self.active.last_lsn = lsn;
        self.active.journal_bytes += place.len;
        if self.segment != place.segment {
            self.segment = place.segment;
            for (source, tail) in std::mem::take(&mut self.tails) {
                let end = self.ends.get(&source).copied().unwrap_or_default();
                self.active.close(source, end, tail);
            }
        }
        for record in records {
            self.apply_record(place, record);
        }
    }

    fn apply_record(&mut self, place: Place, record: Record) {
        let source = record.header.source;
        let layer = &mut self.active;
        match record.header.kind {
            Kind::LOG | Kind::GAP => self.append(place, &record),
            Kind::PUT | Kind::TOMBSTONE | Kind::FORGET => match facts::state_key(&record) {
                Some(key) => {
                    layer.cost += ENTRY_COST + record.body.len();
                    if let Some(old) = layer.state.insert((source, key), record) {
                        layer.cost -= ENTRY_COST + old.body.len();
                    }
                }
                None => malformed(&record),
            },
            Kind::DECLARE => match facts::declared(&record) {
                Some(declared) => drop(layer.sources.insert(source, (declared, record))),
                None => malformed(&record),
            },
            kind if kind.is_journal_only() => {
                if kind == Kind::TABLE {
                    self.raise(source, record.header.seq);
                }
                self.set_local(record);
            }
            _ => {}
        }
    }

    fn set_local(&mut self, record: Record) {
        let Some((key, value)) = facts::local(&record.body) else { return malformed(&record) };
        let layer = &mut self.active;
        layer.cost += ENTRY_COST + record.body.len();
        let new = (record.body, value.is_some());
        if let Some((old, _)) = layer.locals.insert((record.header.kind, key), new) {
            layer.cost -= ENTRY_COST + old.len();
        }
    }

    fn append(&mut self, place: Place, record: &Record) {
        let source = record.header.source;
        let span = Span::of(record).expect("only Log records and gaps are appended");
        let end = self.ends.entry(source).or_default();
        let is_next = span.start > end.last;
        let changes = self.active.log(source, *end);
        if let Some(place) = self.lost
            && end.last > 0
            && span.start > end.last + 1
        {
            // An entry that cannot be read tells its reader what is lost.
            let run = Run { place, last: span.start - 1, bytes: 0, gap: false };
            changes.runs.insert((end.last + 1, facts::FULL), run);
            self.active.cost += ENTRY_COST;
        }
        let changes = self.active.log(source, *end);
        if !is_next {
            // What follows takes the place of what it covers; a change of epoch covers nothing, but no run
            // may reach over it.
            let to = if span.is_full() { span.last } else { span.start - 1 };
            index::cut(&mut changes.runs, span.start, to);
            changes.cuts.push((span.start, to));
            if let Some(tail) = self.tails.remove(&source) {
                self.active.close(source, *end, tail);
            }
            // It may be a record of the same seqs in the same group as theirs.
            let topics = &mut self.active.log(source, *end).topics;
            while topics.pop_if(|(_, run, _)| run.has_group(place)).is_some() {}
        }
        let changes = self.active.log(source, *end);
        if record.header.seq >= end.last {
            let gap = record.header.kind == Kind::GAP;
            let last_crc = if gap { 0 } else { crc32c::crc32c(&record.body) };
            *end = LogEnd { last: record.header.seq, last_epoch: record.header.epoch, last_crc };
            changes.end = *end;
        }
        let bytes = u32::try_from(record.wire_len()).expect("bodies are bounded by FRAME_MAX");
        if record.header.kind == Kind::LOG {
            if let Some(Tail { start, run, topics }) = self.tails.get_mut(&source)
                && run.extend(place, span.last, bytes)
            {
                changes.runs.insert((*start, facts::FULL), *run);
                topics.add(record);
                return;
            }
            let run = Run { place, last: span.last, bytes, gap: false };
            changes.runs.insert((span.start, span.order), run);
            if is_next {
                let mut topics = Topics::default();
                topics.add(record);
                if let Some(tail) = self.tails.insert(source, Tail { start: span.start, run, topics }) {
                    self.active.close(source, *end, tail);
                }
            }
        } else {
            if let Some(tail) = self.tails.remove(&source) {
                self.active.close(source, *end, tail);
            }
            let changes = self.active.log(source, *end);
            let run = Run { place, last: span.last, bytes, gap: true };
            changes.runs.insert((span.start, span.order), run);
        }
        // For the entry, and the cut that there may be.
        self.active.cost += ENTRY_COST;
    }

    fn raise(&mut self, source: u32, first: u64) {
        let end = *self.ends.entry(source).or_default();
        let changes = self.active.log(source, end);
        changes.first = changes.first.max(first);
        index::raise(&mut changes.runs, first);
        if self.tails.get(&source).is_some_and(|tail| tail.start < first) {
            self.tails.remove(&source);
        }
    }

    /// Freezes the active layer for a checkpoint; `None` if nothing changed. After a failed checkpoint the
    /// frozen layer is returned again, and the active one goes on growing.
    pub(super) fn freeze(&mut self) -> Option<Arc<Layer>> {
        if self.frozen.is_none() && self.active.last_lsn > 0 {
            self.frozen = Some(Arc::new(std::mem::take(&mut self.active)));
        }
        self.frozen.clone()
    }

    /// What a reader of this Log from this seq on must apply to a checkpoint, oldest first.
    pub(super) fn changes(&self, source: u32, from: u64) -> Vec<Page> {
        let layers = self.frozen.as_deref().into_iter().chain([&self.active]);
        layers.filter_map(|layer| Some(Page::new(layer.last_lsn, layer.logs.get(&source)?, from))).collect()
    }
}

/// The part of a layer's changes that matters to one read.
#[derive(Debug)]
pub(super) struct Page {
    /// A checkpoint at or above this lsn has them already.
    pub(super) last_lsn: Lsn,
    pub(super) changes: LogChanges,
    /// The layer's runs from here on are not in this page.
    pub(super) until: Key,
}

impl Page {
    fn new(last_lsn: Lsn, changes: &LogChanges, from: u64) -> Self {
        let reaching = changes.runs.range(..(from, facts::EMPTY)).next_back();
        let mut rest = changes.runs.range((from, facts::EMPTY)..);
        let runs = reaching.into_iter().chain(rest.by_ref().take(RUNS_PER_READ));
        let runs = runs.map(|(key, run)| (*key, *run)).collect();
        let until = rest.next().map_or(END, |(key, _)| *key);
        let (first, cuts, end) = (changes.first, changes.cuts.clone(), changes.end);
        let changes = LogChanges { first, cuts, runs, end, topics: Vec::new() };
        Self { last_lsn, changes, until }
    }
}

fn malformed(record: &Record) {
    tracing::error!(
        kind = record.header.kind.0,
        source = record.header.source,
        "the store cannot read a record"
    );
}

/// Memory of an entry of a map besides its value, about.
const ENTRY_COST: usize = 128;
/// Behind every place.
pub(super) const END: Key = (u64::MAX, u8::MAX);
/// A read looks at this many runs of a layer.
pub(super) const RUNS_PER_READ: usize = 64;
