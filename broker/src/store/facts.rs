//! What a store itself reads of the records it keeps: keys, declared sources, places in a Log.
//!
//! A store needs five fields out of all bodies and keeps the rest opaque, so this is a reader of
//! protobuf's wire format that allocates nothing and shares the body's buffer. A body in which it finds
//! no sense is a fault of the core; the record then has no effect in the store, and the fault is logged.

use std::sync::Arc;

use bytes::Bytes;
use codec::{Class, Kind, Record};

use super::{Source, SourceKind};

/// Where a record of a Log stands in it.
///
/// A Log is ordered by `(start, order)`. What is appended later takes the place of what it covers: that is
/// how a gap removes a run, and how a seq that repeats after a change of epoch is told once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Seq of the record, `from` of a gap.
    pub(crate) start: u64,
    /// A gap that covers nothing (a change of epoch) stands before the record of its `start`.
    pub(crate) order: u8,
    /// Seq of the record, `to` of a gap; never below `start`, so that a read from `start` finds a gap
    /// that covers nothing.
    pub(crate) last: u64,
}

/// `order` of a gap that covers nothing.
pub(crate) const EMPTY: u8 = 0;
/// `order` of everything else.
pub(crate) const FULL: u8 = 1;

impl Span {
    /// The place of a Log record or gap; `None` for other kinds.
    pub(crate) fn of(record: &Record) -> Option<Self> {
        let seq = record.header.seq;
        match record.header.kind {
            Kind::LOG => Some(Self { start: seq, order: FULL, last: seq }),
            Kind::GAP => {
                let from = varint_field(&record.body, 1).unwrap_or(0);
                let order = if from <= seq { FULL } else { EMPTY };
                Some(Self { start: from, order, last: from.max(seq) })
            }
            _ => None,
        }
    }

    /// False for a gap that covers nothing: a read does not end on one, or it would never get past it.
    pub(crate) fn is_full(self) -> bool {
        self.order == FULL
    }
}

/// Whether raising a Log's first seq to `first` drops an entry that ends at `last`.
///
/// The gap that ends right below `first` stays: it says what became of the records that went.
pub(crate) fn is_dropped(is_gap: bool, last: u64, first: u64) -> bool {
    if is_gap { last.saturating_add(1) < first } else { last < first }
}

/// The key of a State record: its Frame's topic. Of a `forget` record: the key of its fact, which is the same
/// field.
pub(crate) fn state_key(record: &Record) -> Option<Bytes> {
    match find(&record.body, 1)? {
        None => Some(Bytes::new()),
        Some(Value::Bytes { at, len }) => Some(record.body.slice(at..at + len)),
        Some(Value::Int(_)) => None,
    }
}

/// Key and value of a record of kind 16 or above; no value means: deleted.
pub(crate) fn local(body: &Bytes) -> Option<(Bytes, Option<Bytes>)> {
    let field = |number| match find(body, number)? {
        None => Some(None),
        Some(Value::Bytes { at, len }) => Some(Some(body.slice(at..at + len))),
        Some(Value::Int(_)) => None,
    };
    Some((field(1)?.unwrap_or_default(), field(2)?))
}

/// The source that a `declare` record binds.
pub(crate) fn declared(record: &Record) -> Option<Source> {
    let text = |number| match find(&record.body, number)? {
        None => Some(Arc::from("")),
        Some(Value::Bytes { at, len }) => Some(Arc::from(str::from_utf8(&record.body[at..at + len]).ok()?)),
        Some(Value::Int(_)) => None,
    };
    let kind = match varint_field(&record.body, 2)? {
        1 => SourceKind::Live,
        2 => SourceKind::Log,
        3 => SourceKind::State,
        _ => return None,
    };
    let class = u8::try_from(varint_field(&record.body, 4).unwrap_or(0)).ok()?;
    Some(Source {
        number: record.header.source,
        origin: text(1)?,
        kind,
        name: text(3)?,
        class: Class::from_u8(class)?,
    })
}

/// A gap that a reader makes up for records that it can no longer read.
pub(crate) fn corruption_gap(from: u64, to: u64) -> Bytes {
    const REASON_CORRUPTION: u64 = codec::proto::GapReason::Corruption as u64;
    let mut body = Vec::with_capacity(40);
    for (number, value) in [(1, from), (2, to), (3, to - from + 1), (4, REASON_CORRUPTION)] {
        put_varint(&mut body, number << 3);
        put_varint(&mut body, value);
    }
    Bytes::from(body)
}

enum Value {
    Int(u64),
    Bytes { at: usize, len: usize },
}

fn varint_field(body: &[u8], number: u64) -> Option<u64> {
    match find(body, number)?? {
        Value::Int(value) => Some(value),
        Value::Bytes { .. } => None,
    }
}

