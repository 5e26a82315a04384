//! A connection's TLS session, which keeps little once the handshake is over.
//!
//! rustls' connection holds the peer's chain, transcripts and buffers, 6 KB in all, and QUIC needs nothing of it
//! but the secrets of the next keys. It is dropped:
//! - by an **acceptor** when the client has finished and the ticket is written. TLS messages after that are
//!   errors by RFC 9001, 4.4 and 6 (no post-handshake authentication, no KeyUpdate), and rustls answers
//!   nothing else either.
//! - by a **dialler** when the first ticket has been taken. Later tickets are skipped, as a client may; any other
//!   message ends the connection.
//!
//! The peer's chain is handed out once. Exporters are not used and end with the handshake.

use std::{
    any::Any,
    io::Cursor,
    sync::{Arc, Mutex, PoisonError},
};

use quinn_proto::{
    ConnectError, ConnectionId, Side, TransportError, TransportErrorCode,
    crypto::{self, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, UnsupportedVersion},
    transport_parameters::TransportParameters,
};
use ring::aead;
use rustls::quic::{Connection, KeyChange, Secrets, Suite, Version};
use rustls_pki_types::{CertificateDer, ServerName};

/// The one version of QUIC that is spoken.
pub(super) const QUIC_V1: u32 = 1;

/// Of a dialler.
pub(super) struct ClientTls {
    config: Arc<rustls::ClientConfig>,
    initial: Suite,
}

/// Of an acceptor.
pub(super) struct ServerTls {
    config: Arc<rustls::ServerConfig>,
    initial: Suite,
}

impl ClientTls {
    /// `None`: the provider has no suite for initial packets.
    pub(super) fn new(config: Arc<rustls::ClientConfig>) -> Option<Self> {
        Some(Self { initial: initial(config.crypto_provider())?, config })
    }
}

impl ServerTls {
    /// `None`: the provider has no suite for initial packets.
    pub(super) fn new(config: Arc<rustls::ServerConfig>) -> Option<Self> {
        Some(Self { initial: initial(config.crypto_provider())?, config })
    }
}

/// The suite of initial packets, which QUIC prescribes.
fn initial(provider: &rustls::crypto::CryptoProvider) -> Option<Suite> {
    let prescribed = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.iter().find(|suite| suite.suite() == prescribed)?.tls13()?.quic_suite()
}

impl crypto::ClientConfig for ClientTls {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn crypto::Session>, ConnectError> {
        if version != QUIC_V1 {
            return Err(ConnectError::UnsupportedVersion);
        }
        let wrong_name = |_| ConnectError::InvalidServerName(server_name.into());
        let name = ServerName::try_from(server_name).map_err(wrong_name)?.to_owned();
        let config = Arc::clone(&self.config);
        let connection = rustls::quic::ClientConnection::new(config, Version::V1, name, encoded(params));
        let connection = connection.map_err(|error| ConnectError::InvalidServerName(error.to_string()))?;
        Ok(Box::new(Session::new(connection.into(), self.initial)))
    }
}

impl crypto::ServerConfig for ServerTls {
    fn initial_keys(&self, version: u32, dst_cid: &ConnectionId) -> Result<Keys, UnsupportedVersion> {
        if version != QUIC_V1 {
            return Err(UnsupportedVersion);
        }
        Ok(keys(self.initial.keys(dst_cid, rustls::Side::Server, Version::V1)))
    }

    fn retry_tag(&self, _version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        retry_tag(orig_dst_cid, &[packet])
    }

    fn start_session(
        self: Arc<Self>,
        _version: u32,
        params: &TransportParameters,
    ) -> Box<dyn crypto::Session> {
        let config = Arc::clone(&self.config);
        let connection = rustls::quic::ServerConnection::new(config, Version::V1, encoded(params));
        // Fails on settings that do not fit QUIC, which no peer can change.
        let connection = connection.expect("TLS 1.3 without early data");
        Box::new(Session::new(connection.into(), self.initial))
    }
}

