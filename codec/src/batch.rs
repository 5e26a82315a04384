//! The batch: what a link carries.
//!
//! ```text
//! u8 version=1 | u8 flags (1 = lz4) | u16 count | u32 raw_len | u32 wire_len | u32 dict | u32 crc32c | u32 zero
//! wire bytes: `count` records, back to back (record.rs), as they are or as one LZ4 block
//! ```
//!
//! Little-endian, 24 bytes of prefix. What holds of every batch, checked in this order and each before the
//! allocation that it bounds:
//!
//! 1. `raw_len` is at most [`BATCH_RAW_MAX`], or the batch is one larger record of at most
//!    [`RECORD_BYTES_MAX`]; it has room for `count` record headers, and `count` is not 0.
//! 2. `wire_len` is `raw_len`, or, compressed, less. Under [`COMPRESS_MIN`] raw bytes nothing is compressed. So
//!    a reader that has seen a valid [`Prefix`] may allocate `wire_len`.
//! 3. The crc, over the prefix with crc = 0 and the wire bytes as sent, is right: checked before decompression.
//! 4. The LZ4 block (no size prefix) gives exactly `raw_len` bytes.
//! 5. Those are exactly `count` records, of one class, none of a kind of 16 or above.
//!
//! Anything else is a protocol error. Records of kinds below 16 that nobody here knows are skipped, so that a
//! newer peer may send them.
//!
//! `dict` names a dictionary of the list agreed in Welcome; this version agrees on none and refuses others than
//! 0. Batches form by what is waiting, never by sleeping: [`split`] cuts what a queue holds.

use bytes::{BufMut, Bytes, BytesMut};
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::frame::FRAME_BYTES_MAX;
use crate::record::{Kind, Record, RecordHeader};

/// Raw bytes of a batch, unless it is one larger record.
pub const BATCH_RAW_MAX: usize = 64 << 10;
/// The largest record: a frame of the largest size and its header.
pub const RECORD_BYTES_MAX: usize = FRAME_BYTES_MAX + RecordHeader::LEN;
/// Raw bytes from which compression is tried.
pub const COMPRESS_MIN: usize = 512;
/// What compression has to save, as a part of the raw bytes: less is not worth the reader's work and copy.
const SAVING_MIN: usize = 16;
/// Bodies from this size on are written from where they are; smaller ones are copied beside their header.
const VECTORED_MIN: usize = 1024;

const VERSION: u8 = 1;
const FLAG_LZ4: u8 = 1;
const CRC_AT: usize = 16;

/// A batch that is none, or cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Written by a later version, or no batch at all.
    #[error("batch version {0} is unknown")]
    Version(u8),
    /// Flags that this version does not know.
    #[error("batch flags {0:#04x} are unknown")]
    Flags(u8),
    /// The last four bytes of the prefix are not zero.
    #[error("batch prefix has reserved bytes set")]
    Reserved,
    /// A dictionary that was not agreed on.
    #[error("batch names dictionary {0}, none was agreed on")]
    Dictionary(u32),
    /// No record.
    #[error("batch is empty")]
    Empty,
    /// More records than fit the raw length, or more raw bytes than a batch may have.
    #[error("batch of {count} records cannot have {raw_len} bytes")]
    RawLen {
        /// Records in the batch.
        count: usize,
        /// Their bytes.
        raw_len: usize,
    },
    /// More wire bytes than raw bytes, or compressed where it must not be.
    #[error("batch of {raw_len} bytes cannot be {wire_len} bytes on the wire")]
    WireLen {
        /// Raw bytes.
        raw_len: usize,
        /// Bytes as sent.
        wire_len: usize,
    },
    /// Prefix or wire bytes were damaged.
    #[error("batch checksum does not match")]
    Crc,
    /// The LZ4 block is broken, or not of the size that the prefix says.
    #[error("batch does not decompress to its length")]
    Lz4,
    /// The raw bytes are not exactly `count` records.
    #[error("batch is not exactly its records")]
    Records,
    /// Records that are facts of one store have no place on a link.
    #[error("record kind {0} never crosses a link")]
    JournalKind(u8),
    /// A batch holds one class.
    #[error("batch mixes classes")]
    MixedClass,
}

/// The fixed part of a batch, valid by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    compressed: bool,
    count: u16,
    raw_len: u32,
    wire_len: u32,
    crc: u32,
}

