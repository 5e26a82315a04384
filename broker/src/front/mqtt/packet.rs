//! Inbound packets that are neither CONNECT nor PUBLISH, read without allocation.

use super::{
    error::PacketError,
    gate::Kind,
    wire::{Reader, Value, Version, property},
};
use crate::core::event::{ClientAck, RetainedOnSubscribe};

/// Filters that one SUBSCRIBE or UNSUBSCRIBE may carry: an entry takes more memory than its bytes on the wire.
pub(super) const FILTERS_MAX: usize = 1024;

/// Reads a PUBACK, PUBREC, PUBREL or PUBCOMP.
pub(super) fn ack(kind: Kind, version: Version, body: &[u8]) -> Result<ClientAck, PacketError> {
    let mut reader = Reader::new(body);
    let packet_id = reader.packet_id()?;
    let mut failed = false;
    if version == Version::V5 && !reader.is_empty() {
        failed = reader.u8()? >= 0x80;
        if !reader.is_empty() {
            reader.properties()?.expect_diagnostics()?;
        }
    }
    if !reader.is_empty() {
        return Err(PacketError::Malformed("bytes behind an acknowledgement"));
    }
    Ok(match kind {
        Kind::PubAck => ClientAck::Ack(packet_id),
        // A refusal ends the exchange: the client will send no PUBCOMP.
        Kind::PubRec if failed => ClientAck::Comp(packet_id),
        Kind::PubRec => ClientAck::Rec(packet_id),
        Kind::PubRel => ClientAck::Rel(packet_id),
        _ => ClientAck::Comp(packet_id),
    })
}

/// A SUBSCRIBE whose filters are yet to be read.
#[derive(Debug)]
pub(super) struct Subscribe<'a> {
    pub(super) packet_id: u16,
    /// 0 = none.
    pub(super) identifier: u32,
    version: Version,
    filters: Reader<'a>,
    count: usize,
}

/// One entry of a SUBSCRIBE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SubscribeFilter<'a> {
    pub(super) filter: &'a str,
    pub(super) qos: u8,
    pub(super) no_local: bool,
    pub(super) retain_as_published: bool,
    pub(super) retained: RetainedOnSubscribe,
}

impl<'a> Subscribe<'a> {
    pub(super) fn parse(version: Version, body: &'a [u8]) -> Result<Self, PacketError> {
        let mut reader = Reader::new(body);
        let packet_id = reader.packet_id()?;
        let mut identifier = 0;
        if version == Version::V5 {
            let mut properties = reader.properties()?;
            while let Some((id, value)) = properties.next()? {
                match (id, value) {
                    (property::SUBSCRIPTION_ID, Value::Varint(0)) => {
                        return Err(PacketError::Protocol("subscription identifier zero"));
                    }
                    (property::SUBSCRIPTION_ID, Value::Varint(value)) => identifier = value as u32,
                    (property::USER, _) => {}
                    _ => return Err(PacketError::misplaced()),
                }
            }
        }
        if reader.is_empty() {
            return Err(PacketError::Protocol("a SUBSCRIBE without filters"));
        }
        Ok(Self { packet_id, identifier, version, filters: reader, count: 0 })
    }

    /// The next entry.
    pub(super) fn next(&mut self) -> Result<Option<SubscribeFilter<'a>>, PacketError> {
        if self.filters.is_empty() {
            return Ok(None);
        }
        count(&mut self.count)?;
        let filter = self.filters.str()?;
        let options = self.filters.u8()?;
        let reserved = if self.version == Version::V5 { 0xc0 } else { 0xfc };
        if options & reserved != 0 || options & 3 == 3 {
            return Err(PacketError::Malformed("reserved subscription options"));
        }
        let retained = match options >> 4 & 3 {
            0 => RetainedOnSubscribe::Send,
            1 => RetainedOnSubscribe::SendIfNew,
            2 => RetainedOnSubscribe::DoNotSend,
            _ => return Err(PacketError::Protocol("retain handling 3")),
        };
        Ok(Some(SubscribeFilter {
            filter,
            qos: options & 3,
            no_local: options & 4 != 0,
            retain_as_published: options & 8 != 0,
            retained,
        }))
    }
}

/// An UNSUBSCRIBE whose filters are yet to be read.
#[derive(Debug)]
pub(super) struct Unsubscribe<'a> {
    pub(super) packet_id: u16,
    filters: Reader<'a>,
    count: usize,
}

