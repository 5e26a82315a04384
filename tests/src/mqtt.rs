//! A small MQTT 3.1.1 client from the specification: every byte and every acknowledgement is in the test's hand.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Client id.
    pub client_id: String,
    /// Drop the session at both ends of the connection.
    pub clean: bool,
    /// Seconds; 0 = off.
    pub keep_alive: u16,
    /// (topic, payload, QoS, retain)
    pub will: Option<(String, Vec<u8>, u8, bool)>,
}

impl Options {
    /// A clean session without keep-alive.
    #[must_use]
    pub fn new(client_id: &str) -> Self {
        Self { client_id: client_id.to_owned(), clean: true, keep_alive: 0, will: None }
    }

    /// A session that outlives its connection.
    #[must_use]
    pub fn persistent(mut self) -> Self {
        self.clean = false;
        self
    }

    /// With a will.
    #[must_use]
    pub fn with_will(mut self, topic: &str, payload: &[u8], qos: u8, retain: bool) -> Self {
        self.will = Some((topic.to_owned(), payload.to_vec(), qos, retain));
        self
    }
}

/// A packet from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// CONNACK.
    ConnAck { session_present: bool, code: u8 },
    /// PUBLISH.
    Publish { topic: String, payload: Vec<u8>, qos: u8, packet_id: u16, dup: bool, retain: bool },
    /// PUBACK.
    PubAck(u16),
    /// PUBREC.
    PubRec(u16),
    /// PUBREL.
    PubRel(u16),
    /// PUBCOMP.
    PubComp(u16),
    /// SUBACK.
    SubAck { packet_id: u16, codes: Vec<u8> },
    /// UNSUBACK.
    UnsubAck(u16),
    /// PINGRESP.
    PingResp,
    /// Anything else, raw.
    Other(u8, Vec<u8>),
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    received: Vec<u8>,
    /// Whether CONNACK said that the server had a session.
    pub session_present: bool,
}

/// Longest wait for an answer that must come.
const ANSWER: Duration = Duration::from_secs(20);

impl Client {
    /// Connects and waits for CONNACK.
    ///
    /// # Errors
    /// No connection, or it was refused.
    pub fn connect(address: SocketAddr, options: &Options) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        let mut client = Self { stream, received: Vec::new(), session_present: false };
        client.write(&connect(options))?;
        match client.read(ANSWER)? {
            Packet::ConnAck { session_present, code: 0 } => {
                client.session_present = session_present;
                Ok(client)
            }
            Packet::ConnAck { code, .. } => Err(io::Error::other(format!("CONNACK with code {code}"))),
            packet => Err(io::Error::other(format!("{packet:?} instead of CONNACK"))),
        }
    }

    /// The socket, for what only the socket can do.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Writes bytes as they are.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Reads the next packet.
    ///
    /// # Errors
    /// `UnexpectedEof` if the server closed, `WouldBlock` or `TimedOut` if nothing came within `limit`.
    pub fn read(&mut self, limit: Duration) -> io::Result<Packet> {
        let mut chunk = [0u8; 16 << 10];
        let began = crate::clock::now();
        loop {
            if let Some((packet, used)) = parse(&self.received)? {
                self.received.drain(..used);
                return Ok(packet);
            }
            let left = limit.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.received.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads until the packet that `pick` takes; others are dropped.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_until<T>(&mut self, mut pick: impl FnMut(Packet) -> Option<T>) -> io::Result<T> {
        loop {
            if let Some(found) = pick(self.read(ANSWER)?) {
                return Ok(found);
            }
        }
    }

    /// Subscribes to one filter and waits for SUBACK; PUBLISH packets before it are returned.
    ///
    /// # Errors
    /// As [`Self::read`], or refused.
    pub fn subscribe(&mut self, filter: &str, qos: u8) -> io::Result<Vec<Packet>> {
        let mut body = vec![0, 1];
        string(&mut body, filter.as_bytes());
        body.push(qos);
        self.write(&packet(0x82, &body))?;
        let mut before = Vec::new();
        loop {
            match self.read(ANSWER)? {
                Packet::SubAck { codes, .. } if codes == [qos] => return Ok(before),
                Packet::SubAck { codes, .. } => {
                    return Err(io::Error::other(format!("SUBACK {codes:?} for {filter}")));
                }
                other => before.push(other),
            }
        }
    }

    /// Publishes at QoS 0.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn publish(&mut self, topic: &str, payload: &[u8], retain: bool) -> io::Result<()> {
        self.write(&publish(topic, payload, 0, 0, false, retain))
    }

    /// Publishes at QoS 1 and waits for its PUBACK; other packets are dropped.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn publish_acked(&mut self, topic: &str, payload: &[u8], retain: bool) -> io::Result<()> {
        self.write(&publish(topic, payload, 1, 7, false, retain))?;
        self.read_until(|packet| (packet == Packet::PubAck(7)).then_some(()))
    }

    /// The next PUBLISH within `limit`, acknowledged if it asks for it.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn next_publish(&mut self, limit: Duration) -> io::Result<Packet> {
        let began = crate::clock::now();
        loop {
            let got = self.read(limit.saturating_sub(began.elapsed()))?;
            if let Packet::Publish { qos, packet_id, .. } = got {
                match qos {
                    1 => self.write(&acknowledge(0x40, packet_id))?,
                    2 => self.write(&acknowledge(0x50, packet_id))?,
                    _ => {}
                }
                return Ok(got);
            }
            if let Packet::PubRel(packet_id) = got {
                self.write(&acknowledge(0x70, packet_id))?;
            }
        }
    }

    /// A PING that is answered shows that the connection is alive and everything before it was read.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn ping(&mut self) -> io::Result<()> {
        self.write(&[0xc0, 0])?;
        self.read_until(|packet| (packet == Packet::PingResp).then_some(()))
    }

    /// True if the server closes the connection within `limit`, whatever it says before.
    #[must_use]
    pub fn is_closed_within(&mut self, limit: Duration) -> bool {
        let began = crate::clock::now();
        loop {
            match self.read(limit.saturating_sub(began.elapsed())) {
                Ok(_packet) => {}
                Err(error) => {
                    return !matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock);
                }
            }
        }
    }

    /// DISCONNECT, then closes.
    pub fn disconnect(mut self) {
        drop(self.write(&[0xe0, 0]));
    }
}

