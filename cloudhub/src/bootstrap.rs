//! Enrolment over HTTPS: where a machine without a certificate gets its first, and a node its next.
//!
//! | | | |
//! |---|---|---|
//! | `POST /v1/join` | token, CSR | the only place where a token is good for something |
//! | `POST /v1/renew` | certificate (perhaps expired), CSR of the same key | no client certificate in TLS: rustls would not let an expired one in, and the CSR proves possession |
//! | `GET /v1/ca` | | the CA certificate; a joiner has its hash in the token |
//!
//! Everybody who reaches the port may speak, so everything is bounded before it is believed: connections,
//! handshakes and requests by number and time, bodies by size, failed joins by source address, and the
//! cheap checks come before the ones that cost a signature.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Extension, State, rejection::JsonRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use broker::{
    Tasks,
    enroll::{self, ErrorBody, JoinRequest, Joined, RenewRequest, Token},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::{ServerConfig, crypto::ring, version::TLS13};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    ca::{Authority, CsrError, HubIdentity, IssueError, NODE_LIFETIME, ProvenKey},
    registry::{Registry, RegistryError},
    renew::{self, RenewRefusal},
    token::{self, JoinRefusal},
};

mod failures;
mod places;
use failures::Failures;
use places::{Place, Places};

/// Connections at a time: each is one short request.
const CONNECTIONS_MAX: usize = 256;
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
const HEADERS_MAX: Duration = Duration::from_secs(10);
/// From the end of the handshake to the end of the answer.
const CONNECTION_MAX: Duration = Duration::from_secs(30);
/// Header bytes; hyper's least is 8 KiB.
const HEADER_BYTES_MAX: usize = 16 << 10;
/// When `accept` fails (no file descriptors), others need a moment to close theirs.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What the handlers need.
#[derive(Debug)]
pub struct Bootstrap {
    authority: Arc<Authority>,
    registry: Registry,
    quic: Vec<String>,
    websocket: Vec<String>,
    failures: Failures,
}

impl Bootstrap {
    /// `quic` and `websocket` are the addresses that nodes are told to dial, as `host:port`; an empty host
    /// means the one by which they reached this server.
    #[must_use]
    pub fn new(
        authority: Arc<Authority>,
        registry: Registry,
        quic: Vec<String>,
        websocket: Vec<String>,
    ) -> Self {
        Self { authority, registry, quic, websocket, failures: Failures::default() }
    }

    fn joined(
        &self,
        name: String,
        generation: u32,
        relay: bool,
        key: &ProvenKey,
    ) -> Result<Json<Joined>, Refused> {
        let certificate = self.authority.issue_node(&name, generation, relay, key, NODE_LIFETIME)?;
        Ok(Json(Joined {
            certificate: certificate.pem(),
            ca: self.authority.certificate_pem().to_owned(),
            tier: self.authority.tier().to_owned(),
            name,
            generation,
            quic: self.quic.clone(),
            websocket: self.websocket.clone(),
            secrets: self.authority.secrets_key().text(),
        }))
    }
}

/// TLS 1.3 without client certificates.
///
/// # Errors
/// The identity cannot be used.
pub fn tls(identity: HubIdentity) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until `tasks` are asked to stop. Each connection is a task of its own.
pub async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, bootstrap: Arc<Bootstrap>, tasks: Tasks) {
    let acceptor = TlsAcceptor::from(tls);
    let router = router(bootstrap);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let places = Places::default();
    let stopped = tasks.stopped();
    loop {
        let slot = Arc::clone(&slots).acquire_owned();
        let accepted = tokio::select! {
            biased;
            () = stopped.cancelled() => return,
            // Both steps are cancel safe: a slot not yet used goes back.
            accepted = async { (slot.await, listener.accept().await) } => accepted,
        };
        match accepted {
            (Ok(slot), Ok((stream, from))) => {
                let Some(place) = places.take(from.ip()) else {
                    tracing::debug!(%from, "too many bootstrap connections from this address, one closed");
                    continue;
                };
                let connection = connection(stream, from, acceptor.clone(), router.clone(), (slot, place));
                let stopped = stopped.clone();
                tasks.spawn("bootstrap connection", async move {
                    tokio::select! {
                        biased;
                        () = stopped.cancelled() => {}
                        () = connection => {}
                    }
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "cannot accept a bootstrap connection");
                sleep(ACCEPT_BACKOFF).await;
            }
            (Err(_closed), _) => return,
        }
    }
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    _held: (OwnedSemaphorePermit, Place),
) {
    let stream = match timeout(HANDSHAKE_MAX, Box::pin(acceptor.accept(stream))).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%from, %error, "bootstrap handshake failed"),
        Err(_elapsed) => return tracing::debug!(%from, "bootstrap handshake took too long"),
    };
    let router = router.layer(Extension(Source(from.ip())));
    let service = TowerToHyperService::new(router);
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_MAX, Box::pin(serving)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%from, %error, "bootstrap connection failed"),
        Err(_elapsed) => tracing::debug!(%from, "bootstrap connection took too long"),
    }
}

/// Address that a request came from.
#[derive(Debug, Clone, Copy)]
struct Source(IpAddr);

fn router(bootstrap: Arc<Bootstrap>) -> Router {
    Router::new()
        .route(enroll::PATH_JOIN, post(join))
        .route(enroll::PATH_RENEW, post(renew_certificate))
        .route(enroll::PATH_CA, get(ca))
        .fallback(|| async { Refused::NotFound })
        .method_not_allowed_fallback(|| async { Refused::Method })
        .layer(DefaultBodyLimit::max(enroll::BODY_MAX))
        .with_state(bootstrap)
}

