//! TLS for links: mutual, 1.3 only, identity by the URI SAN of the verified certificate.
//!
//! A dialler accepts role *hub* of its pinned tier, or the one relay that it was told to go through, and
//! nothing else, whatever name it dialled; an acceptor requires a certificate of the tier's CA and learns the
//! role from it ([`PeerCertificate`]).
//!
//! **Tickets** are sealed with keys derived from the tier secret and the time, so that a node resumes at
//! any replica and after a replica's death. The price is stated plainly: who learns the tier secret can
//! open recorded tickets. TLS 1.3 resumes with a fresh key exchange (`psk_dhe_ke`), so recorded
//! traffic stays closed all the same. 0-RTT is off: a replayed first flight would be a replayed publish.
//! Resumption skips certificates, not authority: the session carries the peer's chain, and the acceptor
//! asks the authorizer again at every start.

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use ring::{
    aead, hkdf, hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as provider, verify_tls13_signature},
    server::{
        NoServerSessionStorage, ParsedCertificate, ProducesTickets, VerifierBuilderError,
        WebPkiClientVerifier,
    },
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use super::{
    identity::{IdentityError, PeerCertificate, Role},
    quic::keys::with_small_keys,
};
use crate::clock;

/// The application protocol of links.
pub const ALPN: &[u8] = b"octobus/1";

/// What one end of a link authenticates with.
#[derive(Debug)]
pub struct Credentials {
    /// The tier's CA certificate; more than one while a CA is being replaced.
    pub ca: Vec<CertificateDer<'static>>,
    /// The own certificate, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// The own key.
    pub key: PrivateKeyDer<'static>,
}

/// 32 random bytes, the same on all replicas of a tier. Keys are derived from it, it is never used itself.
#[derive(Clone)]
pub struct TierSecret(hkdf::Prk);

impl TierSecret {
    /// Takes the secret.
    #[must_use]
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(hkdf::Salt::new(hkdf::HKDF_SHA256, b"octobus/1 tier secret").extract(secret))
    }

    /// Key of stateless resets: a replica that restarts can end sessions it no longer knows.
    pub(super) fn reset_key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.derive(b"reset", 0))
    }

    /// Key of address validation tokens (Retry, NEW_TOKEN).
    pub(super) fn token_key(&self) -> hkdf::Prk {
        hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &self.derive(b"token", 0))
    }

    fn derive(&self, purpose: &[u8], period: u32) -> [u8; 32] {
        let period = period.to_be_bytes();
        let info: [&[u8]; 2] = [purpose, &period];
        let mut key = [0; 32];
        self.0
            .expand(&info, hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(&mut key))
            .expect("32 bytes are what HKDF-SHA256 gives at once");
        key
    }
}

impl fmt::Debug for TierSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TierSecret")
    }
}

