//! What the admin socket speaks: the types of both its ends, and the lines of streams.
//!
//! Streams are NDJSON: one JSON object a line. [`Entry`] is a line of a Log; offline readers of a data
//! folder print the same lines.

use ::base64::{DecodeError, Engine, prelude::BASE64_STANDARD};
use broker::event::{Condition, LogInfo, SessionInfo, StateEntry, StateEvent};
use codec::{FrameView, Kind, Record, proto};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// One line of a Log: a record, or a gap where records were removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Entry {
    /// Removed records, or a change of epoch.
    Gap(GapEntry),
    /// A record.
    Record(RecordEntry),
}

/// A record of a Log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordEntry {
    /// Whose; empty is the tier.
    pub node: String,
    /// Stream.
    pub stream: String,
    /// Epoch, 16 hexadecimal digits.
    pub epoch: String,
    /// Sequence number.
    pub seq: u64,
    /// When it entered the bus, RFC 3339.
    pub time: String,
    /// Topic relative to its node.
    pub topic: String,
    /// Payload, base64.
    pub payload: String,
}

/// A gap record of a Log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapEntry {
    /// What is missing.
    pub gap: Gap,
    /// Whose; empty is the tier.
    pub node: String,
    /// Stream.
    pub stream: String,
    /// Epoch, 16 hexadecimal digits: for a change of epoch, the new one.
    pub epoch: String,
    /// Last seq that it covers.
    pub seq: u64,
}

/// The removed stretch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// First seq.
    pub from: u64,
    /// Last seq; below `from` when nothing was removed.
    pub to: u64,
    /// How many records were removed.
    pub count: u64,
    /// `drop-oldest`, `thinned`, `expired`, `acknowledged`, `refused`, `epoch-change`, `corruption`.
    pub reason: String,
}

impl Entry {
    /// The line of a record of a Log; `None` for kinds that are neither record nor gap, and for a frame
    /// that cannot be read.
    #[must_use]
    pub fn of(record: &Record, node: &str, stream: &str) -> Option<Self> {
        let (node, stream, seq) = (node.to_owned(), stream.to_owned(), record.header.seq);
        let epoch = format!("{:016x}", record.header.epoch);
        if record.header.kind == Kind::GAP {
            let gap = read_gap(record)?;
            return Some(Self::Gap(GapEntry { gap, node, stream, epoch, seq }));
        }
        if record.header.kind != Kind::LOG {
            return None;
        }
        let frame = FrameView::parse(&record.body).ok()?;
        Some(Self::Record(RecordEntry {
            node,
            stream,
            epoch,
            seq,
            time: rfc3339(frame.time_us()),
            topic: frame.topic().to_owned(),
            payload: base64(frame.payload()),
        }))
    }

    /// Its topic; a gap has none.
    #[must_use]
    pub fn topic(&self) -> Option<&str> {
        match self {
            Self::Record(record) => Some(&record.topic),
            Self::Gap(_) => None,
        }
    }
}

fn read_gap(record: &Record) -> Option<Gap> {
    let gap: proto::Gap = codec::decode(record.body.clone()).ok()?;
    let reason = reason(gap.reason());
    Some(Gap { from: gap.from, to: gap.to, count: gap.count, reason: reason.to_owned() })
}

/// Why records were removed, as it is shown.
#[must_use]
pub fn reason(reason: proto::GapReason) -> &'static str {
    match reason {
        proto::GapReason::DropOldest => "drop-oldest",
        proto::GapReason::Thinned => "thinned",
        proto::GapReason::Expired => "expired",
        proto::GapReason::EpochChange => "epoch-change",
        proto::GapReason::Corruption => "corruption",
        proto::GapReason::Acknowledged => "acknowledged",
        proto::GapReason::Refused => "refused",
        proto::GapReason::NotHere => "not-here",
        proto::GapReason::Unspecified => "unspecified",
    }
}

/// A time in RFC 3339, as microseconds since 1970.
///
/// # Errors
/// What is wrong, and what to write.
pub fn parse_time(text: &str) -> Result<u64, String> {
    let wrong = || "not a time from 1970 on in RFC 3339, for example 2026-03-01T12:00:00Z".to_owned();
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| wrong())?;
    u64::try_from(time.unix_timestamp_nanos() / 1000).map_err(|_| wrong())
}

/// Where to begin reading a stream: `[EPOCH:]SEQ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The epoch that the seq was seen in, if the reader wants it checked.
    pub epoch: Option<u64>,
    /// First seq wanted.
    pub seq: u64,
}

impl std::str::FromStr for Start {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "not [EPOCH:]SEQ, for example 17 or 00c0ffee00c0ffee:17".to_owned();
        let (epoch, seq) = match text.split_once(':') {
            Some((epoch, seq)) if (1..=16).contains(&epoch.len()) => {
                (Some(u64::from_str_radix(epoch, 16).map_err(|_| wrong())?), seq)
            }
            Some(_) => return Err(wrong()),
            None => (None, text),
        };
        Ok(Self { epoch, seq: seq.parse().map_err(|_| wrong())? })
    }
}