async fn ca(State(bootstrap): State<Arc<Bootstrap>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/x-pem-file")], bootstrap.authority.certificate_pem().to_owned())
}

async fn join(
    State(bootstrap): State<Arc<Bootstrap>>,
    Extension(Source(from)): Extension<Source>,
    request: Result<Json<JoinRequest>, JsonRejection>,
) -> Result<Json<Joined>, Refused> {
    bootstrap.failures.check(from).map_err(|wait| Refused::TooMany { wait })?;
    let joined = try_join(&bootstrap, request).await;
    if let Err(refused) = &joined
        && refused.status().is_client_error()
    {
        bootstrap.failures.count(from);
        tracing::warn!(%from, reason = %refused, "refused a join");
    }
    joined
}

async fn try_join(
    bootstrap: &Bootstrap,
    request: Result<Json<JoinRequest>, JsonRejection>,
) -> Result<Json<Joined>, Refused> {
    let Json(request) = request?;
    let token: Token = request.token.parse().map_err(Refused::Token)?;
    let authenticated = token::authenticate(&bootstrap.registry, &bootstrap.authority, &token).await?;
    let key = ProvenKey::from_csr(&request.csr)?;
    let enrolled = token::redeem(&bootstrap.registry, authenticated, &key).await?;
    bootstrap.joined(enrolled.node, enrolled.generation, enrolled.relay, &key)
}

async fn renew_certificate(
    State(bootstrap): State<Arc<Bootstrap>>,
    Extension(Source(from)): Extension<Source>,
    request: Result<Json<RenewRequest>, JsonRejection>,
) -> Result<Json<Joined>, Refused> {
    bootstrap.failures.check(from).map_err(|wait| Refused::TooMany { wait })?;
    let renewed = try_renew(&bootstrap, request).await;
    if let Err(refused) = &renewed
        && refused.status().is_client_error()
    {
        bootstrap.failures.count(from);
        tracing::warn!(%from, reason = %refused, "refused a renewal");
    }
    renewed
}

async fn try_renew(
    bootstrap: &Bootstrap,
    request: Result<Json<RenewRequest>, JsonRejection>,
) -> Result<Json<Joined>, Refused> {
    let Json(request) = request?;
    let renewal = renew::check(&bootstrap.registry, &bootstrap.authority, &request).await?;
    bootstrap.joined(renewal.node, renewal.generation, renewal.relay, &renewal.key)
}

/// Everything that can be answered instead of a certificate.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("there is nothing here; enrolment is POST {}", enroll::PATH_JOIN)]
    NotFound,
    #[error("this path does not serve that method")]
    Method,
    #[error("{}", .0.body_text())]
    Request(#[from] JsonRejection),
    #[error("too many attempts from this address failed; wait {} s", .wait.as_secs().max(1))]
    TooMany { wait: Duration },
    #[error(transparent)]
    Token(enroll::TokenError),
    #[error(transparent)]
    Join(#[from] JoinRefusal),
    #[error(transparent)]
    Renew(#[from] RenewRefusal),
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error("{0}")]
    Issue(#[from] IssueError),
}

impl Refused {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Request(rejection) => rejection.status(),
            Self::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Token(_) | Self::Csr(_) | Self::Renew(RenewRefusal::Csr(_)) => StatusCode::BAD_REQUEST,
            Self::Join(JoinRefusal::Registry(error)) | Self::Renew(RenewRefusal::Registry(error)) => {
                registry_status(error)
            }
            Self::Join(JoinRefusal::NameTaken { .. }) => StatusCode::CONFLICT,
            Self::Join(_) | Self::Renew(_) => StatusCode::FORBIDDEN,
            Self::Issue(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Method => "method_not_allowed",
            Self::Request(_) => "bad_request",
            Self::TooMany { .. } => "too_many_failures",
            Self::Token(_) => "bad_token",
            Self::Csr(_) | Self::Renew(RenewRefusal::Csr(_)) => "bad_csr",
            Self::Join(JoinRefusal::OtherTier) | Self::Renew(RenewRefusal::OtherTier) => "other_tier",
            Self::Join(JoinRefusal::Unknown) => "unknown_token",
            Self::Join(JoinRefusal::Expired { .. }) => "token_expired",
            Self::Join(JoinRefusal::Used { .. }) => "token_used",
            Self::Join(JoinRefusal::NameTaken { .. }) => "name_taken",
            Self::Join(JoinRefusal::Superseded { .. }) | Self::Renew(RenewRefusal::Revoked { .. }) => {
                "revoked"
            }
            Self::Renew(RenewRefusal::Certificate(_)) => "bad_certificate",
            Self::Renew(RenewRefusal::TooOld { .. }) => "certificate_too_old",
            Self::Renew(RenewRefusal::OtherKey) => "other_key",
            Self::Join(JoinRefusal::Registry(_)) | Self::Renew(RenewRefusal::Registry(_)) => "unavailable",
            Self::Issue(_) => "internal",
        }
    }

    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::TooMany { wait } => Some(wait.as_secs().max(1)),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(5),
            _ => None,
        }
    }
}

fn registry_status(error: &RegistryError) -> StatusCode {
    match error {
        RegistryError::Damaged { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        RegistryError::Stopped(_) | RegistryError::Refused(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::error!(error = %self, "enrolment failed");
        }
        let retry_after_s = self.retry_after_s();
        let body = ErrorBody { error: self.word().to_owned(), message: self.to_string(), retry_after_s };
        let mut response = (status, Json(body)).into_response();
        if let Some(seconds) = retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
