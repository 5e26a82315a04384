//! The fixed-header gate: what no client may send is refused before a byte of its body is awaited.
//!
//! Invariant: a [`Packet`] that leaves here is complete, of a type that a client may send in this protocol
//! version, with the flags and a body length that this type allows. So the readers behind the gate never ask
//! for more bytes, and a claimed length costs nothing until bytes arrive.

use super::{
    error::PacketError,
    wire::{Version, varint, varint_len},
};

/// Types of packets that a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Connect,
    Publish,
    PubAck,
    PubRec,
    PubRel,
    PubComp,
    Subscribe,
    Unsubscribe,
    PingReq,
    Disconnect,
}

/// A packet at the beginning of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    /// Its type.
    pub(super) kind: Kind,
    /// The low half of its first byte.
    pub(super) flags: u8,
    /// What follows the fixed header.
    pub(super) body: &'a [u8],
    /// Bytes of the whole packet.
    pub(super) len: usize,
}

/// What stands at the beginning of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate<'a> {
    /// A complete packet.
    Packet(Packet<'a>),
    /// The beginning of a packet that needs at least this many bytes in all.
    Incomplete(usize),
}

/// Looks at the beginning of `input`. `version` is `None` until the CONNECT has been read.
///
/// # Errors
/// No continuation of these bytes is a packet that is allowed here.
pub(super) fn check(
    input: &[u8],
    version: Option<Version>,
    packet_max: usize,
) -> Result<Gate<'_>, PacketError> {
    let Some(&first) = input.first() else { return Ok(Gate::Incomplete(2)) };
    let kind = kind(first, version)?;
    let flags = first & 0x0f;
    check_flags(kind, flags)?;
    let Some((body_len, len_len)) = varint(&input[1..])? else {
        return Ok(Gate::Incomplete(input.len() + 1));
    };
    if version == Some(Version::V5) && len_len != varint_len(body_len) {
        return Err(PacketError::Malformed("the remaining length is not in its shortest form"));
    }
    let (min, max) = body_bounds(kind, flags, version);
    if body_len < min {
        return Err(PacketError::Malformed("the packet is too short for its type"));
    }
    if max.is_some_and(|max| body_len > max) {
        return Err(PacketError::Malformed("the packet is too long for its type"));
    }
    let head = 1 + len_len;
    let len = head + body_len;
    if len > packet_max {
        return Err(PacketError::TooLarge { bytes: len, max: packet_max });
    }
    Ok(match input.get(head..len) {
        Some(body) => Gate::Packet(Packet { kind, flags, body, len }),
        None => Gate::Incomplete(len),
    })
}

fn kind(first: u8, version: Option<Version>) -> Result<Kind, PacketError> {
    let kind = match first >> 4 {
        1 => Kind::Connect,
        3 => Kind::Publish,
        4 => Kind::PubAck,
        5 => Kind::PubRec,
        6 => Kind::PubRel,
        7 => Kind::PubComp,
        8 => Kind::Subscribe,
        10 => Kind::Unsubscribe,
        12 => Kind::PingReq,
        14 => Kind::Disconnect,
        2 | 9 | 11 | 13 => return Err(PacketError::Protocol("a packet that only servers send")),
        15 if version == Some(Version::V5) => {
            return Err(PacketError::Protocol("AUTH without an authentication method"));
        }
        _ => return Err(PacketError::Malformed("a reserved packet type")),
    };
    match (version, kind) {
        (None, Kind::Connect) => Ok(kind),
        (None, _) => Err(PacketError::NotMqtt),
        (Some(_), Kind::Connect) => Err(PacketError::Protocol("a second CONNECT")),
        (Some(_), _) => Ok(kind),
    }
}

fn check_flags(kind: Kind, flags: u8) -> Result<(), PacketError> {
    let allowed = match kind {
        Kind::Publish => {
            let (qos, dup) = (flags >> 1 & 3, flags & 8 != 0);
            qos != 3 && !(dup && qos == 0)
        }
        Kind::PubRel | Kind::Subscribe | Kind::Unsubscribe => flags == 2,
        _ => flags == 0,
    };
    if allowed { Ok(()) } else { Err(PacketError::Malformed("reserved flags in the fixed header")) }
}