fn encoded(params: &TransportParameters) -> Vec<u8> {
    let mut bytes = Vec::new();
    params.write(&mut bytes);
    bytes
}

fn keys(keys: rustls::quic::Keys) -> Keys {
    let header =
        |key: Box<dyn rustls::quic::HeaderProtectionKey>| -> Box<dyn HeaderKey> { Box::new(Masking(key)) };
    let packet = |key: Box<dyn rustls::quic::PacketKey>| -> Box<dyn PacketKey> { Box::new(Sealing(key)) };
    Keys {
        header: KeyPair { local: header(keys.local.header), remote: header(keys.remote.header) },
        packet: KeyPair { local: packet(keys.local.packet), remote: packet(keys.remote.packet) },
    }
}

struct Session {
    /// Until it is over.
    handshake: Option<Box<Handshake>>,
    next: Option<Secrets>,
    /// Of the peer; taken by who asks first.
    chain: Mutex<Option<Vec<CertificateDer<'static>>>>,
    tickets: Tickets,
    initial: Suite,
}

struct Handshake(Connection);

impl Session {
    fn new(connection: Connection, initial: Suite) -> Self {
        Self {
            handshake: Some(Box::new(Handshake(connection))),
            next: None,
            chain: Mutex::default(),
            tickets: Tickets::default(),
            initial,
        }
    }

    /// Keeps what will still be asked for.
    fn end_handshake(&mut self) {
        let Some(handshake) = self.handshake.take() else { return };
        if let Some(chain) = handshake.chain() {
            *self.chain.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(chain);
        }
    }
}

impl Handshake {
    fn chain(&self) -> Option<Vec<CertificateDer<'static>>> {
        let chain = self.0.peer_certificates()?;
        Some(chain.iter().map(|certificate| certificate.clone().into_owned()).collect())
    }

    fn side(&self) -> Side {
        match self.0 {
            Connection::Client(_) => Side::Client,
            Connection::Server(_) => Side::Server,
        }
    }
}

impl crypto::Session for Session {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        let side = match side {
            Side::Client => rustls::Side::Client,
            Side::Server => rustls::Side::Server,
        };
        keys(self.initial.keys(dst_cid, side, Version::V1))
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        None
    }

    /// A `Vec<CertificateDer<'static>>`; after the handshake for the first who asks.
    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        let chain = match &self.handshake {
            Some(handshake) => handshake.chain(),
            None => self.chain.lock().unwrap_or_else(PoisonError::into_inner).take(),
        };
        chain.map(|chain| -> Box<dyn Any> { Box::new(chain) })
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        None
    }

    fn is_handshaking(&self) -> bool {
        self.handshake.as_ref().is_some_and(|handshake| handshake.0.is_handshaking())
    }

    fn read_handshake(&mut self, bytes: &[u8]) -> Result<bool, TransportError> {
        let Some(handshake) = &mut self.handshake else {
            self.tickets.read(bytes)?;
            return Ok(false);
        };
        let is_after = !handshake.0.is_handshaking();
        handshake.0.read_hs(bytes).map_err(|error| match handshake.0.alert() {
            Some(alert) => of_alert(u8::from(alert), error.to_string()),
            None => failed(TransportErrorCode::PROTOCOL_VIOLATION, format!("TLS: {error}")),
        })?;
        if is_after && handshake.side() == Side::Client {
            self.tickets.read(bytes)?;
            if self.tickets.whole > 0 && self.tickets.is_between() {
                self.end_handshake();
            }
        }
        Ok(false)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        let Some(handshake) = &self.handshake else { return Ok(None) };
        let Some(bytes) = handshake.0.quic_transport_parameters() else { return Ok(None) };
        Ok(Some(TransportParameters::read(handshake.side(), &mut Cursor::new(bytes))?))
    }

    fn write_handshake(&mut self, buffer: &mut Vec<u8>) -> Option<Keys> {
        let handshake = self.handshake.as_mut()?;
        let before = buffer.len();
        match handshake.0.write_hs(buffer) {
            Some(KeyChange::Handshake { keys: new }) => Some(keys(new)),
            Some(KeyChange::OneRtt { keys: new, next }) => {
                self.next = Some(next);
                Some(keys(new))
            }
            None => {
                let nothing_left = buffer.len() == before && !handshake.0.is_handshaking();
                if nothing_left && self.next.is_some() && handshake.side() == Side::Server {
                    self.end_handshake();
                }
                None
            }
        }
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.next.as_mut()?.next_packet_keys();
        Some(KeyPair { local: Box::new(Sealing(keys.local)), remote: Box::new(Sealing(keys.remote)) })
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        let Some((payload, tag)) = payload.split_last_chunk::<{ aead::MAX_TAG_LEN }>() else { return false };
        retry_tag(orig_dst_cid, &[header, payload]) == *tag
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        let handshake = self.handshake.as_ref().ok_or(ExportKeyingMaterialError)?;
        let exported = handshake.0.export_keying_material(output, label, Some(context));
        exported.map(drop).map_err(|_| ExportKeyingMaterialError)
    }
}

