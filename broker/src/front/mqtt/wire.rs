//! The alphabet of MQTT: bounds-checked reading and writing of integers, strings and properties.
//!
//! A [`Reader`] stands on a complete packet body that the [gate](super::gate) let through; whatever runs over
//! its end is malformed, never "wait for more". Nothing here allocates for a peer.

use bytes::BufMut;

use super::error::PacketError;

/// Protocol level of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Version {
    /// MQTT 3.1.1.
    V4,
    /// MQTT 5.
    V5,
}

/// Largest value of a variable byte integer.
pub(super) const VARINT_MAX: usize = 268_435_455;

/// Reads a variable byte integer: the value and how many bytes it took; `None` if it goes on behind `raw`.
pub(super) fn varint(raw: &[u8]) -> Result<Option<(usize, usize)>, PacketError> {
    let mut value = 0;
    for (at, byte) in raw.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
    if raw.len() < 4 { Ok(None) } else { Err(PacketError::Malformed("a length of more than four bytes")) }
}

/// Bytes that `value` takes as a variable byte integer.
pub(super) const fn varint_len(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

/// Appends a variable byte integer; `value` is at most [`VARINT_MAX`].
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    debug_assert!(value <= VARINT_MAX);
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a length and bytes; more than fit are a mistake of the caller, who checked.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    debug_assert!(bytes.len() <= usize::from(u16::MAX));
    out.put_u16(bytes.len() as u16);
    out.extend_from_slice(bytes);
}

/// A cursor over a complete packet body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Everything that was not read yet.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], PacketError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or(PacketError::Malformed("a field runs over the packet's end"))?;
        self.0 = tail;
        Ok(head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, PacketError> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, PacketError> {
        let raw = self.take(2)?;
        Ok(u16::from_be_bytes([raw[0], raw[1]]))
    }

    pub(super) fn u32(&mut self) -> Result<u32, PacketError> {
        let raw = self.take(4)?;
        Ok(u32::from_be_bytes([raw[0], raw[1], raw[2], raw[3]]))
    }

    /// A packet identifier, which is never zero.
    pub(super) fn packet_id(&mut self) -> Result<u16, PacketError> {
        match self.u16()? {
            0 => Err(PacketError::Protocol("packet identifier zero")),
            id => Ok(id),
        }
    }

    /// A variable byte integer in its shortest form.
    pub(super) fn varint(&mut self) -> Result<usize, PacketError> {
        let (value, len) =
            varint(self.0)?.ok_or(PacketError::Malformed("a field runs over the packet's end"))?;
        if len != varint_len(value) {
            return Err(PacketError::Malformed("a variable byte integer is not in its shortest form"));
        }
        self.take(len)?;
        Ok(value)
    }

    /// Binary data.
    pub(super) fn bytes(&mut self) -> Result<&'a [u8], PacketError> {
        let len = self.u16()?;
        self.take(usize::from(len))
    }

    /// A UTF-8 string without U+0000.
    pub(super) fn str(&mut self) -> Result<&'a str, PacketError> {
        let text = std::str::from_utf8(self.bytes()?)
            .map_err(|_invalid| PacketError::Malformed("a string is not UTF-8"))?;
        if text.as_bytes().contains(&0) {
            return Err(PacketError::Malformed("a string contains U+0000"));
        }
        Ok(text)
    }

    /// The properties that start here.
    pub(super) fn properties(&mut self) -> Result<Properties<'a>, PacketError> {
        let len = self.varint()?;
        Ok(Properties { reader: Reader(self.take(len)?), seen: 0, user: 0 })
    }
}

