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
    ledger::{Effect, Ledger},
};
use crate::{
    limits,
    store::{LogRecovery, Source},
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
    /// Bytes kept from `first` on.
    pub(super) bytes: u64,
    /// Quota.
    pub(super) bytes_max: u64,
    /// Clients that hold a cursor at the head: they get what matches as it becomes durable.
    pub(super) consumers: BTreeSet<ClientIx>,
    /// A newer source has taken over this name: reads only.
    pub(super) retired: bool,
    tail: VecDeque<Record>,
    tail_bytes: usize,
    tail_bytes_max: usize,
    /// (first seq, bytes) of stretches of about 64 KiB, for retention.
    stretches: VecDeque<(u64, u64)>,
}

/// A stretch is closed at this size.
const STRETCH_BYTES: u64 = 64 << 10;

impl Log {
    pub(super) fn new(source: &Source, bytes_max: u64, first: u64) -> Self {
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
            bytes: 0,
            bytes_max,
            consumers: BTreeSet::new(),
            retired: false,
            tail: VecDeque::new(),
            tail_bytes: 0,
            tail_bytes_max: limits::LOG_TAIL_BYTES,
            stretches: VecDeque::new(),
        }
    }

    /// Takes over what the store recovered.
    pub(super) fn recover(&mut self, found: &LogRecovery) {
        self.first = self.first.max(found.first.max(1));
        self.next = self.next.max(found.last + 1);
        self.durable_next = self.next;
        self.last_crc = found.last_crc;
        self.stretches = found.stretches.iter().copied().collect();
        self.bytes = self.stretches.iter().map(|(_, bytes)| bytes).sum();
        if self.epochs.is_empty() && found.last > 0 {
            self.epochs.push((self.first, found.last_epoch));
        }
    }

    /// Takes over the stored table.
    pub(super) fn recover_table(&mut self, table: &proto::LogTable) {
        self.epochs = table.epochs.iter().map(|range| (range.from, range.epoch)).collect();
        self.first = self.first.max(table.first);
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
        let bytes = record.wire_len() as u64;
        self.bytes += bytes;
        match self.stretches.back_mut() {
            Some((_, held)) if *held + bytes <= STRETCH_BYTES => *held += bytes,
            _ => self.stretches.push_back((seq, bytes)),
        }
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

    /// Where `first` must move for the quota to hold. At least the last stretch is kept.
    pub(super) fn over_quota(&self) -> Option<u64> {
        let mut bytes = self.bytes;
        let mut first = None;
        for pair in self.stretches.iter().zip(self.stretches.iter().skip(1)) {
            let ((_, oldest), (next, _)) = pair;
            if bytes <= self.bytes_max || *next > self.durable_next {
                break;
            }
            bytes -= oldest;
            first = Some(*next);
        }
        first
    }

    /// Bytes kept behind `seq`, to the precision of a stretch.
    pub(super) fn bytes_after(&self, seq: u64) -> u64 {
        if seq + 1 >= self.next {
            return 0;
        }
        let ends = self.stretches.iter().skip(1).map(|(next, _)| *next).chain([self.next]);
        self.stretches.iter().zip(ends).filter(|(_, end)| seq + 1 < *end).map(|((_, bytes), _)| bytes).sum()
    }

    /// Drops everything below `first`, durably.
    pub(super) fn trim(&mut self, ledger: &mut Ledger, first: u64) {
        while self.stretches.len() > 1 && self.stretches[1].0 <= first {
            let (_, bytes) = self.stretches.pop_front().expect("more than one");
            self.bytes -= bytes;
        }
        self.first = first;
        self.write_table(ledger);
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
        };
        let key = Bytes::copy_from_slice(&self.id.to_be_bytes());
        ledger.write_local_of(Kind::TABLE, self.id, self.first, key, Some(codec::encode(&table)));
    }
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

/// The body of a gap without its first seqs.
pub(super) fn without(body: &Bytes, first: u64) -> Bytes {
    match codec::decode::<proto::Gap>(body.clone()) {
        Ok(mut gap) => {
            gap.from += first;
            gap.count = gap.count.saturating_sub(first);
            codec::encode(&gap)
        }
        Err(_) => body.clone(),
    }
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
