//! The one request at a time that a node makes of a hub's bootstrap server.
//!
//! The server is recognised by its CA, not by its name: the CA's SHA-256 comes from the join token or
//! from the stored identity, the server presents the CA in its chain, and the leaf must be a hub's. So a
//! hub may be reached by any address, and a wrong hub learns nothing: nothing is sent before the
//! handshake is through.

use std::{fmt, sync::Arc, time::Duration};

use broker::{
    enroll::{self, ErrorBody},
    link::identity::{PeerCertificate, Role},
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{WebPkiSupportedAlgorithms, ring, verify_tls13_signature},
    server::ParsedCertificate,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

/// From dialling to the last byte of the answer.
const REQUEST_MAX: Duration = Duration::from_secs(30);

/// A bootstrap server, by address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// DNS name or address, an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// The text is no address of a bootstrap server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a hub's address: write https://HOST or https://HOST:PORT (default port {port})", port = enroll::PORT)]
pub struct UrlError(String);

impl Server {
    /// Reads `https://HOST[:PORT]`; the scheme and a final slash may be left out.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(url: &str) -> Result<Self, UrlError> {
        let bad = || UrlError(url.to_owned());
        let text = url.trim();
        let text = text.strip_prefix("https://").unwrap_or(text);
        let text = text.strip_suffix('/').unwrap_or(text);
        let (host, rest) = match text.strip_prefix('[') {
            Some(text) => text.split_once(']').ok_or_else(bad)?,
            None => text.find(':').map_or((text, ""), |at| text.split_at(at)),
        };
        let port = match rest {
            "" => enroll::PORT,
            rest => rest.strip_prefix(':').and_then(|port| port.parse().ok()).ok_or_else(bad)?,
        };
        let server = Self { host: host.to_owned(), port };
        if server.name().is_ok() && port != 0 { Ok(server) } else { Err(bad()) }
    }

    fn name(&self) -> Result<ServerName<'static>, rustls_pki_types::InvalidDnsNameError> {
        ServerName::try_from(self.host.clone())
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

/// Why there is no answer, or not the one hoped for.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nobody answers there.
    #[error("cannot reach {server}: {source} (is the address right, is TCP port {} open?)", .server.port)]
    Connect { server: Server, source: std::io::Error },
    /// It is not the right hub, or not a hub at all. Nothing was sent to it.
    #[error("{server} is not the hub it should be, and was told nothing: {source}")]
    Handshake { server: Server, source: std::io::Error },
    /// The connection broke. The request may have been carried out; repeating it is safe.
    #[error("the connection to {server} broke: {source}; try again")]
    Exchange { server: Server, source: Box<dyn std::error::Error + Send + Sync> },
    /// It takes too long. The request may have been carried out; repeating it is safe.
    #[error("{0} did not answer within 30 s; try again")]
    Timeout(Server),
    /// The hub said no, and why.
    #[error("the hub refused: {}", .0.message)]
    Refused(ErrorBody),
    /// The answer makes no sense.
    #[error("{server} gave an answer that is not the bootstrap protocol's (HTTP status {status})")]
    Nonsense { server: Server, status: u16 },
}

/// Who the server must be.
#[derive(Debug, Clone)]
pub struct Pin {
    /// SHA-256 of its CA certificate's DER.
    pub ca_sha256: [u8; 32],
    /// The tier, once it is known.
    pub tier: Option<Arc<str>>,
}