impl Prefix {
    /// Encoded size.
    pub const LEN: usize = 24;

    /// Reads a prefix and checks everything that it says by itself.
    ///
    /// # Errors
    /// It breaks one of the first two rules of the module, or is of another version.
    pub fn decode(raw: &[u8; Self::LEN]) -> Result<Self, BatchError> {
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        if raw[0] != VERSION {
            return Err(BatchError::Version(raw[0]));
        }
        if raw[1] & !FLAG_LZ4 != 0 {
            return Err(BatchError::Flags(raw[1]));
        }
        if u32_at(12) != 0 {
            return Err(BatchError::Dictionary(u32_at(12)));
        }
        if u32_at(20) != 0 {
            return Err(BatchError::Reserved);
        }
        let prefix = Self {
            compressed: raw[1] & FLAG_LZ4 != 0,
            count: u16::from_le_bytes([raw[2], raw[3]]),
            raw_len: u32_at(4),
            wire_len: u32_at(8),
            crc: u32_at(CRC_AT),
        };
        check_raw_len(usize::from(prefix.count), prefix.raw_len())?;
        prefix.check_wire_len()?;
        Ok(prefix)
    }

    fn check_wire_len(&self) -> Result<(), BatchError> {
        let (raw_len, wire_len) = (self.raw_len(), self.wire_len());
        let possible = if self.compressed {
            raw_len >= COMPRESS_MIN && (1..raw_len).contains(&wire_len)
        } else {
            wire_len == raw_len
        };
        if possible { Ok(()) } else { Err(BatchError::WireLen { raw_len, wire_len }) }
    }

    /// Bytes that follow the prefix; bounded, so that they may be allocated.
    #[must_use]
    pub fn wire_len(&self) -> usize {
        self.wire_len as usize
    }

    /// Bytes of the records.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.raw_len as usize
    }

    /// Number of records.
    #[must_use]
    pub fn count(&self) -> usize {
        usize::from(self.count)
    }

    /// True if the wire bytes are an LZ4 block.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.compressed
    }

    fn without_crc(&self) -> [u8; Self::LEN] {
        let mut raw = [0; Self::LEN];
        let mut out = &mut raw[..];
        out.put_u8(VERSION);
        out.put_u8(if self.compressed { FLAG_LZ4 } else { 0 });
        out.put_u16_le(self.count);
        out.put_u32_le(self.raw_len);
        out.put_u32_le(self.wire_len);
        raw
    }

    /// The prefix of these wire bytes, checksum included.
    fn seal<'w>(&self, wire: impl Iterator<Item = &'w [u8]>) -> [u8; Self::LEN] {
        let mut raw = self.without_crc();
        let crc = wire.fold(crc32c::crc32c(&raw), crc32c::crc32c_append);
        raw[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        raw
    }
}

fn check_raw_len(count: usize, raw_len: usize) -> Result<(), BatchError> {
    if count == 0 {
        return Err(BatchError::Empty);
    }
    let max = if count == 1 { RECORD_BYTES_MAX } else { BATCH_RAW_MAX };
    if raw_len < count * RecordHeader::LEN || raw_len > max {
        return Err(BatchError::RawLen { count, raw_len });
    }
    Ok(())
}

/// The records of a batch. Their bodies share one buffer: `wire` itself, or what it decompresses to.
///
/// Records of unknown kinds are left out.
///
/// # Errors
/// The bytes are damaged or break a rule of the module; the peer is at fault, and the link is closed.
pub fn decode(prefix: &Prefix, wire: Bytes) -> Result<Vec<Record>, BatchError> {
    if wire.len() != prefix.wire_len() {
        return Err(BatchError::WireLen { raw_len: prefix.raw_len(), wire_len: wire.len() });
    }
    if crc32c::crc32c_append(crc32c::crc32c(&prefix.without_crc()), &wire) != prefix.crc {
        return Err(BatchError::Crc);
    }
    let raw = if prefix.compressed { decompress(&wire, prefix.raw_len())? } else { wire };
    read_records(raw, prefix.count())
}

fn decompress(wire: &[u8], raw_len: usize) -> Result<Bytes, BatchError> {
    let mut raw = vec![0; raw_len];
    match decompress_into(wire, &mut raw) {
        Ok(len) if len == raw_len => Ok(raw.into()),
        _ => Err(BatchError::Lz4),
    }
}