/// A Log, as `GET /v1/logs` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogRow {
    /// Whose; empty is the tier.
    pub node: String,
    /// Stream.
    pub stream: String,
    /// Class.
    pub class: String,
    /// Current epoch, 16 hexadecimal digits.
    pub epoch: String,
    /// Oldest kept seq.
    pub first: u64,
    /// Seq of the next append.
    pub next: u64,
    /// Bytes kept.
    pub bytes: u64,
    /// Records kept.
    pub records: u64,
    /// Quota, bytes.
    pub max_bytes: u64,
    /// Seconds until policy must refuse, thin or drop what has not arrived, at the rate it fills now; nothing if
    /// that is not to be expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_to_full: Option<u64>,
}

impl From<&LogInfo> for LogRow {
    fn from(log: &LogInfo) -> Self {
        Self {
            node: log.origin.to_string(),
            stream: log.stream.to_string(),
            class: log.class.as_str().to_owned(),
            epoch: format!("{:016x}", log.epoch),
            first: log.first,
            next: log.next,
            bytes: log.bytes,
            records: log.records,
            max_bytes: log.bytes_max,
            seconds_to_full: log.seconds_to_full,
        }
    }
}

/// A session, as `GET /v1/sessions` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Number within this process's life.
    pub session: u64,
    /// `mqtt`, `nats`, `internal`, `link`.
    pub kind: String,
    /// Client id or peer name.
    pub name: String,
    /// Connected, or kept for a client that is away.
    pub connected: bool,
    /// For a link: whether hello and welcome are through.
    pub established: bool,
    /// Subscriptions.
    pub subscriptions: usize,
    /// Bytes in its queue.
    pub queued_bytes: usize,
}

impl From<&SessionInfo> for SessionRow {
    fn from(info: &SessionInfo) -> Self {
        Self {
            session: info.session.0,
            kind: info.kind.to_owned(),
            name: info.name.to_string(),
            connected: info.connected,
            established: info.established,
            subscriptions: info.subscriptions,
            queued_bytes: info.queued_bytes,
        }
    }
}

/// A standing condition, as `GET /v1/conditions` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConditionRow {
    /// `DuplicateIdentity`, ...
    pub kind: String,
    /// What it is about.
    pub subject: String,
    /// What happened and what to do.
    pub message: String,
    /// Since when, RFC 3339.
    pub since: String,
}

impl From<&Condition> for ConditionRow {
    fn from(condition: &Condition) -> Self {
        Self {
            kind: condition.kind.to_owned(),
            subject: condition.subject.clone(),
            message: condition.message.clone(),
            since: rfc3339(condition.since_us),
        }
    }
}

/// A State entry, as `GET /v1/state` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateRow {
    /// Key within its space.
    pub key: String,
    /// Incarnation of its origin, 16 hexadecimal digits.
    pub incarnation: String,
    /// Origin revision.
    pub revision: u64,
    /// Local revision: lists and watches count in it. In a space of this process, the same.
    #[serde(default)]
    pub local: u64,
    /// Time of the change, RFC 3339.
    pub time: String,
    /// Value, base64.
    pub value: String,
}

impl From<&StateEntry> for StateRow {
    fn from(entry: &StateEntry) -> Self {
        Self {
            key: entry.key.clone(),
            incarnation: format!("{:016x}", entry.incarnation),
            revision: entry.revision,
            local: entry.local,
            time: rfc3339(entry.time_us),
            value: base64(&entry.value()),
        }
    }
}

/// An event of a watch, as `GET /v1/state/watch` streams it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum WatchRow {
    /// A key has this value now.
    Put {
        /// The entry.
        #[serde(flatten)]
        entry: StateRow,
        /// What was there before, if that was asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        previous: Option<StateRow>,
    },
    /// A key is gone.
    Deleted {
        /// The key.
        key: String,
        /// Origin revision of the deletion.
        revision: u64,
        /// Local revision of the deletion.
        local: u64,
        /// What was there before, if that was asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        previous: Option<StateRow>,
    },
    /// Everything that existed at this local revision stands above, and nothing is on the way.
    Synced {
        /// Local revision.
        revision: u64,
    },
    /// The watch fell behind what is known, and ends.
    TooOld {
        /// The first local revision that can be watched from.
        oldest: u64,
    },
}

impl From<&StateEvent> for WatchRow {
    fn from(event: &StateEvent) -> Self {
        let row = |entry: &Option<Box<StateEntry>>| entry.as_ref().map(|entry| StateRow::from(&**entry));
        match event {
            StateEvent::Put { entry, previous } => {
                Self::Put { entry: StateRow::from(entry), previous: row(previous) }
            }
            StateEvent::Deleted { key, revision, local, previous } => Self::Deleted {
                key: key.clone(),
                revision: *revision,
                local: *local,
                previous: row(previous),
            },
            StateEvent::Synced { revision } => Self::Synced { revision: *revision },
            StateEvent::TooOld { oldest } => Self::TooOld { oldest: *oldest },
        }
    }
}