/// The bytes of CONNECT.
#[must_use]
pub fn connect(options: &Options) -> Vec<u8> {
    let mut flags = u8::from(options.clean) << 1;
    let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, 0];
    body.extend_from_slice(&options.keep_alive.to_be_bytes());
    string(&mut body, options.client_id.as_bytes());
    if let Some((topic, payload, qos, retain)) = &options.will {
        flags |= 4 | qos << 3 | u8::from(*retain) << 5;
        string(&mut body, topic.as_bytes());
        string(&mut body, payload);
    }
    body[7] = flags;
    packet(0x10, &body)
}

/// The bytes of PUBLISH.
#[must_use]
pub fn publish(topic: &str, payload: &[u8], qos: u8, packet_id: u16, dup: bool, retain: bool) -> Vec<u8> {
    let mut body = Vec::with_capacity(topic.len() + payload.len() + 4);
    string(&mut body, topic.as_bytes());
    if qos > 0 {
        body.extend_from_slice(&packet_id.to_be_bytes());
    }
    body.extend_from_slice(payload);
    packet(0x30 | u8::from(dup) << 3 | qos << 1 | u8::from(retain), &body)
}

/// The bytes of PUBACK (0x40), PUBREC (0x50), PUBREL (0x62) or PUBCOMP (0x70).
#[must_use]
pub fn acknowledge(kind: u8, packet_id: u16) -> [u8; 4] {
    let [high, low] = packet_id.to_be_bytes();
    [kind, 2, high, low]
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    let mut left = body.len();
    loop {
        let byte = u8::try_from(left & 0x7f).expect("seven bits");
        left >>= 7;
        out.push(byte | if left > 0 { 0x80 } else { 0 });
        if left == 0 {
            break;
        }
    }
    out.extend_from_slice(body);
    out
}

fn string(out: &mut Vec<u8>, text: &[u8]) {
    let len = u16::try_from(text.len()).expect("a string of MQTT has at most 65 535 bytes");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(text);
}

/// The first packet in `raw` and its length, if it is complete.
fn parse(raw: &[u8]) -> io::Result<Option<(Packet, usize)>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the server sent a malformed packet");
    let (mut len, mut at) = (0usize, 1);
    loop {
        let Some(&byte) = raw.get(at) else { return Ok(None) };
        len |= usize::from(byte & 0x7f) << (7 * (at - 1));
        at += 1;
        if byte & 0x80 == 0 {
            break;
        }
        if at > 4 {
            return Err(malformed());
        }
    }
    let Some(body) = raw.get(at..at + len) else { return Ok(None) };
    let id = |from: usize| -> io::Result<u16> {
        Ok(u16::from_be_bytes([
            *body.get(from).ok_or_else(malformed)?,
            *body.get(from + 1).ok_or_else(malformed)?,
        ]))
    };
    let packet = match raw[0] >> 4 {
        2 if len == 2 => Packet::ConnAck { session_present: body[0] & 1 == 1, code: body[1] },
        3 => {
            let topic_end = 2 + usize::from(id(0)?);
            let topic = body.get(2..topic_end).ok_or_else(malformed)?;
            let qos = raw[0] >> 1 & 3;
            let (packet_id, start) = if qos > 0 { (id(topic_end)?, topic_end + 2) } else { (0, topic_end) };
            Packet::Publish {
                topic: String::from_utf8(topic.to_vec()).map_err(|_not_utf8| malformed())?,
                payload: body[start..].to_vec(),
                qos,
                packet_id,
                dup: raw[0] & 8 != 0,
                retain: raw[0] & 1 != 0,
            }
        }
        4 => Packet::PubAck(id(0)?),
        5 => Packet::PubRec(id(0)?),
        6 => Packet::PubRel(id(0)?),
        7 => Packet::PubComp(id(0)?),
        9 => Packet::SubAck { packet_id: id(0)?, codes: body[2..].to_vec() },
        11 => Packet::UnsubAck(id(0)?),
        13 => Packet::PingResp,
        _ => Packet::Other(raw[0], body.to_vec()),
    };
    Ok(Some((packet, at + len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publish_reads_back_as_it_was_written() {
        for len in [0, 100, 127, 128, 16_383, 16_384, 100_000] {
            let raw = publish("a/b", &vec![7; len], 1, 513, true, true);
            let (packet, used) = parse(&raw).unwrap().unwrap();
            assert_eq!(used, raw.len());
            let expected = Packet::Publish {
                topic: "a/b".to_owned(),
                payload: vec![7; len],
                qos: 1,
                packet_id: 513,
                dup: true,
                retain: true,
            };
            assert_eq!(packet, expected);
            assert_eq!(parse(&raw[..raw.len() - 1]).unwrap(), None);
        }
    }
}
