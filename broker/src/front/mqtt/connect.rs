//! CONNECT: the one packet that a stranger may send.

use super::{
    error::PacketError,
    publish::{Message, Properties as MessageProperties},
    wire::{Reader, Value, Version, property},
};

/// Largest CONNECT: a will payload of 64 KiB and its company. Strangers get no more than this.
pub(super) const CONNECT_BYTES_MAX: usize = 128 << 10;
/// Longest client identifier.
pub(super) const CLIENT_ID_BYTES_MAX: usize = 256;

/// A CONNECT, borrowing from the input.
#[derive(Debug)]
pub(super) struct Connect<'a> {
    pub(super) version: Version,
    pub(super) clean_start: bool,
    /// Seconds; 0 = none.
    pub(super) keep_alive_s: u16,
    /// Empty: the server assigns one.
    pub(super) client_id: &'a str,
    pub(super) username: Option<&'a str>,
    pub(super) password: Option<&'a [u8]>,
    pub(super) will: Option<Will<'a>>,
    /// How long the session outlives the connection; `u32::MAX` = for ever.
    pub(super) expiry_s: u32,
    /// Deliveries in flight that the client allows.
    pub(super) receive_max: u16,
    /// Largest packet that the client takes.
    pub(super) packet_max: usize,
}

/// A last will, borrowing from the input.
#[derive(Debug)]
pub(super) struct Will<'a> {
    pub(super) message: Message<'a>,
    pub(super) qos: u8,
    pub(super) retain: bool,
    pub(super) delay_s: u32,
}

/// A CONNECT that is refused; with a version if it got that far, so that the answer can be in its language.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConnectError {
    pub(super) version: Option<Version>,
    pub(super) error: PacketError,
}

const USERNAME: u8 = 0x80;
const PASSWORD: u8 = 0x40;
const WILL_RETAIN: u8 = 0x20;
const WILL: u8 = 0x04;
const CLEAN: u8 = 0x02;
const RESERVED: u8 = 0x01;

impl<'a> Connect<'a> {
    /// Reads the body of a CONNECT.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ConnectError> {
        let mut reader = Reader::new(body);
        let version = protocol(&mut reader).map_err(|error| ConnectError { version: None, error })?;
        Self::parse_versioned(reader, version).map_err(|error| ConnectError { version: Some(version), error })
    }

    fn parse_versioned(mut reader: Reader<'a>, version: Version) -> Result<Self, PacketError> {
        let flags = reader.u8()?;
        let will_qos = check_flags(flags, version)?;
        let keep_alive_s = reader.u16()?;
        let clean_start = flags & CLEAN != 0;
        let properties = match version {
            Version::V5 => Properties::read(&mut reader)?,
            Version::V4 if clean_start => Properties::default(),
            Version::V4 => Properties { expiry_s: u32::MAX, ..Properties::default() },
        };
        let client_id = client_id(&mut reader, version, clean_start)?;
        let will = if flags & WILL != 0 {
            Some(Will::read(&mut reader, version, will_qos, flags & WILL_RETAIN != 0)?)
        } else {
            None
        };
        let username = if flags & USERNAME != 0 { Some(reader.str()?) } else { None };
        let password = if flags & PASSWORD != 0 { Some(reader.bytes()?) } else { None };
        if !reader.is_empty() {
            return Err(PacketError::Malformed("bytes behind the CONNECT's fields"));
        }
        Ok(Self {
            version,
            clean_start,
            keep_alive_s,
            client_id,
            username,
            password,
            will,
            expiry_s: properties.expiry_s,
            receive_max: properties.receive_max,
            packet_max: properties.packet_max,
        })
    }
}

fn protocol(reader: &mut Reader<'_>) -> Result<Version, PacketError> {
    let name = reader.bytes().map_err(|_short| PacketError::NotMqtt)?;
    let level = reader.u8()?;
    match (name, level) {
        (b"MQTT", 4) => Ok(Version::V4),
        (b"MQTT", 5) => Ok(Version::V5),
        (b"MQTT" | b"MQIsdp", level) => Err(PacketError::BadVersion(level)),
        _ => Err(PacketError::NotMqtt),
    }
}

/// Checks the connect flags and returns the QoS of the will.
fn check_flags(flags: u8, version: Version) -> Result<u8, PacketError> {
    let will_qos = flags >> 3 & 3;
    if flags & RESERVED != 0 {
        return Err(PacketError::Malformed("the reserved connect flag is set"));
    }
    if will_qos == 3 || (flags & WILL == 0 && flags & (WILL_RETAIN | 0x18) != 0) {
        return Err(PacketError::Malformed("impossible will flags"));
    }
    if version == Version::V4 && flags & (USERNAME | PASSWORD) == PASSWORD {
        return Err(PacketError::Malformed("a password without a user name"));
    }
    Ok(will_qos)
}