/// RFC 9001, 5.8: against accidents, under a key that everybody knows.
fn retry_tag(orig_dst_cid: &ConnectionId, packet: &[&[u8]]) -> [u8; aead::MAX_TAG_LEN] {
    const KEY: [u8; 16] = 0xbe0c_690b_9f66_575a_1d76_6b54_e368_c84e_u128.to_be_bytes();
    const NONCE: [u8; aead::NONCE_LEN] =
        [0x46, 0x15, 0x99, 0xd3, 0x5d, 0x63, 0x2b, 0xf2, 0x23, 0x98, 0x25, 0xbb];
    let id: &[u8] = orig_dst_cid;
    let mut pseudo_packet = vec![u8::try_from(id.len()).expect("an id is short")];
    pseudo_packet.extend_from_slice(id);
    packet.iter().for_each(|part| pseudo_packet.extend_from_slice(part));
    let key = aead::UnboundKey::new(&aead::AES_128_GCM, &KEY).expect("16 bytes");
    let nonce = aead::Nonce::assume_unique_for_key(NONCE);
    let aad = aead::Aad::from(pseudo_packet);
    let tag = aead::LessSafeKey::new(key).seal_in_place_separate_tag(nonce, aad, &mut []);
    let tag = tag.expect("nothing is sealed");
    tag.as_ref().try_into().expect("16 bytes")
}

/// TLS messages after a handshake, read for nothing but their bounds and kind.
#[derive(Debug, Default)]
struct Tickets {
    /// Of a header that has not come whole.
    header: [u8; 4],
    have: u8,
    /// Bytes of a message that are still to come.
    body: u32,
    /// Messages that have come whole.
    whole: u32,
}

impl Tickets {
    const NEW_SESSION_TICKET: u8 = 4;
    const UNEXPECTED_MESSAGE: u8 = 10;

    fn read(&mut self, mut bytes: &[u8]) -> Result<(), TransportError> {
        while !bytes.is_empty() {
            if self.body > 0 {
                let skipped = bytes.len().min(self.body as usize);
                bytes = &bytes[skipped..];
                self.body -= u32::try_from(skipped).expect("at most a body");
                self.whole += u32::from(self.body == 0);
                continue;
            }
            self.header[usize::from(self.have)] = bytes[0];
            bytes = &bytes[1..];
            self.have += 1;
            if self.have == 4 {
                let [kind, length @ ..] = self.header;
                if kind != Self::NEW_SESSION_TICKET {
                    let what = format!("TLS message {kind} after the handshake");
                    return Err(of_alert(Self::UNEXPECTED_MESSAGE, what));
                }
                let [a, b, c] = length;
                (self.body, self.have) = (u32::from_be_bytes([0, a, b, c]), 0);
                self.whole += u32::from(self.body == 0);
            }
        }
        Ok(())
    }

