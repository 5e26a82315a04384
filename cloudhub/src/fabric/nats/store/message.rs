//! What stands in a message of JetStream: a batch of one Log, or an entry of a node's State.
//!
//! | message | headers | payload |
//! |---|---|---|
//! | of a Log | `Octobus-Epoch`, `Octobus-First`, `Octobus-Last` | a batch as on a link (`codec::batch`), source 0 |
//! | of State | `Octobus-Space`, `Octobus-Mark`: where the node stands ([`Summary`]) | one record: header and frame |
//!
//! The summary stands in every write of a node's State, so that the last message of all its keys tells where
//! each of its spaces stands. It holds for all of them because a node's State is written one message after the
//! other, in the order of its pairs.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Bytes, BytesMut};
use codec::{Class, Flags, Kind, Record, RecordHeader, batch, name, proto};

pub(super) const EPOCH: &str = "Octobus-Epoch";
pub(super) const FIRST: &str = "Octobus-First";
pub(super) const LAST: &str = "Octobus-Last";
pub(super) const SPACE: &str = "Octobus-Space";
pub(super) const MARK: &str = "Octobus-Mark";

/// Headers by name; a name may stand there more than once.
pub(super) type Headers = Vec<(&'static str, String)>;

/// A message as it was stored.
#[derive(Debug, Clone, Default)]
pub(super) struct Message {
    /// Of the stream: what the next write of its subject expects.
    pub(super) sequence: u64,
    pub(super) headers: Vec<(String, String)>,
    pub(super) payload: Bytes,
}

impl Message {
    fn header<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.all(name).next()
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers.iter().filter(move |(held, _)| held == name).map(|(_, value)| value.as_str())
    }
}

/// Where a Log ends in JetStream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// Sequence of its last message.
    pub(super) sequence: u64,
    pub(super) epoch: u64,
    /// First seq of that message, or its mark.
    pub(super) from: u64,
    /// Last seq: of a record or of a gap.
    pub(super) mark: u64,
    /// Of the frame at the mark; 0 if that is a gap.
    pub(super) crc: u32,
    pub(super) class: Class,
}

/// Reads where a Log ends from the last message of its subject. `None`: that is not one of ours.
pub(super) fn end_of(message: &Message) -> Option<End> {
    let number = |name| message.header(name)?.parse::<u64>().ok();
    let epoch = u64::from_str_radix(message.header(EPOCH)?, 16).ok()?;
    let (first, mark) = (number(FIRST)?, number(LAST)?);
    let last = batch_of(&message.payload).and_then(|records| records.last().cloned());
    let crc = last.as_ref().filter(|last| last.header.kind == Kind::LOG && last.header.seq == mark);
    let class = last.as_ref().and_then(|last| Class::from_u8(last.header.class)).unwrap_or(Class::Event);
    let crc = crc.map_or(0, |last| crc32c::crc32c(&last.body));
    Some(End { sequence: message.sequence, epoch, from: first.min(mark).max(1), mark, crc, class })
}

/// The records of a message of a Log.
pub(super) fn batch_of(payload: &Bytes) -> Option<Vec<Record>> {
    let prefix = batch::Prefix::decode(payload.get(..batch::Prefix::LEN)?.try_into().ok()?).ok()?;
    batch::decode(&prefix, payload.slice(batch::Prefix::LEN..)).ok()
}

/// A batch as the payload of a message.
pub(super) fn payload_of(encoder: &mut batch::Encoder, records: &[Record]) -> Option<Bytes> {
    let encoded = encoder.encode(records).ok()?;
    let mut payload = BytesMut::with_capacity(encoded.wire_len());
    for buffer in encoded.buffers() {
        payload.extend_from_slice(buffer);
    }
    Some(payload.freeze())
}

/// The headers of a message with these records.
pub(super) fn headers_of(records: &[Record]) -> Headers {
    let (first, last) = (&records[0], &records[records.len() - 1]);
    vec![
        (EPOCH, format!("{:016x}", last.header.epoch)),
        (FIRST, first_seq(first).to_string()),
        (LAST, last.header.seq.to_string()),
    ]
}

/// The first seq that a record stands for.
pub(super) fn first_seq(record: &Record) -> u64 {
    let gap = (record.header.kind == Kind::GAP).then(|| codec::decode::<proto::Gap>(record.body.clone()));
    match gap {
        Some(Ok(gap)) => gap.from,
        _ => record.header.seq,
    }
}