fn read_records(mut raw: Bytes, count: usize) -> Result<Vec<Record>, BatchError> {
    let mut records = Vec::with_capacity(count);
    let mut class = None;
    for _ in 0..count {
        let record = Record::take(&mut raw).ok_or(BatchError::Records)?;
        check_header(&record.header, &mut class)?;
        if record.header.kind.is_known() {
            records.push(record);
        }
    }
    if raw.is_empty() { Ok(records) } else { Err(BatchError::Records) }
}

fn check_header(header: &RecordHeader, class: &mut Option<u8>) -> Result<(), BatchError> {
    let Kind(kind) = header.kind;
    if header.kind.is_journal_only() {
        return Err(BatchError::JournalKind(kind));
    }
    if *class.get_or_insert(header.class) == header.class { Ok(()) } else { Err(BatchError::MixedClass) }
}

/// Cuts records into runs that are one batch each, in order: of one class, and of at most [`BATCH_RAW_MAX`]
/// bytes or one larger record.
pub fn split(records: &[Record]) -> impl Iterator<Item = &[Record]> {
    let mut rest = records;
    std::iter::from_fn(move || {
        let (batch, after) = rest.split_at(batch_at_front(rest));
        rest = after;
        (!batch.is_empty()).then_some(batch)
    })
}

/// True if a record of `next` bytes ([`Record::wire_len`]) may join a batch that has `raw_len` bytes.
#[must_use]
pub const fn fits(raw_len: usize, next: usize) -> bool {
    raw_len == 0 || raw_len + next <= BATCH_RAW_MAX
}

fn batch_at_front(records: &[Record]) -> usize {
    let mut raw_len = 0;
    let class = records.first().map(|record| record.header.class);
    let taken = records.iter().take_while(|record| {
        let takes = Some(record.header.class) == class && fits(raw_len, record.wire_len());
        raw_len += record.wire_len();
        takes
    });
    taken.count()
}

/// Writes batches. Holds the scratch memory of compression (about 150 KiB once used), so one per link is enough.
#[derive(Default)]
pub struct Encoder {
    raw: Vec<u8>,
    compressed: Vec<u8>,
    table: CompressTable,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("scratch", &(self.raw.capacity() + self.compressed.capacity()))
            .finish()
    }
}

impl Encoder {
    /// An encoder that has allocated nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes one batch of records that [`split`] has put together, compressed where that pays.
    ///
    /// # Errors
    /// The records are not one batch: none, too many bytes, several classes, or of a kind that never crosses a
    /// link.
    pub fn encode(&mut self, records: &[Record]) -> Result<Encoded, BatchError> {
        let raw_len = check_records(records)?;
        let prefix = Prefix {
            compressed: false,
            count: records.len() as u16,
            raw_len: raw_len as u32,
            wire_len: raw_len as u32,
            crc: 0,
        };
        if raw_len >= COMPRESS_MIN
            && let Some(encoded) = self.compress(prefix, records)
        {
            return Ok(encoded);
        }
        Ok(encode_vectored(&prefix, records))
    }

    /// As [`Self::encode`], for what is known not to shrink: no scratch, no copy of large bodies.
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn encode_uncompressed(records: &[Record]) -> Result<Encoded, BatchError> {
        let raw_len = check_records(records)? as u32;
        let count = records.len() as u16;
        Ok(encode_vectored(&Prefix { compressed: false, count, raw_len, wire_len: raw_len, crc: 0 }, records))
    }

    /// `None` if it does not shrink, or hardly.
    fn compress(&mut self, prefix: Prefix, records: &[Record]) -> Option<Encoded> {
        self.raw.clear();
        self.raw.reserve(prefix.raw_len());
        for record in records {
            record.put(&mut self.raw);
        }
        let room = get_maximum_output_size(self.raw.len());
        if self.compressed.len() < room {
            self.compressed.resize(room, 0);
        }
        let len = compress_into_with_table(&self.raw, &mut self.compressed, &mut self.table).ok()?;
        let encoded = (len <= self.raw.len() - self.raw.len() / SAVING_MIN).then(|| {
            let wire = &self.compressed[..len];
            let prefix = Prefix { compressed: true, wire_len: len as u32, ..prefix };
            let mut whole = BytesMut::with_capacity(Prefix::LEN + len);
            whole.put_slice(&prefix.seal(std::iter::once(wire)));
            whole.put_slice(wire);
            Encoded { buffers: vec![whole.freeze()], prefix }
        });
        self.release_oversized();
        encoded
    }