/// One operation of `POST /v1/state`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteOp {
    /// A space of this process.
    pub space: String,
    /// The key.
    pub key: String,
    /// The new value, base64. With neither this nor `delete`, only what is expected is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Delete the key.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub delete: bool,
    /// Only if the key has this revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// Only if there is no such key.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub absent: bool,
}

/// A write was done and is durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Of each operation in order; 0 of one that changed nothing.
    pub revisions: Vec<u64>,
}

/// An intent is durable and on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Names the answer.
    pub id: String,
}

/// What became of an intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// `applied`, `conflict`, `not-authorized`, `expired`, `malformed`.
    pub outcome: String,
    /// Of the change; for a conflict, of what is there.
    pub revision: u64,
}

/// A message, as `GET /v1/subscribe` streams it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageRow {
    /// Whose; empty is the tier.
    pub node: String,
    /// Topic relative to its node.
    pub topic: String,
    /// When it entered the bus, RFC 3339.
    pub time: String,
    /// Payload, base64.
    pub payload: String,
    /// A retained message that was there before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub retained: bool,
}

/// An echo over a link, as `GET /v1/ping` measures it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingRow {
    /// Who answered.
    pub peer: String,
    /// Each round trip of a small message, microseconds.
    pub round_trips_us: Vec<u64>,
    /// Bytes that were sent at once, and came back.
    pub bytes: u64,
    /// How long that took, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo_us: Option<u64>,
}

/// What went wrong, in the body of every answer that is not 2xx.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What it is, and what to do.
    pub error: String,
}

/// RFC 3339 with microseconds, in UTC.
#[must_use]
pub fn rfc3339(micros: u64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000)
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| "out of range".to_owned())
}

/// The text of a base64 field of a row.
#[must_use]
pub fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// The bytes of a base64 field of a row.
///
/// # Errors
/// The text is not base64: the other side is not what it should be.
pub fn payload(text: &str) -> Result<Vec<u8>, DecodeError> {
    BASE64_STANDARD.decode(text)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use codec::{Class, Flags, RecordHeader};

    use super::*;

    fn record(kind: Kind, body: impl Into<Bytes>) -> Record {
        let header = RecordHeader {
            kind,
            class: Class::Telemetry as u8,
            flags: Flags::default(),
            source: 1,
            epoch: 0xc0ffee,
            seq: 9,
            aux: 0,
        };
        Record { header, body: body.into() }
    }

    #[test]
    fn a_record_is_one_json_line_with_its_position_and_payload_in_base64() {
        let frame = proto::Frame {
            topic: "a/b".to_owned(),
            time_us: 1_000_001,
            payload: b"71.5".to_vec().into(),
            ..proto::Frame::default()
        };
        let entry = Entry::of(&record(Kind::LOG, codec::encode(&frame)), "edge-1", "default").unwrap();
        assert_eq!(
            serde_json::to_string(&entry).unwrap(),
            r#"{"node":"edge-1","stream":"default","epoch":"0000000000c0ffee","seq":9,"time":"1970-01-01T00:00:01.000001Z","topic":"a/b","payload":"NzEuNQ=="}"#
        );
    }

    #[test]
    fn a_gap_is_a_line_of_its_own_kind() {
        let gap = proto::Gap { from: 3, to: 9, count: 7, reason: 1, new_epoch: 0 };
        let entry = Entry::of(&record(Kind::GAP, codec::encode(&gap)), "edge-1", "default").unwrap();
        let line = serde_json::to_string(&entry).unwrap();
        assert_eq!(
            line,
            r#"{"gap":{"from":3,"to":9,"count":7,"reason":"drop-oldest"},"node":"edge-1","stream":"default","epoch":"0000000000c0ffee","seq":9}"#
        );
        assert_eq!(serde_json::from_str::<Entry>(&line).unwrap(), entry);
    }

    #[test]
    fn a_damaged_body_is_skipped_rather_than_shown() {
        assert_eq!(Entry::of(&record(Kind::LOG, vec![0xff; 9]), "n", "s"), None);
        assert_eq!(Entry::of(&record(Kind::GAP, vec![0xff; 9]), "n", "s"), None);
    }

    #[test]
    fn a_position_may_carry_its_epoch() {
        assert_eq!("17".parse(), Ok(Start { epoch: None, seq: 17 }));
        assert_eq!("c0ffee:1".parse(), Ok(Start { epoch: Some(0xc0ffee), seq: 1 }));
        for wrong in ["", ":", "x", "1:", ":1", "1:2:3", "11112222333344445:1"] {
            assert!(wrong.parse::<Start>().is_err(), "{wrong}");
        }
    }
}
