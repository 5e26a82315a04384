//! The record: what changes per hop, in a fixed header in front of an immutable body.
//!
//! ```text
//! u32 body_len | u8 kind | u8 class | u16 flags | u32 source | u32 zero | u64 epoch | u64 seq | u64 aux
//! ```
//!
//! Little-endian, 40 bytes, shared by the journal, link batches and queues. Records stand back to back
//! without padding; in the journal the *group* is padded to 8 bytes.

use bytes::{BufMut, Bytes};

/// What a record is, and so what its body is. Numbers stand on wires and disks and are never reused.
///
/// 1 to 15 may cross links: those without a name here are skipped by `body_len`, so that a newer peer may send
/// them. 16 and above are facts of one store: on a link they are a protocol error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(pub u8);

impl Kind {
    /// A message with no durability. Body: Frame.
    pub const LIVE: Self = Self(1);
    /// An entry of a Log. Body: Frame.
    pub const LOG: Self = Self(2);
    /// A State entry. Body: Frame, whose topic is the key.
    pub const PUT: Self = Self(3);
    /// A State entry's removal. Body: Frame without payload, whose topic is the key.
    pub const TOMBSTONE: Self = Self(4);
    /// Removed Log entries or a change of epoch. Body: `proto::Gap`.
    pub const GAP: Self = Self(5);
    /// The owner of a space has listed its source completely. Body: `proto::Barrier`.
    pub const BARRIER: Self = Self(6);
    /// A link control message. Body: `proto::Control`.
    pub const CONTROL: Self = Self(7);
    /// Binds a source number. Body: `proto::Declare`.
    pub const DECLARE: Self = Self(8);
    /// Everything of a source that concerns this receiver, up to the pair in the header, stands before this
    /// record. Empty body.
    pub const SYNCED: Self = Self(9);
    /// Journal only, body `proto::Local`, value `proto::Cursor`.
    pub const CURSOR: Self = Self(16);
    /// Journal only, body `proto::Local`, value `proto::ClientSession`.
    pub const SESSION: Self = Self(17);
    /// Journal only, body `proto::Local`, value `proto::Outbound`.
    pub const PACKET_ID: Self = Self(18);
    /// Journal only, body `proto::Local`, value `proto::Mark`.
    pub const MARK: Self = Self(19);
    /// Journal only, body `proto::Local`, value `proto::LogTable`. `source` and `seq` (= `first`) are set,
    /// so that the store can free segments without reading the body.
    pub const TABLE: Self = Self(20);
    /// Journal only, body `proto::Local`: a small fact of the store itself (instance, incarnation, clock).
    pub const META: Self = Self(21);
    /// Journal only, body `proto::Local` without a value: the State entry of this key of `source` is no longer
    /// kept, not even as a tombstone.
    pub const FORGET: Self = Self(22);

    /// Kinds of 16 and above never cross a link.
    #[must_use]
    pub const fn is_journal_only(self) -> bool {
        self.0 >= 16
    }

    /// True if this version gives the kind a meaning.
    #[must_use]
    pub const fn is_known(self) -> bool {
        matches!(self, Self(1..=9 | 16..=22))
    }
}

/// Priority of a source, highest first. Class belongs to the source, never to a record: all records of a stream
/// or space travel in one class, in order. A record repeats its source's class so that queues need no lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// Link control; never anything else.
    Control = 0,
    /// Alarms: never thinned.
    Alarm = 1,
    /// State entries.
    State = 2,
    /// Events, intents and commands.
    Event = 3,
    /// Telemetry: may be thinned or dropped by policy.
    Telemetry = 4,
    /// Bulk transfer.
    Bulk = 5,
}

impl Class {
    /// All classes, highest priority first.
    pub const ALL: [Self; 6] =
        [Self::Control, Self::Alarm, Self::State, Self::Event, Self::Telemetry, Self::Bulk];

    /// The class of this number, if there is one.
    #[must_use]
    pub const fn from_u8(n: u8) -> Option<Self> {
        if (n as usize) < Self::ALL.len() { Some(Self::ALL[n as usize]) } else { None }
    }

    /// The name used in configuration, logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Alarm => "alarm",
            Self::State => "state",
            Self::Event => "event",
            Self::Telemetry => "telemetry",
            Self::Bulk => "bulk",
        }
    }
}

/// Flags of a record. Unknown bits are carried, not interpreted: a newer peer may set them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(pub u16);

impl Flags {
    /// Came over a link; no link exports it again.
    pub const IMPORTED: Self = Self(1);
    /// A request that wants an answer; `seq` is the hop's correlation id.
    pub const REQUEST: Self = Self(2);
    /// An answer; `seq` is the correlation id of the request on this hop.
    pub const REPLY: Self = Self(4);
    /// The record's time comes from a trusted clock.
    pub const TIME_TRUSTED: Self = Self(8);

    /// Published at QoS 2: a subscriber may have it exactly once.
    pub const QOS2: Self = Self(16);
    /// Published at QoS 1: kept for retained messages, which are delivered at the QoS they came with.
    pub const QOS1: Self = Self(64);
    /// Published with the retain flag, for subscribers that want to see it as published.
    pub const RETAIN: Self = Self(32);
    /// On a tombstone: the entry left this receiver's scope and may come back as it was, at the same revision.
    pub const UNLISTED: Self = Self(128);