    /// One large record must not leave megabytes with every idle link.
    fn release_oversized(&mut self) {
        if self.raw.capacity() > BATCH_RAW_MAX {
            self.raw = Vec::new();
        }
        let room = get_maximum_output_size(BATCH_RAW_MAX);
        if self.compressed.len() > room {
            self.compressed.truncate(room);
            self.compressed.shrink_to_fit();
        }
    }
}

/// The raw length of records that may form one batch.
fn check_records(records: &[Record]) -> Result<usize, BatchError> {
    let mut class = None;
    let mut raw_len = 0;
    for record in records {
        check_header(&record.header, &mut class)?;
        raw_len += record.wire_len();
    }
    check_raw_len(records.len(), raw_len)?;
    Ok(raw_len)
}

/// Large bodies stay where they are; headers and small bodies between them are gathered in one buffer.
fn encode_vectored(prefix: &Prefix, records: &[Record]) -> Encoded {
    let gathered: usize = records.iter().map(Record::wire_len).filter(|len| *len < VECTORED_MIN).sum();
    let mut gather = BytesMut::with_capacity(Prefix::LEN + gathered + records.len() * RecordHeader::LEN);
    // The prefix's place; its content follows when the checksum is known.
    gather.put_bytes(0, Prefix::LEN);
    let head = gather.split();
    let mut buffers = vec![Bytes::new()];
    for record in records {
        if record.body.len() < VECTORED_MIN {
            record.put(&mut gather);
        } else {
            gather.put_slice(&record.header.encode(record.body.len() as u32));
            buffers.push(gather.split().freeze());
            buffers.push(record.body.clone());
        }
    }
    if !gather.is_empty() {
        buffers.push(gather.freeze());
    }
    buffers[0] = seal_in_place(head, prefix, &buffers[1..]);
    Encoded { buffers, prefix: *prefix }
}

fn seal_in_place(mut head: BytesMut, prefix: &Prefix, wire: &[Bytes]) -> Bytes {
    head.copy_from_slice(&prefix.seal(wire.iter().map(|buffer| &buffer[..])));
    head.freeze()
}

/// A batch as it goes to a socket: one buffer, or several to be written in order (vectored).
#[derive(Debug, Clone)]
pub struct Encoded {
    buffers: Vec<Bytes>,
    prefix: Prefix,
}

impl Encoded {
    /// The buffers, to be written in order. None is empty.
    #[must_use]
    pub fn buffers(&self) -> &[Bytes] {
        &self.buffers
    }

    /// The buffers, to be written in order and consumed by the writing.
    #[must_use]
    pub fn into_buffers(self) -> Vec<Bytes> {
        self.buffers
    }

    /// Bytes on the wire, prefix included.
    #[must_use]
    pub fn wire_len(&self) -> usize {
        Prefix::LEN + self.prefix.wire_len()
    }

    /// Bytes of the records.
    #[must_use]
    pub fn raw_len(&self) -> usize {
        self.prefix.raw_len()
    }

    /// True if it was compressed.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.prefix.is_compressed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Class, Flags};

    fn record(body: impl Into<Bytes>) -> Record {
        let header = RecordHeader {
            kind: Kind::LOG,
            class: Class::Telemetry as u8,
            flags: Flags::IMPORTED,
            source: 7,
            epoch: 8,
            seq: 9,
            aux: 0,
        };
        Record { header, body: body.into() }
    }

    fn of_kind(kind: u8) -> Record {
        let mut record = record("body");
        record.header.kind = Kind(kind);
        record
    }