/// Sends `body` as JSON and reads a JSON answer.
///
/// Not cancel safe as to the effect: a dropped future may leave the request carried out.
///
/// # Errors
/// See [`RequestError`].
pub async fn post<B: Serialize, A: DeserializeOwned>(
    server: &Server,
    pin: Pin,
    path: &'static str,
    body: &B,
) -> Result<A, RequestError> {
    let body = serde_json::to_vec(body).expect("requests are structs of strings");
    let exchange = Box::pin(exchange(server, pin, path, body));
    let (status, answer) =
        timeout(REQUEST_MAX, exchange).await.map_err(|_elapsed| RequestError::Timeout(server.clone()))??;
    let nonsense = || RequestError::Nonsense { server: server.clone(), status };
    if (200..300).contains(&status) {
        serde_json::from_slice(&answer).map_err(|_| nonsense())
    } else {
        Err(serde_json::from_slice(&answer).map_or_else(|_| nonsense(), RequestError::Refused))
    }
}

async fn exchange(
    server: &Server,
    pin: Pin,
    path: &'static str,
    body: Vec<u8>,
) -> Result<(u16, Bytes), RequestError> {
    let at = || server.clone();
    let stream = TcpStream::connect((server.host.as_str(), server.port))
        .await
        .map_err(|source| RequestError::Connect { server: at(), source })?;
    let name = server.name().map_err(|error| RequestError::Connect {
        server: at(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, error),
    })?;
    let stream = TlsConnector::from(client_config(pin))
        .connect(name, stream)
        .await
        .map_err(|source| RequestError::Handshake { server: at(), source })?;

    let broke = |source| RequestError::Exchange { server: at(), source };
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| broke(error.into()))?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::HOST, server.host.as_str())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| broke(error.into()))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), enroll::BODY_MAX).collect().await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>((status, body.to_bytes()))
    };
    // The connection is driven beside the exchange and ends with it; its own error shows in the answer.
    let (answer, connection) = tokio::join!(answer, connection);
    if let Err(error) = connection {
        tracing::debug!(%server, %error, "bootstrap connection ended");
    }
    answer.map_err(broke)
}

fn client_config(pin: Pin) -> Arc<ClientConfig> {
    let provider = ring::default_provider();
    let algorithms = provider.signature_verification_algorithms;
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .expect("ring has the suites of TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(HubVerifier { pin, algorithms }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

#[derive(Debug)]
struct HubVerifier {
    pin: Pin,
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
        let is_pinned = |ca: &&CertificateDer<'_>| Sha256::digest(ca)[..] == self.pin.ca_sha256;
        let ca = intermediates.iter().find(is_pinned).ok_or_else(|| {
            rustls::Error::General("its CA is not the one that the token or identity names".into())
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let leaf = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &roots, &[], now, self.algorithms.all)?;
        let certificate =
            PeerCertificate::parse(end_entity).map_err(|error| rustls::Error::General(error.to_string()))?;
        let identity = &certificate.identity;
        let right_tier = self.pin.tier.as_ref().is_none_or(|tier| *tier == identity.tier);
        match identity.role {
            Role::Hub { .. } if right_tier => Ok(ServerCertVerified::assertion()),
            _ => Err(rustls::Error::General(format!("{identity} is not a hub of the right tier"))),
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_is_named_by_url_or_by_host() {
        let server = |host: &str, port| Ok(Server { host: host.into(), port });
        assert_eq!(Server::parse("https://hub.example:8443/"), server("hub.example", 8443));
        assert_eq!(Server::parse("hub"), server("hub", 10002));
        assert_eq!(Server::parse(" 10.0.0.1:1 "), server("10.0.0.1", 1));
        assert_eq!(Server::parse("https://[::1]:2"), server("::1", 2));
        assert_eq!(Server::parse("[::1]"), server("::1", 10002));
        let bad_ones =
            ["", "http://hub", "https://", "hub:0", "hub:x", "hub:70000", "::1", "[::1", "hub/x", "a b"];
        for bad in bad_ones {
            assert_eq!(Server::parse(bad), Err(UrlError(bad.into())), "{bad}");
        }
    }

    #[test]
    fn an_address_reads_back_as_it_is_shown() {
        for text in ["https://hub:10002", "https://[fe80::1]:7"] {
            assert_eq!(Server::parse(text).unwrap().to_string(), text);
        }
    }
}