    /// True if every bit of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets of bits.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The fixed part of a record, without the body's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordHeader {
    /// What it is.
    pub kind: Kind,
    /// Raw class byte; see [`Class::from_u8`].
    pub class: u8,
    /// Flags.
    pub flags: Flags,
    /// Number bound by an earlier `declare` in this session or store; 0 = none.
    pub source: u32,
    /// Log: epoch. State: incarnation. Live: 0.
    pub epoch: u64,
    /// Log: seq. State: origin revision. Live: correlation id of the hop, 0 = none.
    pub seq: u64,
    /// Journal: State's local revision, or the mark of the client that published a Log entry. 0 on a link.
    pub aux: u64,
}

impl RecordHeader {
    /// Encoded size.
    pub const LEN: usize = 40;

    /// Writes the header of a record with a body of `body_len` bytes.
    #[must_use]
    pub fn encode(&self, body_len: u32) -> [u8; Self::LEN] {
        let mut raw = [0u8; Self::LEN];
        let mut out = &mut raw[..];
        out.put_u32_le(body_len);
        out.put_u8(self.kind.0);
        out.put_u8(self.class);
        out.put_u16_le(self.flags.0);
        out.put_u32_le(self.source);
        out.put_u32_le(0);
        out.put_u64_le(self.epoch);
        out.put_u64_le(self.seq);
        out.put_u64_le(self.aux);
        raw
    }

    /// Reads a header and the length of the body that follows it.
    #[must_use]
    pub fn decode(raw: &[u8; Self::LEN]) -> (Self, u32) {
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let header = Self {
            kind: Kind(raw[4]),
            class: raw[5],
            flags: Flags(u16::from_le_bytes([raw[6], raw[7]])),
            source: u32_at(8),
            epoch: u64_at(16),
            seq: u64_at(24),
            aux: u64_at(32),
        };
        (header, u32_at(0))
    }
}

/// A header and its body. Cloning shares the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The fixed part.
    pub header: RecordHeader,
    /// A Frame for kinds 1 to 4, else a prost message.
    pub body: Bytes,
}

impl Record {
    /// Bytes of this record on a wire or disk.
    #[must_use]
    pub fn wire_len(&self) -> usize {
        RecordHeader::LEN + self.body.len()
    }

    /// Appends header and body.
    ///
    /// # Panics
    /// If the body has 4 GiB or more; no body of the bus exceeds a frame.
    pub fn put(&self, out: &mut impl BufMut) {
        let len = u32::try_from(self.body.len()).expect("a body is at most a frame, 2 MiB");
        out.put_slice(&self.header.encode(len));
        out.put_slice(&self.body);
    }

    /// Takes the first record off `raw`, without copying. `None`, and `raw` is as it was, if it does not hold a
    /// whole one.
    #[must_use]
    pub fn take(raw: &mut Bytes) -> Option<Self> {
        let (header, body_len) = RecordHeader::decode(raw.first_chunk()?);
        let end = usize::try_from(body_len).ok()?.checked_add(RecordHeader::LEN)?;
        if raw.len() < end {
            return None;
        }
        let body = raw.split_to(end).slice(RecordHeader::LEN..);
        Some(Self { header, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(body: &'static str) -> Record {
        let header = RecordHeader {
            kind: Kind::PUT,
            class: Class::State as u8,
            flags: Flags::IMPORTED.union(Flags::TIME_TRUSTED),
            source: 0x0403_0201,
            epoch: 0x1122_3344_5566_7788,
            seq: 1,
            aux: u64::MAX,
        };
        Record { header, body: body.into() }
    }

    #[test]
    fn the_header_stands_byte_by_byte_as_documented() {
        let raw = record("").header.encode(5);
        assert_eq!(
            raw[..],
            [
                &[5, 0, 0, 0, 3, 2, 9, 0][..],
                &[1, 2, 3, 4, 0, 0, 0, 0],
                &[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11],
                &[1, 0, 0, 0, 0, 0, 0, 0],
                &[0xff; 8],
            ]
            .concat()
        );
        assert_eq!(RecordHeader::decode(&raw), (record("").header, 5));
    }

    #[test]
    fn records_stand_back_to_back_and_come_back_in_order() {
        let mut raw = bytes::BytesMut::new();
        for body in ["first", "", "third"] {
            record(body).put(&mut raw);
        }
        let mut raw = raw.freeze();
        for body in ["first", "", "third"] {
            assert_eq!(Record::take(&mut raw), Some(record(body)));
        }
        assert_eq!(Record::take(&mut raw), None);
    }

    #[test]
    fn half_a_record_is_left_alone() {
        let mut whole = bytes::BytesMut::new();
        record("body").put(&mut whole);
        let whole = whole.freeze();
        for len in 0..whole.len() {
            let mut part = whole.slice(..len);
            assert_eq!(Record::take(&mut part), None);
            assert_eq!(part.len(), len);
        }
    }

    #[test]
    fn every_class_has_one_number_and_order_is_priority() {
        for (n, class) in (0u8..).zip(Class::ALL) {
            assert_eq!(class as u8, n);
            assert_eq!(Class::from_u8(n), Some(class));
        }
        assert_eq!(Class::from_u8(6), None);
        assert!(Class::ALL.is_sorted());
    }

    #[test]
    fn flags_are_sets() {
        let both = Flags::IMPORTED.union(Flags::REPLY);
        assert!(both.contains(Flags::REPLY) && both.contains(both));
        assert!(!both.contains(Flags::REQUEST) && !Flags::REPLY.contains(both));
    }

    #[test]
    fn kinds_from_16_on_are_of_one_store() {
        assert!(Kind::DECLARE.is_known() && !Kind::DECLARE.is_journal_only());
        assert!(Kind::META.is_known() && Kind::CURSOR.is_journal_only());
        assert!(!Kind(0).is_known() && !Kind(10).is_known() && !Kind(15).is_journal_only());
    }
}
