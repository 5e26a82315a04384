//! The frame: one immutable message, encoded once where it enters the bus.
//!
//! The schema is `Frame` in `proto/octobus.proto`. Two readers exist: prost's, which copies a frame into owned
//! fields, and [`FrameView`], which routing uses: one pass over the bytes, no allocation, every later access a
//! field read. **They agree exactly**: `FrameView` accepts what prost accepts and sees the same values. That
//! includes what one would not write by hand: the last of a repeated scalar wins, unknown fields and groups are
//! skipped (to prost's depth), a varint is cut to its field's width, every topic and header name is checked for
//! UTF-8 even if a later one replaces it. `tests/properties.rs` and the fuzz target `frame` hold the two equal,
//! because a frame that only one of them can read would be routed by one broker and refused by the next.
//!
//! [`FrameParts`] writes. It differs from prost in one point: the payload (field 6) comes after `ttl_s` (field
//! 7), so that it may follow the head as a buffer of its own ([`FrameParts::encode_head_into`]).

use bytes::{BufMut, Bytes, BytesMut};

use crate::wire::{Reader, WireError, varint_len};

/// The largest encoded frame that the bus carries. Whoever reads one from a peer checks this first; larger
/// things are blobs.
pub const FRAME_BYTES_MAX: usize = 2 << 20;

/// Names of headers that the bus itself gives a meaning. They are compared byte by byte, as NATS does.
pub mod header {
    /// The payload's media type; MQTT 5's Content Type.
    pub const CONTENT_TYPE: &str = "content-type";
    /// MQTT 5's Response Topic.
    pub const MQTT_RESPONSE_TOPIC: &str = "mqtt-response-topic";
    /// MQTT 5's Correlation Data: bytes, not text.
    pub const MQTT_CORRELATION_DATA: &str = "mqtt-correlation-data";
    /// MQTT 5's Payload Format Indicator: `1` says that the payload is UTF-8.
    pub const MQTT_PAYLOAD_FORMAT: &str = "mqtt-payload-format";
    /// `1`: a down message also sets the retained message of its topic on the node; an empty payload clears it.
    pub const RETAIN: &str = "Octobus-Retain";
    /// On an answer that nobody gave: `503` when the node is offline or no responder listens.
    pub const SERVICE_ERROR_CODE: &str = "Nats-Service-Error-Code";
    /// The reason beside [`SERVICE_ERROR_CODE`], for people.
    pub const SERVICE_ERROR: &str = "Nats-Service-Error";
}

/// The bytes are not a `proto::Frame`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The protobuf encoding is broken.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The topic is not UTF-8.
    #[error("frame topic is not UTF-8")]
    TopicUtf8,
    /// The name of a header is not UTF-8.
    #[error("frame header name is not UTF-8")]
    HeaderUtf8,
}

/// W3C trace context, as `traceparent` carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    /// Names the whole trace.
    pub trace_id: [u8; 16],
    /// Names the span that sent the message.
    pub parent_id: [u8; 8],
    /// Bit 0: sampled.
    pub flags: u8,
}

impl Trace {
    /// Size of the frame's `trace` field. Any other size means: no trace.
    pub const LEN: usize = 25;

    /// Reads `00-<32 hex>-<16 hex>-<2 hex>`. `None` for what the standard calls invalid: upper case, another
    /// version than 00, an id of zeros.
    #[must_use]
    pub fn from_traceparent(text: &str) -> Option<Self> {
        let text: &[u8; 55] = text.as_bytes().try_into().ok()?;
        if !text.starts_with(b"00-") || text[35] != b'-' || text[52] != b'-' {
            return None;
        }
        let trace = Self {
            trace_id: unhex(&text[3..35])?,
            parent_id: unhex(&text[36..52])?,
            flags: unhex::<1>(&text[53..])?[0],
        };
        (trace.trace_id != [0; 16] && trace.parent_id != [0; 8]).then_some(trace)
    }

    /// Writes `00-<32 hex>-<16 hex>-<2 hex>`.
    #[must_use]
    pub fn to_traceparent(self) -> String {
        let mut text = String::with_capacity(55);
        text.push_str("00-");
        push_hex(&mut text, &self.trace_id);
        text.push('-');
        push_hex(&mut text, &self.parent_id);
        text.push('-');
        push_hex(&mut text, &[self.flags]);
        text
    }