/// Shortest and, where there is one, longest body of a type.
fn body_bounds(kind: Kind, flags: u8, version: Option<Version>) -> (usize, Option<usize>) {
    let v5 = version == Some(Version::V5);
    match kind {
        // name, level, flags, keep-alive, empty client identifier
        Kind::Connect => (12, None),
        // a topic of one byte; in MQTT 5 an empty topic and a property length
        Kind::Publish => (if flags & 6 == 0 { 3 } else { 5 }, None),
        Kind::PubAck | Kind::PubRec | Kind::PubRel | Kind::PubComp => (2, (!v5).then_some(2)),
        // packet identifier, one filter of one byte (and its options); in MQTT 5 a property length
        Kind::Subscribe => (6 + usize::from(v5), None),
        Kind::Unsubscribe => (5 + usize::from(v5), None),
        Kind::PingReq => (0, Some(0)),
        Kind::Disconnect => (0, (!v5).then_some(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1 << 20;

    /// The specification's table, written down once more and differently: type, flags, shortest and longest
    /// body for 3.1.1 and for 5; `None`: never from a client.
    fn expected(kind: u8, flags: u8, v5: bool) -> Option<(usize, usize)> {
        let any = MAX - 2;
        let long = |min: usize| Some((min, any));
        match (kind, flags) {
            (3, 0 | 1) => long(3),
            (3, 2..=5 | 10..=13) => long(5),
            (4 | 5 | 7, 0) | (6, 2) => Some((2, if v5 { any } else { 2 })),
            (8, 2) => long(if v5 { 7 } else { 6 }),
            (10, 2) => long(if v5 { 6 } else { 5 }),
            (12, 0) => Some((0, 0)),
            (14, 0) => Some((0, if v5 { any } else { 0 })),
            _ => None,
        }
    }

    #[test]
    fn the_gate_passes_exactly_the_types_flags_and_lengths_of_the_specification() {
        for version in [Version::V4, Version::V5] {
            for first in 0..=u8::MAX {
                for len in 0..=16_u8 {
                    let mut input = vec![first, len];
                    input.extend(std::iter::repeat_n(0, usize::from(len)));
                    let allowed = expected(first >> 4, first & 15, version == Version::V5)
                        .is_some_and(|(min, max)| (min..=max).contains(&usize::from(len)));
                    let verdict = check(&input, Some(version), MAX);
                    assert_eq!(
                        matches!(verdict, Ok(Gate::Packet(packet)) if packet.len == input.len()),
                        allowed,
                        "{version:?} {first:#04x} {len}: {verdict:?}"
                    );
                    assert!(!matches!(verdict, Ok(Gate::Incomplete(_))), "a complete packet never waits");
                }
            }
        }
    }

    #[test]
    fn before_connect_only_connect_passes() {
        for first in 0..=u8::MAX {
            let mut input = vec![first, 12];
            input.extend([0; 12]);
            assert_eq!(check(&input, None, MAX).is_ok(), first == 0x10, "{first:#04x}");
        }
        assert!(check(&[0x10, 12], Some(Version::V4), MAX).is_err(), "and only once");
    }

    #[test]
    fn a_claim_over_the_limit_is_refused_by_its_header_alone() {
        let verdict = check(&[0x30, 0xff, 0xff, 0xff, 0x7f], Some(Version::V5), MAX);
        assert!(matches!(verdict, Err(PacketError::TooLarge { .. })));
        assert!(check(&[0x30, 0xff, 0xff, 0xff, 0xff], Some(Version::V5), MAX).is_err());
    }

    #[test]
    fn the_first_byte_alone_is_enough_to_refuse() {
        assert!(check(&[0x20], Some(Version::V5), MAX).is_err());
        assert!(check(&[0xb0], Some(Version::V4), MAX).is_err());
        assert!(check(b"G", None, MAX).is_err(), "HTTP on the wrong port");
    }
}
