//! Packets that this server sends.

use bytes::BufMut;
use codec::{
    FrameView,
    frame::{FrameError, header},
};

use super::{
    error::reason,
    publish::TRACEPARENT,
    wire::{VARINT_MAX, Version, property, put_bytes, put_varint, varint_len},
    writer::Writer,
};
use crate::core::event::Delivery;

/// What CONNACK says besides success.
#[derive(Debug)]
pub(super) struct ConnAck<'a> {
    pub(super) session_present: bool,
    pub(super) receive_max: u16,
    pub(super) packet_max: usize,
    pub(super) topic_alias_max: u16,
    /// Seconds that the session lasts, set if that is less than what the client asked for.
    pub(super) lowered_expiry_s: Option<u32>,
    /// Set if the server chose it.
    pub(super) assigned_client_id: Option<&'a str>,
}

/// A successful CONNACK.
pub(super) fn connack(out: &mut Vec<u8>, version: Version, connack: &ConnAck<'_>) {
    if version == Version::V4 {
        out.put_slice(&[0x20, 2, u8::from(connack.session_present), 0]);
        return;
    }
    let mut properties = Vec::with_capacity(64);
    properties.put_u8(property::RECEIVE_MAX);
    properties.put_u16(connack.receive_max);
    properties.put_u8(property::PACKET_MAX);
    properties.put_u32(u32::try_from(connack.packet_max).unwrap_or(u32::MAX));
    properties.put_u8(property::TOPIC_ALIAS_MAX);
    properties.put_u16(connack.topic_alias_max);
    for (id, available) in [
        (property::WILDCARD_AVAILABLE, 1),
        (property::SUBSCRIPTION_ID_AVAILABLE, 1),
        (property::SHARED_AVAILABLE, 0),
    ] {
        properties.put_slice(&[id, available]);
    }
    if let Some(seconds) = connack.lowered_expiry_s {
        properties.put_u8(property::SESSION_EXPIRY);
        properties.put_u32(seconds);
    }
    if let Some(client_id) = connack.assigned_client_id {
        properties.put_u8(property::ASSIGNED_CLIENT_ID);
        put_bytes(&mut properties, client_id.as_bytes());
    }
    out.put_u8(0x20);
    put_varint(out, 2 + varint_len(properties.len()) + properties.len());
    out.put_slice(&[u8::from(connack.session_present), reason::SUCCESS]);
    put_varint(out, properties.len());
    out.put_slice(&properties);
}

/// A CONNACK that refuses. MQTT 3.1.1 knows five reasons.
pub(super) fn connack_refused(out: &mut Vec<u8>, version: Version, code: u8) {
    if version == Version::V5 {
        out.put_slice(&[0x20, 3, 0, code, 0]);
        return;
    }
    let code = match code {
        reason::BAD_VERSION => 1,
        reason::BAD_CLIENT_ID => 2,
        reason::BAD_CREDENTIALS => 4,
        reason::NOT_AUTHORIZED => 5,
        _ => 3,
    };
    out.put_slice(&[0x20, 2, 0, code]);
}