    fn from_field(raw: &[u8]) -> Option<Self> {
        let raw: &[u8; Self::LEN] = raw.try_into().ok()?;
        let (trace_id, rest) = raw.split_first_chunk()?;
        let (parent_id, rest) = rest.split_first_chunk()?;
        Some(Self { trace_id: *trace_id, parent_id: *parent_id, flags: *rest.first()? })
    }
}

fn unhex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

fn push_hex(text: &mut String, raw: &[u8]) {
    for byte in raw {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(nibble), 16).expect("a nibble is a hex digit"));
        }
    }
}

/// Keys of the fields of `proto::Frame` and `proto::Header`. All are one byte long.
mod field {
    use crate::wire::{WireType, key};

    pub(super) const TOPIC: u32 = key(1, WireType::Bytes);
    pub(super) const TIME_US: u32 = key(2, WireType::Fixed64);
    pub(super) const TIME_TRUSTED: u32 = key(3, WireType::Varint);
    pub(super) const TRACE: u32 = key(4, WireType::Bytes);
    pub(super) const HEADERS: u32 = key(5, WireType::Bytes);
    pub(super) const PAYLOAD: u32 = key(6, WireType::Bytes);
    pub(super) const TTL_S: u32 = key(7, WireType::Varint);
    /// The highest number of a field of a frame; all below exist.
    pub(super) const LAST: u32 = 7;

    pub(super) const HEADER_NAME: u32 = key(1, WireType::Bytes);
    pub(super) const HEADER_VALUE: u32 = key(2, WireType::Bytes);
    /// The highest number of a field of a header.
    pub(super) const HEADER_LAST: u32 = 2;
}

/// How deep prost follows messages and groups; the frame itself is the first level.
const DEPTH: u32 = 100;

/// A bounds-checked reader of an encoded `proto::Frame`: no allocation, no copy.
///
/// Borrowed accessors have the lifetime of the bytes, not of the view, so `Bytes::slice_ref` works on them.
#[derive(Debug, Clone, Copy)]
pub struct FrameView<'a> {
    topic: &'a str,
    payload: &'a [u8],
    trace: &'a [u8],
    /// From the first header field to the end of the last; other fields may stand between them.
    headers: &'a [u8],
    time_us: u64,
    ttl_s: u32,
    time_trusted: bool,
}

impl<'a> FrameView<'a> {
    /// Reads every field once. Its size has been checked by whoever took the bytes from a peer.
    ///
    /// # Errors
    /// Exactly when prost refuses to decode the bytes as a `proto::Frame`.
    pub fn parse(raw: &'a [u8]) -> Result<Self, FrameError> {
        let mut view = Self {
            topic: "",
            payload: &[],
            trace: &[],
            headers: &[],
            time_us: 0,
            ttl_s: 0,
            time_trusted: false,
        };
        let mut headers: Option<(usize, usize)> = None;
        let mut reader = Reader::new(raw);
        while !reader.is_empty() {
            let at = reader.position();
            match reader.key()? {
                field::TOPIC => {
                    view.topic = std::str::from_utf8(reader.bytes()?).map_err(|_| FrameError::TopicUtf8)?;
                }
                field::TIME_US => view.time_us = reader.fixed64()?,
                field::TIME_TRUSTED => view.time_trusted = reader.varint()? != 0,
                field::TRACE => view.trace = reader.bytes()?,
                field::HEADERS => {
                    read_header(reader.bytes()?)?;
                    headers = Some((headers.map_or(at, |(first, _)| first), reader.position()));
                }
                field::PAYLOAD => view.payload = reader.bytes()?,
                // Cut to 32 bits, as prost does.
                field::TTL_S => view.ttl_s = reader.varint()? as u32,
                unknown => reader.skip(unknown, field::LAST, DEPTH)?,
            }
        }
        if let Some((first, end)) = headers {
            view.headers = &raw[first..end];
        }
        Ok(view)
    }

    /// The topic, relative to its origin. A State record's key. Not validated as a topic.
    #[must_use]
    pub fn topic(&self) -> &'a str {
        self.topic
    }

    /// The payload.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Wall clock at ingress, microseconds since 1970.
    #[must_use]
    pub fn time_us(&self) -> u64 {
        self.time_us
    }

    /// The clock behind [`Self::time_us`] was known to be right.
    #[must_use]
    pub fn time_trusted(&self) -> bool {
        self.time_trusted
    }

    /// Seconds until the message expires; 0 = never.
    #[must_use]
    pub fn ttl_s(&self) -> u32 {
        self.ttl_s
    }

    /// The trace context, if the frame has one of the right size.
    #[must_use]
    pub fn trace(&self) -> Option<Trace> {
        Trace::from_field(self.trace)
    }

    /// The headers in order; a name may occur more than once. A malformed header was refused by `parse`.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + 'a {
        let mut reader = Reader::new(self.headers);
        std::iter::from_fn(move || next_header(&mut reader))
    }

    /// The value of the first header with exactly this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers().find_map(|(found, value)| (found == name).then_some(value))
    }
}

