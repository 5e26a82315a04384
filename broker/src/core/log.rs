//! A Log: an append-only stream whose entries get (epoch, seq) once and keep it through every hop.
//!
//! Invariants: seq is consecutive, counting what a gap covers; nobody is shown a record before it is
//! durable (`durable_next`); (epoch, seq) is never reused.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use super::{
    client::ClientIx,
    event::Origin,
    forecast::Forecast,
    ledger::{Effect, Ledger},
    policy::Policy,
    retention::{Acked, Removed, Upkeep},
    thin::LEVELS,
};
use crate::{
    limits,
    store::{Extent, LogRecovery, Source, Stretches},
};

/// A Log is known by its number in the store.
pub(super) type LogId = u32;

#[derive(Debug)]
pub(super) struct Log {
    pub(super) id: LogId,
    pub(super) origin: Origin,
    pub(super) stream: Arc<str>,
    pub(super) class: Class,
    /// (first seq, epoch), ascending.
    pub(super) epochs: Vec<(u64, u64)>,
    /// Oldest seq that policy keeps.
    pub(super) first: u64,
    /// Seq of the next append.
    pub(super) next: u64,
    /// Everything below is durable.
    pub(super) durable_next: u64,
    /// crc32c of the frame at `next - 1`; 0 if that is a gap or nothing.
    pub(super) last_crc: u32,
    /// Bytes appended since this process started.
    pub(super) appended: u64,
    /// What is kept from `first` on.
    pub(super) kept: Stretches,
    pub(super) policy: Policy,
    /// What became of the seqs below `first`.
    pub(super) removed: Removed,
    /// Everything below is thinned at the width of this level, ascending in width and so descending in seq.
    pub(super) thinned_to: [u64; LEVELS],
    pub(super) upkeep: Upkeep,
    pub(super) acked: Acked,
    pub(super) forecast: Forecast,
    /// Clients that hold a cursor at the head: they get what matches as it becomes durable.
    pub(super) consumers: BTreeSet<ClientIx>,
    /// A newer source has taken over this name: reads only.
    pub(super) retired: bool,
    tail: VecDeque<Record>,
    tail_bytes: usize,
    tail_bytes_max: usize,
}

impl Log {
    pub(super) fn new(source: &Source, policy: Policy, first: u64) -> Self {
        Self {
            id: source.number,
            origin: Arc::clone(&source.origin),
            stream: Arc::clone(&source.name),
            class: source.class,
            epochs: Vec::new(),
            first,
            next: first,
            durable_next: first,
            last_crc: 0,
            appended: 0,
            kept: Stretches::default(),
            policy,
            removed: Removed::default(),
            thinned_to: [first; LEVELS],
            upkeep: Upkeep::default(),
            acked: Acked::default(),
            forecast: Forecast::default(),
            consumers: BTreeSet::new(),
            retired: false,
            tail: VecDeque::new(),
            tail_bytes: 0,
            tail_bytes_max: limits::LOG_TAIL_BYTES,
        }
    }

    /// Takes over what the store recovered.
    pub(super) fn recover(&mut self, found: &LogRecovery) {
        self.first = self.first.max(found.first.max(1));
        self.next = self.next.max(found.last + 1);
        self.durable_next = self.next;
        self.last_crc = found.last_crc;
        self.kept = found.kept.clone();
        if self.epochs.is_empty() && found.last > 0 {
            self.epochs.push((self.first, found.last_epoch));
        }
    }

    /// Takes over the stored table.
    pub(super) fn recover_table(&mut self, table: &proto::LogTable) {
        self.epochs = table.epochs.iter().map(|range| (range.from, range.epoch)).collect();
        self.first = self.first.max(table.first);
        self.removed = Removed::stored(&table.removed);
        for (level, to) in table.thinned_to.iter().take(LEVELS).enumerate() {
            self.thinned_to[level] = *to;
        }
        if let Some((from, _)) = self.epochs.last() {
            self.next = self.next.max(*from);
            self.durable_next = self.next;
        }
    }

    /// Whose, and which stream.
    pub(super) fn name(&self) -> (Origin, Arc<str>) {
        (Arc::clone(&self.origin), Arc::clone(&self.stream))
    }