    /// Bytes that LZ4 cannot shrink.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..len).map(|_| next()).collect()
    }

    fn join(encoded: &Encoded) -> Bytes {
        let whole = encoded.buffers().concat();
        assert_eq!(whole.len(), encoded.wire_len());
        whole.into()
    }

    fn read(whole: &Bytes) -> Result<Vec<Record>, BatchError> {
        let prefix = Prefix::decode(whole.first_chunk().unwrap())?;
        decode(&prefix, whole.slice(Prefix::LEN..))
    }

    fn sealed(prefix: Prefix, wire: &[u8]) -> Result<Vec<Record>, BatchError> {
        let prefix = Prefix { crc: 0, ..prefix };
        let raw = prefix.seal(std::iter::once(wire));
        decode(&Prefix::decode(&raw)?, Bytes::copy_from_slice(wire))
    }

    fn round_trip(records: &[Record]) -> Encoded {
        let encoded = Encoder::new().encode(records).unwrap();
        assert_eq!(read(&join(&encoded)).unwrap(), records);
        encoded
    }

    #[test]
    fn under_512_bytes_nothing_is_compressed() {
        let limit = COMPRESS_MIN - RecordHeader::LEN;
        assert!(!round_trip(&[record(vec![0; limit - 1])]).is_compressed());
        assert!(round_trip(&[record(vec![0; limit])]).is_compressed());
    }

    #[test]
    fn what_does_not_shrink_is_sent_as_it_is_and_not_copied() {
        let body = Bytes::from(noise(5000));
        let encoded = round_trip(&[record("small"), record(body.clone()), record("small")]);
        assert!(!encoded.is_compressed());
        assert!(encoded.buffers().iter().any(|buffer| buffer.as_ptr() == body.as_ptr()));
    }

    #[test]
    fn bodies_of_an_uncompressed_batch_are_slices_of_it() {
        let whole = join(&Encoder::encode_uncompressed(&[record("hello"), record("world")]).unwrap());
        let records = read(&whole).unwrap();
        let range = whole.as_ptr_range();
        assert!(records.iter().all(|record| range.contains(&record.body.as_ptr())));
    }

    #[test]
    fn one_record_may_exceed_64_kib_but_not_the_largest_frame() {
        assert!(round_trip(&[record(vec![1; FRAME_BYTES_MAX])]).is_compressed());
        assert!(!round_trip(&[record(noise(FRAME_BYTES_MAX))]).is_compressed());
        let raw_len = RECORD_BYTES_MAX + 1;
        assert_eq!(
            Encoder::new().encode(&[record(vec![1; FRAME_BYTES_MAX + 1])]).unwrap_err(),
            BatchError::RawLen { count: 1, raw_len }
        );
    }

    #[test]
    fn a_large_record_leaves_no_large_scratch_behind() {
        let mut encoder = Encoder::new();
        encoder.encode(&[record(vec![1; FRAME_BYTES_MAX])]).unwrap();
        assert!(encoder.raw.capacity() + encoder.compressed.capacity() < 3 * BATCH_RAW_MAX);
    }

    #[test]
    fn several_records_never_exceed_64_kib() {
        let half = BATCH_RAW_MAX / 2 - RecordHeader::LEN;
        round_trip(&[record(noise(half)), record(noise(half))]);
        let too_much = [record(noise(half)), record(noise(half + 1))];
        let raw_len = BATCH_RAW_MAX + 1;
        assert_eq!(Encoder::new().encode(&too_much).unwrap_err(), BatchError::RawLen { count: 2, raw_len });
    }

    #[test]
    fn records_are_split_by_bytes_and_by_class() {
        let mut alarm = record("alarm");
        alarm.header.class = Class::Alarm as u8;
        let records = [
            record("a"),
            record(vec![0; 60_000]),
            record(vec![0; 6_000]),
            record(vec![0; 70_000]),
            record("b"),
            alarm,
        ];
        let sizes: Vec<_> = split(&records).map(<[_]>::len).collect();
        assert_eq!(sizes, [2, 1, 1, 1, 1]);
        assert_eq!(split(&[]).count(), 0);
        for batch in split(&records) {
            round_trip(batch);
        }
    }

    #[test]
    fn records_of_a_store_or_of_two_classes_are_refused_both_ways() {
        assert_eq!(Encoder::new().encode(&[of_kind(16)]).unwrap_err(), BatchError::JournalKind(16));
        let mut alarm = record("b");
        alarm.header.class = Class::Alarm as u8;
        let mixed = [record("a"), alarm];
        assert_eq!(Encoder::new().encode(&mixed).unwrap_err(), BatchError::MixedClass);
        for (records, error) in
            [(&[of_kind(16)][..], BatchError::JournalKind(16)), (&mixed, BatchError::MixedClass)]
        {
            let mut wire = Vec::new();
            records.iter().for_each(|record| record.put(&mut wire));
            let (count, len) = (records.len() as u16, wire.len() as u32);
            let prefix = Prefix { compressed: false, count, raw_len: len, wire_len: len, crc: 0 };
            assert_eq!(sealed(prefix, &wire), Err(error));
        }
    }

    #[test]
    fn unknown_kinds_are_skipped() {
        let encoded = Encoder::new().encode(&[of_kind(0), of_kind(2), of_kind(15)]).unwrap();
        assert_eq!(read(&join(&encoded)).unwrap(), [of_kind(2)]);
    }

    #[test]
    fn an_empty_batch_is_refused() {
        assert_eq!(Encoder::new().encode(&[]).unwrap_err(), BatchError::Empty);
        let prefix = Prefix { compressed: false, count: 0, raw_len: 0, wire_len: 0, crc: 0 };
        assert_eq!(Prefix::decode(&prefix.without_crc()), Err(BatchError::Empty));
    }

    #[test]
    fn a_prefix_that_claims_too_much_is_refused_by_itself() {
        let prefix = |compressed, count, raw_len, wire_len| {
            Prefix::decode(&Prefix { compressed, count, raw_len, wire_len, crc: 0 }.without_crc())
        };
        assert!(prefix(false, 1, 40, 40).is_ok());
        for (count, raw_len) in
            [(1, 39), (2, 79), (2, 65_537), (1, u32::MAX), (1, RECORD_BYTES_MAX as u32 + 1)]
        {
            let error =
                BatchError::RawLen { count: usize::from(count), raw_len: usize::try_from(raw_len).unwrap() };
            assert_eq!(prefix(false, count, raw_len, raw_len), Err(error));
        }
        for (compressed, raw_len, wire_len) in
            [(false, 600, 599), (false, 600, u32::MAX), (true, 600, 600), (true, 600, 0), (true, 511, 50)]
        {
            assert!(matches!(prefix(compressed, 1, raw_len, wire_len), Err(BatchError::WireLen { .. })));
        }
    }

    #[test]
    fn other_versions_flags_and_reserved_bytes_are_refused() {
        let good = *join(&round_trip(&[record("a")])).first_chunk::<{ Prefix::LEN }>().unwrap();
        for (at, value, error) in [
            (0, 2, BatchError::Version(2)),
            (1, 2, BatchError::Flags(2)),
            (12, 1, BatchError::Dictionary(1)),
            (20, 1, BatchError::Reserved),
        ] {
            let mut raw = good;
            raw[at] = value;
            assert_eq!(Prefix::decode(&raw), Err(error));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let whole = join(&round_trip(&[record("some body")]));
        for at in 0..whole.len() * 8 {
            let mut raw = whole.to_vec();
            raw[at / 8] ^= 1 << (at % 8);
            assert!(read(&raw.into()).is_err(), "bit {at}");
        }
    }

    #[test]
    fn the_raw_length_must_be_consumed_exactly() {
        let mut wire = Vec::new();
        record("a").put(&mut wire);
        record("b").put(&mut wire);
        let len = wire.len() as u32;
        let claim = |count, wire: &[u8]| {
            sealed(Prefix { compressed: false, count, raw_len: len, wire_len: len, crc: 0 }, wire)
        };
        assert_eq!(claim(2, &wire).map(|records| records.len()), Ok(2));
        assert_eq!(claim(1, &wire), Err(BatchError::Records));
        wire[0] += 1;
        assert_eq!(claim(2, &wire), Err(BatchError::Records));
    }

    #[test]
    fn an_lz4_block_of_another_size_is_refused() {
        let mut raw = Vec::new();
        record(vec![0; 1000]).put(&mut raw);
        let wire = lz4_flex::block::compress(&raw);
        for raw_len in [raw.len() as u32 - 1, raw.len() as u32 + 1, RECORD_BYTES_MAX as u32] {
            let wire_len = wire.len() as u32;
            let prefix = Prefix { compressed: true, count: 1, raw_len, wire_len, crc: 0 };
            assert_eq!(sealed(prefix, &wire), Err(BatchError::Lz4));
        }
    }
}