/// Name and value of a header; the name is UTF-8.
fn read_header(raw: &[u8]) -> Result<(&[u8], &[u8]), FrameError> {
    let (mut name, mut value) = (&[][..], &[][..]);
    let mut reader = Reader::new(raw);
    while !reader.is_empty() {
        match reader.key()? {
            field::HEADER_NAME => {
                name = reader.bytes()?;
                // Nearly always ASCII, which is found out several times faster.
                if !name.is_ascii() && std::str::from_utf8(name).is_err() {
                    return Err(FrameError::HeaderUtf8);
                }
            }
            field::HEADER_VALUE => value = reader.bytes()?,
            unknown => reader.skip(unknown, field::HEADER_LAST, DEPTH - 1)?,
        }
    }
    Ok((name, value))
}

/// The next header in bytes that `parse` has accepted, so an error cannot occur; it would end the iteration.
fn next_header<'a>(reader: &mut Reader<'a>) -> Option<(&'a str, &'a [u8])> {
    while !reader.is_empty() {
        match reader.key().ok()? {
            field::HEADERS => {
                let (name, value) = read_header(reader.bytes().ok()?).ok()?;
                return Some((std::str::from_utf8(name).ok()?, value));
            }
            field::TOPIC | field::TRACE | field::PAYLOAD => drop(reader.bytes().ok()?),
            field::TIME_US => drop(reader.fixed64().ok()?),
            field::TIME_TRUSTED | field::TTL_S => drop(reader.varint().ok()?),
            unknown => reader.skip(unknown, field::LAST, DEPTH).ok()?,
        }
    }
    None
}

/// What a front has to say about a message; encoded once.
#[derive(Debug, Clone, Copy, Default)]
pub struct FrameParts<'a> {
    /// See [`FrameView::topic`].
    pub topic: &'a str,
    /// See [`FrameView::time_us`].
    pub time_us: u64,
    /// See [`FrameView::time_trusted`].
    pub time_trusted: bool,
    /// See [`FrameView::trace`].
    pub trace: Option<Trace>,
    /// See [`FrameView::ttl_s`].
    pub ttl_s: u32,
    /// See [`FrameView::headers`].
    pub headers: &'a [(&'a str, &'a [u8])],
    /// See [`FrameView::payload`].
    pub payload: &'a [u8],
}

impl FrameParts<'_> {
    /// Exact size of the encoding, to be compared with [`FRAME_BYTES_MAX`] before anything is written.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        self.head_len() + self.payload.len()
    }

    /// Appends the encoding. Fields with their default value are left out, as in any proto3 message.
    pub fn encode_into(&self, out: &mut BytesMut) {
        out.reserve(self.encoded_len());
        self.put_head(out);
        out.put_slice(self.payload);
    }

    /// Appends everything up to the payload's own bytes, which the caller lets follow.
    pub fn encode_head_into(&self, out: &mut BytesMut) {
        out.reserve(self.head_len());
        self.put_head(out);
    }

    /// The encoding in a buffer of exactly its size.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.encoded_len());
        self.encode_into(&mut out);
        out.freeze()
    }

    fn head_len(&self) -> usize {
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| prefix_len(header_len(name, value)) + header_len(name, value))
            .sum();
        bytes_len(self.topic.len())
            + if self.time_us == 0 { 0 } else { 9 }
            + if self.time_trusted { 2 } else { 0 }
            + if self.trace.is_some() { 2 + Trace::LEN } else { 0 }
            + headers
            + if self.ttl_s == 0 { 0 } else { 1 + varint_len(u64::from(self.ttl_s)) }
            + if self.payload.is_empty() { 0 } else { prefix_len(self.payload.len()) }
    }

    fn put_head(&self, out: &mut BytesMut) {
        put_bytes(out, field::TOPIC, self.topic.as_bytes());
        if self.time_us != 0 {
            put_key(out, field::TIME_US);
            out.put_u64_le(self.time_us);
        }
        if self.time_trusted {
            put_key(out, field::TIME_TRUSTED);
            out.put_u8(1);
        }
        if let Some(trace) = self.trace {
            put_prefix(out, field::TRACE, Trace::LEN);
            out.put_slice(&trace.trace_id);
            out.put_slice(&trace.parent_id);
            out.put_u8(trace.flags);
        }
        for (name, value) in self.headers {
            put_prefix(out, field::HEADERS, header_len(name, value));
            put_bytes(out, field::HEADER_NAME, name.as_bytes());
            put_bytes(out, field::HEADER_VALUE, value);
        }
        if self.ttl_s != 0 {
            put_key(out, field::TTL_S);
            put_varint(out, u64::from(self.ttl_s));
        }
        if !self.payload.is_empty() {
            put_prefix(out, field::PAYLOAD, self.payload.len());
        }
    }
}