impl<'a> Unsubscribe<'a> {
    pub(super) fn parse(version: Version, body: &'a [u8]) -> Result<Self, PacketError> {
        let mut reader = Reader::new(body);
        let packet_id = reader.packet_id()?;
        if version == Version::V5 {
            let mut properties = reader.properties()?;
            while let Some((id, _value)) = properties.next()? {
                if id != property::USER {
                    return Err(PacketError::misplaced());
                }
            }
        }
        if reader.is_empty() {
            return Err(PacketError::Protocol("an UNSUBSCRIBE without filters"));
        }
        Ok(Self { packet_id, filters: reader, count: 0 })
    }

    /// The next filter.
    pub(super) fn next(&mut self) -> Result<Option<&'a str>, PacketError> {
        if self.filters.is_empty() {
            return Ok(None);
        }
        count(&mut self.count)?;
        self.filters.str().map(Some)
    }
}

fn count(count: &mut usize) -> Result<(), PacketError> {
    *count += 1;
    if *count > FILTERS_MAX { Err(PacketError::Quota("too many filters in one packet")) } else { Ok(()) }
}

/// A DISCONNECT of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disconnect {
    /// The client wants its will published nevertheless.
    pub(super) with_will: bool,
    /// A new session expiry.
    pub(super) expiry_s: Option<u32>,
}

impl Disconnect {
    pub(super) fn parse(body: &[u8]) -> Result<Self, PacketError> {
        let mut reader = Reader::new(body);
        let mut read = Self { with_will: false, expiry_s: None };
        if reader.is_empty() {
            return Ok(read);
        }
        // Anything but a normal disconnection is one that the will is for.
        read.with_will = reader.u8()? != 0;
        if reader.is_empty() {
            return Ok(read);
        }
        let mut properties = reader.properties()?;
        while let Some((id, value)) = properties.next()? {
            match (id, value) {
                (property::SESSION_EXPIRY, Value::Four(seconds)) => read.expiry_s = Some(seconds),
                (property::REASON_STRING | property::USER, _) => {}
                _ => return Err(PacketError::misplaced()),
            }
        }
        if reader.is_empty() { Ok(read) } else { Err(PacketError::Malformed("bytes behind a DISCONNECT")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_has_its_short_middle_and_long_form_in_version_5_only() {
        for body in [&[0, 7][..], &[0, 7, 0], &[0, 7, 0x10, 0], &[0, 7, 0, 4, 31, 0, 1, b'x']] {
            assert_eq!(ack(Kind::PubAck, Version::V5, body), Ok(ClientAck::Ack(7)), "{body:?}");
        }
        assert!(ack(Kind::PubAck, Version::V5, &[0, 0]).is_err(), "packet identifier zero");
        assert!(ack(Kind::PubAck, Version::V5, &[0, 7, 0, 0, 9]).is_err(), "trailing bytes");
        assert!(ack(Kind::PubAck, Version::V4, &[0, 7, 0]).is_err());
    }

    #[test]
    fn a_refused_pubrec_ends_the_exchange() {
        assert_eq!(ack(Kind::PubRec, Version::V5, &[0, 7, 0x97]), Ok(ClientAck::Comp(7)));
        assert_eq!(ack(Kind::PubRec, Version::V5, &[0, 7, 0x10]), Ok(ClientAck::Rec(7)));
    }

    #[test]
    fn subscription_options_that_are_reserved_are_malformed() {
        for (version, options, allowed) in [
            (Version::V4, 2, true),
            (Version::V4, 3, false),
            (Version::V4, 4, false),
            (Version::V5, 0x2e, true),
            (Version::V5, 0x30, false),
            (Version::V5, 0x40, false),
        ] {
            let body: &[u8] = if version == Version::V5 {
                &[0, 1, 0, 0, 1, b'a', options]
            } else {
                &[0, 1, 0, 1, b'a', options]
            };
            let mut subscribe = Subscribe::parse(version, body).unwrap();
            assert_eq!(subscribe.next().is_ok(), allowed, "{version:?} {options:#04x}");
        }
    }

    #[test]
    fn a_disconnect_of_one_byte_is_a_reason_without_properties() {
        assert_eq!(Disconnect::parse(&[4]), Ok(Disconnect { with_will: true, expiry_s: None }));
        assert_eq!(
            Disconnect::parse(&[0, 5, 17, 0, 0, 0, 9]),
            Ok(Disconnect { with_will: false, expiry_s: Some(9) })
        );
    }
}