    fn is_between(&self) -> bool {
        self.body == 0 && self.have == 0
    }
}

fn of_alert(alert: u8, reason: String) -> TransportError {
    failed(TransportErrorCode::crypto(alert), reason)
}

fn failed(code: TransportErrorCode, reason: String) -> TransportError {
    TransportError { code, frame: None, reason }
}

struct Sealing(Box<dyn rustls::quic::PacketKey>);

impl PacketKey for Sealing {
    fn encrypt(&self, packet: u64, buffer: &mut [u8], header_len: usize) {
        let (header, rest) = buffer.split_at_mut(header_len);
        let (payload, place) = rest.split_at_mut(rest.len() - self.0.tag_len());
        let tag = self.0.encrypt_in_place(packet, header, payload).expect("a packet is short");
        place.copy_from_slice(tag.as_ref());
    }

    fn decrypt(
        &self,
        packet: u64,
        header: &[u8],
        payload: &mut bytes::BytesMut,
    ) -> Result<(), crypto::CryptoError> {
        let plain = self.0.decrypt_in_place(packet, header, payload.as_mut());
        let len = plain.map_err(|_| crypto::CryptoError)?.len();
        payload.truncate(len);
        Ok(())
    }

    fn tag_len(&self) -> usize {
        self.0.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.0.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.0.integrity_limit()
    }
}

struct Masking(Box<dyn rustls::quic::HeaderProtectionKey>);

impl Masking {
    /// The sample, the first byte, and where the packet number may be, of a packet long enough for them.
    fn parts<'a>(&self, pn_offset: usize, packet: &'a mut [u8]) -> (&'a [u8], &'a mut u8, &'a mut [u8]) {
        let (header, sample) = packet.split_at_mut(pn_offset + 4);
        let (first, rest) = header.split_first_mut().expect("a header has a first byte");
        let end = rest.len().min(pn_offset + 3);
        (&sample[..self.0.sample_len()], first, &mut rest[pn_offset - 1..end])
    }
}

impl HeaderKey for Masking {
    fn decrypt(&self, pn_offset: usize, packet: &mut [u8]) {
        let (sample, first, number) = self.parts(pn_offset, packet);
        self.0.decrypt_in_place(sample, first, number).expect("a sample of its length");
    }

    fn encrypt(&self, pn_offset: usize, packet: &mut [u8]) {
        let (sample, first, number) = self.parts(pn_offset, packet);
        self.0.encrypt_in_place(sample, first, number).expect("a sample of its length");
    }

    fn sample_size(&self) -> usize {
        self.0.sample_len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_are_skipped_however_they_are_cut_and_nothing_else_is() {
        let ticket = [&[4, 0, 0, 9][..], &[7; 9]].concat();
        let stream = [&ticket[..], &[4, 0, 0, 0], &ticket[..]].concat();
        for cut in 0..stream.len() {
            let mut tickets = Tickets::default();
            tickets.read(&stream[..cut]).unwrap();
            let boundary = [0, 13, 17, 30].contains(&cut);
            assert_eq!(tickets.is_between(), boundary, "{cut}");
            tickets.read(&stream[cut..]).unwrap();
            assert_eq!((tickets.whole, tickets.is_between()), (3, true));
            // A KeyUpdate, which QUIC forbids.
            let error = tickets.read(&[24, 0, 0, 1, 0]).unwrap_err();
            assert_eq!(error.code, TransportErrorCode::crypto(10));
        }
    }

    #[test]
    fn a_retry_is_signed_as_the_rfc_shows() {
        // RFC 9001, A.4.
        let id = ConnectionId::new(&[0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08]);
        let packet = b"\xff\x00\x00\x00\x01\x00\x08\xf0\x67\xa5\x50\x2a\x42\x62\xb5token";
        let tag = b"\x04\xa2\x65\xba\x2e\xff\x4d\x82\x90\x58\xfb\x3f\x0f\x24\x96\xba";
        assert_eq!(retry_tag(&id, &[packet]), *tag);
    }
}