fn header_len(name: &str, value: &[u8]) -> usize {
    bytes_len(name.len()) + bytes_len(value.len())
}

/// Key, length and content of a field of bytes; nothing if it is empty.
fn bytes_len(len: usize) -> usize {
    if len == 0 { 0 } else { prefix_len(len) + len }
}

fn prefix_len(len: usize) -> usize {
    1 + varint_len(len as u64)
}

fn put_bytes(out: &mut BytesMut, key: u32, value: &[u8]) {
    if !value.is_empty() {
        put_prefix(out, key, value.len());
        out.put_slice(value);
    }
}

fn put_prefix(out: &mut BytesMut, key: u32, len: usize) {
    put_key(out, key);
    put_varint(out, len as u64);
}

fn put_key(out: &mut BytesMut, key: u32) {
    out.put_u8(key as u8);
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn traceparent_is_read_and_written_alike() {
        let trace = Trace::from_traceparent(PARENT).unwrap();
        assert_eq!(trace.flags, 1);
        assert_eq!(trace.to_traceparent(), PARENT);
    }

    #[test]
    fn traceparent_that_the_standard_calls_invalid_is_none() {
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-é",
        ] {
            assert_eq!(Trace::from_traceparent(text), None, "{text}");
        }
    }

    #[test]
    fn every_part_comes_back() {
        let parts = FrameParts {
            topic: "sensors/boiler/temp",
            time_us: 1_700_000_000_000_000,
            time_trusted: true,
            trace: Trace::from_traceparent(PARENT),
            ttl_s: 300,
            headers: &[("content-type", b"text/plain"), ("", b""), ("x", &[0xff])],
            payload: b"71.5",
        };
        let raw = parts.encode();
        assert_eq!(raw.len(), parts.encoded_len());
        assert!(raw.ends_with(parts.payload), "the payload is written last");
        let view = FrameView::parse(&raw).unwrap();
        assert_eq!(view.topic(), parts.topic);
        assert_eq!(view.time_us(), parts.time_us);
        assert!(view.time_trusted());
        assert_eq!(view.trace(), parts.trace);
        assert_eq!(view.ttl_s(), 300);
        assert_eq!(view.headers().collect::<Vec<_>>(), parts.headers);
        assert_eq!(view.header("x"), Some(&[0xff][..]));
        assert_eq!(view.header("y"), None);
        assert_eq!(view.payload(), parts.payload);
    }

    #[test]
    fn head_and_payload_written_apart_are_the_same_frame() {
        let parts = FrameParts { topic: "a/b", payload: &[7; 300], ..FrameParts::default() };
        let mut apart = BytesMut::new();
        parts.encode_head_into(&mut apart);
        apart.put_slice(parts.payload);
        assert_eq!(apart.freeze(), parts.encode());
    }

    #[test]
    fn an_empty_frame_has_no_bytes() {
        assert!(FrameParts::default().encode().is_empty());
        let view = FrameView::parse(&[]).unwrap();
        assert_eq!((view.topic(), view.payload(), view.trace()), ("", &[][..], None));
    }

    #[test]
    fn a_trace_of_another_size_is_no_trace() {
        let view = FrameView::parse(&[0x22, 2, 1, 2]).unwrap();
        assert_eq!(view.trace(), None);
    }

    #[test]
    fn a_length_beyond_the_end_is_refused() {
        assert_eq!(FrameView::parse(&[0x0a, 5, b'a']).unwrap_err(), FrameError::Wire(WireError::Truncated));
    }

    #[test]
    fn a_topic_that_is_not_utf8_is_refused_even_if_replaced() {
        assert_eq!(FrameView::parse(&[0x0a, 1, 0xff, 0x0a, 1, b'a']).unwrap_err(), FrameError::TopicUtf8);
    }
}
