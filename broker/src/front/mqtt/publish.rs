//! PUBLISH, inbound: from the read buffer straight into an encoded Frame, the one copy of ingress.

use bytes::{Bytes, BytesMut};
use codec::{
    Trace,
    frame::{FrameParts, header},
};

use super::{
    error::PacketError,
    wire::{Reader, Value, Version, property},
};

/// A PUBLISH, borrowing from the input.
#[derive(Debug)]
pub(super) struct Publish<'a> {
    /// The topic is empty if only the alias names it.
    pub(super) message: Message<'a>,
    pub(super) qos: u8,
    pub(super) dup: bool,
    pub(super) retain: bool,
    /// 0 for QoS 0.
    pub(super) packet_id: u16,
    pub(super) alias: Option<u16>,
}

/// What a PUBLISH and a will have in common.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) topic: &'a str,
    pub(super) payload: &'a [u8],
    pub(super) properties: Properties<'a>,
}

/// Properties of a message, and of how it is sent.
#[derive(Debug, Default)]
pub(super) struct Properties<'a> {
    format_utf8: Option<bool>,
    ttl_s: u32,
    content_type: Option<&'a str>,
    /// Where the publisher wants an answer.
    pub(super) response_topic: Option<&'a str>,
    correlation: Option<&'a [u8]>,
    user: Vec<(&'a str, &'a str)>,
    alias: Option<u16>,
    pub(super) will_delay_s: u32,
}

/// Headers whose names stand for properties of their own; as user properties they are not carried, so that
/// nobody can forge one.
const MAPPED: [&str; 4] = [
    header::CONTENT_TYPE,
    header::MQTT_RESPONSE_TOPIC,
    header::MQTT_CORRELATION_DATA,
    header::MQTT_PAYLOAD_FORMAT,
];

/// The user property and NATS header that carries the W3C trace context.
pub(super) const TRACEPARENT: &str = "traceparent";

impl<'a> Publish<'a> {
    /// Reads the body of a PUBLISH. The topic is checked by whoever resolves the alias.
    pub(super) fn parse(version: Version, flags: u8, body: &'a [u8]) -> Result<Self, PacketError> {
        let qos = flags >> 1 & 3;
        let mut reader = Reader::new(body);
        let topic = reader.str()?;
        let packet_id = if qos == 0 { 0 } else { reader.packet_id()? };
        let mut properties = Properties::default();
        if version == Version::V5 {
            properties.read_publish(&mut reader)?;
        }
        let alias = properties.alias;
        Ok(Self {
            message: Message { topic, payload: reader.rest(), properties },
            qos,
            dup: flags & 8 != 0,
            retain: flags & 1 != 0,
            packet_id,
            alias,
        })
    }
}

impl<'a> Properties<'a> {
    fn read_publish(&mut self, reader: &mut Reader<'a>) -> Result<(), PacketError> {
        let mut properties = reader.properties()?;
        while let Some((id, value)) = properties.next()? {
            match (id, value) {
                (property::TOPIC_ALIAS, Value::Two(alias)) => self.alias = Some(alias),
                (id, value) => self.take(id, value)?,
            }
        }
        Ok(())
    }

    pub(super) fn read_will(&mut self, reader: &mut Reader<'a>) -> Result<(), PacketError> {
        let mut properties = reader.properties()?;
        while let Some((id, value)) = properties.next()? {
            match (id, value) {
                (property::WILL_DELAY, Value::Four(seconds)) => self.will_delay_s = seconds,
                (id, value) => self.take(id, value)?,
            }
        }
        Ok(())
    }

    fn take(&mut self, id: u8, value: Value<'a>) -> Result<(), PacketError> {
        match (id, value) {
            (property::PAYLOAD_FORMAT, Value::Byte(format @ (0 | 1))) => self.format_utf8 = Some(format == 1),
            (property::PAYLOAD_FORMAT, _) => return Err(PacketError::Malformed("unknown payload format")),
            // Zero is "none" in a frame; a message that expires at once lives one second.
            (property::MESSAGE_EXPIRY, Value::Four(seconds)) => self.ttl_s = seconds.max(1),
            (property::CONTENT_TYPE, Value::Str(text)) => self.content_type = Some(text),
            (property::RESPONSE_TOPIC, Value::Str(topic)) => {
                codec::topic::validate_topic(topic).map_err(|_invalid| PacketError::BadTopic)?;
                self.response_topic = Some(topic);
            }
            (property::CORRELATION_DATA, Value::Bytes(data)) => self.correlation = Some(data),
            (property::USER, Value::Pair(name, value)) => self.user.push((name, value)),
            _ => return Err(PacketError::misplaced()),
        }
        Ok(())
    }

    /// Calls `with` for each header of the frame; the trace context is not one.
    fn headers(&self) -> Vec<(&'a str, &'a [u8])> {
        let mapped = [
            (header::CONTENT_TYPE, self.content_type.map(str::as_bytes)),
            (header::MQTT_RESPONSE_TOPIC, self.response_topic.map(str::as_bytes)),
            (header::MQTT_CORRELATION_DATA, self.correlation),
            (
                header::MQTT_PAYLOAD_FORMAT,
                self.format_utf8.map(|utf8| if utf8 { b"1" } else { b"0" }.as_slice()),
            ),
        ];
        let user = self
            .user
            .iter()
            .filter(|(name, _value)| !name.is_empty() && !MAPPED.contains(name) && *name != TRACEPARENT)
            .map(|(name, value)| (*name, value.as_bytes()));
        mapped.into_iter().filter_map(|(name, value)| Some((name, value?))).chain(user).collect()
    }

    fn trace(&self) -> Option<Trace> {
        let (_name, text) = self.user.iter().find(|(name, _value)| *name == TRACEPARENT)?;
        Trace::from_traceparent(text)
    }
}

/// When a message entered the bus.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entered {
    /// Wall clock, microseconds.
    pub(super) time_us: u64,
    /// Whether that clock is known to be right.
    pub(super) trusted: bool,
}

/// Encodes frames back to back; the frames of one read share buffers, each at most [`ARENA_BYTES`] large, so
/// that a parked frame holds on to little that is not its own.
#[derive(Debug, Default)]
pub(super) struct Arena {
    buffer: BytesMut,
}

/// Size of a shared buffer. A larger frame has its own.
const ARENA_BYTES: usize = 16 << 10;

impl Arena {
    /// Encodes one message. `expected` is about what is still to come in this read, in bytes.
    pub(super) fn encode(&mut self, message: &Message<'_>, entered: Entered, expected: usize) -> Bytes {
        let headers = message.properties.headers();
        let parts = FrameParts {
            topic: message.topic,
            time_us: entered.time_us,
            time_trusted: entered.trusted,
            trace: message.properties.trace(),
            ttl_s: message.properties.ttl_s,
            headers: &headers,
            payload: message.payload,
        };
        let len = parts.encoded_len();
        if self.buffer.capacity() - self.buffer.len() < len {
            // Frames are a little larger than their packets: the time alone takes nine bytes.
            let room = (expected + expected / 4).min(ARENA_BYTES);
            self.buffer = BytesMut::with_capacity(len.max(room));
        }
        parts.encode_into(&mut self.buffer);
        self.buffer.split().freeze()
    }

    /// Lets go of the current buffer: what is left of it would be idle memory.
    pub(super) fn release(&mut self) {
        self.buffer = BytesMut::new();
    }
}