fn client_id<'a>(
    reader: &mut Reader<'a>,
    version: Version,
    clean_start: bool,
) -> Result<&'a str, PacketError> {
    let client_id = reader.str()?;
    let nameless_but_lasting = client_id.is_empty() && version == Version::V4 && !clean_start;
    if nameless_but_lasting || client_id.len() > CLIENT_ID_BYTES_MAX {
        return Err(PacketError::BadClientId);
    }
    Ok(client_id)
}

#[derive(Debug)]
struct Properties {
    expiry_s: u32,
    receive_max: u16,
    packet_max: usize,
}

impl Default for Properties {
    fn default() -> Self {
        Self { expiry_s: 0, receive_max: u16::MAX, packet_max: usize::MAX }
    }
}

impl Properties {
    fn read(reader: &mut Reader<'_>) -> Result<Self, PacketError> {
        let mut read = Self::default();
        let mut properties = reader.properties()?;
        while let Some((id, value)) = properties.next()? {
            match (id, value) {
                (property::SESSION_EXPIRY, Value::Four(seconds)) => read.expiry_s = seconds,
                (property::RECEIVE_MAX, Value::Two(0)) => {
                    return Err(PacketError::Protocol("a receive maximum of zero"));
                }
                (property::RECEIVE_MAX, Value::Two(max)) => read.receive_max = max,
                (property::PACKET_MAX, Value::Four(0)) => {
                    return Err(PacketError::Protocol("a maximum packet size of zero"));
                }
                (property::PACKET_MAX, Value::Four(max)) => {
                    read.packet_max = usize::try_from(max).unwrap_or(usize::MAX);
                }
                (property::REQUEST_PROBLEM_INFO | property::REQUEST_RESPONSE_INFO, Value::Byte(0 | 1))
                | (property::TOPIC_ALIAS_MAX | property::USER, _) => {}
                (property::AUTH_METHOD | property::AUTH_DATA, _) => return Err(PacketError::BadAuthMethod),
                _ => return Err(PacketError::misplaced()),
            }
        }
        Ok(read)
    }
}

impl<'a> Will<'a> {
    fn read(reader: &mut Reader<'a>, version: Version, qos: u8, retain: bool) -> Result<Self, PacketError> {
        let mut properties = MessageProperties::default();
        if version == Version::V5 {
            properties.read_will(reader)?;
        }
        let topic = reader.str()?;
        codec::topic::validate_topic(topic).map_err(|_invalid| PacketError::BadTopic)?;
        let payload = reader.bytes()?;
        let delay_s = properties.will_delay_s;
        Ok(Self { message: Message { topic, payload, properties }, qos, retain, delay_s })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(flags: u8, rest: &[u8]) -> Vec<u8> {
        [b"\0\x04MQTT\x04".as_slice(), &[flags, 0, 60], rest].concat()
    }

    fn error(body: &[u8]) -> PacketError {
        Connect::parse(body).unwrap_err().error
    }

    #[test]
    fn impossible_connect_flags_are_malformed() {
        for flags in [0x03, 0x1e, 0x0a, 0x22, 0x42] {
            let body = v4(flags, b"\0\x01a\0\x01t\0\x01p\0\x01u\0\x01p");
            assert!(matches!(error(&body), PacketError::Malformed(_)), "{flags:#04x}");
        }
    }

    #[test]
    fn a_lasting_session_needs_a_client_identifier() {
        assert_eq!(error(&v4(0, b"\0\0")), PacketError::BadClientId);
        assert!(Connect::parse(&v4(CLEAN, b"\0\0")).is_ok());
    }

    #[test]
    fn other_protocol_levels_are_named_as_such() {
        assert_eq!(error(b"\0\x04MQTT\x06\x02\0\0\0\0"), PacketError::BadVersion(6));
        assert_eq!(error(b"\0\x06MQIsdp\x03\x02\0\0\0\0"), PacketError::BadVersion(3));
        assert_eq!(error(b"\0\x04HTTP\x04\x02\0\0\0\0"), PacketError::NotMqtt);
    }

    #[test]
    fn bytes_behind_the_last_field_are_malformed() {
        assert!(matches!(error(&v4(CLEAN, b"\0\x01a!")), PacketError::Malformed(_)));
    }

    #[test]
    fn a_password_may_be_any_bytes() {
        let body = v4(CLEAN | USERNAME | PASSWORD, b"\0\x01a\0\x01u\0\x02\xff\0");
        assert_eq!(Connect::parse(&body).unwrap().password, Some(b"\xff\0".as_slice()));
    }
}