    /// The node that a Log `down/<node>` of the tier is for.
    pub(super) fn down_to(&self) -> Option<&str> {
        self.stream.strip_prefix("down/").filter(|_| self.origin.is_empty())
    }

    /// The epoch of the next append.
    pub(super) fn epoch(&self) -> u64 {
        self.epochs.last().map_or(0, |(_, epoch)| *epoch)
    }

    /// The epoch of the record at `seq`.
    pub(super) fn epoch_at(&self, seq: u64) -> u64 {
        self.epochs.iter().rev().find(|(from, _)| *from <= seq).map_or(0, |(_, epoch)| *epoch)
    }

    /// Appends a message of this Log's own origin. `publisher` is the mark of the client that published it.
    pub(super) fn append(&mut self, ledger: &mut Ledger, flags: Flags, publisher: u64, frame: Bytes) -> u64 {
        let header = RecordHeader {
            kind: Kind::LOG,
            class: self.class as u8,
            flags,
            source: self.id,
            epoch: self.epoch(),
            seq: self.next,
            aux: publisher,
        };
        self.push(ledger, Record { header, body: frame });
        header.seq
    }

    /// Takes a record or gap as it came from another broker; the caller has checked that it is the next.
    pub(super) fn import(&mut self, ledger: &mut Ledger, mut record: Record) {
        record.header.source = self.id;
        record.header.class = self.class as u8;
        record.header.flags = record.header.flags.union(Flags::IMPORTED);
        record.header.aux = 0;
        if record.body.len() < limits::PARK_COPY_BYTES {
            // The tail must not keep the batch that a small record came in.
            record.body = Bytes::copy_from_slice(&record.body);
        }
        self.tail_bytes_max = limits::IMPORTED_TAIL_BYTES;
        self.push(ledger, record);
    }

    fn push(&mut self, ledger: &mut Ledger, record: Record) {
        let seq = record.header.seq;
        self.next = seq + 1;
        self.last_crc = if record.header.kind == Kind::LOG { crc32c::crc32c(&record.body) } else { 0 };
        self.appended += record.wire_len() as u64;
        self.kept.push(extent(&record));
        self.tail_bytes += record.wire_len();
        self.tail.push_back(record.clone());
        while self.tail_bytes > self.tail_bytes_max
            && self.tail.front().is_some_and(|oldest| oldest.header.seq < self.durable_next)
        {
            let oldest = self.tail.pop_front().expect("looked at the front");
            self.tail_bytes -= oldest.wire_len();
        }
        ledger.write(record);
        ledger.after(Effect::LogDurable { log: self.id, seq });
    }

    /// The record at `seq`, or the first after it, if it is still in memory.
    pub(super) fn in_tail(&self, seq: u64) -> Option<&Record> {
        let oldest = self.tail.front()?;
        if seq < range_of(oldest).0 {
            return None;
        }
        let at = self.tail.partition_point(|record| record.header.seq < seq);
        self.tail.get(at)
    }

    /// A newer source has taken over the name: from now on this one is only read.
    pub(super) fn retire(&mut self) {
        self.retired = true;
        let durable_next = self.durable_next;
        self.tail.retain(|record| record.header.seq >= durable_next);
        self.tail_bytes = self.tail.iter().map(Record::wire_len).sum();
    }

    /// crc32c of the frame at `seq`, if it is known without reading the store.
    pub(super) fn crc_at(&self, seq: u64) -> Option<u32> {
        if seq + 1 == self.next {
            return Some(self.last_crc);
        }
        let record = self.in_tail(seq)?;
        (record.header.seq == seq && record.header.kind == Kind::LOG).then(|| crc32c::crc32c(&record.body))
    }

    /// A gap takes the place of what it covers, in memory too.
    pub(super) fn cut_tail(&mut self, gap: &Record) {
        let (from, to) = range_of(gap);
        let begin = self.tail.partition_point(|record| record.header.seq < from);
        let end = self.tail.partition_point(|record| record.header.seq <= to);
        if begin == end {
            return;
        }
        let covered: usize = self.tail.drain(begin..end).map(|record| record.wire_len()).sum();
        self.tail_bytes = self.tail_bytes - covered + gap.wire_len();
        self.tail.insert(begin, gap.clone());
    }

