//! One GET, as kubelet sends it: no certificate is verified, no connection kept, and redirects are followed on the
//! same host only.

use std::{
    error::Error,
    io,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use futures_util::future::{Either, select};
use http_body_util::{BodyExt, Empty};
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    client::conn::http1,
    header::{ACCEPT, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{TEXT_MAX, Target, port};

const REDIRECTS_MAX: usize = 10;
/// What our requests name as the version of kubelet.
const VERSION: &str = "1.33";

/// What to ask for.
#[derive(Debug, Clone)]
pub(super) struct Get {
    uri: Uri,
    headers: HeaderMap,
}

impl Get {
    pub(super) fn new(action: &HTTPGetAction, target: &Target<'_>, agent: &str) -> Result<Self, String> {
        let port = port(&action.port, target.container)?;
        let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(target.pod_ip);
        let scheme = action.scheme.as_deref().filter(|scheme| !scheme.is_empty());
        let scheme = scheme.unwrap_or("HTTP").to_lowercase();
        let path = action.path.as_deref().unwrap_or_default();
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let text = format!("{scheme}://{}{path}", with_port(host, port));
        let uri = text.parse().map_err(|error| format!("{text}: {error}"))?;
        let mut headers = HeaderMap::new();
        for header in action.http_headers.iter().flatten() {
            let name = HeaderName::from_bytes(header.name.as_bytes());
            let value = HeaderValue::from_str(&header.value);
            let (Ok(name), Ok(value)) = (name, value) else {
                return Err(format!("invalid header {}", header.name));
            };
            headers.append(name, value);
        }
        let agent =
            HeaderValue::from_str(&format!("{agent}/{VERSION}")).map_err(|error| error.to_string())?;
        for (name, value) in [(USER_AGENT, agent), (ACCEPT, HeaderValue::from_static("*/*"))] {
            // An empty one says: leave it out.
            if headers.get(&name).is_some_and(HeaderValue::is_empty) {
                headers.remove(&name);
            } else if !headers.contains_key(&name) {
                headers.insert(name, value);
            }
        }
        Ok(Self { uri, headers })
    }

    pub(super) fn url(&self) -> String {
        self.uri.to_string()
    }

    /// The status of the answer, after redirects.
    pub(super) async fn fetch(&self) -> Result<u16, String> {
        let first = self.uri.host().map(str::to_owned);
        let mut uri = self.uri.clone();
        for _ in 0..=REDIRECTS_MAX {
            let (status, location) = self.fetch_one(&uri).await?;
            let next = location.filter(|_| matches!(status, 301 | 302 | 303 | 307 | 308));
            let Some(next) = next.and_then(|location| follow(&uri, &location)) else { return Ok(status) };
            // What another host says is not this container's health.
            if next.host().map(str::to_owned) != first {
                return Ok(status);
            }
            uri = next;
        }
        Err(format!("stopped after {REDIRECTS_MAX} redirects"))
    }

    async fn fetch_one(&self, uri: &Uri) -> Result<(u16, Option<String>), String> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let is_tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let address = with_port(&host, port);
        let stream = TcpStream::connect(&address).await.map_err(|error| dial_error(&address, &error))?;
        if is_tls {
            let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
            let connector = TlsConnector::from(tls());
            let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
            self.exchange(uri, stream).await
        } else {
            self.exchange(uri, stream).await
        }
    }

    async fn exchange(
        &self,
        uri: &Uri,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<(u16, Option<String>), String> {
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::get(path).body(Empty::<Bytes>::new());
        let mut request = request.map_err(|error| error.to_string())?;
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        if !self.headers.contains_key(HOST) {
            let authority = uri.authority().map_or("", |authority| authority.as_str());
            let value = HeaderValue::from_str(authority).map_err(|error| error.to_string())?;
            request.headers_mut().insert(HOST, value);
        }
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(told)?;
        let asked = async {
            let response = sender.send_request(request).await.map_err(told)?;
            let status = response.status().as_u16();
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.map(str::to_owned);
            read_some(response).await;
            Ok((status, location))
        };
        // The connection is served here and ends with this: no task outlives the asking.
        match select(Box::pin(asked), Box::pin(connection)).await {
            Either::Left((answer, _)) => answer,
            Either::Right((_, asked)) => asked.await,
        }
    }
}

/// So that a server is not cut off while it writes a short answer. Nobody looks at it.
async fn read_some(response: Response<Incoming>) {
    let mut body = response.into_body();
    let mut left = TEXT_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            break;
        }
    }
}

/// Where a redirect leads.
fn follow(from: &Uri, location: &str) -> Option<Uri> {
    let text = if location.contains("://") {
        location.to_owned()
    } else {
        let base = format!("{}://{}", from.scheme_str()?, from.authority()?);
        if let Some(authority) = location.strip_prefix("//") {
            format!("{}://{authority}", from.scheme_str()?)
        } else if location.starts_with('/') {
            format!("{base}{location}")
        } else {
            let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{base}{folder}/{location}")
        }
    };
    text.parse().ok()
}

/// `host:port`, with brackets where the host has colons.
pub(super) fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// As Go says it.
pub(super) fn dial_error(address: &str, error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".to_owned(),
        io::ErrorKind::TimedOut => "i/o timeout".to_owned(),
        _ => error.to_string(),
    };
    format!("dial tcp {address}: {why}")
}

fn told(error: hyper::Error) -> String {
    // What lies behind says more than "connection error".
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

fn tls() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let provider = Arc::new(ring::default_provider());
        let verifier = Arc::new(TrustsAnybody(Arc::clone(&provider)));
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has the default versions")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        Arc::new(config)
    });
    Arc::clone(config)
}

/// A probe asks the pod whose address it has, and tells it nothing: whoever answers there is the answer.
#[derive(Debug)]
struct TrustsAnybody(Arc<CryptoProvider>);

impl ServerCertVerifier for TrustsAnybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