/// First bytes of the acknowledgement packets.
pub(super) mod ack {
    pub(in crate::front::mqtt) const PUBACK: u8 = 0x40;
    pub(in crate::front::mqtt) const PUBREC: u8 = 0x50;
    pub(in crate::front::mqtt) const PUBREL: u8 = 0x62;
    pub(in crate::front::mqtt) const PUBCOMP: u8 = 0x70;
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP. MQTT 3.1.1 has no reasons in them.
pub(super) fn acknowledge(out: &mut Vec<u8>, version: Version, first: u8, packet_id: u16, code: u8) {
    let [high, low] = packet_id.to_be_bytes();
    if version == Version::V4 || code == reason::SUCCESS {
        out.put_slice(&[first, 2, high, low]);
    } else {
        out.put_slice(&[first, 3, high, low, code]);
    }
}

/// SUBACK with one code for each filter.
pub(super) fn suback(out: &mut Vec<u8>, version: Version, packet_id: u16, codes: &[u8]) {
    answer(out, 0x90, version, packet_id, codes);
}

/// UNSUBACK; MQTT 3.1.1 has no codes in it.
pub(super) fn unsuback(out: &mut Vec<u8>, version: Version, packet_id: u16, codes: &[u8]) {
    answer(out, 0xb0, version, packet_id, if version == Version::V5 { codes } else { &[] });
}

fn answer(out: &mut Vec<u8>, first: u8, version: Version, packet_id: u16, codes: &[u8]) {
    let properties = usize::from(version == Version::V5);
    out.put_u8(first);
    put_varint(out, 2 + properties + codes.len());
    out.put_u16(packet_id);
    out.put_bytes(0, properties);
    out.put_slice(codes);
}

/// PINGRESP.
pub(super) fn pingresp(out: &mut Vec<u8>) {
    out.put_slice(&[0xd0, 0]);
}

/// DISCONNECT; only MQTT 5 has one from the server.
pub(super) fn disconnect(out: &mut Vec<u8>, code: u8) {
    out.put_slice(&[0xe0, 2, code, 0]);
}

/// Why a delivery was not encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DeliveryError {
    /// The client does not take packets of this size.
    #[error("larger than the client takes")]
    TooLarge,
    /// Not a frame: a mistake of this process.
    #[error("not a frame: {0}")]
    Frame(#[from] FrameError),
}

/// PUBLISH: the head is gathered, a large payload shared. Returns the packet's length.
pub(super) fn publish(
    out: &mut Writer,
    version: Version,
    delivery: &Delivery,
    now_us: u64,
    packet_max: usize,
) -> Result<usize, DeliveryError> {
    let view = FrameView::parse(&delivery.frame)?;
    let (topic, payload) = (view.topic(), view.payload());
    let mut properties = Vec::new();
    let mut body = 2 + topic.len() + payload.len() + if delivery.qos > 0 { 2 } else { 0 };
    if version == Version::V5 {
        message_properties(&mut properties, &view, delivery, now_us);
        body += varint_len(properties.len()) + properties.len();
    }
    let len = 1 + varint_len(body) + body;
    if len > packet_max || body > VARINT_MAX {
        return Err(DeliveryError::TooLarge);
    }
    let head = out.gather();
    head.put_u8(0x30 | u8::from(delivery.dup) << 3 | delivery.qos << 1 | u8::from(delivery.retain));
    put_varint(head, body);
    put_bytes(head, topic.as_bytes());
    if delivery.qos > 0 {
        head.put_u16(delivery.packet_id);
    }
    if version == Version::V5 {
        put_varint(head, properties.len());
        head.put_slice(&properties);
    }
    out.payload(&delivery.frame, payload);
    Ok(len)
}

fn message_properties(out: &mut Vec<u8>, view: &FrameView<'_>, delivery: &Delivery, now_us: u64) {
    if view.ttl_s() > 0 {
        let waited_s = now_us.saturating_sub(view.time_us()) / 1_000_000;
        let left_s = u64::from(view.ttl_s()).saturating_sub(waited_s).max(1);
        out.put_u8(property::MESSAGE_EXPIRY);
        out.put_u32(left_s as u32);
    }
    if let Some(reply) = &delivery.reply {
        out.put_u8(property::RESPONSE_TOPIC);
        put_bytes(out, reply.as_bytes());
    }
    for identifier in delivery.identifiers.iter().flat_map(|identifiers| identifiers.iter()) {
        out.put_u8(property::SUBSCRIPTION_ID);
        put_varint(out, *identifier as usize & VARINT_MAX);
    }
    if let Some(trace) = view.trace() {
        put_user(out, TRACEPARENT, &trace.to_traceparent());
    }
    let mut mapped = 0_u8;
    for (name, value) in view.headers() {
        put_header(out, name, value, delivery.reply.is_some(), &mut mapped);
    }
}

/// Writes one header as the property it stands for. A header that MQTT cannot carry is left out, and so is a
/// second one where MQTT allows one: frames also come from fronts with other rules.
fn put_header(out: &mut Vec<u8>, name: &str, value: &[u8], has_reply: bool, mapped: &mut u8) {
    if value.len() > usize::from(u16::MAX) {
        return;
    }
    let mut first = |bit: u8| {
        let first = *mapped & bit == 0;
        *mapped |= bit;
        first
    };
    match name {
        header::MQTT_PAYLOAD_FORMAT => {
            if let b"0" | b"1" = value
                && first(1)
            {
                out.put_slice(&[property::PAYLOAD_FORMAT, value[0] - b'0']);
            }
        }
        header::CONTENT_TYPE => {
            if text(value).is_some() && first(2) {
                out.put_u8(property::CONTENT_TYPE);
                put_bytes(out, value);
            }
        }
        header::MQTT_RESPONSE_TOPIC => {
            let valid = text(value).is_some_and(|topic| codec::topic::validate_topic(topic).is_ok());
            if valid && !has_reply && first(4) {
                out.put_u8(property::RESPONSE_TOPIC);
                put_bytes(out, value);
            }
        }
        header::MQTT_CORRELATION_DATA => {
            if first(8) {
                out.put_u8(property::CORRELATION_DATA);
                put_bytes(out, value);
            }
        }
        name => {
            if let Some(value) = text(value)
                && text(name.as_bytes()).is_some()
                && name.len() <= usize::from(u16::MAX)
            {
                put_user(out, name, value);
            }
        }
    }
}

fn put_user(out: &mut Vec<u8>, name: &str, value: &str) {
    out.put_u8(property::USER);
    put_bytes(out, name.as_bytes());
    put_bytes(out, value.as_bytes());
}

/// A string that MQTT can carry.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| !text.as_bytes().contains(&0))
}