    /// Bytes kept behind `seq`, to the precision of a stretch.
    pub(super) fn bytes_after(&self, seq: u64) -> u64 {
        if seq.saturating_add(1) >= self.next { 0 } else { self.kept.bytes_from(seq + 1) }
    }

    /// The seq where this Log's history begins, whatever policy removed of it since.
    pub(super) fn begin(&self) -> u64 {
        self.epochs.first().map_or(1, |(from, _)| *from).min(self.first)
    }

    /// What policy removed from `from` on and below `first`, as gaps.
    pub(super) fn front_gaps(&self, mut from: u64) -> Vec<Record> {
        let mut gaps = Vec::new();
        while from < self.first {
            let (to, reason) = self.removed.at(from, self.first - 1);
            gaps.push(gap(self, from, to, reason));
            from = to + 1;
        }
        gaps
    }

    /// From `from` on, everything is under a new epoch.
    pub(super) fn begin_epoch(&mut self, ledger: &mut Ledger, from: u64, epoch: u64) {
        self.epochs.push((from, epoch));
        self.write_table(ledger);
    }

    pub(super) fn write_table(&self, ledger: &mut Ledger) {
        let table = proto::LogTable {
            epochs: self.epochs.iter().map(|&(from, epoch)| proto::EpochRange { from, epoch }).collect(),
            first: self.first,
            removed: self.removed.to_store(),
            thinned_to: self.thinned_to.to_vec(),
        };
        let key = Bytes::copy_from_slice(&self.id.to_be_bytes());
        ledger.write_local_of(Kind::TABLE, self.id, self.first, key, Some(codec::encode(&table)));
    }
}

/// A Log or gap record as retention counts it.
pub(super) fn extent(record: &Record) -> Extent {
    let records = u64::from(record.header.kind == Kind::LOG);
    Extent { start: range_of(record).0, bytes: record.wire_len() as u64, records }
}

/// The part of a gap from `from` on: what stands below is not this gap's to tell where it arrives.
pub(super) fn gap_from(mut record: Record, from: u64) -> Record {
    if record.header.kind == Kind::GAP
        && let Ok(mut gap) = codec::decode::<proto::Gap>(record.body.clone())
        && gap.from < from
        && from <= gap.to
    {
        gap.count = gap.count.min(gap.to + 1 - from);
        gap.from = from;
        record.body = codec::encode(&gap);
    }
    record
}

/// The part of a gap up to `to`.
pub(super) fn gap_to(mut record: Record, to: u64) -> Record {
    if let Ok(mut gap) = codec::decode::<proto::Gap>(record.body.clone())
        && gap.from <= to
        && to < gap.to
    {
        gap.count = gap.count.min(to + 1 - gap.from);
        gap.to = to;
        record.header.seq = to;
        record.body = codec::encode(&gap);
    }
    record
}

/// The seqs that a Log or gap record stands for.
pub(super) fn range_of(record: &Record) -> (u64, u64) {
    let to = record.header.seq;
    if record.header.kind != Kind::GAP {
        return (to, to);
    }
    match codec::decode::<proto::Gap>(record.body.clone()) {
        Ok(gap) => (gap.from, to),
        Err(_) => (to, to),
    }
}

/// Whether a gap stands for seqs that were never of this Log.
pub(super) fn is_hole(record: &Record) -> bool {
    let gap = codec::decode::<proto::Gap>(record.body.clone());
    gap.is_ok_and(|gap| gap.reason() == proto::GapReason::NotHere)
}

/// A gap record for seqs that are not there any more.
pub(super) fn gap(log: &Log, from: u64, to: u64, reason: proto::GapReason) -> Record {
    let gap =
        proto::Gap { from, to, count: (to + 1).saturating_sub(from), reason: reason as i32, new_epoch: 0 };
    let header = RecordHeader {
        kind: Kind::GAP,
        class: log.class as u8,
        flags: Flags::default(),
        source: log.id,
        epoch: log.epoch_at(to),
        seq: to,
        aux: 0,
    };
    Record { header, body: codec::encode(&gap) }
}