/// An entry of State as the payload of a message.
pub(super) fn entry_of(record: &Record) -> Bytes {
    let mut payload = BytesMut::with_capacity(record.wire_len());
    record.put(&mut payload);
    payload.freeze()
}

/// The record of such a payload.
pub(super) fn record_of(payload: &Bytes) -> Option<Record> {
    let record = Record::take(&mut payload.clone())?;
    matches!(record.header.kind, Kind::PUT | Kind::TOMBSTONE).then_some(record)
}

/// A record as it is stored: of no session's source.
pub(super) fn stored(mut record: Record) -> Record {
    let flags = Flags(record.header.flags.0 & !Flags::IMPORTED.0);
    record.header = RecordHeader { source: 0, aux: 0, flags, ..record.header };
    record
}

/// Where a space of a node stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SpacePlace {
    /// Everything up to this pair is durable.
    pub(super) pair: (u64, u64),
    /// The owner's run that brought it.
    pub(super) run: u64,
    /// The incarnation whose barrier came last.
    pub(super) listed: u64,
}

/// Where a Log of a node stood, and when that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogPlace {
    pub(super) epoch: u64,
    pub(super) mark: u64,
    pub(super) crc: u32,
    /// Wall time of its last message, seconds.
    pub(super) time_s: u64,
    pub(super) class: Class,
}

/// Where a node stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) spaces: BTreeMap<Arc<str>, SpacePlace>,
    pub(super) logs: BTreeMap<Arc<str>, LogPlace>,
}

impl Summary {
    pub(super) fn headers(&self) -> Headers {
        let escaped = |text: &str| {
            let mut out = String::new();
            name::escape_token(text, &mut out);
            out
        };
        let spaces = self.spaces.iter().map(|(space, at)| {
            let value = format!("{} {} {} {} {}", at.pair.0, at.pair.1, at.run, at.listed, escaped(space));
            (SPACE, value)
        });
        let logs = self.logs.iter().map(|(stream, at)| {
            // Two numbers that are small stand as one.
            let crc = u64::from(at.crc) << 8 | at.class as u64;
            (MARK, format!("{} {} {crc} {} {}", at.epoch, at.mark, at.time_s, escaped(stream)))
        });
        spaces.chain(logs).collect()
    }

    /// Of the last message of a node's keys. What cannot be read is left out: it is told again.
    pub(super) fn of(message: &Message) -> Self {
        fn five(value: &str) -> Option<([u64; 4], Arc<str>)> {
            let mut parts = value.split(' ');
            let mut numbers = [0; 4];
            for number in &mut numbers {
                *number = parts.next()?.parse().ok()?;
            }
            Some((numbers, name::unescape_token(parts.next()?).ok()?.into()))
        }
        let spaces =
            message.all(SPACE).filter_map(five).map(|([incarnation, revision, run, listed], space)| {
                (space, SpacePlace { pair: (incarnation, revision), run, listed })
            });
        let logs = message.all(MARK).filter_map(five).filter_map(|([epoch, mark, crc, time_s], stream)| {
            let class = Class::from_u8(u8::try_from(crc & 0xff).ok()?)?;
            Some((stream, LogPlace { epoch, mark, crc: u32::try_from(crc >> 8).ok()?, time_s, class }))
        });
        Self { spaces: spaces.collect(), logs: logs.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_comes_back_as_it_was_written() {
        let mut summary = Summary::default();
        let place = SpacePlace { pair: (1 << 60, 3), run: u64::MAX, listed: 1 << 60 };
        summary.spaces.insert("twin".into(), place);
        summary.logs.insert(
            "my stream".into(),
            LogPlace { epoch: u64::MAX, mark: 9, crc: u32::MAX, time_s: 7, class: Class::Alarm },
        );
        let headers = summary.headers();
        let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        assert_eq!(Summary::of(&Message { headers, ..Message::default() }), summary);
    }

    #[test]
    fn what_is_no_summary_says_nothing() {
        let headers = vec![(SPACE.to_owned(), "1 2 3".to_owned()), (MARK.to_owned(), "a b c d e".to_owned())];
        assert_eq!(Summary::of(&Message { headers, ..Message::default() }), Summary::default());
    }
}