/// The last field of this number (protobuf: the last one wins). Outer `None`: not a message.
fn find(body: &[u8], number: u64) -> Option<Option<Value>> {
    let mut at = 0;
    let mut found = None;
    while at < body.len() {
        let tag = varint(body, &mut at)?;
        let value = match tag & 7 {
            0 => Some(Value::Int(varint(body, &mut at)?)),
            1 => {
                at = at.checked_add(8)?;
                None
            }
            2 => {
                let len = usize::try_from(varint(body, &mut at)?).ok()?;
                let start = at;
                at = at.checked_add(len)?;
                Some(Value::Bytes { at: start, len })
            }
            5 => {
                at = at.checked_add(4)?;
                None
            }
            _ => return None,
        };
        if at > body.len() {
            return None;
        }
        if tag >> 3 == number && value.is_some() {
            found = value;
        }
    }
    Some(found)
}

fn varint(body: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let byte = *body.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Encoded bodies and records for the tests of both stores.
#[cfg(test)]
pub(crate) mod samples {
    use codec::{Flags, RecordHeader};

    use super::*;
    use crate::core::event::{Group, Lsn};

    pub(crate) fn record(kind: Kind, source: u32, seq: u64, body: impl Into<Bytes>) -> Record {
        let header = RecordHeader { kind, class: 4, flags: Flags::default(), source, epoch: 7, seq, aux: 0 };
        Record { header, body: body.into() }
    }

    fn bytes_field(out: &mut Vec<u8>, number: u64, value: &[u8]) {
        put_varint(out, number << 3 | 2);
        put_varint(out, value.len() as u64);
        out.extend_from_slice(value);
    }

    pub(crate) fn frame(topic: &str, payload: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        bytes_field(&mut body, 1, topic.as_bytes());
        bytes_field(&mut body, 6, payload);
        body
    }

    pub(crate) fn log(source: u32, seq: u64, payload: &[u8]) -> Record {
        record(Kind::LOG, source, seq, frame("t", payload))
    }

    pub(crate) fn put(source: u32, key: &str, revision: u64, value: &[u8]) -> Record {
        record(Kind::PUT, source, revision, frame(key, value))
    }

    pub(crate) fn gap(source: u32, from: u64, to: u64) -> Record {
        let mut body = Vec::new();
        for (number, value) in [(1, from), (2, to)] {
            put_varint(&mut body, number << 3);
            put_varint(&mut body, value);
        }
        record(Kind::GAP, source, to, body)
    }

    pub(crate) fn fact(kind: Kind, key: &[u8], value: Option<&[u8]>) -> Record {
        let mut body = Vec::new();
        bytes_field(&mut body, 1, key);
        if let Some(value) = value {
            bytes_field(&mut body, 2, value);
        }
        record(kind, 0, 0, body)
    }

    pub(crate) fn table(source: u32, first: u64) -> Record {
        let mut record = fact(Kind::TABLE, &source.to_be_bytes(), Some(&first.to_be_bytes()));
        record.header.source = source;
        record.header.seq = first;
        record
    }

    pub(crate) fn declare(source: u32, kind: SourceKind, name: &str) -> Record {
        let mut body = Vec::new();
        bytes_field(&mut body, 1, b"node");
        for (number, value) in [(2, kind as u64), (4, 4)] {
            put_varint(&mut body, number << 3);
            put_varint(&mut body, value);
        }
        bytes_field(&mut body, 3, name.as_bytes());
        record(Kind::DECLARE, source, 0, body)
    }

    pub(crate) fn group(lsn: Lsn, records: Vec<Record>) -> Group {
        Group { lsn, lane: Default::default(), records }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{samples::*, *};

    proptest! {
        #[test]
        fn no_bytes_panic_the_reader(body: Vec<u8>, kind in 0u8..24, seq: u64) {
            let record = record(Kind(kind), 1, seq, body);
            let _ = (Span::of(&record), state_key(&record), local(&record.body), declared(&record));
        }
    }

    #[test]
    fn a_fact_without_value_is_told_from_one_with_an_empty_value() {
        assert_eq!(local(&fact(Kind::META, b"k", None).body), Some(("k".into(), None)));
        assert_eq!(local(&fact(Kind::META, b"k", Some(b"")).body), Some(("k".into(), Some(Bytes::new()))));
    }

    #[test]
    fn a_gap_that_covers_nothing_stands_before_the_record_that_follows_it() {
        let (empty, record) = (Span::of(&gap(1, 6, 5)).unwrap(), Span::of(&log(1, 6, b"")).unwrap());
        assert!((empty.start, empty.order) < (record.start, record.order));
        assert_eq!(empty.last, 6);
    }

    #[test]
    fn a_declare_is_read_back() {
        let source = declared(&declare(9, SourceKind::Log, "telemetry")).unwrap();
        assert_eq!((source.number, &*source.origin, &*source.name), (9, "node", "telemetry"));
        assert_eq!((source.kind, source.class), (SourceKind::Log, Class::Telemetry));
    }
}