/// Property identifiers.
pub(super) mod property {
    pub(in crate::front::mqtt) const PAYLOAD_FORMAT: u8 = 1;
    pub(in crate::front::mqtt) const MESSAGE_EXPIRY: u8 = 2;
    pub(in crate::front::mqtt) const CONTENT_TYPE: u8 = 3;
    pub(in crate::front::mqtt) const RESPONSE_TOPIC: u8 = 8;
    pub(in crate::front::mqtt) const CORRELATION_DATA: u8 = 9;
    pub(in crate::front::mqtt) const SUBSCRIPTION_ID: u8 = 11;
    pub(in crate::front::mqtt) const SESSION_EXPIRY: u8 = 17;
    pub(in crate::front::mqtt) const ASSIGNED_CLIENT_ID: u8 = 18;
    pub(in crate::front::mqtt) const AUTH_METHOD: u8 = 21;
    pub(in crate::front::mqtt) const AUTH_DATA: u8 = 22;
    pub(in crate::front::mqtt) const REQUEST_PROBLEM_INFO: u8 = 23;
    pub(in crate::front::mqtt) const WILL_DELAY: u8 = 24;
    pub(in crate::front::mqtt) const REQUEST_RESPONSE_INFO: u8 = 25;
    pub(in crate::front::mqtt) const REASON_STRING: u8 = 31;
    pub(in crate::front::mqtt) const RECEIVE_MAX: u8 = 33;
    pub(in crate::front::mqtt) const TOPIC_ALIAS_MAX: u8 = 34;
    pub(in crate::front::mqtt) const TOPIC_ALIAS: u8 = 35;
    pub(in crate::front::mqtt) const USER: u8 = 38;
    pub(in crate::front::mqtt) const PACKET_MAX: u8 = 39;
    pub(in crate::front::mqtt) const WILDCARD_AVAILABLE: u8 = 40;
    pub(in crate::front::mqtt) const SUBSCRIPTION_ID_AVAILABLE: u8 = 41;
    pub(in crate::front::mqtt) const SHARED_AVAILABLE: u8 = 42;
}

/// The value of a property, by the type that its identifier prescribes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Byte(u8),
    Two(u16),
    Four(u32),
    Varint(usize),
    Str(&'a str),
    Bytes(&'a [u8]),
    Pair(&'a str, &'a str),
}

/// Reads properties one by one. Only user properties may repeat, and only [`USER_PROPERTIES_MAX`] times.
#[derive(Debug)]
pub(super) struct Properties<'a> {
    reader: Reader<'a>,
    seen: u64,
    user: usize,
}

/// User properties that one packet may carry.
pub(super) const USER_PROPERTIES_MAX: usize = 128;

impl<'a> Properties<'a> {
    /// The next property and its identifier.
    pub(super) fn next(&mut self) -> Result<Option<(u8, Value<'a>)>, PacketError> {
        if self.reader.is_empty() {
            return Ok(None);
        }
        let id = self.reader.u8()?;
        let value = match id {
            1 | 23 | 25 | 36 | 37 | 40 | 41 | 42 => Value::Byte(self.reader.u8()?),
            19 | 33 | 34 | 35 => Value::Two(self.reader.u16()?),
            2 | 17 | 24 | 39 => Value::Four(self.reader.u32()?),
            11 => Value::Varint(self.reader.varint()?),
            3 | 8 | 18 | 21 | 26 | 28 | 31 => Value::Str(self.reader.str()?),
            9 | 22 => Value::Bytes(self.reader.bytes()?),
            38 => Value::Pair(self.reader.str()?, self.reader.str()?),
            _ => return Err(PacketError::Malformed("an unknown property")),
        };
        if id == property::USER {
            self.user += 1;
            if self.user > USER_PROPERTIES_MAX {
                return Err(PacketError::Quota("too many user properties"));
            }
        } else if self.seen & (1 << id) != 0 {
            return Err(PacketError::Protocol("a property is given twice"));
        }
        self.seen |= 1 << id;
        Ok(Some((id, value)))
    }

    /// Reads all, of which only a reason string and user properties are allowed: the tail of an acknowledgement.
    pub(super) fn expect_diagnostics(mut self) -> Result<(), PacketError> {
        while let Some((id, _value)) = self.next()? {
            if !matches!(id, property::REASON_STRING | property::USER) {
                return Err(PacketError::misplaced());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_varint_round_trips_at_every_width() {
        for value in [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, VARINT_MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out.len(), varint_len(value));
            assert_eq!(varint(&out).unwrap(), Some((value, out.len())));
            assert_eq!(varint(&out[..out.len() - 1]).unwrap(), None, "cut short");
        }
        assert!(varint(&[0xff; 5]).is_err(), "a fifth byte");
        assert!(Reader::new(&[0x80, 0x00]).varint().is_err(), "not the shortest form");
    }

    #[test]
    fn a_property_other_than_user_stands_once() {
        let twice = [10, property::MESSAGE_EXPIRY, 0, 0, 0, 1, property::MESSAGE_EXPIRY, 0, 0, 0, 1];
        let mut properties = Reader::new(&twice).properties().unwrap();
        assert!(properties.next().unwrap().is_some());
        assert!(matches!(properties.next(), Err(PacketError::Protocol(_))));
    }

    #[test]
    fn a_property_never_reads_behind_the_property_length() {
        let lying = [3, property::CONTENT_TYPE, 0, 2, b'x', b'y'];
        assert!(Reader::new(&lying).properties().unwrap().next().is_err());
    }
}
