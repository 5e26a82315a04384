//! A store in memory, for simulation and simulated fleets.
//!
//! It does nothing by itself: groups wait until its owner says that they are durable ([`MemStore::flush`],
//! [`MemStore::flush_some`]), so that a simulation decides what a crash loses. [`MemStore::auto`] makes
//! everything durable when it is polled. It keeps decoded records, no bytes of a journal, and is at the same
//! time the model that the store on disk is tested against: what both say after any history is equal.

use std::{
    collections::{BTreeMap, VecDeque},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use codec::{Kind, Record};

use super::{
    Extent, LocalFact, LogRecovery, Recovered, Source, Store, StoreEvent, Stretches,
    facts::{self, Span},
};
use crate::core::event::{Group, Lsn, ReadRequest};

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct MemStore {
    image: Image,
    waiting: VecDeque<Group>,
    events: VecDeque<StoreEvent>,
    auto: bool,
    /// Keeps what can be read, and nothing to recover from.
    only_logs: bool,
    refusing: Option<String>,
    waker: Option<Waker>,
}

impl MemStore {
    /// An empty store; its owner makes groups durable.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty store that makes every group durable when it is next polled.
    #[must_use]
    pub fn auto() -> Self {
        Self { auto: true, ..Self::default() }
    }

    /// As [`MemStore::auto`], for a broker that is never started again: keeps Logs, which are read, and forgets
    /// what is needed to [`recover`](Self::recover) only.
    #[must_use]
    pub fn of_logs() -> Self {
        Self { auto: true, only_logs: true, ..Self::default() }
    }

    /// Makes every waiting group durable.
    pub fn flush(&mut self) {
        self.flush_some(usize::MAX);
    }

    /// Makes the first `groups` of the waiting groups durable, or refuses all that wait if this store
    /// refuses writes.
    pub fn flush_some(&mut self, groups: usize) {
        let count = groups.min(self.waiting.len());
        if count == 0 {
            return;
        }
        if let Some(reason) = &self.refusing {
            let lsn = self.waiting[0].lsn;
            self.waiting.clear();
            self.events.push_back(StoreEvent::Refused { lsn, reason: reason.clone() });
        } else {
            for mut group in self.waiting.drain(..count) {
                if self.only_logs {
                    group
                        .records
                        .retain(|record| matches!(record.header.kind, Kind::LOG | Kind::GAP | Kind::TABLE));
                }
                self.image.apply(group);
            }
            self.events.push_back(StoreEvent::Persisted(self.image.last_lsn));
        }
        self.wake();
    }

    /// Groups submitted and not yet durable.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        self.waiting.len()
    }

    /// From now on refuses writes for this reason (a full disk), or takes them again (`None`).
    pub fn refuse(&mut self, reason: Option<&str>) {
        self.refusing = reason.map(str::to_owned);
    }

    /// From now on is low on space for this reason, or has room again (`None`).
    pub fn set_low(&mut self, reason: Option<&str>) {
        let event = reason.map_or(StoreEvent::Ample, |reason| StoreEvent::Low { reason: reason.to_owned() });
        self.events.push_back(event);
        self.wake();
    }

    /// The power is cut: what was not durable is gone, and so is every completion that nobody took.
    #[must_use]
    pub fn crash(self) -> (Self, Recovered) {
        let store = Self { image: self.image, auto: self.auto, ..Self::default() };
        let recovered = store.recover();
        (store, recovered)
    }

    /// What opening this store would find: all that is durable.
    #[must_use]
    pub fn recover(&self) -> Recovered {
        self.image.recovered()
    }

    /// A copy of the disk: what is durable, and nothing that waits.
    #[must_use]
    pub fn copy(&self) -> Self {
        Self { image: self.image.clone(), auto: self.auto, ..Self::default() }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Store for MemStore {
    fn submit(&mut self, group: Group) {
        let next = self.waiting.back().map_or(self.image.last_lsn, |last| last.lsn) + 1;
        assert!(group.lsn >= next, "group {} was submitted twice", group.lsn);
        if group.lsn > next {
            // Submitted before the refusal of an earlier one was seen: refused with it.
            return;
        }
        self.waiting.push_back(group);
        if self.auto {
            self.wake();
        }
    }

    fn read(&mut self, request: ReadRequest) {
        let (records, next) = self.image.read(&request);
        self.events.push_back(StoreEvent::Read { read: request.read, records, next });
        self.wake();
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<StoreEvent> {
        if self.auto {
            self.flush();
        }
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(event);
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// What is durable.
#[derive(Debug, Default, Clone)]
struct Image {
    last_lsn: Lsn,
    sources: BTreeMap<u32, Source>,
    state: BTreeMap<(u32, Bytes), Record>,
    locals: BTreeMap<(Kind, Bytes), Bytes>,
    logs: BTreeMap<u32, Log>,
}

#[derive(Debug, Default, Clone)]
struct Log {
    records: BTreeMap<(u64, u8), Record>,
    last: u64,
    last_epoch: u64,
    last_crc: u32,
}

impl Image {
    fn apply(&mut self, group: Group) {
        assert_eq!(group.lsn, self.last_lsn + 1, "groups become durable in order");
        self.last_lsn = group.lsn;
        for record in group.records {
            self.apply_record(record);
        }
    }

    fn apply_record(&mut self, record: Record) {
        let source = record.header.source;
        match record.header.kind {
            Kind::LOG | Kind::GAP => self.logs.entry(source).or_default().append(record),
            Kind::PUT | Kind::TOMBSTONE => {
                if let Some(key) = facts::state_key(&record) {
                    self.state.insert((source, key), record);
                }
            }
            Kind::FORGET => {
                if let Some(key) = facts::state_key(&record) {
                    self.state.remove(&(source, key));
                }
            }
            Kind::DECLARE => {
                if let Some(declared) = facts::declared(&record) {
                    self.sources.insert(source, declared);
                }
            }
            kind if kind.is_journal_only() => {
                if kind == Kind::TABLE {
                    self.logs.entry(source).or_default().drop_below(record.header.seq);
                }
                match facts::local(&record.body) {
                    Some((key, Some(value))) => drop(self.locals.insert((kind, key), value)),
                    Some((key, None)) => drop(self.locals.remove(&(kind, key))),
                    None => {}
                }
            }
            _ => {}
        }
    }

    /// Leaves out whatever it may, and stops wherever it may: whoever reads must stand that.
    fn read(&self, request: &ReadRequest) -> (Vec<Record>, u64) {
        let (mut out, mut next) = (Vec::new(), request.from);
        let (mut bytes, mut enough) = (0, false);
        let Some(log) = self.logs.get(&request.source) else { return (out, next) };
        // The entry in front may be a gap that reaches over the wanted seq.
        let reaching = log.records.range(..(request.from, facts::EMPTY)).next_back();
        let following = log.records.range((request.from, facts::EMPTY)..);
        for (_, record) in reaching.into_iter().chain(following) {
            let span = Span::of(record).expect("only Log records and gaps are kept here");
            if span.last < request.from {
                continue;
            }
            if enough && bytes + record.wire_len() > request.bytes_max {
                break;
            }
            bytes += record.wire_len();
            enough |= span.is_full();
            next = next.max(span.last + u64::from(span.is_full()));
            if request.wants(record) {
                out.push(record.clone());
            }
        }
        (out, next)
    }

    fn recovered(&self) -> Recovered {
        Recovered {
            last_lsn: self.last_lsn,
            sources: self.sources.values().cloned().collect(),
            logs: self.logs.iter().map(|(source, log)| log.recovered(*source)).collect(),
            state: self.state.values().cloned().collect(),
            locals: self
                .locals
                .iter()
                .map(|((kind, key), value)| LocalFact { kind: *kind, key: key.clone(), value: value.clone() })
                .collect(),
            ..Recovered::default()
        }
    }
}

impl Log {
    fn append(&mut self, record: Record) {
        let span = Span::of(&record).expect("only Log records and gaps are appended");
        if span.is_full() {
            let covered: Vec<_> = self
                .records
                .range((span.start, facts::EMPTY)..=(span.last, facts::FULL))
                .filter(|(key, covered)| is_covered(**key, covered, span))
                .map(|(key, _)| *key)
                .collect();
            for key in covered {
                self.records.remove(&key);
            }
        }
        if record.header.seq >= self.last {
            self.last = record.header.seq;
            self.last_epoch = record.header.epoch;
            self.last_crc = if record.header.kind == Kind::LOG { crc32c::crc32c(&record.body) } else { 0 };
        }
        self.records.insert((span.start, span.order), record);
    }

    fn drop_below(&mut self, first: u64) {
        let dropped: Vec<_> = self
            .records
            .range(..=(first, u8::MAX))
            .filter(|(_, record)| {
                let span = Span::of(record).expect("only Log records and gaps are kept here");
                facts::is_dropped(record.header.kind == Kind::GAP, span.last, first)
            })
            .map(|(key, _)| *key)
            .collect();
        for key in dropped {
            self.records.remove(&key);
        }
    }

    fn recovered(&self, source: u32) -> LogRecovery {
        let mut kept = Stretches::default();
        for (&(start, _), record) in &self.records {
            let records = u64::from(record.header.kind == Kind::LOG);
            kept.push(Extent { start, bytes: record.wire_len() as u64, records });
        }
        LogRecovery {
            source,
            first: self.records.keys().next().map_or(0, |(start, _)| *start),
            last: self.last,
            last_epoch: self.last_epoch,
            last_crc: self.last_crc,
            kept,
        }
    }
}

/// A change of epoch right before a record is not covered by that record, only by a gap around both.
fn is_covered(key: (u64, u8), record: &Record, by: Span) -> bool {
    let inside = Span::of(record).is_some_and(|span| span.last <= by.last);
    inside && (key.1 == facts::FULL || key.0 > by.start)
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::{super::facts::samples::*, *};

    fn next(store: &mut MemStore) -> Option<StoreEvent> {
        match store.poll_event(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(event) => Some(event),
            Poll::Pending => None,
        }
    }

    fn read(store: &mut MemStore, from: u64, bytes_max: usize) -> Vec<u64> {
        store.read(ReadRequest { read: 1, source: 1, from, bytes_max, wanted: None });
        match next(store) {
            Some(StoreEvent::Read { records, .. }) => records.iter().map(|r| r.header.seq).collect(),
            other => panic!("expected the read, not {other:?}"),
        }
    }

    fn filled(records: Vec<Record>) -> MemStore {
        let mut store = MemStore::auto();
        store.submit(group(1, records));
        assert!(matches!(next(&mut store), Some(StoreEvent::Persisted(1))));
        store
    }

    #[test]
    fn a_crash_loses_what_was_not_synced_and_nothing_else() {
        let mut store = MemStore::new();
        for lsn in 1..=3 {
            store.submit(group(lsn, vec![log(1, lsn, b"x")]));
        }
        store.flush_some(2);
        let (mut store, recovered) = store.crash();
        assert_eq!((recovered.last_lsn, recovered.logs[0].last), (2, 2));
        assert_eq!(read(&mut store, 0, usize::MAX), [1, 2]);
    }

    #[test]
    fn a_refusal_takes_every_later_group_with_it_and_the_refused_lsn_is_tried_again() {
        let mut store = MemStore::new();
        store.refuse(Some("disk full"));
        store.submit(group(1, vec![]));
        store.submit(group(2, vec![]));
        store.flush();
        store.submit(group(3, vec![]));
        assert!(matches!(next(&mut store), Some(StoreEvent::Refused { lsn: 1, .. })));
        assert!(next(&mut store).is_none());
        store.refuse(None);
        store.submit(group(1, vec![log(1, 1, b"again")]));
        store.flush();
        assert!(matches!(next(&mut store), Some(StoreEvent::Persisted(1))));
    }

    #[test]
    fn a_read_returns_at_least_one_record_and_starts_at_the_next_that_exists() {
        let mut store = filled(vec![log(1, 3, b"x"), log(1, 4, b"x"), log(2, 9, b"x")]);
        assert_eq!(read(&mut store, 1, 0), [3]);
        assert_eq!(read(&mut store, 4, usize::MAX), [4]);
        assert_eq!(read(&mut store, 5, usize::MAX), [0u64; 0]);
    }

    #[test]
    fn gaps_stand_in_place_of_what_they_cover() {
        let mut store = filled((1..=6).map(|seq| log(1, seq, b"x")).chain([gap(1, 2, 4)]).collect());
        assert_eq!(read(&mut store, 0, usize::MAX), [1, 4, 5, 6]);
        assert_eq!(read(&mut store, 3, 0), [4], "the gap that covers it");
    }

    #[test]
    fn a_read_does_not_end_on_a_gap_that_covers_nothing() {
        let mut store = filled(vec![log(1, 5, b"x"), gap(1, 6, 5), log(1, 6, b"x"), log(1, 7, b"x")]);
        assert_eq!(read(&mut store, 6, 0), [5, 6]);
        assert_eq!(read(&mut store, 7, 0), [7]);
    }

    #[test]
    fn a_table_drops_what_is_below_its_first_but_not_the_gap_that_ends_there() {
        let mut store =
            filled((1..=6).map(|seq| log(1, seq, b"x")).chain([gap(1, 1, 3), table(1, 4)]).collect());
        assert_eq!(read(&mut store, 0, usize::MAX), [3, 4, 5, 6]);
        let recovered = store.recover();
        assert_eq!((recovered.logs[0].first, recovered.logs[0].last), (1, 6));
        assert_eq!(recovered.locals[0].kind, Kind::TABLE);
    }

    #[test]
    fn an_emptied_log_still_knows_its_last_seq() {
        let store = filled(vec![log(1, 1, b"x"), table(1, 2)]);
        let recovered = store.recover();
        assert_eq!((recovered.logs[0].first, recovered.logs[0].last), (0, 1));
    }

    #[test]
    fn a_fact_without_value_deletes() {
        let store = filled(vec![
            fact(Kind::META, b"a", Some(b"1")),
            fact(Kind::META, b"b", Some(b"1")),
            fact(Kind::META, b"a", None),
        ]);
        let keys: Vec<_> = store.recover().locals.into_iter().map(|fact| fact.key).collect();
        assert_eq!(keys, ["b"]);
    }

    #[test]
    fn state_keeps_tombstones_and_the_last_of_each_key() {
        let mut tombstone = put(1, "b", 3, b"");
        tombstone.header.kind = Kind::TOMBSTONE;
        let store = filled(vec![put(1, "b", 1, b"x"), put(1, "a", 2, b"y"), tombstone]);
        let state = store.recover().state;
        assert_eq!(state.iter().map(|r| r.header.kind).collect::<Vec<_>>(), [Kind::PUT, Kind::TOMBSTONE]);
    }

    #[tokio::test]
    async fn a_waiting_task_is_woken() {
        let mut store = MemStore::auto();
        let event = std::future::poll_fn(|cx| store.poll_event(cx));
        assert!(tokio::time::timeout(std::time::Duration::ZERO, event).await.is_err());
        store.submit(group(1, vec![]));
        let event = std::future::poll_fn(|cx| store.poll_event(cx)).await;
        assert!(matches!(event, StoreEvent::Persisted(1)));
    }
}