/// The acceptor's side: any certificate of the tier's CA. Its role is judged after the handshake.
///
/// # Errors
/// No usable CA, chain or key.
pub fn acceptor(credentials: Credentials, secret: &TierSecret) -> Result<ServerConfig, TlsError> {
    let provider = crypto_provider();
    let roots = Arc::new(roots(&credentials.ca)?);
    let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(credentials.chain, credentials.key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = Arc::new(DerivedTickets { secret: secret.clone(), now_s: wall_s });
    config.send_tls13_tickets = 1;
    config.max_early_data_size = 0;
    Ok(config)
}

/// The dialler's side: accepts replicas of `tier` only.
///
/// # Errors
/// No usable CA, chain or key.
pub fn dialler(credentials: Credentials, tier: &str) -> Result<ClientConfig, TlsError> {
    dialler_through(credentials, tier, None)
}

/// As [`dialler`]; also accepts the relay of this name.
///
/// # Errors
/// No usable CA, chain or key.
pub fn dialler_through(
    credentials: Credentials,
    tier: &str,
    relay: Option<&str>,
) -> Result<ClientConfig, TlsError> {
    let provider = crypto_provider();
    let verifier = HubVerifier {
        roots: roots(&credentials.ca)?,
        tier: tier.into(),
        relay: relay.map(Arc::from),
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(credentials.chain, credentials.key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::in_memory_sessions(SESSIONS_KEPT);
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(config)
}

/// Why a TLS configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A certificate or key cannot be used.
    #[error("certificate or key: {0}")]
    Rustls(#[from] rustls::Error),
    /// The CA list is empty or broken.
    #[error("CA certificates: {0}")]
    Roots(#[from] VerifierBuilderError),
    /// The TLS library misses what QUIC needs.
    #[error("the TLS provider has no suite for QUIC's initial packets")]
    NoInitialSuite,
}

/// Who the chain of a verified connection says the peer is, now: a resumed session carries the chain of the
/// first one, which may have expired since.
pub(super) fn peer_of(chain: Option<&[CertificateDer<'_>]>) -> Result<PeerCertificate, PeerError> {
    let leaf = chain.and_then(<[_]>::first).ok_or(PeerError::Missing)?;
    let peer = PeerCertificate::parse(leaf)?;
    if peer.is_valid_at(clock::wall_us()) {
        Ok(peer)
    } else {
        Err(PeerError::Expired(peer.identity.to_string()))
    }
}

/// Why a verified connection is nobody's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The peer showed no certificate.
    #[error("the peer shows no certificate")]
    Missing,
    /// It has expired since the resumed session began.
    #[error("the certificate of {0} is out of its time")]
    Expired(String),
    /// It names nobody.
    #[error("the peer's certificate: {0}")]
    Identity(#[from] IdentityError),
}

/// Sessions that a dialler may resume; rustls keeps several tickets for one name.
const SESSIONS_KEPT: usize = 8;
/// Tickets open for between one and two periods.
const TICKET_PERIOD_S: u64 = 12 * 3600;
/// A ticket carries the peer's chain; longer ones are not ours.
const TICKET_MAX: usize = 16 << 10;

/// ring's provider with AES-128 first: less key schedule per connection than AES-256, the same speed class. One
/// for the process: it is part of every configuration.
fn crypto_provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = provider::default_provider();
        provider.cipher_suites = vec![
            with_small_keys(provider::cipher_suite::TLS13_AES_128_GCM_SHA256),
            with_small_keys(provider::cipher_suite::TLS13_AES_256_GCM_SHA384),
            provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ];
        Arc::new(provider)
    });
    Arc::clone(&PROVIDER)
}

fn roots(ca: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in ca {
        roots.add(certificate.clone())?;
    }
    if roots.is_empty() {
        return Err(VerifierBuilderError::NoRootAnchors.into());
    }
    Ok(roots)
}

fn wall_s() -> u64 {
    clock::wall_us() / 1_000_000
}

/// Chain to the tier's CA as webpki verifies it, but with the tier and role of the URI SAN in the place of a
/// DNS name: hubs move, identities do not.
#[derive(Debug)]
struct HubVerifier {
    roots: RootCertStore,
    tier: Arc<str>,
    relay: Option<Arc<str>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for HubVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let peer =
            PeerCertificate::parse(end_entity).map_err(|error| rustls::Error::General(error.to_string()))?;
        let wanted = match &peer.identity.role {
            Role::Hub { .. } => true,
            Role::Node { name, .. } => peer.serves && self.relay.as_ref() == Some(name),
        };
        if wanted && peer.identity.tier == self.tier {
            return Ok(ServerCertVerified::assertion());
        }
        let relay = self.relay.as_ref().map_or_else(String::new, |relay| format!(" nor the relay {relay}"));
        Err(rustls::Error::General(format!(
            "{} is not a hub of tier {}{relay}: refused",
            peer.identity, self.tier
        )))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

/// Session tickets under keys that every replica derives alike: `u32 period | nonce[12] | sealed | tag[16]`,
/// ChaCha20-Poly1305, the period authenticated. Only the current period and the one before it open.
struct DerivedTickets {
    secret: TierSecret,
    now_s: fn() -> u64,
}

impl DerivedTickets {
    fn period(&self) -> u32 {
        u32::try_from((self.now_s)() / TICKET_PERIOD_S).unwrap_or(u32::MAX)
    }

    fn key(&self, period: u32) -> aead::LessSafeKey {
        let key = aead::UnboundKey::new(&aead::CHACHA20_POLY1305, &self.secret.derive(b"ticket", period))
            .expect("32 bytes is the key length");
        aead::LessSafeKey::new(key)
    }
}

impl ProducesTickets for DerivedTickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(TICKET_PERIOD_S).expect("half a day")
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let period = self.period();
        let mut nonce = [0; aead::NONCE_LEN];
        // Random, because replicas share the key and cannot share a counter.
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut sealed = plain.to_vec();
        let (nonce_used, aad) =
            (aead::Nonce::assume_unique_for_key(nonce), aead::Aad::from(period.to_be_bytes()));
        self.key(period).seal_in_place_append_tag(nonce_used, aad, &mut sealed).ok()?;
        let ticket = [&period.to_be_bytes()[..], &nonce, &sealed].concat();
        (ticket.len() <= TICKET_MAX).then_some(ticket)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        if ticket.len() > TICKET_MAX {
            return None;
        }
        let (period, rest) = ticket.split_first_chunk::<4>()?;
        let (nonce, sealed) = rest.split_first_chunk::<{ aead::NONCE_LEN }>()?;
        let number = u32::from_be_bytes(*period);
        // Replicas' clocks differ a little: the next period may already have begun elsewhere.
        let now = self.period();
        if !(now.saturating_sub(1)..=now.saturating_add(1)).contains(&number) {
            return None;
        }
        let mut plain = sealed.to_vec();
        let nonce = aead::Nonce::assume_unique_for_key(*nonce);
        let len = self.key(number).open_in_place(nonce, aead::Aad::from(*period), &mut plain).ok()?.len();
        plain.truncate(len);
        Some(plain)
    }
}

impl fmt::Debug for DerivedTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DerivedTickets")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tickets(secret: u8, now_s: fn() -> u64) -> DerivedTickets {
        DerivedTickets { secret: TierSecret::new(&[secret; 32]), now_s }
    }

    #[test]
    fn a_ticket_of_one_replica_opens_at_another_of_the_same_tier_only() {
        let ticket = tickets(1, || 1_000_000).encrypt(b"session").unwrap();
        assert_eq!(tickets(1, || 1_000_000).decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(tickets(2, || 1_000_000).decrypt(&ticket), None);
    }

    #[test]
    fn a_ticket_stops_opening_after_the_next_period() {
        let ticket = tickets(1, || 10 * TICKET_PERIOD_S).encrypt(b"session").unwrap();
        assert!(tickets(1, || 12 * TICKET_PERIOD_S - 1).decrypt(&ticket).is_some());
        assert!(tickets(1, || 12 * TICKET_PERIOD_S).decrypt(&ticket).is_none());
    }

    #[test]
    fn every_changed_or_missing_byte_of_a_ticket_is_noticed() {
        let tickets = tickets(1, || 1_000_000);
        let ticket = tickets.encrypt(b"session").unwrap();
        for at in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[at] ^= 1;
            assert_eq!(tickets.decrypt(&changed), None);
            assert_eq!(tickets.decrypt(&ticket[..at]), None);
        }
        assert_eq!(tickets.decrypt(&vec![0; TICKET_MAX + 1]), None);
    }

    #[test]
    fn keys_for_different_purposes_differ_and_secrets_do_not_show() {
        let secret = TierSecret::new(&[7; 32]);
        assert_ne!(secret.derive(b"reset", 0), secret.derive(b"token", 0));
        assert_ne!(secret.derive(b"ticket", 0), secret.derive(b"ticket", 1));
        assert_eq!(format!("{secret:?}"), "TierSecret");
    }
}
